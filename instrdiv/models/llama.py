"""The Llama-family decoder, as pure functions over a tree of weights.

One implementation serves Llama, Mistral, DeepSeek-Coder and Qwen2: the differences (rope scaling, windows, biases,
grouped heads, tied heads) are data in ``ModelConfig``. Layers are stacked on a leading axis and scanned, so the
program is the same size for forty layers as for one.

Weights: ``{"embed": [V, D], "norm": [D], "lm_head": {"kernel": [D, V]}, "layers": {"input_norm": [L, D],
"post_norm": [L, D], "q_proj": {"kernel": [L, in, out], "bias": [L, out]}, ...}}``; with a tied head there
is no ``lm_head``, and most linear layers have no bias. A kernel may be ``Quantized``.

Adapters of M members: ``{"q_proj": {"a": [M, L, in, R], "b": [M, L, R, out]}, ...}``, with L = 1 for the head. The rows
of a batch are grouped by member, in order: the base matmul runs once over all rows, and only the two thin LoRA matmuls
are per member.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.models.llama_config import ModelConfig, Rope

#: The linear layers of a block, by the names that checkpoints and adapters use.
BLOCK_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: How attention is computed: by XLA, or by cuDNN's fused kernel (needs a GPU and bfloat16).
ATTENTION = ("plain", "cudnn")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder and its weights; a pytree whose configuration is static.

    Attributes:
      config: the checkpoint's configuration.
      weights: see the module docstring.
    """

    config: ModelConfig
    weights: Mapping[str, Any]


jax.tree_util.register_dataclass(Model, data_fields=["weights"], meta_fields=["config"])


class Adapters(NamedTuple):
    """The adapters of a population of M members.

    Attributes:
      pairs: see the module docstring.
      scale: float32 [M], alpha / rank of each member.
    """

    pairs: Mapping[str, Any]
    scale: Any


class Quantized(NamedTuple):
    """A symmetric 8-bit kernel with one scale per output channel; dequantized in the matmul.

    Attributes:
      values: int8 [L, in, out].
      scale: float32 [L, 1, out].
    """

    values: jax.Array
    scale: jax.Array


