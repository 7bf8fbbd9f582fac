"""Exact match against a count in plain Python, and the contents of splits and slices."""

import functools
import math

import jax
import numpy as np
import pytest

from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.exact_match import Evaluator
from instrdiv.evaluation.test_sets import held_out_rules, make_test_set, sample_test, stream_of_split
from instrdiv.models.decoder import make_decoder
from instrdiv.runs.run import run
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.rewriting import SLICES
from tests.worlds import members, tiny, trainer


def counts_of(run, population, split, piece, dev_tests=24, tests=40):
    test_set = make_test_set(split, population, RulePools(population), dev_tests, tests)
    evaluator = Evaluator(run, piece)
    counts = np.asarray(evaluator.count(evaluator.pieces(test_set)))
    return {name: counts[: len(population), column] for column, name in enumerate(SLICES)}


def teacher_forced_by_hand(run, row, table, split, member):
    """(right, occurrences) of every test, from full logits and the text of each sequence."""
    data, params = (jax.tree.map(lambda leaf: leaf[row], tree) for tree in (run.data, run.state.params))
    stream = stream_of_split(split, 0)
    make = jax.jit(jax.vmap(lambda rule, i: sample_test(run.group, data, rule, stream, i)))
    batch = make(table.arrays(), np.arange(len(table)))
    apply = jax.jit(functools.partial(make_decoder(run.group).apply, answer_only=False))
    logits = apply(params, batch.tokens[:, :-1], batch.padding)
    guesses = np.asarray(logits.argmax(-1))
    verdicts = []
    for tokens, guess in zip(np.asarray(batch.tokens), guesses, strict=True):
        text = Alphabet(26).decode_tokens(tokens)
        pattern, replacement, string, answer = text.lstrip("_").split("$")[0].split("#")
        assert answer == string.replace(pattern, replacement, 1)
        places = range(text.rindex("#") + 1, text.index("$") + 1)
        found = sum(string.startswith(pattern, i) for i in range(len(string)))
        verdicts.append((all(guess[i - 1] == tokens[i] for i in places), found))
    return verdicts


RAGGED = {"pattern_length_min": 1, "input_length_min": 2, "no_op_fraction": 0.5}


@pytest.mark.parametrize("changes, devices, data_parallel", [({}, 1, 1), (RAGGED, 1, 1), (RAGGED, 4, 2)])
def test_counts_equal_a_plain_python_count(changes, devices, data_parallel):
    """With a briefly trained model, so that some answers are right, and a piece size that does not divide the tests."""
    small = {"instructions": 2, "alphabet_size": 8, "input_length": 3, "width": 32, "learning_rate": 1e-2}
    population = members(2, **small, epochs=60.0, reports=1, **changes)
    run = trainer(population, devices, data_parallel)
    run.advance()
    counts = counts_of(run, population, "seen", piece=16)
    test_set = make_test_set("seen", population, RulePools(population), 24, 40)
    for row, member in enumerate(population):
        verdicts = teacher_forced_by_hand(run, row, test_set.rules[row], "seen", member)
        assert counts["all"][row].tolist() == [sum(right for right, _ in verdicts), 40]
        has_op = [right for right, found in verdicts if found]
        assert counts["has_op"][row].tolist() == [sum(has_op), len(has_op)]
        assert counts["no_op"][row][1] == 40 - len(has_op)
    assert counts["all"][:, 0].max() > 0, "the counts must not all be zero"


def test_slices_partition_the_tests():
    population = members(1, no_op_fraction=0.5, near_miss_fraction=0.5)
    counts = counts_of(trainer(population), population, "unseen", piece=8)
    sizes = {name: count[0, 1] for name, count in counts.items()}
    assert sizes["all"] == 40 == sizes["has_op"] + sizes["no_op"] and 0 < sizes["near_miss"] < sizes["no_op"]
    assert sizes["occurrences=1"] + sizes["occurrences>1"] == sizes["has_op"]
    assert sizes["pattern_seen"] == sizes["replacement_seen"] == 0  # the default split


def test_a_looser_split_has_seen_replacements():
    population = members(1, held_out="pattern", alphabet_size=5, instructions=60)
    sizes = {k: v[0, 1] for k, v in counts_of(trainer(population), population, "unseen", 8, 4, 20).items()}
    assert sizes["pattern_seen"] == 0 < sizes["replacement_seen"]


def test_dev_and_final_rules_differ_and_all_members_share_them():
    population = members(3)
    rules = held_out_rules(population[0].setting.source, 24, 40)
    texts = {name: {table.text(i, Alphabet(26)) for i in range(len(table))} for name, table in rules.items()}
    assert len(texts["unseen_dev"]) == 24 and len(texts["unseen"]) == 40 and not texts["unseen_dev"] & texts["unseen"]
    test_set = make_test_set("unseen", population, RulePools(population), 24, 40)
    assert len({table.digest for table in test_set.rules}) == 1


def test_seen_tests_cover_the_trained_rules_evenly():
    member = Member(tiny(instructions=10, tail_shape=0.05), 0)
    pools = RulePools([member])
    (table,) = make_test_set("seen", [member], pools, 8, 100).rules
    from instrdiv.tasks.counts import rule_counts

    trained = np.flatnonzero(rule_counts(10, 64, 0.05))
    assert 1 < len(trained) < 10, "the tail must leave rules out"
    expected = {pools.of(member).text(i, Alphabet(26)) for i in trained}
    shown = [table.text(i, Alphabet(26)) for i in range(100)]
    assert set(shown) == expected
    assert max(map(shown.count, expected)) - min(map(shown.count, expected)) <= 1


def test_members_of_different_splits_share_a_group_and_have_their_own_tests():
    population = [Member(tiny(split_seed=seed), 0) for seed in (0, 1)]
    run = trainer(population)
    test_set = make_test_set("unseen", population, RulePools(population), 8, 16)
    assert test_set.rules[0].digest != test_set.rules[1].digest
    (piece,) = Evaluator(run, 16).pieces(test_set)
    assert np.asarray(piece[2]).tolist() == [stream_of_split("unseen", 0), stream_of_split("unseen", 1)]


def test_splits_have_inputs_of_their_own():
    assert len({stream_of_split(split, seed) for split in ("seen", "unseen_dev", "unseen") for seed in range(5)}) == 15


class TestSeenByShare:
    """Trained rules, tested in proportion to their training examples."""

    LOPSIDED = Member(tiny(instructions=16, examples=4096, tail_shape=0.2), seed=3)

    def test_shares_are_those_of_the_training_set(self):
        tested = np.bincount(self.LOPSIDED.seen_rules(20_000, by_share=True), minlength=16) / 20_000
        counts = self.LOPSIDED.rule_counts()
        assert counts.max() > 4 * np.median(counts)
        np.testing.assert_allclose(tested, counts / 4096, atol=0.015)
        assert not tested[counts == 0].any()

    def test_the_other_split_tests_every_trained_rule_equally_often(self):
        tested = np.bincount(self.LOPSIDED.seen_rules(160), minlength=16)
        trained = self.LOPSIDED.rule_counts() > 0
        assert tested[trained].min() >= 10 and not tested[~trained].any()

    @pytest.mark.parametrize("tail_shape, splits", [(math.inf, 3), (0.2, 4)])
    def test_only_a_run_with_a_long_tail_has_it(self, tail_shape, splits):
        done = run(Sweep("tail", (Member(tiny(tail_shape=tail_shape), 0),), 8, 16), progress=False)
        assert len({row["split"] for row in done.results}) == splits
