"""LoRA: a population's adapters, padded to a common rank; merging; reading and writing PEFT files.

An *adapter* belongs to one member: ``{"q_proj": {"a": [L, in, r], "b": [L, r, out]}, ...}``, with the layers it targets
at its own rank (L = 1 for the head). *Adapters* belong to a population: the same with a leading axis M, every layer
that any member targets, and R, the largest rank. Beyond a member's own rank and targets, both a AND b are zero, so
their gradients are zero and they stay zero. So rank, alpha and targets are data, and members that differ in them share
one program.

A linear layer computes ``y = x @ kernel + scale * (x @ a) @ b``, scale = alpha / rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.models.llama import BLOCK_LINEAR, Quantized
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.safetensors import DTYPES, header_of, tensors_in
from instrdiv.models.weights import leaves
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import at_least, field, positive
from instrdiv.runtime.files import replacing

#: Layers that can be targeted, in the order used in tables; initial weights depend on this order, too.
TARGETS = (*BLOCK_LINEAR, "lm_head")

Adapter = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Lora:
    """The configuration of a member's adapter. The fields are flags, ``--config.<field>``.

    Attributes:
      rank: number of columns of a.
      alpha: the adapter's output is scaled by alpha / rank.
      targets: names from ``TARGETS``; or ``all-linear``, as in PEFT: all linear layers of the blocks, but not the head.

    Raises BadInput if the values are not valid.
    """

    rank: int = field(8, "rank of the adapters", bound=at_least(1))
    alpha: float = field(16.0, "LoRA alpha; an adapter's output is scaled by alpha / rank", bound=positive)
    targets: tuple[str, ...] | str = field("all-linear", f"linear layers to adapt, out of {', '.join(TARGETS)}")

    def __post_init__(self):
        names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        names = BLOCK_LINEAR if names == ("all-linear",) else names
        unknown = [name for name in names if name not in TARGETS]
        if unknown or not names:
            raise BadInput(f"--targets={','.join(names)}: {unknown[0] if unknown else 'nothing'} is not a linear layer "
                           f"of these models; choose from {', '.join(TARGETS)}, or all-linear")  # fmt: skip
        if self.rank < 1:
            raise BadInput(f"--rank={self.rank}: must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadInput(f"--alpha={self.alpha}: must be a positive number")
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in names))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self, config: ModelConfig) -> None:
        """Raises BadInput if the head is targeted but the model's head is tied to its embedding."""
        if "lm_head" in self.targets and config.tied_head:
            raise BadInput("--targets=lm_head: this model's head is tied to its embedding (tie_word_embeddings); "
                           "target the other layers")  # fmt: skip


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """(L, in, out) of every linear layer of a model; a tied head is not included."""
    kernels = [leaf for leaf in leaves(config) if leaf.is_kernel]
    return {leaf.path[-2]: (leaf.layers or 1, leaf.shape[0], leaf.shape[1]) for leaf in kernels}


def scales(loras: Sequence[Lora]) -> np.ndarray:
    """float32 [M]: alpha / rank."""
    return np.array([lora.scale for lora in loras], np.float32)


def init_adapters(config: ModelConfig, loras: Sequence[Lora], seeds: Any) -> Adapter:
    """A population's adapters before training, float32: a is uniform as in PEFT (Kaiming, a = sqrt 5), b is zero.

    Args:
      config: the base model's.
      loras: the members' adapter configurations.
      seeds: uint32 [M]; may be traced.

    Every entry depends only on its member's seed, its layer, and its row and column: not on the other members or on
    the common padded rank. Entries beyond a member's own rank and targets are zero.
    """
    rank = max(lora.rank for lora in loras)
    ranks = jnp.asarray([lora.rank for lora in loras])
    adapters = {}
    for place, name in enumerate(TARGETS):
        targeted = jnp.asarray([name in lora.targets for lora in loras])
        if not any(name in lora.targets for lora in loras):
            continue
        layers, inputs, outputs = linear_shapes(config)[name]
        bound = inputs**-0.5

        def column(seed, layer, number, place=place, inputs=inputs, bound=bound):
            key = jax.random.key(seed, impl="threefry2x32")
            for part in (place, layer, number):
                key = jax.random.fold_in(key, part)
            return jax.random.uniform(key, (inputs,), jnp.float32, -bound, bound)

        columns = jax.vmap(column, (None, None, 0), out_axes=1)
        a = jax.vmap(jax.vmap(columns, (None, 0, None)), (0, None, None))(seeds, jnp.arange(layers), jnp.arange(rank))
        own = (jnp.arange(rank) < ranks[:, None]) & targeted[:, None]
        adapters[name] = {
            "a": jnp.where(own[:, None, None], a, 0.0),
            "b": jnp.zeros((len(loras), layers, rank, outputs), jnp.float32),
        }
    return adapters


