"""Sampled examples against ``str.replace`` and plain Python, over random settings."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.examples import Knobs, TaskShape, _below, _places
from instrdiv.tasks.strings.rewriting import Rewriting
from instrdiv.tasks.strings.rules import RuleSource, StringFamily


def knobs(no_op=0.0, near_miss=0.0, occurrences=(1,), lengths=(8, 8)):
    return Knobs(
        no_op_fraction=np.float32(no_op),
        near_miss_fraction=np.float32(near_miss),
        occurrences=np.array(occurrences, np.int32),
        choices=np.int32(len(occurrences)),
        input_length_min=np.int32(lengths[0]),
        input_length_max=np.int32(lengths[1]),
    )


def rule_table(alphabet, shortest, longest, shortest_replacement, longest_replacement, count=200, seed=0):
    strings = StringFamily(alphabet, ("free",), shortest, longest)
    replacements = StringFamily(alphabet, ("free",), shortest_replacement, longest_replacement)
    return RuleSource(strings, replacements, split="rule", held_out_share=0.1).pool(seed, count)


def sample(shape, knobs, table, count, seed=0, jitted={}):  # noqa: B006 - a cache of compiled functions
    """``count`` examples, rules in turn, as numpy arrays."""
    if shape not in jitted:
        jitted[shape] = jax.jit(
            lambda knobs, rules, key, rows, index: jax.vmap(
                lambda row, i: Rewriting.example(
                    shape, knobs, jax.tree.map(lambda t: t[row], rules), jax.random.fold_in(key, i)
                )
            )(rows, index)
        )
    index = np.arange(count)
    rules = jax.tree.map(jnp.asarray, table.arrays())
    return jax.tree.map(np.asarray, jitted[shape](knobs, rules, jax.random.key(seed), index % len(table), index))


def parse(tokens, alphabet):
    """Pattern, replacement, input, answer of a token row; fails on any other form."""
    text = alphabet.decode_tokens(tokens)
    stripped = text.lstrip("_")
    prompt, end, rest = stripped.partition("$")
    assert end and set(rest) <= {"_"}
    pattern, replacement, string, answer = prompt.split("#")
    assert "_" not in prompt
    return pattern, replacement, string, answer, len(text) - len(stripped)


def longest_answer(length, replacement, shortest):
    return length + max(0, replacement - shortest)


#: (alphabet, pattern lengths, replacement lengths, longest input)
WORLDS = [
    (26, (3, 3), (3, 3), 8),
    (2, (2, 4), (1, 4), 14),
    (3, (2, 3), (0, 5), 12),
    (26, (20, 20), (20, 20), 50),
    (5, (1, 6), (6, 6), 25),
]


@pytest.mark.parametrize("world", range(len(WORLDS)))
def test_100_000_examples_agree_with_replace(world):
    """20,000 examples a world, in 8 random settings of the knobs each; 100,000 in all."""
    size, patterns, replacements, longest = WORLDS[world]
    alphabet, random = Alphabet(size), np.random.default_rng(world)
    room = longest // patterns[1]
    shape = TaskShape(
        size, patterns[1], replacements[1], longest, longest_answer(longest, replacements[1], patterns[0]),
        planted=room, ragged=patterns[0] < patterns[1] or replacements[0] < replacements[1],
    )  # fmt: skip
    table = rule_table(size, *patterns, *replacements, count=min(200, 20 * size))
    rules = [table.text(row, alphabet) for row in range(len(table))]
    for setting in range(8):
        ragged = shape.ragged
        shortest = int(random.integers(max(patterns[1], longest // 2), longest + 1)) if ragged else longest
        lacking = (1 - size ** -float(patterns[0])) ** longest
        most = shortest // patterns[1]
        setting_knobs = knobs(
            no_op=random.choice([0.0, 0.3, 1.0]) if lacking > 0.02 else 0.0,
            near_miss=random.choice([0.0, 0.5, 1.0]),
            occurrences=tuple(random.integers(1, most + 1, 3)),
            lengths=(shortest, longest),
        )
        batch = sample(shape, setting_knobs, table, 2_500, seed=setting)
        for row in range(2_500):
            pattern, replacement, string, answer, padding = parse(batch.tokens[row], alphabet)
            assert (pattern, replacement) == rules[row % len(table)]
            assert answer == string.replace(pattern, replacement, 1)
            assert shortest <= len(string) <= longest
            assert padding == batch.padding[row]
            assert batch.loss_mask[row].sum() == len(answer) + 1 and batch.loss_mask[row, : len(answer) + 1].all()
            found = sum(string.startswith(pattern, i) for i in range(len(string)))
            assert found == batch.facts.occurrences[row]
            if setting_knobs.no_op_fraction == 1:
                assert found == 0
            if setting_knobs.no_op_fraction == 0:
                assert found >= min(setting_knobs.occurrences)
            if batch.facts.near_miss[row]:
                windows = (string[i : i + len(pattern)] for i in range(len(string) - len(pattern) + 1))
                nearest = min(sum(a != b for a, b in zip(w, pattern, strict=True)) for w in windows)
                assert found == 0 and nearest == 1


SHAPE = TaskShape(26, 3, 3, 8, 8, planted=2, ragged=False)
TABLE = rule_table(26, 3, 3, 3, 3)


def test_the_answer_starts_at_the_same_position_in_every_row():
    shape = TaskShape(3, 3, 5, 12, 16, planted=1, ragged=True)
    batch = sample(shape, knobs(lengths=(4, 12)), rule_table(3, 2, 3, 0, 5, count=60), 500)
    assert (batch.tokens[:, shape.prompt - 1] == 1).all() and batch.tokens.shape[1] == shape.sequence


def test_ragged_rows_of_full_length_equal_fixed_ones():
    """The two ways of laying out a prompt agree where both apply."""
    import dataclasses

    fixed = sample(SHAPE, knobs(), TABLE, 100)
    ragged = sample(dataclasses.replace(SHAPE, ragged=True), knobs(), TABLE, 100)
    assert (fixed.tokens == ragged.tokens).all() and (ragged.padding == 0).all()


def test_an_example_is_a_function_of_its_key_alone():
    """Not of the batch it is made in, the number of other occurrences allowed, or the padding of the knobs."""
    import dataclasses

    many = sample(SHAPE, knobs(no_op=0.5), TABLE, 400)
    few = sample(SHAPE, knobs(no_op=0.5), TABLE, 7)
    assert (many.tokens[:7] == few.tokens).all()
    roomier = sample(dataclasses.replace(SHAPE, planted=1), knobs(no_op=0.5), TABLE, 400)
    assert (many.tokens == roomier.tokens).all()
    padded = knobs(no_op=0.5).replace(occurrences=np.array([1, 0], np.int32))
    assert (sample(SHAPE, padded, TABLE, 400).tokens == many.tokens).all()
    assert (sample(SHAPE, knobs(no_op=0.5), TABLE, 400, seed=1).tokens != many.tokens).any()


def test_tokens_are_the_same_everywhere():
    """Golden rows: sampling must not change with the version of JAX or the device."""
    shown = [Alphabet(26).decode_tokens(row) for row in sample(SHAPE, knobs(0.5, 0.5, (1, 2)), TABLE, 6).tokens]
    assert shown == GOLDEN_ROWS


def test_occurrences_are_drawn_uniformly_from_the_list():
    # Long patterns do not turn up by chance, so what is found is what was planted.
    shape = TaskShape(26, 6, 6, 30, 30, planted=5, ragged=False)
    batch = sample(shape, knobs(occurrences=(1, 1, 2, 5), lengths=(30, 30)), rule_table(26, 6, 6, 6, 6), 8_000)
    counts = collections.Counter(batch.facts.occurrences.tolist())
    assert set(counts) == {1, 2, 5}
    for planted, share in ((1, 0.5), (2, 0.25), (5, 0.25)):
        assert abs(counts[planted] / 8_000 - share) < 5 * math.sqrt(share * (1 - share) / 8_000)


def test_shares_of_no_ops_and_near_misses():
    batch = sample(SHAPE, knobs(no_op=0.3, near_miss=0.25), TABLE, 10_000)
    assert abs((batch.facts.occurrences == 0).mean() - 0.3) < 0.025
    assert abs(batch.facts.near_miss.mean() - 0.075) < 0.014


@pytest.mark.parametrize("count, size, length", [(1, 3, 7), (2, 2, 7), (3, 2, 8), (2, 3, 6)])
def test_places_are_uniform_over_all_arrangements(count, size, length):
    draws = 60_000
    bits = jax.random.bits(jax.random.key(count), (draws, 9), jnp.uint32)
    starts = jax.jit(jax.vmap(lambda b: _places(b, jnp.int32(count), jnp.int32(size), jnp.int32(length), 4)))(bits)
    seen = collections.Counter(map(tuple, np.asarray(starts)[:, :count].tolist()))
    every = [
        c
        for c in itertools.combinations(range(length - size + 1), count)
        if all(b - a >= size for a, b in itertools.pairwise(c))
    ]
    assert set(seen) == set(every)
    expected = draws / len(every)
    chi_squared = sum((n - expected) ** 2 / expected for n in seen.values())
    assert chi_squared < len(every) + 6 * math.sqrt(2 * len(every))
    assert (np.asarray(starts)[:, count:] >= length).all()  # what is not planted lies past the text


def test_letters_around_the_pattern_are_uniform():
    shape = TaskShape(4, 2, 2, 12, 12, planted=1, ragged=False)
    batch = sample(shape, knobs(no_op=1.0, lengths=(12, 12)), rule_table(4, 2, 2, 2, 2), 10_000)
    letters = batch.tokens[:, 6:18] - 3
    assert np.allclose(np.bincount(letters.ravel(), minlength=4) / letters.size, 0.25, atol=0.01)


@pytest.mark.parametrize("bound", [1, 2, 3, 26, 1000, 65535])
def test_integers_below_a_bound_are_exact(bound):
    bits = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint64)
    bits[:2] = 0, 2**32 - 1
    expected = (bits * np.uint64(bound)) >> np.uint64(32)
    assert (np.asarray(_below(jnp.asarray(bits.astype(np.uint32)), bound)) == expected.astype(np.int64)).all()


GOLDEN_ROWS = [
    "qdd#yel#avjaekbj#avjaekbj$",
    "yqc#bff#abpokyqc#abpokbff$",
    "pmp#gqn#mrbpzpwn#mrbpzpwn$",
    "qfa#rxj#qfaqfakq#rxjqfakq$",
    "zvr#gme#czvrdlek#cgmedlek$",
    "nvo#xsu#nnvozuba#nxsuzuba$",
]
