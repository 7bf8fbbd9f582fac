"""The decoder: what it may attend to, and that skipping work does not change results."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.config.groups import make_groups
from instrdiv.config.settings import Member
from instrdiv.models.decoder import MUON_MATRICES, Decoder, attend, make_decoder, rotate
from tests.worlds import tiny

VARIANTS = [
    {"positions": positions, "norm": norm, "tied_head": tied, "activation": activation, "biases": biases, "layers": 2}
    for (positions, norm), (tied, activation, biases) in itertools.product(
        [("learned", "layernorm"), ("rotary", "rmsnorm"), ("none", "layernorm")],
        [(True, "gelu", True), (False, "relu", False)],
    )
] + [{"init": "gpt2", "layers": 1}, {"heads": 4, "layers": 3}]


def build(ragged=False, **changes):
    (group,) = make_groups([Member(tiny(**changes), 0)])
    decoder = dataclasses.replace(make_decoder(group), ragged=ragged)
    tokens = jax.random.randint(jax.random.key(1), (3, decoder.sequence), 0, decoder.vocabulary_size)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens, jnp.zeros(3, jnp.int32))
    return decoder, params, tokens


@functools.partial(jax.jit, static_argnums=0, static_argnames="answer_only")
def apply(decoder, params, tokens, padding, answer_only=True):
    return decoder.apply(params, tokens, padding, answer_only=answer_only)


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    def test_computing_the_last_layer_on_the_answer_alone_is_equal(self, variant):
        decoder, params, tokens = build(**variant)
        short = apply(decoder, params, tokens, jnp.zeros(3, jnp.int32))
        whole = apply(decoder, params, tokens, jnp.zeros(3, jnp.int32), answer_only=False)
        assert short.shape[1] == decoder.sequence - decoder.prompt + 1
        np.testing.assert_allclose(short, whole[:, decoder.prompt - 1 :], atol=2e-5)

    def test_so_are_its_gradients(self, variant):
        decoder, params, tokens = build(**variant)

        def loss(params, answer_only):
            logits = apply(decoder, params, tokens, jnp.zeros(3, jnp.int32), answer_only=answer_only)
            return (logits[:, -(decoder.sequence - decoder.prompt + 1) :] ** 2).mean()

        gradients = jax.jit(jax.grad(loss), static_argnums=1)
        for a, b in zip(*(jax.tree.leaves(gradients(params, flag)) for flag in (True, False)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_nothing_looks_ahead(self, variant):
        decoder, params, tokens = build(**variant)
        before = apply(decoder, params, tokens, jnp.zeros(3, jnp.int32), answer_only=False)
        changed = tokens.at[:, 9:].set((tokens[:, 9:] + 1) % decoder.vocabulary_size)
        after = apply(decoder, params, changed, jnp.zeros(3, jnp.int32), answer_only=False)
        np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-5)
        assert np.abs(before[:, 9:] - after[:, 9:]).max() > 1e-3

    def test_padding_on_the_left_changes_nothing(self, variant):
        decoder, params, tokens = build(ragged=True, **variant)
        pad = 4
        alone = apply(decoder, params, tokens[:, pad:], jnp.zeros(3, jnp.int32), answer_only=False)
        padded = apply(decoder, params, tokens.at[:, :pad].set(0), jnp.full(3, pad), answer_only=False)
        np.testing.assert_allclose(alone, padded[:, pad:], atol=2e-5)


def test_bfloat16_computes_close_to_float32_and_keeps_its_parameters():
    decoder, params, tokens = build()
    half = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, precision="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0), tokens, jnp.zeros(3, jnp.int32)))} == {
        jnp.dtype("float32")
    }
    a, b = (d.apply(params, tokens, jnp.zeros(3, jnp.int32)) for d in (decoder, half))
    assert b.dtype == jnp.float32 and 0 < np.abs(a - b).max() < 0.2
    assert (b != b.astype(jnp.bfloat16)).any(), (
        "the head must not round its logits: the best letter would often be tied"
    )


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)])
@pytest.mark.parametrize("queries", [7, 3])
def test_attention_and_its_gradients_agree_with_jax(queries, dtype, atol):
    """Also without the first queries, and for rows that start with padding."""
    q, k, v, upstream = jax.random.normal(jax.random.key(0), (4, 2, 7, 4, 8)).astype(dtype)
    q, upstream = q[:, -queries:], upstream[:, -queries:]
    mask = jnp.tril(jnp.ones((2, 7, 7), bool))[:, -queries:].at[1, :, :2].set(False)
    mask = mask.at[1, :, 2].set(True)  # every query has a key

    def value_and_gradients(attention, dtype):
        value, pull_back = jax.vjp(lambda *qkv: attention(*qkv), *(part.astype(dtype) for part in (q, k, v)))
        return value, *pull_back(upstream.astype(dtype))

    ours = value_and_gradients(lambda q, k, v: attend(q, k, v, mask), dtype)
    theirs = value_and_gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]), jnp.float32)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype(jnp.float32), other, atol=atol)


@pytest.mark.parametrize("ragged", [False, True])
def test_what_bfloat16_adds_to_a_row_is_not_seen(ragged):
    """In bfloat16, rows are padded to a multiple of eight: the logits equal those of a row that has that length."""
    decoder, params, tokens = build(ragged, precision="bfloat16", positions="rotary")
    padding, T = jnp.array([0, 1, 2]) * ragged, decoder.sequence
    longer = dataclasses.replace(decoder, sequence=T + -T % 8)
    assert longer.sequence > T
    filled = jnp.pad(tokens, ((0, 0), (0, longer.sequence - T)), constant_values=5)
    short, full = decoder.apply(params, tokens, padding), longer.apply(params, filled, padding)
    np.testing.assert_array_equal(short, full[:, : short.shape[1]])


def test_attention_in_one_kernel_is_asked_for_where_it_is_causal(monkeypatch):
    """With JAX's attention in place of cuDNN's, logits agree; the last layer, with fewer queries, does not use it."""
    decoder, params, tokens = build(precision="bfloat16", layers=3)
    fused = dataclasses.replace(decoder, attention="cudnn")
    asked = []

    def attention(q, k, v, is_causal, implementation):
        asked.append(implementation)
        return plain(q, k, v, is_causal=is_causal)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    a, b = (d.apply(params, tokens, jnp.zeros(3, jnp.int32)) for d in (decoder, fused))
    assert asked == ["cudnn"] * 2
    np.testing.assert_allclose(a, b, atol=0.1)
    padded = dataclasses.replace(fused, ragged=True).apply(params, tokens, jnp.ones(3, jnp.int32))
    assert asked == ["cudnn"] * 2 and np.isfinite(padded).all()


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        return (rotate(q, jnp.array([[i]])) * rotate(k, jnp.array([[j]]))).sum()

    np.testing.assert_allclose(score(5, 3), score(12, 10), atol=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_dropout_needs_a_key_and_acts_only_in_training():
    decoder, params, tokens = build(dropout=0.5)
    padding = jnp.zeros(3, jnp.int32)
    quiet = decoder.apply(params, tokens, padding)
    noisy = decoder.apply(params, tokens, padding, train=True, rngs={"dropout": jax.random.key(1)})
    assert (quiet == decoder.apply(params, tokens, padding)).all() and (quiet != noisy).any()


def test_the_parameters_are_those_of_gpt2():
    """Counted by hand for the papers' shape: 12 D^2 + 13 D per layer, embeddings, positions, final norm."""
    from instrdiv.config.presets import PAPER

    (group,) = make_groups([Member(PAPER, 0)])
    decoder = make_decoder(group)
    params = jax.eval_shape(
        lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 143), jnp.int32), jnp.zeros(1, jnp.int32))
    )
    D = 256
    assert decoder.sequence == 143
    expected = 6 * (12 * D * D + 13 * D) + 29 * D + 143 * D + 2 * D
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_the_matrices_of_a_block_are_named():
    _, params, _ = build(biases=True)
    kernels = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"}
    assert kernels == set(MUON_MATRICES)


def test_a_decoder_is_hashable_so_that_programs_can_be_cached():
    decoder, _, _ = build()
    assert isinstance(hash(decoder), int) and isinstance(decoder, Decoder)