class Rows(NamedTuple):
    """The decoder's input.

    Attributes:
      tokens: int32 [B, T].
      positions: int32 [B, T], restarting in every segment.
      segments: int32 [B, T]; 0 is padding. A token attends to its own segment, up to and including itself.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      keys, values: [L, B, S, K, head_dim].
      segments: int32 [B, S]; 0 where nothing has been written.
      length: int32 scalar, number of positions written.
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    length: jax.Array


def empty_cache(config: ModelConfig, rows: int, places: int, precision: Any) -> Cache:
    """An empty cache for ``rows`` rows of ``places`` tokens each, prompt and answer together."""
    shape = (config.layers, rows, places, config.kv_heads, config.head_dim)
    empty = jnp.zeros(shape, precision)
    return Cache(empty, empty, jnp.zeros((rows, places), jnp.int32), jnp.int32(0))


def hidden(
    model: Model,
    rows: Rows,
    adapters: Adapters | None = None,
    cache: Cache | None = None,
    *,
    precision: Any = jnp.float32,
    remat: bool = False,
    attention: str = "plain",
) -> tuple[jax.Array, Cache | None]:
    """The final hidden states, after the last norm.

    Args:
      model: its kernels are cast to ``precision`` where they are used.
      rows: B rows; with adapters of M members, row i belongs to member i // (B // M).
      adapters: a population's adapters; None for the base model alone.
      cache: keys and values of earlier tokens of these rows; None if there are no earlier tokens.
      precision: dtype of activations; norms and softmax are in float32.
      remat: keep only each layer's input for the backward pass.
      attention: see ``ATTENTION``.

    Returns:
      [B, T, D] in ``precision``, and the cache with these tokens added (None if no cache was given).
    """
    config, weights = model.config, model.weights
    pairs, scale = adapters or Adapters({}, None)
    x = weights["embed"][rows.tokens].astype(precision)
    angles = rows.positions[..., None] * jnp.asarray(frequencies(config.rope, config.head_dim))
    rotation = (jnp.cos(angles)[:, :, None].astype(precision), jnp.sin(angles)[:, :, None].astype(precision))

    start = jnp.int32(0) if cache is None else cache.length
    places = start + jnp.arange(rows.tokens.shape[1])
    seen = rows.segments if cache is None else _write(cache.segments, rows.segments, start)
    distance = places[:, None] - jnp.arange(seen.shape[1])
    same = (rows.segments[:, :, None] == seen[:, None]) & (rows.segments[:, :, None] > 0) & (distance >= 0)

    def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, Any]:
        own, adapter, window, cached = layer
        linear = _Linear(own, adapter, scale)

        def heads(name: str, x: jax.Array) -> jax.Array:
            return linear(name, x).reshape(*x.shape[:2], -1, config.head_dim)

        y = _rms_norm(x, own["input_norm"], config.norm_epsilon)
        q, k, v = _rotate(heads("q_proj", y), rotation), _rotate(heads("k_proj", y), rotation), heads("v_proj", y)
        if cached is not None:
            k, v = cached = _write(cached[0], k, start), _write(cached[1], v, start)
        mask = (same & (distance < window))[:, None]
        implementation: Literal["xla", "cudnn"] = "cudnn" if attention == "cudnn" else "xla"
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
        x = x + linear("o_proj", mixed.reshape(*mixed.shape[:2], -1))
        y = _rms_norm(x, own["post_norm"], config.norm_epsilon)
        y = linear("down_proj", jax.nn.silu(linear("gate_proj", y)) * linear("up_proj", y))
        return x + y, cached

    by_layer = {n: jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), pair)
                for n, pair in pairs.items() if n != "lm_head"}  # fmt: skip
    far = np.iinfo(np.int32).max
    windows = jnp.asarray([far if window is None else window for window in config.windows], jnp.int32)
    cached = None if cache is None else (cache.keys, cache.values)
    body = jax.checkpoint(block, prevent_cse=False) if remat else block
    x, cached = jax.lax.scan(body, x, (weights["layers"], by_layer, windows, cached))
    if cache is not None:
        assert cached is not None
        cache = Cache(*cached, seen, start + rows.tokens.shape[1])
    return _rms_norm(x, weights["norm"], config.norm_epsilon), cache


def logits(model: Model, x: jax.Array, adapters: Adapters | None = None) -> jax.Array:
    """Logits float32 [B, T, V] from hidden states [B, T, D]; arguments as for ``hidden``."""
    weights, (pairs, scale) = model.weights, adapters or Adapters({}, None)
    if model.config.tied_head:
        kernel = weights["embed"].astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x, kernel, preferred_element_type=jnp.float32)
    own = {name: jax.tree.map(lambda leaf: leaf[:, 0], pair)
           for name, pair in pairs.items() if name == "lm_head"}  # fmt: skip
    return _Linear(weights, own, scale, jnp.float32)("lm_head", x)


class _Linear:
    """The linear layers of one block, each with its adapters' contribution added."""

    def __init__(self, layer: Mapping[str, Any], adapters: Mapping[str, Any], scale: Any, result: Any = None):
        self.layer, self.adapters, self.scale, self.result = layer, adapters, scale, result

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """Maps x [B, T, in] to [B, T, out]."""
        layer, result = self.layer[name], self.result or x.dtype
        y = product(x, layer["kernel"], result)
        if "bias" in layer:
            y = y + layer["bias"].astype(result)
        if name in self.adapters:
            a, b = self.adapters[name]["a"], self.adapters[name]["b"] * self.scale[:, None, None]
            own = x.reshape(len(a), -1, *x.shape[1:])
            low = jnp.einsum("mbti,mir->mbtr", own, a.astype(x.dtype))
            added = jnp.einsum("mbtr,mro->mbto", low, b.astype(x.dtype), preferred_element_type=result)
            y = y + added.reshape(y.shape)
        return y


def product(x: jax.Array, kernel: jax.Array | Quantized, result: Any = None) -> jax.Array:
    """x [..., in] times a stored kernel [in, out]; the result has dtype ``result``, by default that of x."""
    # Cast the kernel again in the backward pass: storing the cast kernels of all layers would be a second, larger base.
    return jax.checkpoint(_product, static_argnums=2, prevent_cse=False)(x, kernel, result or x.dtype)


def _product(x: jax.Array, kernel: jax.Array | Quantized, result: Any) -> jax.Array:
    if isinstance(kernel, Quantized):
        y = jnp.matmul(x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * kernel.scale).astype(result)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=result)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: radians per position for each pair of channels, scaled according to the rope type."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # Slow rotations are slowed down by the factor, fast ones kept, and those in between interpolated.
        turns = rope.original_positions * inverse / (2 * math.pi)
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        inverse = (1 - kept) * inverse / rope.factor + kept * inverse
    return inverse.astype(np.float32)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary positions on [B, T, heads, head_dim]; each pair is a channel of the first half and one of the second."""
    cosine, sine = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return wide.astype(x.dtype) * weight.astype(x.dtype)


def _write(stored: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes ``new`` [B, T, ...] into ``stored`` [B, S, ...], starting at position ``start``."""
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), start, axis=1)
