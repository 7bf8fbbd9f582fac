"""Greedy decoding against Transformers' ``generate``, and against a loop without a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.models import generation as decoding
from instrdiv.models import llama, lora
from instrdiv.models.generation import decode_greedily, left_padded
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.lora import Lora
from tests import adapters as worlds
from tools.parity import FAMILIES, NEW_TOKENS, Pair, random_prompts

CONFIG = worlds.CONFIG
MODEL = Model(CONFIG, worlds.weights())
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], [30, 31]]


@jax.jit
def all_logits(rows, adapters, scale):
    added = None if adapters is None else Adapters(adapters, scale)
    x, _ = llama.hidden(MODEL, rows, added)
    return llama.logits(MODEL, x, added)


def by_hand(prompt, new_tokens, end_tokens=(), adapters=None, scale=None):
    """Greedy tokens of one prompt, recomputing the whole sequence for every token; stops after an end token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        row = np.array([[*tokens, *[0] * (24 - len(tokens))]])  # no position attends to what follows it
        logits = all_logits(worlds.rows_of(row), adapters, scale)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
        if tokens[-1] in end_tokens:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_64_tokens_are_those_of_transformers(tmp_path, family):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="is the oracle")
    pair = Pair.make(family, tmp_path)
    ours = pair.our_tokens(random_prompts(), NEW_TOKENS)
    np.testing.assert_array_equal(ours, pair.their_tokens(random_prompts(), NEW_TOKENS))
    assert ours.shape == (4, 64) and len(np.unique(ours)) > 16  # not a single repeated token


def test_it_ends_where_transformers_does(tmp_path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="is the oracle")
    pair = Pair.make("Qwen2", tmp_path)
    endless = pair.our_tokens(random_prompts(), 32)
    ends = (int(endless[0, 4]), int(endless[1, 9]))
    ours = pair.our_tokens(random_prompts(), 32, end_tokens=ends)
    np.testing.assert_array_equal(ours, pair.their_tokens(random_prompts(), 32, eos_token_id=list(ends)))
    assert (ours[:2, -1] == 0).all()


@pytest.mark.parametrize("ends", [(), "some"])
def test_tokens_and_lengths_are_those_found_without_a_cache(ends):
    alone = [by_hand(prompt, 12) for prompt in PROMPTS]
    if ends:
        ends = (alone[0][0], alone[2][5])  # the first row ends at once
    tokens, lengths = decode_greedily(MODEL, left_padded(PROMPTS), new_tokens=12, end_tokens=tuple(ends))
    assert tokens.shape == (4, 12) and tokens.dtype == lengths.dtype == jnp.int32
    for row, prompt in enumerate(PROMPTS):
        expected = by_hand(prompt, 12, ends)
        ended = expected[-1] in ends
        assert tokens[row].tolist() == expected + [0] * (12 - len(expected))
        assert lengths[row] == len(expected) - ended
    if ends:
        assert lengths[0] == 0 and lengths.max() > 0


def test_the_ends_are_those_of_the_config_unless_others_are_given():
    first = by_hand(PROMPTS[0], 1)[0]
    config = dataclasses.replace(CONFIG, end_tokens=(first,))
    prompts = left_padded(PROMPTS[:1])
    assert decode_greedily(Model(config, worlds.weights()), prompts, new_tokens=3)[1] == 0
    assert decode_greedily(Model(config, worlds.weights()), prompts, new_tokens=1, end_tokens=())[1] == 1


def test_it_stops_when_all_have_ended(monkeypatch):
    ends = tuple({by_hand(prompt, 3)[2] for prompt in PROMPTS})
    needed = max(len(by_hand(prompt, 3, ends)) for prompt in PROMPTS)
    calls = []

    def counted(*args, **options):
        jax.debug.callback(lambda: calls.append(1))
        return llama.hidden(*args, **options)

    monkeypatch.setattr(decoding, "hidden", counted)
    decode = functools.partial(decode_greedily.__wrapped__, new_tokens=100, end_tokens=ends)
    jax.block_until_ready(jax.jit(decode)(MODEL, left_padded(PROMPTS)))
    jax.effects_barrier()
    assert len(calls) == needed


def test_a_population_decodes_as_its_members_do_alone():
    loras = [Lora(2, 5.0, ("q_proj",)), Lora(4, 4.0, "all-linear"), Lora(1, 2.0, ("lm_head", "down_proj"))]
    rng, shapes = np.random.default_rng(0), lora.linear_shapes(CONFIG)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    singles = [
        {
            name: {"a": normal(*shapes[name][:2], one.rank), "b": normal(shapes[name][0], one.rank, shapes[name][2])}
            for name in one.targets
        }
        for one in loras
    ]
    adapters, scale = lora.stack_adapters(CONFIG, loras, singles), lora.scales(loras)
    asked = PROMPTS[:2] * 3  # the same prompts for every member, so that only the members differ
    tokens, _ = decode_greedily(MODEL, left_padded(asked), Adapters(adapters, scale), new_tokens=8)
    for row, prompt in enumerate(asked):
        member = row // 2
        alone = lora.stack_adapters(CONFIG, loras[member : member + 1], singles[member : member + 1])
        assert tokens[row].tolist() == by_hand(prompt, 8, (), alone, scale[member : member + 1])
    assert len({tuple(row) for row in np.asarray(tokens).tolist()}) == 6


def test_idle_rows_fill_a_batch_and_change_nothing():
    some, lengths = decode_greedily(MODEL, left_padded(PROMPTS), new_tokens=5)
    filled = left_padded([*PROMPTS, [], []], places=9)
    more, more_lengths = decode_greedily(MODEL, filled, new_tokens=5)
    np.testing.assert_array_equal(more[:4], some)
    assert not more[4:].any() and more_lengths.tolist() == [*lengths.tolist(), 0, 0]


def test_left_padding():
    rows = left_padded([[4, 5], [6], []], places=3)
    np.testing.assert_array_equal(rows.tokens, [[0, 4, 5], [0, 0, 6], [0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert {array.dtype for array in rows} == {np.dtype("int32")}
    assert left_padded([[1], [2, 3]]).tokens.shape == (2, 2)
