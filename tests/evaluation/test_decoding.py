"""Greedy decoding with a cache against teacher forcing, and against a decoder that recomputes everything."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.config.groups import make_groups
from instrdiv.config.pools import RulePools
from instrdiv.evaluation.decoding import GroupDecoder, Prompts
from instrdiv.evaluation.test_sets import SPLITS, make_test_set, sample_test, stream_of_split
from instrdiv.models.decoder import decode_greedily, make_decoder
from instrdiv.runtime.mesh import make_mesh, padded_size
from instrdiv.runtime.streams import TEST_STREAM, stream_key
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.tokens import END, PAD, blank_instruction
from instrdiv.training.members import exact_matches, predict
from instrdiv.training.population import stack_knobs
from tests.worlds import members, trainer

WORLD = {"alphabet_size": 4, "input_length": 4, "held_out": "rule", "held_out_share": 0.4, "examples": 256,
         "layers": 2, "width": 32, "learning_rate": 1e-2, "batch_size": 16, "reports": 1, "epochs": 20.0}  # fmt: skip
RAGGED = {"pattern_length_min": 1, "replacement_length": 3, "replacement_length_min": 0, "input_length_min": 3}
NO_OPS = {"no_op_fraction": 0.3, "near_miss_fraction": 0.5}
GPT2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu", "biases": True, "tied_head": True,
        "init": "gpt2"}  # fmt: skip
ROTARY = {"positions": "rotary", "norm": "rmsnorm"}
NONE = {"positions": "none"}
VARIANTS = {
    "gpt2, ragged": GPT2 | RAGGED,
    "rotary, ragged, no-ops": ROTARY | RAGGED | NO_OPS,
    "none, no-ops": NONE | NO_OPS,
}


@functools.cache
def trained(name):
    """Two members of a variant, trained briefly, so that some answers are right."""
    run = trainer(members(2, **WORLD | VARIANTS[name]))
    run.advance()
    return run


def prompts_of(population, split, count=32, **changes):
    tables = make_test_set(split, population, RulePools(population), count, count).rules
    streams = [stream_of_split(split, member.setting.split_seed) for member in population]
    keys = jnp.stack([stream_key(TEST_STREAM, stream) for stream in streams])
    return Prompts(stack_knobs([m.setting for m in population]), keys, **({"rules": tables, "shown": tables} | changes))


@functools.cache
def group_decoder(group):
    """One compiled program per group, shared by all tests of this file."""
    return GroupDecoder(group, group.shape, make_mesh(1), members_per_vmap=1, piece=16)


def answers_of(run, prompts, decoder=None, params=None):
    decoder = decoder or group_decoder(run.group)
    pieces = list(decoder.answers(params or run.state.params, prompts))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *pieces)
    assert (joined.index[:, len(prompts) :] == -1).all()
    return jax.tree.map(lambda leaf: leaf[:, : len(prompts)], joined)


@functools.cache
def teacher_forcing(group):
    """A jitted function of one member: its test examples, and whether each is exact under teacher forcing."""

    def function(data, params, rules, stream):
        index = jnp.arange(rules.patterns.shape[0])
        batch = jax.vmap(lambda rule, i: sample_test(group, data, rule, stream, i))(rules, index)
        return batch, exact_matches(*predict(make_decoder(group), params, batch), batch.loss_mask)

    return jax.jit(function)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(decoder, params, tokens, padding):
    return decoder.apply(params, tokens, padding, answer_only=False)


def naively(decoder, params, prompt, padding):
    """Greedy decoding that recomputes the whole sequence for every token, with the last layer at all positions."""
    tokens = np.zeros((len(prompt), decoder.sequence + 1), np.int32)
    tokens[:, : decoder.prompt] = prompt
    for place in range(decoder.prompt, decoder.sequence + 1):
        logits = logits_of(decoder, params, tokens[:, :-1], padding)
        tokens[:, place] = np.asarray(logits[:, place - 1].argmax(-1))
    answers = tokens[:, decoder.prompt :]
    for answer in answers:
        ends = np.flatnonzero(answer == END)
        if len(ends):
            answer[ends[0] + 1 :] = PAD
    return answers


def by_row(run):
    """Data and parameters of each member."""
    return [jax.tree.map(lambda leaf: leaf[row], (run.data, run.state.params)) for row in range(2)]  # noqa: B023


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_exactness_is_that_of_teacher_forcing_and_tokens_are_those_without_a_cache(variant):
    run = trained(variant)
    decoder, right, wrong, ended = make_decoder(run.group), 0, 0, 0
    for split in SPLITS:
        prompts = prompts_of(run.group.members, split)
        answers = answers_of(run, prompts)
        for row, (data, params) in enumerate(by_row(run)):
            rules, stream = prompts.rules[row].arrays(), stream_of_split(split, 0)
            batch, forced = teacher_forcing(run.group)(data, params, rules, stream)
            np.testing.assert_array_equal(answers.right[row], batch.tokens[:, decoder.prompt :])
            np.testing.assert_array_equal(answers.facts.occurrences[row], batch.facts.occurrences)
            greedy = (answers.decoded[row] == answers.right[row]).all(1)
            np.testing.assert_array_equal(greedy, forced)
            without_cache = naively(decoder, params, batch.tokens[:, : decoder.prompt], batch.padding)
            np.testing.assert_array_equal(answers.decoded[row], without_cache)
            right, wrong, ended = right + greedy.sum(), wrong + (~greedy).sum(), ended + (without_cache == END).sum()
    assert right >= 5 and wrong >= 5 and ended > 100, "the comparison must include right and wrong answers"


def test_in_bfloat16_answers_differ_only_where_two_tokens_are_nearly_as_likely():
    """The cache changes the shapes of sums, so bfloat16 may round differently; answers may differ only at near ties."""
    run = trained("none, no-ops")
    run = copy.copy(run)
    run.group = dataclasses.replace(run.group, config=dataclasses.replace(run.group.config, precision="bfloat16"))
    prompts = prompts_of(run.group.members, "seen", count=200)
    answers, decoder = answers_of(run, prompts), make_decoder(run.group)
    for row, (data, params) in enumerate(by_row(run)):
        batch, _ = teacher_forcing(run.group)(data, params, prompts.rules[row].arrays(), 0)
        decoded = answers.decoded[row].astype(np.int32)
        prompt = np.asarray(batch.tokens[:, : decoder.prompt])
        without_cache = naively(decoder, params, prompt, batch.padding)
        differ = np.flatnonzero((decoded != without_cache).any(1))
        assert len(differ) <= 20, "at most a tenth, for a briefly trained model"
        tokens = np.concatenate([prompt, without_cache[:, :-1]], 1)
        logits = np.asarray(logits_of(decoder, params, tokens, batch.padding))[:, decoder.prompt - 1 :]
        for i in differ:
            best = np.sort(logits[i, np.flatnonzero(decoded[i] != without_cache[i])[0]])[::-1]
            # How differently it rounds depends on the processor: a gap of 16% has been seen.
            assert best[0] - best[1] < 0.25 * np.abs(best).max()


@pytest.mark.parametrize("variant", [GPT2, ROTARY], ids=["gpt2", "rotary"])
def test_an_answer_without_an_end_has_none_and_after_an_end_there_is_padding(variant):
    """Random weights and prompts: the end token may come anywhere or never."""
    (group,) = make_groups(members(1, **WORLD | variant))
    decoder = make_decoder(group)
    prompt = jax.random.randint(jax.random.key(0), (300, decoder.prompt), 0, decoder.vocabulary_size)
    padding = jnp.zeros(300, jnp.int32)
    params = decoder.init(jax.random.key(1), jnp.zeros((1, decoder.sequence), jnp.int32), padding[:1])
    params = jax.tree.map(lambda leaf: leaf * 5, params)
    decoded = np.asarray(jax.jit(lambda p: decode_greedily(decoder, params, p, padding))(prompt))
    np.testing.assert_array_equal(decoded, naively(decoder, params, prompt, padding))
    texts = [Alphabet(4).decode_tokens(row) for row in decoded]
    assert all(set(text.partition("$")[2]) <= {"_"} for text in texts)
    assert len({text.find("$") for text in texts}) > 2 and any("$" not in text for text in texts)


@pytest.mark.parametrize("devices, data_parallel, members_per_vmap", [(4, 2, 1), (1, 1, 3)])
def test_the_layout_changes_nothing(devices, data_parallel, members_per_vmap):
    run = trained("none, no-ops")
    mesh = make_mesh(devices, data_parallel)
    size = padded_size(2, mesh, members_per_vmap)
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[[0, 1, *[0] * (size - 2)]], run.state.params)
    prompts = prompts_of(run.group.members, "unseen")
    decoder = GroupDecoder(run.group, run.group.shape, mesh, members_per_vmap, piece=20)
    apart, together = answers_of(run, prompts), answers_of(run, prompts, decoder, params)
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(a, b)


def test_members_may_have_different_numbers_of_tests():
    run = trained("none, no-ops")
    prompts = prompts_of(run.group.members, "unseen")
    fewer = [prompts.rules[0], prompts.rules[1][:5]]
    everything, some = (answers_of(run, p) for p in (prompts, Prompts(prompts.knobs, prompts.keys, fewer, fewer)))
    assert some.index[1].tolist() == [*range(5), *[-1] * 27] and some.index[0].tolist() == [*range(32)]
    np.testing.assert_array_equal(some.decoded[1, :5], everything.decoded[1, :5])


class TestWhatThePromptShows:
    def test_another_rule_is_read_and_the_right_answer_stays(self):
        """Each prompt shows another test's rule; input and right answer stay, ``differs`` marks other answers."""
        run = trained("rotary, ragged, no-ops")
        prompts = prompts_of(run.group.members, "unseen")
        table = prompts.rules[0]
        other = table[np.roll(np.arange(len(table)), 1)]
        shuffled = prompts_of(run.group.members, "unseen", shown=[other, other])
        own, shuffled = answers_of(run, prompts), answers_of(run, shuffled)
        np.testing.assert_array_equal(own.right, shuffled.right)
        np.testing.assert_array_equal(own.input[0], shuffled.input[0])
        assert not own.differs.any() and 0 < shuffled.differs.sum() < shuffled.differs.size
        alphabet, decoder, (_, params) = Alphabet(4), make_decoder(run.group), by_row(run)[0]
        prompt, padding = [], []
        for i in range(len(table)):
            text = alphabet.decode(shuffled.input[0][0, i, : shuffled.input[1][0, i]])
            asked, right = (text.replace(*t.text(i, alphabet), 1) for t in (other, table))
            assert shuffled.differs[0, i] == (asked != right)
            shown = "#".join([*other.text(i, alphabet), text, ""])
            padding.append(decoder.prompt - len(shown))
            prompt.append([0] * padding[-1] + [1 if c == "#" else 3 + "abcd".index(c) for c in shown])
        expected = naively(decoder, params, np.array(prompt), np.array(padding))
        np.testing.assert_array_equal(shuffled.decoded[0], expected)

    def test_a_blanked_rule_leaves_separators_and_input(self):
        tokens = jnp.array([0, 0, 4, 5, 1, 6, 1, 7, 8, 9, 1])
        assert blank_instruction(tokens).tolist() == [0, 0, 0, 0, 1, 0, 1, 7, 8, 9, 1]

    def test_blanked_prompts_are_decoded_as_such(self):
        run = trained("none, no-ops")
        prompts = prompts_of(run.group.members, "unseen")
        blanked = answers_of(run, prompts_of(run.group.members, "unseen", blanked=True))
        decoder, (data, params) = make_decoder(run.group), by_row(run)[0]
        stream = stream_of_split("unseen", 0)
        batch, _ = teacher_forcing(run.group)(data, params, prompts.rules[0].arrays(), stream)
        prompt = np.array(batch.tokens[:, : decoder.prompt])
        prompt[:, [0, 1, 3, 4]] = PAD
        np.testing.assert_array_equal(blanked.decoded[0], naively(decoder, params, prompt, batch.padding))
