"""Weights of a checkpoint: safetensors files to the decoder's tree, sharded and cast, and back.

Tensors are memory-mapped: each device reads its own part in the file's dtype, then transposes and casts it into its
layer's slot. So the host holds about one tensor at a time, however large the model is.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.models.llama import Quantized
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.safetensors import (
    _SINGLE,
    DTYPES,
    Stored,
    _stored_tensors,
    header_of,
)
from instrdiv.runtime.errors import BadInput

#: Path in our tree -> name in the checkpoint ({} is the layer) and names of our axes. Kernels are stored transposed.
TABLE: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("embed",): ("model.embed_tokens.weight", ("vocab", "width")),
    ("norm",): ("model.norm.weight", ("width",)),
    ("lm_head", "kernel"): ("lm_head.weight", ("width", "vocab")),
    ("layers", "input_norm"): ("model.layers.{}.input_layernorm.weight", ("width",)),
    ("layers", "post_norm"): ("model.layers.{}.post_attention_layernorm.weight", ("width",)),
    ("layers", "q_proj", "kernel"): ("model.layers.{}.self_attn.q_proj.weight", ("width", "heads")),
    ("layers", "q_proj", "bias"): ("model.layers.{}.self_attn.q_proj.bias", ("heads",)),
    ("layers", "k_proj", "kernel"): ("model.layers.{}.self_attn.k_proj.weight", ("width", "kv_heads")),
    ("layers", "k_proj", "bias"): ("model.layers.{}.self_attn.k_proj.bias", ("kv_heads",)),
    ("layers", "v_proj", "kernel"): ("model.layers.{}.self_attn.v_proj.weight", ("width", "kv_heads")),
    ("layers", "v_proj", "bias"): ("model.layers.{}.self_attn.v_proj.bias", ("kv_heads",)),
    ("layers", "o_proj", "kernel"): ("model.layers.{}.self_attn.o_proj.weight", ("heads", "width")),
    ("layers", "o_proj", "bias"): ("model.layers.{}.self_attn.o_proj.bias", ("width",)),
    ("layers", "gate_proj", "kernel"): ("model.layers.{}.mlp.gate_proj.weight", ("width", "mlp")),
    ("layers", "gate_proj", "bias"): ("model.layers.{}.mlp.gate_proj.bias", ("mlp",)),
    ("layers", "up_proj", "kernel"): ("model.layers.{}.mlp.up_proj.weight", ("width", "mlp")),
    ("layers", "up_proj", "bias"): ("model.layers.{}.mlp.up_proj.bias", ("mlp",)),
    ("layers", "down_proj", "kernel"): ("model.layers.{}.mlp.down_proj.weight", ("mlp", "width")),
    ("layers", "down_proj", "bias"): ("model.layers.{}.mlp.down_proj.bias", ("width",)),
}
#: Suffixes of other tensors in old checkpoints: rotary frequencies, which are computed from config.json instead.
IGNORED = ("rotary_emb.inv_freq",)


class Leaf(NamedTuple):
    """An array of the tree.

    Attributes:
      path: its keys in the tree.
      name: name of its tensor in a checkpoint; {} is the layer.
      axes: names of its axes, without the layer axis.
      shape: lengths of these axes.
      layers: number of tensors stacked on the leading layer axis; None if it has no such axis.
    """

    path: tuple[str, ...]
    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    layers: int | None

    @property
    def is_kernel(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape including the layer axis."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_kernel else self.shape

    def names(self) -> list[str]:
        """The names of its tensors, by layer."""
        return [self.name.format(layer) for layer in range(self.layers or 1)]


def leaves(config: ModelConfig) -> list[Leaf]:
    """The arrays in the tree of a model with this configuration."""
    lengths = {
        "vocab": config.vocab_size,
        "width": config.width,
        "heads": config.heads * config.head_dim,
        "kv_heads": config.kv_heads * config.head_dim,
        "mlp": config.mlp_width,
    }
    has_bias = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.qkv_bias) | {"o_proj": config.output_bias}
    there = []
    for path, (name, axes) in TABLE.items():
        lacks_bias = path[-1] == "bias" and not has_bias.get(path[1], config.mlp_bias)
        if not lacks_bias and not (path[0] == "lm_head" and config.tied_head):
            layers = config.layers if path[0] == "layers" else None
            there.append(Leaf(path, name, axes, tuple(lengths[axis] for axis in axes), layers))
    return there


def as_tree(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nests values, given by path, into dictionaries."""
    tree: dict[str, Any] = {}
    for (*parents, last), value in values.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def partition_specs(config: ModelConfig, mesh: Mesh, fsdp: bool = False) -> dict[tuple[str, ...], P]:
    """How each array of the tree is sharded over a mesh, by its path; the layer axis is not sharded.

    Along 'tensor', as in Megatron: whole heads and the MLP's channels, so a block needs two reductions. Key and value
    heads that the axis does not divide are replicated, because each then serves queries on several devices; so is a
    vocabulary that it does not divide, because that costs little. With ``fsdp``, the width of every matrix is sharded
    along ('member', 'data'): devices that process different rows each keep a part of the weights, and gather each layer
    when they use it. Axes that the mesh lacks count as 1.

    Raises:
      BadInput: 'tensor' does not divide the heads or the MLP's width, or ('member', 'data') does not divide the width.
    """
    tensor = mesh.shape.get("tensor", 1)
    both = tuple(axis for axis in ("member", "data") if axis in mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in both)
    for what, length in (("attention heads", config.heads), ("channels of the MLP", config.mlp_width)):
        if length % tensor:
            raise BadInput(f"--tensor_parallel={tensor}: must divide the {length} {what}")
    if fsdp and config.width % parts:
        raise BadInput(f"--fsdp: the width {config.width} cannot be split into {parts} equal parts, one per device; "
                       "use a different number of devices")  # fmt: skip
    counts = {"heads": config.heads, "mlp": config.mlp_width, "kv_heads": config.kv_heads, "vocab": config.vocab_size}
    along: dict[str, Any] = {axis: "tensor" for axis, count in counts.items() if tensor > 1 and count % tensor == 0}

    def spec(leaf: Leaf) -> P:
        width = {"width": both} if fsdp and both and len(leaf.axes) == 2 else {}
        axes = [(along | width).get(axis) for axis in leaf.axes]
        return P(*([None] if leaf.layers else []), *axes)

    return {leaf.path: spec(leaf) for leaf in leaves(config)}


