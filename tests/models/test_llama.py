"""The decoder against Transformers, the oracle, for every family, on checkpoints that Transformers wrote."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.models.llama import Model, Rows, hidden, logits
from instrdiv.models.llama_config import Rope
from instrdiv.models.weights import read_weights
from tools.parity import FAMILIES, PLACES, ROWS, Pair, random_rows

for package in ("torch", "transformers"):
    pytest.importorskip(package, reason="is the oracle")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return Pair.make(request.param, tmp_path_factory.mktemp("base"))


def test_the_logits_are_the_same(pair):
    tokens, left, right = random_rows()
    ours = pair.our_logits(tokens)
    assert ours.shape == (ROWS, PLACES, 128) and ours.std() > 1
    np.testing.assert_allclose(ours, pair.their_logits(tokens), atol=1e-4, rtol=0)
    for attended in (left, right):
        padded = pair.our_logits(tokens, attended)[attended]
        np.testing.assert_allclose(padded, pair.their_logits(tokens, attended)[attended], atol=1e-4, rtol=0)


def test_a_cache_changes_nothing(pair):
    tokens, _, _ = random_rows()
    pieces = [20, *[1] * 13, 15]
    np.testing.assert_allclose(pair.our_cached_logits(tokens, pieces), pair.our_logits(tokens), atol=1e-4, rtol=0)


def test_padding_may_hold_anything(pair):
    tokens, left, right = random_rows()
    for attended in (left, right):
        other = np.where(attended, tokens, 7)
        for cut in (tokens, other):
            logits = pair.our_logits(cut, attended)
            assert np.isfinite(logits).all()
        np.testing.assert_array_equal(pair.our_logits(tokens, attended)[attended], logits[attended])


def test_eight_bits_compute_what_transformers_does_with_the_same_numbers(pair, tmp_path):
    tokens, _, _ = random_rows()
    theirs, eight = pair.in_eight_bits(tmp_path / "eight")
    ours, exact = pair.our_logits(tokens, weights=eight), pair.our_logits(tokens)
    np.testing.assert_allclose(ours, pair.their_logits(tokens, model=theirs), atol=1e-4, rtol=0)
    assert 0.001 < error(ours, exact) < 0.1


def test_bfloat16_is_as_exact_as_transformers(pair):
    tokens, _, _ = random_rows()
    half = read_weights(pair.path, pair.config, "bfloat16")
    ours = error(pair.our_logits(tokens, weights=half, precision="bfloat16"), pair.our_logits(tokens))
    theirs = error(pair.their_logits(tokens, model=pair.their_bfloat16()), pair.their_logits(tokens))
    assert 0.001 < ours < min(1.3 * theirs, 0.1)


def error(logits, exact):
    """Root mean square of the differences, divided by the standard deviation of the logits."""
    return np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()


def test_shards_are_read_as_one_file_is(tmp_path):
    whole = Pair.make("CodeQwen1.5", tmp_path / "whole")
    sharded = Pair.make("CodeQwen1.5", tmp_path / "sharded", max_shard_size="20KB")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    jax.tree.map(np.testing.assert_array_equal, sharded.weights, whole.weights)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("Mistral v0.1", {"windows": (None, None, None)}),
        ("Mistral v0.1", {"windows": (9, 9, 9)}),
        ("Qwen2.5", {"windows": (None, None, None)}),
        ("Qwen2.5", {"windows": (8, 8, 8)}),
        ("Llama-3.1", {"rope": Rope(500_000.0)}),
        ("DeepSeek-Coder", {"rope": Rope(100_000.0)}),
        ("DeepSeek-Coder", {"rope": Rope(10_000.0, "linear", 4.0)}),
        ("Llama-2", {"norm_epsilon": 0.1}),
    ],
)
def test_what_sets_a_family_apart_is_seen_in_these_rows(tmp_path, family, changes):
    """Otherwise the tests above could not tell whether these settings are used at all."""
    pair, tokens = Pair.make(family, tmp_path), random_rows()[0]
    changed = dataclasses.replace(pair, config=dataclasses.replace(pair.config, **changes))
    assert np.abs(changed.our_logits(tokens) - pair.our_logits(tokens)).max() > 1e-2


@pytest.mark.parametrize("family", ["Llama-3.1", "Qwen2.5"])
def test_rows_that_are_packed_do_not_see_each_other(tmp_path, family):
    pair = Pair.make(family, tmp_path)
    tokens = random_rows()[0][:1]
    lengths = [20, 5, PLACES - 30]  # and five positions of padding
    segments = np.repeat([1, 2, 3, 0], [*lengths, 5])[None].astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in [*lengths, 5]])[None].astype(np.int32)
    rows = Rows(*map(jnp.asarray, (tokens.astype(np.int32), positions, segments)))
    model = Model(pair.config, pair.weights)
    packed = np.asarray(logits(model, hidden(model, rows)[0]))
    start = 0
    for length in lengths:
        alone = pair.their_logits(tokens[:, start : start + length])
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-4, rtol=0)
        start += length


def test_rematerialised_layers_have_the_same_gradients(tmp_path):
    pair = Pair.make("CodeQwen1.5", tmp_path)
    tokens = jnp.asarray(random_rows()[0][:, :9], jnp.int32)
    rows = Rows(tokens, jnp.broadcast_to(jnp.arange(9), tokens.shape), jnp.ones_like(tokens))

    def loss(weights, remat):
        model = Model(pair.config, weights)
        return logits(model, hidden(model, rows, remat=remat)[0]).std()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(pair.weights, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, again)
