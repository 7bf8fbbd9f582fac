"""The decoder: what it may look at, and that skipping work changes nothing."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.model import MUON_MATRICES, Decoder, rotate
from instrdiv.population import make_groups
from instrdiv.settings import Member
from instrdiv.training import make_decoder
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
    params = decoder.init(jax.random.key(0), tokens, jnp.zeros(3, jnp.int32))
    return decoder, params, tokens


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    def test_computing_the_last_layer_on_the_answer_alone_is_equal(self, variant):
        decoder, params, tokens = build(**variant)
        short = decoder.apply(params, tokens, jnp.zeros(3, jnp.int32))
        whole = decoder.apply(params, tokens, jnp.zeros(3, jnp.int32), answer_only=False)
        assert short.shape[1] == decoder.sequence - decoder.prompt + 1
        np.testing.assert_allclose(short, whole[:, decoder.prompt - 1 :], atol=2e-5)

    def test_so_are_its_gradients(self, variant):
        decoder, params, tokens = build(**variant)

        def loss(params, answer_only):
            logits = decoder.apply(params, tokens, jnp.zeros(3, jnp.int32), answer_only=answer_only)
            return (logits[:, -(decoder.sequence - decoder.prompt + 1) :] ** 2).mean()

        for a, b in zip(*(jax.tree.leaves(jax.grad(loss)(params, flag)) for flag in (True, False)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_nothing_looks_ahead(self, variant):
        decoder, params, tokens = build(**variant)
        before = decoder.apply(params, tokens, jnp.zeros(3, jnp.int32), answer_only=False)
        changed = tokens.at[:, 9:].set((tokens[:, 9:] + 1) % decoder.vocabulary_size)
        after = decoder.apply(params, changed, jnp.zeros(3, jnp.int32), answer_only=False)
        np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-5)
        assert np.abs(before[:, 9:] - after[:, 9:]).max() > 1e-3

    def test_padding_on_the_left_changes_nothing(self, variant):
        decoder, params, tokens = build(ragged=True, **variant)
        pad = 4
        alone = decoder.apply(params, tokens[:, pad:], jnp.zeros(3, jnp.int32), answer_only=False)
        padded = decoder.apply(params, tokens.at[:, :pad].set(0), jnp.full(3, pad), answer_only=False)
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
        "the head must not round its logits: the best letter would often be a tie"
    )


def test_attention_agrees_with_jax():
    from instrdiv.model import attend

    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 8))
    mask = jnp.tril(jnp.ones((1, 7, 7), bool))
    np.testing.assert_allclose(
        attend(q, k, v, mask), jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]), atol=1e-5
    )


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
    """Counted by hand for the papers' shape: 12 D^2 + 13 D a layer, embeddings, positions, final norm."""
    from instrdiv.presets import PAPER

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