def read_weights(
    directory: str | Path,
    config: ModelConfig,
    precision: Any = "float32",
    *,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    int8: bool = False,
) -> dict[str, Any]:
    """Reads a checkpoint's weights onto the devices, as a tree (see ``llama.py``).

    Args:
      directory: contains model.safetensors, or its shards and model.safetensors.index.json.
      config: the checkpoint's configuration.
      precision: dtype of the arrays; the files' dtype (float32, float16 or bfloat16) may differ.
      mesh, fsdp: how the arrays are sharded, see ``partition_specs``; by default, they are on one device.
      int8: hold the layers' kernels in eight bits (``quantize``), but not the embedding and the head.

    Raises:
      BadInput: a file or tensor is missing, damaged, unexpected, or of the wrong shape or dtype; names it. Raised
        before anything is loaded, except for non-finite values.
    """
    directory = Path(directory)
    stored = _stored_tensors(directory)
    there = leaves(config)
    _check(directory, config, there, stored)
    mesh = mesh or Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = partition_specs(config, mesh, fsdp)
    arrays = {}
    for leaf in there:
        tensors = [stored[name] for name in leaf.names()]
        arrays[leaf.path] = _read_leaf(leaf, tensors, jnp.dtype(precision), mesh, specs[leaf.path], int8)
    return as_tree(arrays)


