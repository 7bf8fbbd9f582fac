"""The decoder: GPT-2 style, in Flax, small enough to read at a glance.

Only the answer is ever trained or scored, and nothing after the last attention looks back. So the last layer's
attention output and MLP, the final norm and the head run on the answer positions alone (``answer_only``): the result
is the same, and 8 % of the arithmetic is saved at the papers' shape, 17 % at the laptop's.

Training and decoding read the same definition: with ``start`` a call takes only the tokens that are new, and keeps
their keys and values for the calls that follow (``decoding.py``).
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

#: The parameters that Muon orthogonalizes: the four matrices of a block. Everything else is Adam's.
MUON_MATRICES = ("qkv", "attention_out", "mlp_up", "mlp_down")


class Decoder(nn.Module):
    """Reads tokens, predicts the next one: the model of P2 (arXiv 2410.04717), section 3.1, or a variant.

    Attributes:
      config: the static fields of a setting.
      vocabulary_size: number of tokens.
      prompt: tokens before the answer; the first prediction is made at position ``prompt - 1``.
      sequence: longest row.
      ragged: rows may start with padding, which nothing attends to and which does not count as positions.
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
        """Logits float32 [B, T - prompt + 1, V], from position ``prompt - 1`` on; [B, T, V] if not ``answer_only``.

        Args:
          tokens_BxT: int32, T <= sequence; to train, the row without its last token.
          padding_B: int32 tokens of padding on the left (ignored unless ``ragged``).
          answer_only: compute the last layer where the answer is predicted, and nowhere else.
          train: apply dropout (needs the ``dropout`` PRNG).
          start: to decode: the place of the first of these tokens in its row (int32 scalar). The tokens before it are
            known by their keys and values, in the collection ``cache``, to which those of these tokens are added:
            apply with ``mutable=["cache"]``. With ``answer_only`` the tokens are those of the whole prompt, or more.
        """
        c, dtype = self.config, jnp.dtype(self.config.precision)
        T = tokens_BxT.shape[1]
        gpt2 = c.init == "gpt2"
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02 if gpt2 else 0.5), (self.vocabulary_size, c.width)
        )
        # As a product: the vocabulary is tiny, and the gradient of a lookup is a scatter, which is slow everywhere.
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
            # Tensor cores want whole tiles. What is added comes last, so nothing attends to it; it is cut off below.
            added = -T % 8
            x_BxTxD = jnp.pad(x_BxTxD, ((0, 0), (0, added), (0, 0)))
            place_T, S = jnp.arange(T + added), T + added
            position_BxT = jnp.pad(position_BxT, ((0, 0), (0, added)))
        mask_BxTxS = (place_T[:, None] >= jnp.arange(S))[None]
        if self.ragged:
            mask_BxTxS = mask_BxTxS & (jnp.arange(S)[None, None, :] >= padding_B[:, None, None])
        for layer in range(c.layers):
            first = self.prompt - 1 if answer_only and layer == c.layers - 1 else 0
            # In one kernel where it is causal, and nothing else: not where some queries, or keys, are left out.
            fused = self.attention == "cudnn" and first == 0 and start is None and not self.ragged
            block = Block(c, fused, name=f"layer_{layer}")
            x_BxTxD = block(x_BxTxD, position_BxT, mask_BxTxS, first, train, start)
        x_BxTxD = make_norm(c, "final_norm")(x_BxTxD[:, : T - first])
        if c.tied_head:
            head = embedding.T
        else:
            head_init = nn.initializers.normal(0.02) if gpt2 else nn.initializers.lecun_normal()
            head = self.param("head", head_init, (c.width, self.vocabulary_size))
        # Not rounded to bfloat16: the best letter must not be a tie.
        return jnp.einsum("btd,dv->btv", x_BxTxD, head.astype(dtype), preferred_element_type=jnp.float32)


