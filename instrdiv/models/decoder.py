"""The decoder: a small GPT-2-style transformer in Flax.

Only the answer is ever trained on or scored, and positions no longer mix after the last attention. So the last layer's
attention output and MLP, the final norm, and the head run on the answer positions only (``answer_only``): the result
is the same, and it saves 8% of the arithmetic at the papers' shape, 17% at the laptop preset's.

Training and decoding share this definition: with ``start``, a call takes only the new tokens and caches their keys and
values for later calls (``decoding.py``).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from instrdiv.config.groups import Group
from instrdiv.config.settings import ModelFields
from instrdiv.tasks.tokens import END, PAD

#: The parameters that Muon orthogonalizes: the four matrices of a block. Everything else uses Adam.
MUON_MATRICES = ("qkv", "attention_out", "mlp_up", "mlp_down")


class Decoder(nn.Module):
    """A next-token predictor: the model of P2 (arXiv 2410.04717), section 3.1, or a variant of it.

    Attributes:
      config: the static fields of a setting.
      vocabulary_size: number of tokens.
      prompt: number of tokens before the answer; the first prediction is made at position ``prompt - 1``.
      sequence: length of the longest row.
      ragged: rows may start with padding, which is never attended to and is not counted in positions.
      attention: one of ``ATTENTION``.
    """

    config: ModelFields
    vocabulary_size: int
    prompt: int
    sequence: int
    ragged: bool = False
    attention: str = "plain"

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        padding_B: jax.Array,
        answer_only: bool = True,
        train: bool = False,
        start: jax.Array | int | None = None,
    ) -> jax.Array:
        """Logits float32 [B, T - prompt + 1, V] from position ``prompt - 1`` onward; [B, T, V] if not ``answer_only``.

        Args:
          tokens_BxT: int32, T <= sequence; in training, the row without its last token.
          padding_B: int32, number of padding tokens on the left (ignored unless ``ragged``).
          answer_only: compute the last layer only at the positions that predict the answer.
          train: apply dropout (needs the ``dropout`` PRNG).
          start: for decoding: the position of the first of these tokens in its row (int32 scalar). The keys and values
            of earlier tokens are read from the collection ``cache``, and those of these tokens are added to it: apply
            with ``mutable=["cache"]``. With ``answer_only``, the tokens must include the whole prompt.
        """
        c, dtype = self.config, jnp.dtype(self.config.precision)
        T = tokens_BxT.shape[1]
        gpt2 = c.init == "gpt2"
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02 if gpt2 else 0.5), (self.vocabulary_size, c.width)
        )
        # A matmul, not a lookup: the vocabulary is tiny, and a lookup's gradient is a scatter, slow on every backend.
        x_BxTxD = jax.nn.one_hot(tokens_BxT, self.vocabulary_size, dtype=dtype) @ embedding.astype(dtype)
        place_T, S = (jnp.arange(T), T) if start is None else (start + jnp.arange(T), self.sequence)
        position_BxT = place_T[None, :]
        if self.ragged:
            position_BxT = jnp.maximum(position_BxT - padding_B[:, None], 0)
        if c.positions == "learned":
            positions = self.param("positions", nn.initializers.normal(0.01 if gpt2 else 0.1), (self.sequence, c.width))
            in_order = start is None and not self.ragged
            x_BxTxD += positions.astype(dtype)[jnp.s_[None, :T] if in_order else position_BxT]
        x_BxTxD = nn.Dropout(c.dropout, deterministic=not train)(x_BxTxD)
        if start is None and c.precision == "bfloat16":
            # Tensor cores want whole tiles. The padding is at the end, so nothing attends to it; it is cut off below.
            added = -T % 8
            x_BxTxD = jnp.pad(x_BxTxD, ((0, 0), (0, added), (0, 0)))
            place_T, S = jnp.arange(T + added), T + added
            position_BxT = jnp.pad(position_BxT, ((0, 0), (0, added)))
        mask_BxTxS = (place_T[:, None] >= jnp.arange(S))[None]
        if self.ragged:
            mask_BxTxS = mask_BxTxS & (jnp.arange(S)[None, None, :] >= padding_B[:, None, None])
        for layer in range(c.layers):
            first = self.prompt - 1 if answer_only and layer == c.layers - 1 else 0
            # The fused kernel only handles plain causal attention: not a subset of the queries, and no masked keys.
            fused = self.attention == "cudnn" and first == 0 and start is None and not self.ragged
            block = Block(c, fused, name=f"layer_{layer}")
            x_BxTxD = block(x_BxTxD, position_BxT, mask_BxTxS, first, train, start)
        x_BxTxD = make_norm(c, "final_norm")(x_BxTxD[:, : T - first])
        if c.tied_head:
            head = embedding.T
        else:
            head_init = nn.initializers.normal(0.02) if gpt2 else nn.initializers.lecun_normal()
            head = self.param("head", head_init, (c.width, self.vocabulary_size))
        # Not rounded to bfloat16, which could make the best letters tie.
        return jnp.einsum("btd,dv->btv", x_BxTxD, head.astype(dtype), preferred_element_type=jnp.float32)


class Block(nn.Module):
    """Pre-norm attention and MLP. Output positions start at ``first``; keys and values cover all positions.

    With ``start`` (see ``Decoder``), they cover all positions up to the last of these tokens; S is the longest row.
    """

    config: ModelFields
    fused_attention: bool = False

    @nn.compact
    def __call__(self, x_BxTxD, position_BxT, mask_BxTxS, first: int, train: bool, start=None):
        c = self.config
        B, T, D = x_BxTxD.shape
        head_size = D // c.heads
        drop = nn.Dropout(c.dropout, deterministic=not train)

        qkv = make_linear(c, 3 * D, "qkv")(make_norm(c, "attention_norm")(x_BxTxD))
        q, k, v = (part.reshape(B, T, c.heads, head_size) for part in jnp.split(qkv, 3, axis=-1))
        if c.positions == "rotary":
            q, k = rotate(q, position_BxT), rotate(k, position_BxT)
        if start is not None:
            S = mask_BxTxS.shape[-1]
            k, v = self._remember("keys", k, start, S), self._remember("values", v, start, S)
        if self.fused_attention:
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        else:
            attended = attend(q[:, first:], k, v, mask_BxTxS[:, first:])
        x = x_BxTxD[:, first:]
        x += drop(make_linear(c, D, "attention_out", residual=True)(attended.reshape(B, T - first, D)))

        hidden = make_linear(c, c.mlp_ratio * D, "mlp_up")(make_norm(c, "mlp_norm")(x))
        # GELU's gradient is recomputed from its input, which is kept anyway; its intermediate values are not stored.
        hidden = jax.checkpoint(nn.gelu)(hidden) if c.activation == "gelu" else nn.relu(hidden)
        return x + drop(make_linear(c, D, "mlp_down", residual=True)(hidden))

    def _remember(self, name: str, new_BxTxHxK: jax.Array, start, S: int) -> jax.Array:
        """Writes the new keys (or values) into the cache at ``start``; returns the whole cache, [B, S, H, K]."""
        B, _, *head = new_BxTxHxK.shape
        kept = self.variable("cache", name, jnp.zeros, (B, S, *head), new_BxTxHxK.dtype)
        kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, new_BxTxHxK, start, axis=1)
        return kept.value


@jax.custom_vjp
def attend(q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array, mask_BxTxS: jax.Array) -> jax.Array:
    """Softmax attention, [B, T, H, K]; scores and softmax in float32.

    Written out because sequences are short: XLA's CPU backend runs this form, gradient included, a quarter faster than
    ``jax.nn.dot_product_attention``. The custom gradient stores the attention weights and multiplies in the inputs'
    precision; the gradient JAX derives uses float32 T x S arrays instead. (A query with no keys, as in a row's
    padding, has no meaningful gradient, but its output is never read.)
    """
    return _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask_BxTxS)[0]


def _attend(q, k, v, mask):
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    # Without the barrier, XLA would store the float32 values that these are computed from.
    weights = jax.lax.optimization_barrier(weights.astype(v.dtype))
    attended = jnp.einsum("bhts,bshk->bthk", weights, v)
    return attended, (q, k, v, weights, attended)


def _attend_gradient(known, upstream):
    q, k, v, weights, attended = known
    for_weights = jnp.einsum("bthk,bshk->bhts", upstream, v, preferred_element_type=jnp.float32)
    # What the softmax gradient subtracts, (weights * for_weights).sum(-1), without a T x S pass, as in FlashAttention.
    mean_BxTxHx1 = (upstream.astype(jnp.float32) * attended).sum(-1, keepdims=True)
    for_scores = weights * (for_weights - mean_BxTxHx1.transpose(0, 2, 1, 3))
    for_scores = (for_scores * q.shape[-1] ** -0.5).astype(q.dtype)
    for_q = jnp.einsum("bhts,bshk->bthk", for_scores, k)
    for_k = jnp.einsum("bhts,bthk->bshk", for_scores, q)
    return for_q, for_k, jnp.einsum("bhts,bthk->bshk", weights, upstream), None


attend.defvjp(_attend, _attend_gradient)


def make_linear(c: ModelFields, features: int, name: str, residual: bool = False) -> Any:
    """A linear layer; those that write to the residual stream are initialized sqrt(2 * layers) smaller, as in GPT-2."""
    scale = 1 / math.sqrt(2 * c.layers) if residual else 1.0
    if c.init == "gpt2":
        kernel_init: Any = nn.initializers.normal(0.02 * scale)
    else:
        kernel_init = nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
    dense = nn.Dense(features, use_bias=c.biases, dtype=jnp.dtype(c.precision), kernel_init=kernel_init, name=name)

    def apply(x_BxTxD):
        # Flattened to a matrix: on CPU, the weight gradient of the three-dimensional form is half as fast.
        return dense(x_BxTxD.reshape(-1, x_BxTxD.shape[-1])).reshape(*x_BxTxD.shape[:-1], features)

    return apply


def make_norm(c: ModelFields, name: str) -> nn.Module:
    dtype = jnp.dtype(c.precision)
    if c.norm == "rmsnorm":
        return nn.RMSNorm(dtype=dtype, name=name)
    return nn.LayerNorm(dtype=dtype, use_bias=c.biases, epsilon=1e-5, name=name)


def rotate(x_BxTxHxK: jax.Array, position_BxT: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): pairs (i, i + K/2) rotate by position / 10000^(2i/K)."""
    half = x_BxTxHxK.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half) / half)
    angle = position_BxT[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxTxHxK.dtype)