def stack_adapters(config: ModelConfig, loras: Sequence[Lora], adapters: Sequence[Adapter]) -> Adapter:
    """Stacks the members' adapters into a population's, padded with zeros (numpy, float32)."""
    rank = max(lora.rank for lora in loras)
    stacked: Adapter = {}
    for name in TARGETS:
        if not any(name in lora.targets for lora in loras):
            continue
        layers, inputs, outputs = linear_shapes(config)[name]
        a = np.zeros((len(loras), layers, inputs, rank), np.float32)
        b = np.zeros((len(loras), layers, rank, outputs), np.float32)
        for row, (lora, adapter) in enumerate(zip(loras, adapters, strict=True)):
            if name in lora.targets:
                a[row, :, :, : lora.rank], b[row, :, : lora.rank] = adapter[name]["a"], adapter[name]["b"]
        stacked[name] = {"a": a, "b": b}
    return stacked


def adapter_of(adapters: Adapter, row: int, lora: Lora) -> Adapter:
    """Extracts one member's adapter, at its own rank and targets, from a population's."""
    return {
        name: {"a": adapters[name]["a"][row, :, :, : lora.rank], "b": adapters[name]["b"][row, :, : lora.rank]}
        for name in lora.targets
    }


def merge(weights: Mapping[str, Any], lora: Lora, adapter: Adapter, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Merges one member's adapter into the base: one tree of weights, which runs without an adapter.

    Kernels keep their dtype; sums are computed in float32. Eight bits cannot hold the sum, so every ``Quantized``
    kernel, targeted or not, becomes an array of ``dtype``.
    """

    def merged(name: str, layer: Mapping[str, Any]) -> dict[str, Any]:
        kernel = layer["kernel"]
        kind, wide = kernel.dtype if not isinstance(kernel, Quantized) else dtype, kernel
        if isinstance(kernel, Quantized):
            wide = kernel.values.astype(jnp.float32) * kernel.scale
        if name in adapter:
            a, b = (jnp.asarray(adapter[name][part], jnp.float32) for part in ("a", "b"))
            added = lora.scale * jnp.matmul(a, b, precision="highest")
            wide = wide.astype(jnp.float32) + (added[0] if name == "lm_head" else added)
        return {**layer, "kernel": wide.astype(kind)}

    blocks = weights["layers"]
    layers = {n: merged(n, part) if n in BLOCK_LINEAR else part for n, part in blocks.items()}
    head = {"lm_head": merged("lm_head", weights["lm_head"])} if "lm_head" in weights else {}
    return {**weights, "layers": layers, **head}


#: PEFT options that we accept with any value: either we read them, or they do not change what the adapter computes.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "lora_alpha"),
    *("lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision"),
    *("runtime_config", "target_modules", "use_rslora"),
}
#: Options that must be unset or have one of these values; of the initializations, those that leave the base unchanged.
_ALLOWED = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def _tensor_names(config: ModelConfig, target: str) -> list[tuple[str, str]]:
    """PEFT's tensor names for the a and b of every layer of a target."""
    (leaf,) = [leaf for leaf in leaves(config) if leaf.path[-2:] == (target, "kernel")]
    stems = [f"base_model.model.{name.removesuffix('.weight')}" for name in leaf.names()]
    return [(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight") for stem in stems]


def write_adapter(out: Path, config: ModelConfig, lora: Lora, adapter: Adapter, base: str | None = None) -> None:
    """Writes an adapter as a directory that ``peft.PeftModel.from_pretrained`` reads, overwriting existing files.

    Args:
      out: the directory; created if it does not exist.
      config: the base model's; ``base`` is its name or path, recorded in adapter_config.json.
      lora, adapter: its configuration and arrays, of any array type.

    Raises OSError if it cannot be written.
    """
    tensors = {}
    for name in lora.targets:
        for layer, names in enumerate(_tensor_names(config, name)):
            for tensor, part in zip(names, ("a", "b"), strict=True):
                tensors[tensor] = np.ascontiguousarray(np.asarray(adapter[name][part][layer], np.float32).T)
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "adapter_model.safetensors", "wb") as file:
        file.write(header_of({name: (array.shape, array.dtype) for name, array in tensors.items()}))
        for array in tensors.values():
            file.write(array.data)
    with replacing(out / "adapter_config.json") as file:
        json.dump(said, file, indent=2)
        file.write("\n")


def read_adapter(path: Path | str, config: ModelConfig, base: str | None = None) -> tuple[Lora, Adapter]:
    """Reads an adapter in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``).

    Args:
      path: the directory.
      config: of the base model that the adapter is for.
      base: the base model's name or path; if the adapter names its base, too, the last path components must match.

    Returns:
      Its configuration, and its arrays, numpy float32. rsLoRA is converted to the equivalent plain LoRA. Dropout, used
      only in training, is dropped; so is the copy of the base's head that PEFT adds if the head is targeted.

    Raises:
      BadInput: it is not a LoRA adapter, has unsupported options, or was made for a different base.
    """
    path = Path(path)
    said = _read_config(path / "adapter_config.json")
    made_for = said.get("base_model_name_or_path")
    if base and made_for and Path(base).name.lower() != Path(made_for).name.lower():
        raise BadInput(f"{path / 'adapter_config.json'}: base_model_name_or_path is {made_for}, not {base}; "
                       "use the adapter with its own base, or correct the entry if both are the same")  # fmt: skip
    tensors = _read_tensors(path / "adapter_model.safetensors")
    file = path / "adapter_model.safetensors"
    targets = tuple(n for n in TARGETS if any(f".{n}.lora_" in tensor for tensor in tensors))
    named = said.get("target_modules")
    for name in [] if isinstance(named, str) or named is None else named:
        if name.rpartition(".")[2] not in TARGETS:
            raise BadInput(f"{path / 'adapter_config.json'}: target_modules names {name}; "
                           f"supported are {', '.join(TARGETS)}")  # fmt: skip
        if name.rpartition(".")[2] not in targets:
            raise BadInput(f"{file}: has no tensor for {name}, which is in target_modules of adapter_config.json")
    if not targets:
        raise BadInput(f"{file}: has no LoRA tensor for any of {', '.join(TARGETS)}")
    rank, alpha = said["r"], said["lora_alpha"]
    lora = Lora(rank, alpha * math.sqrt(rank) if said.get("use_rslora") else alpha, targets)
    lora.validate(config)
    adapter: Adapter = {}
    for target in targets:
        _, inputs, outputs = linear_shapes(config)[target]
        parts: dict[str, list[np.ndarray]] = {"a": [], "b": []}
        for names in _tensor_names(config, target):
            for tensor, part, shape in zip(names, "ab", ((rank, inputs), (outputs, rank)), strict=True):
                if tensor not in tensors:
                    raise BadInput(f"{file}: lacks {tensor}; it is damaged or was made for a different base")
                found = tensors.pop(tensor)
                if found.shape != shape:
                    raise BadInput(f"{file}: {tensor} is {list(found.shape)}, not {list(shape)} as expected for rank "
                                   f"{rank} and this base; it was made for a different base")  # fmt: skip
                if not np.isfinite(found).all():
                    raise BadInput(f"{file}: {tensor} has non-finite values; it is damaged")
                parts[part].append(np.ascontiguousarray(found.astype(np.float32).T))
        adapter[target] = {part: np.stack(arrays) for part, arrays in parts.items()}
    head = (config.vocab_size, config.width)
    left = [n for n, t in tensors.items() if not (n.endswith(".lm_head.base_layer.weight") and t.shape == head)]
    if left:
        raise BadInput(f"{file}: {left[0]} does not exist in this base; the adapter was made for a different one")
    return lora, adapter


def _read_config(file: Path) -> dict[str, Any]:
    """Reads ``adapter_config.json``; raises BadInput for options that are unsupported or unknown."""
    try:
        said = json.loads(file.read_text())
        kind = said.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{file}: cannot be read as an adapter configuration ({error})") from None
    if kind != "LORA":
        raise BadInput(f"{file}: peft_type is {kind}; only LORA is supported")
    for name, value in said.items():
        if name not in _IDLE and value and value not in _ALLOWED.get(name, ()):
            raise BadInput(f"{file}: {name}={json.dumps(value)} is not supported; train the adapter without it")
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = said.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise BadInput(f"{file}: {name} is {json.dumps(value)}; it must be a positive number")
    base, named = said.get("base_model_name_or_path"), said.get("target_modules")
    if not isinstance(base, str | None):
        raise BadInput(f"{file}: base_model_name_or_path is {json.dumps(base)}; it must be a string")
    if not all(isinstance(name, str) for name in (named if isinstance(named, list) else [named or ""])):
        raise BadInput(f"{file}: target_modules is {json.dumps(named)}; it must be layer names")
    return said


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, memory-mapped."""
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        remedy = f"; {pickled.name} is pickled and never read: convert it to safetensors" if pickled.exists() else ""
        raise BadInput(f"{file}: there is no such file{remedy}")
    tensors = {tensor.name: tensor for tensor in tensors_in(file)}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise BadInput(f"{file}: tensor {name} is {tensor.dtype}; supported are {', '.join(DTYPES)}")
    return {name: tensor.map() for name, tensor in tensors.items()}