class Block(nn.Module):
    """Pre-norm attention and MLP. Output positions start at ``first``; keys and values are those of all positions.

    With ``start``, see ``Decoder``: all positions up to the last of these tokens; S is the longest row.
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
        # GELU's gradient is computed from its input, which is there; what was computed on the way is not kept.
        hidden = jax.checkpoint(nn.gelu)(hidden) if c.activation == "gelu" else nn.relu(hidden)
        return x + drop(make_linear(c, D, "mlp_down", residual=True)(hidden))

    def _remember(self, name: str, new_BxTxHxK: jax.Array, start, S: int) -> jax.Array:
        """Puts the new keys (or values) at ``start`` into the cache; all of it, [B, S, H, K]."""
        B, _, *head = new_BxTxHxK.shape
        kept = self.variable("cache", name, jnp.zeros, (B, S, *head), new_BxTxHxK.dtype)
        kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, new_BxTxHxK, start, axis=1)
        return kept.value


@jax.custom_vjp
def attend(q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array, mask_BxTxS: jax.Array) -> jax.Array:
    """Softmax attention, [B, T, H, K]; scores and softmax in float32.

    Written out because sequences are short: XLA's CPU backend runs this form, with its gradient, a quarter faster than
    ``jax.nn.dot_product_attention``. With a gradient of its own, which keeps the weights, and multiplies, in the
    precision of the inputs: the one that JAX derives has arrays of T x S in float32 instead. (A query without any key,
    as in the padding of a row, has no meaningful gradient: nothing reads what it attends to.)
    """
    return _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask_BxTxS)[0]


def _attend(q, k, v, mask):
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    # Or XLA would rather keep the float32 that they are computed from.
    weights = jax.lax.optimization_barrier(weights.astype(v.dtype))
    attended = jnp.einsum("bhts,bshk->bthk", weights, v)
    return attended, (q, k, v, weights, attended)


def _attend_gradient(known, upstream):
    q, k, v, weights, attended = known
    for_weights = jnp.einsum("bthk,bshk->bhts", upstream, v, preferred_element_type=jnp.float32)
    # What a softmax subtracts, (weights * for_weights).sum(-1), without a pass over T x S: as flash attention has it.
    mean_BxTxHx1 = (upstream.astype(jnp.float32) * attended).sum(-1, keepdims=True)
    for_scores = weights * (for_weights - mean_BxTxHx1.transpose(0, 2, 1, 3))
    for_scores = (for_scores * q.shape[-1] ** -0.5).astype(q.dtype)
    for_q = jnp.einsum("bhts,bshk->bthk", for_scores, k)
    for_k = jnp.einsum("bhts,bthk->bshk", for_scores, q)
    return for_q, for_k, jnp.einsum("bhts,bthk->bshk", weights, upstream), None


attend.defvjp(_attend, _attend_gradient)


def make_linear(c: ModelFields, features: int, name: str, residual: bool = False) -> Any:
    """A linear layer; those that write to the residual stream start smaller by sqrt(2 * layers), as in GPT-2."""
    scale = 1 / math.sqrt(2 * c.layers) if residual else 1.0
    if c.init == "gpt2":
        kernel_init: Any = nn.initializers.normal(0.02 * scale)
    else:
        kernel_init = nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
    dense = nn.Dense(features, use_bias=c.biases, dtype=jnp.dtype(c.precision), kernel_init=kernel_init, name=name)

    def apply(x_BxTxD):
        # As one matrix: on CPU the weight gradient of the three-dimensional form is half as fast.
        return dense(x_BxTxD.reshape(-1, x_BxTxD.shape[-1])).reshape(*x_BxTxD.shape[:-1], features)

    return apply


def make_norm(c: ModelFields, name: str) -> nn.Module:
    dtype = jnp.dtype(c.precision)
    if c.norm == "rmsnorm":
        return nn.RMSNorm(dtype=dtype, name=name)
    return nn.LayerNorm(dtype=dtype, use_bias=c.biases, epsilon=1e-5, name=name)


def rotate(x_BxTxHxK: jax.Array, position_BxT: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): pairs (i, i + K/2) turn by position / 10000^(2i/K)."""
    half = x_BxTxHxK.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half) / half)
    angle = position_BxT[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxTxHxK.dtype)


def make_decoder(group: Group) -> Decoder:
    """The decoder that the members of a group have."""
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
    """The greedy answers int32 [B, A + 1]: letters, then the end token, then PAD; no end token where none came.

    Args:
      decoder: its ``prompt`` is P; it leaves room for A answer letters.
      params: of one member.
      prompt_BxP: int32, right-aligned: every answer starts at the same place.
      padding_B: int32, tokens of padding before each prompt (ignored unless ``decoder.ragged``).
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