def quantize(kernel: jax.Array) -> Quantized:
    """Quantizes a kernel [..., in, out] to eight bits; 127 is the largest magnitude of each output channel.

    The error of a weight is at most half a step: scale / 2.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Quantized(jnp.clip(jnp.round(kernel / scale), -127, 127).astype(jnp.int8), scale)


def write_weights(
    directory: str | Path, config: ModelConfig, weights: Mapping[str, Any], precision: Any = "bfloat16"
) -> None:
    """Writes a checkpoint for ``from_pretrained`` and ``read_weights``: config.json and model.safetensors.

    Args:
      directory: created if it does not exist.
      config, weights: of one model; quantized kernels are written dequantized.
      precision: dtype of the file: float32, bfloat16 or float16.

    Raises:
      BadInput: the directory is not empty or cannot be written, or Transformers has no such model.
    """
    directory, dtype = Path(directory), jnp.dtype(precision)
    fields = config.to_json() | {"torch_dtype": dtype.name}
    header = header_of({name: (leaf.stored_shape, dtype) for leaf in leaves(config) for name in leaf.names()})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise BadInput(f"{directory}: is not empty, and nothing is overwritten; choose another directory")
        with open(directory / _SINGLE, "wb") as file:
            file.write(header)
            for leaf in leaves(config):
                array = functools.reduce(lambda node, key: node[key], leaf.path, weights)
                for layer in range(leaf.layers or 1):
                    part = array if leaf.layers is None else jax.tree.map(lambda a, i=layer: a[i], array)
                    file.write(np.asarray(_as_stored(part, leaf.is_kernel, dtype)).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        # Written last, so that an incomplete directory is not mistaken for a checkpoint.
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{directory}: cannot be written ({error.strerror}); choose another directory") from None


def _check(directory: Path, config: ModelConfig, there: list[Leaf], stored: Mapping[str, Stored]) -> None:
    """Checks that every tensor the decoder needs is there, with a usable dtype and the right shape, and no others."""
    needed = {name: leaf for leaf in there for name in leaf.names()}
    for name, leaf in needed.items():
        if name not in stored:
            raise BadInput(f"{directory}: lacks the tensor {name} {list(leaf.stored_shape)}, which its config.json "
                           "requires; download both again")  # fmt: skip
        tensor = stored[name]
        if tensor.dtype not in DTYPES:
            raise BadInput(f"{tensor.file}: tensor {name} is {tensor.dtype}; supported are {', '.join(DTYPES)}")
        if tensor.shape != leaf.stored_shape:
            raise BadInput(f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json requires "
                           f"{list(leaf.stored_shape)}")  # fmt: skip
    for name, tensor in stored.items():
        if name in needed or name.endswith(IGNORED):
            continue
        if config.tied_head and name == TABLE["lm_head", "kernel"][0]:
            embed = stored[TABLE["embed",][0]]
            if (tensor.dtype, tensor.shape) == (embed.dtype, embed.shape) and np.array_equal(tensor.map(), embed.map()):
                continue
            raise BadInput(f"{tensor.file}: tensor {name} differs from the embedding, although config.json ties "
                           "them; set tie_word_embeddings=false there")  # fmt: skip
        raise BadInput(f"{tensor.file}: tensor {name} is not part of the model that config.json describes")


def _read_leaf(leaf: Leaf, tensors: list[Stored], dtype: Any, mesh: Mesh, spec: P, int8: bool) -> Any:
    """Reads an array of the tree, or a quantized kernel: allocated as zeros and filled layer by layer."""
    layers = () if leaf.layers is None else (leaf.layers,)
    shape, sharding = leaf.whole_shape, NamedSharding(mesh, spec)
    by_layer: Any
    if int8 and leaf.is_kernel and layers:
        of_scale = NamedSharding(mesh, P(*spec[:-2], None, spec[-1]))
        scale = jnp.zeros((*shape[:-2], 1, shape[-1]), jnp.float32, device=of_scale)
        by_layer = Quantized(jnp.zeros(shape, jnp.int8, device=sharding), scale)
    else:
        by_layer = jnp.zeros(shape, dtype, device=sharding)
    shardings = jax.tree.map(lambda array: array.sharding, by_layer)
    of_one = tuple(spec)[len(layers) :]
    as_stored = NamedSharding(mesh, P(*(of_one[::-1] if leaf.is_kernel else of_one)))
    for layer, tensor in enumerate(tensors):
        placed = tensor.on_device(as_stored)
        by_layer, finite = _place(by_layer, placed, layer, transposed=leaf.is_kernel, shardings=shardings)
        if not finite:  # checked per tensor, so that each is freed before the next one is read
            raise BadInput(f"{tensor.file}: is damaged: its tensor {tensor.name} has non-finite values; "
                           "download it again")  # fmt: skip
    return by_layer


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("transposed", "shardings"))
def _place(by_layer: Any, tensor: jax.Array, layer: jax.Array, *, transposed: bool, shardings: Any) -> Any:
    """The leaf with a file's tensor written into its layer's slot, and whether all its values are finite."""

    def put(into: jax.Array, one: jax.Array) -> jax.Array:
        stack = into.reshape(-1, *one.shape)
        return jax.lax.dynamic_update_index_in_dim(stack, one.astype(into.dtype), layer, 0).reshape(into.shape)

    ours = tensor.T if transposed else tensor
    one = quantize(ours) if isinstance(by_layer, Quantized) else ours
    return jax.lax.with_sharding_constraint(jax.tree.map(put, by_layer, one), shardings), jnp.isfinite(tensor).all()


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _as_stored(array: jax.Array | Quantized, transposed: bool, dtype: Any) -> jax.Array:
    """One layer of a leaf in the checkpoint's layout: dequantized, transposed if need be, and cast."""
    if isinstance(array, Quantized):
        array = array.values * array.scale
    return (array.T if transposed else array).astype(dtype)