def make_decoder(group: Group) -> Decoder:
    """The decoder that all members of a group share."""
    shape = group.shape
    return Decoder(
        config=group.config,
        vocabulary_size=shape.vocabulary,
        prompt=shape.prompt,
        sequence=shape.sequence - 1,
        ragged=shape.ragged,
        attention=group.attention,
    )


def decode_greedily(decoder: Decoder, params: Any, prompt_BxP: jax.Array, padding_B: jax.Array) -> jax.Array:
    """Greedy answers int32 [B, A + 1]: letters, the end token (if one was produced), then PAD.

    Args:
      decoder: its ``prompt`` is P; it leaves room for A answer letters.
      params: one member's parameters.
      prompt_BxP: int32, right-aligned: every answer starts at the same position.
      padding_B: int32, number of padding tokens before each prompt (ignored unless ``decoder.ragged``).
    """
    logits, cache = decoder.apply(params, prompt_BxP, padding_B, start=0, mutable=["cache"])

    def step(carry, place):
        cache, token_B = carry
        logits, cache = decoder.apply(
            params | cache, token_B[:, None], padding_B, answer_only=False, start=place, mutable=["cache"]
        )
        return (cache, logits[:, 0].argmax(-1)), token_B

    places = jnp.arange(decoder.prompt, decoder.sequence)
    (_, last_B), tokens_AxB = jax.lax.scan(step, (cache, logits[:, 0].argmax(-1)), places)
    tokens = jnp.concatenate([tokens_AxB, last_B[None]]).T.astype(jnp.int32)
    ends = tokens == END
    return jnp.where(ends.cumsum(1) - ends > 0, PAD, tokens)
