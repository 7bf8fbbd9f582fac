"""LoRA: adapters of a population, padded to one rank; merging; PEFT's files in and out.

An *adapter* is one member's: ``{"q_proj": {"a": [L, in, r], "b": [L, r, out]}, ...}`` with what it targets, at its own
rank (the head's with L = 1). *Adapters* are a population's: the same with a leading axis M, with all that any member
targets, and R the largest rank. A member's part beyond its own rank and targets is zero in a AND b, so its gradients
are zero, and it stays so: rank, alpha and targets are data, and members that differ in them share one program.

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

#: What can be targeted, in the order that tables name it; the order decides initial weights, too.
TARGETS = (*BLOCK_LINEAR, "lm_head")

Adapter = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What a member's adapter is. The fields are flags, ``--config.<field>``.

    Attributes:
      rank: columns of a.
      alpha: over the rank, it scales what the adapter adds.
      targets: names of ``TARGETS``; or ``all-linear``, as PEFT has it: those of the blocks, not the head.

    Raises BadInput where there is no such adapter.
    """

    rank: int = field(8, "of the adapters", bound=at_least(1))
    alpha: float = field(16.0, "what an adapter adds is scaled by alpha over rank", bound=positive)
    targets: tuple[str, ...] | str = field("all-linear", f"linear layers that are adapted, of {', '.join(TARGETS)}")

    def __post_init__(self):
        names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        names = BLOCK_LINEAR if names == ("all-linear",) else names
        unknown = [name for name in names if name not in TARGETS]
        if unknown or not names:
            raise BadInput(f"--targets={','.join(names)}: {unknown[0] if unknown else 'nothing'} is no linear layer of "
                           f"these models; targets are {', '.join(TARGETS)}, or all-linear")  # fmt: skip
        if self.rank < 1:
            raise BadInput(f"--rank={self.rank}: must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadInput(f"--alpha={self.alpha}: must be a positive number")
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in names))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self, config: ModelConfig) -> None:
        """Raises BadInput where a model has nothing of its own that is targeted."""
        if "lm_head" in self.targets and config.tied_head:
            raise BadInput("--targets=lm_head: the head of this model is its embedding (tie_word_embeddings); "
                           "target the other layers")  # fmt: skip


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """(L, in, out) of every linear layer of a model; a tied head is none."""
    kernels = [leaf for leaf in leaves(config) if leaf.is_kernel]
    return {leaf.path[-2]: (leaf.layers or 1, leaf.shape[0], leaf.shape[1]) for leaf in kernels}


def scales(loras: Sequence[Lora]) -> np.ndarray:
    """float32 [M]: alpha over rank."""
    return np.array([lora.scale for lora in loras], np.float32)


def init_adapters(config: ModelConfig, loras: Sequence[Lora], seeds: Any) -> Adapter:
    """The adapters of a population before training, float32: a uniform as PEFT's (Kaiming, a = sqrt 5), b zero.

    Args:
      config: of the base model.
      loras: of the members.
      seeds: uint32 [M]; may be traced.

    Every number depends on its member's seed, its layer, and its row and column alone: not on the other members, nor
    on the rank that all are padded to. What lies beyond a member's own rank and targets is zero.
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
    """The members' adapters as a population's, padded with zeros (numpy, float32)."""
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
    """One member's adapter, with its own rank and targets, out of a population's."""
    return {
        name: {"a": adapters[name]["a"][row, :, :, : lora.rank], "b": adapters[name]["b"][row, :, : lora.rank]}
        for name in lora.targets
    }


def merge(weights: Mapping[str, Any], lora: Lora, adapter: Adapter, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The weights of one member alone: base and adapter as one tree, which needs no adapter to be run.

    Kernels keep their dtype; the sums are taken in float32. Eight bits cannot hold the sum, so every ``Quantized``
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


#: Options that do not change what a trained adapter computes.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "lora_alpha"),
    *("lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision"),
    *("runtime_config", "target_modules", "use_rslora"),
}
#: Options that may have other values than none, and those; of the initial weights, those that leave the base as it is.
_ALLOWED = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def _tensor_names(config: ModelConfig, target: str) -> list[tuple[str, str]]:
    """PEFT's names of the a and b of every layer of a target."""
    (leaf,) = [leaf for leaf in leaves(config) if leaf.path[-2:] == (target, "kernel")]
    stems = [f"base_model.model.{name.removesuffix('.weight')}" for name in leaf.names()]
    return [(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight") for stem in stems]


def write_adapter(out: Path, config: ModelConfig, lora: Lora, adapter: Adapter, base: str | None = None) -> None:
    """Writes an adapter as a directory that ``peft.PeftModel.from_pretrained`` reads, in place of what is there.

    Args:
      out: the directory; made if need be.
      config: of the base model; ``base`` is its name or path, for those who look for it.
      lora, adapter: what it is; arrays of any kind.

    Raises OSError where it cannot be written.
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
    """Reads an adapter as PEFT writes it (``adapter_config.json``, ``adapter_model.safetensors``).

    Args:
      path: the directory.
      config: of the base model it is for.
      base: the base model's name or path; where both it and the adapter name one, the last parts must agree.

    Returns:
      What it is, and its arrays, numpy float32. rsLoRA comes as the plain LoRA that computes the same. Dropout is of
      training, and left out; so is the copy of the base's head that PEFT adds where the head is targeted.

    Raises:
      BadInput: it is no LoRA adapter, has options that we do not support, or was made for another base.
    """
    path = Path(path)
    said = _read_config(path / "adapter_config.json")
    made_for = said.get("base_model_name_or_path")
    if base and made_for and Path(base).name.lower() != Path(made_for).name.lower():
        raise BadInput(f"{path / 'adapter_config.json'}: base_model_name_or_path is {made_for}, not {base}; "
                       "use the adapter with its own base, or correct the entry if they are the same")  # fmt: skip
    tensors = _read_tensors(path / "adapter_model.safetensors")
    file = path / "adapter_model.safetensors"
    targets = tuple(n for n in TARGETS if any(f".{n}.lora_" in tensor for tensor in tensors))
    named = said.get("target_modules")
    for name in [] if isinstance(named, str) or named is None else named:
        if name.rpartition(".")[2] not in TARGETS:
            raise BadInput(f"{path / 'adapter_config.json'}: target_modules names {name}; "
                           f"supported are {', '.join(TARGETS)}")  # fmt: skip
        if name.rpartition(".")[2] not in targets:
            raise BadInput(f"{file}: has no tensor of {name}, which target_modules of adapter_config.json names")
    if not targets:
        raise BadInput(f"{file}: has no LoRA tensor of {', '.join(TARGETS)}")
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
                    raise BadInput(f"{file}: lacks {tensor}; it is damaged, or made for another base")
                found = tensors.pop(tensor)
                if found.shape != shape:
                    raise BadInput(f"{file}: {tensor} is {list(found.shape)}, not {list(shape)} as rank {rank} and "
                                   "this base ask; it was made for another base")  # fmt: skip
                if not np.isfinite(found).all():
                    raise BadInput(f"{file}: {tensor} has numbers that are not finite; it is damaged")
                parts[part].append(np.ascontiguousarray(found.astype(np.float32).T))
        adapter[target] = {part: np.stack(arrays) for part, arrays in parts.items()}
    head = (config.vocab_size, config.width)
    left = [n for n, t in tensors.items() if not (n.endswith(".lm_head.base_layer.weight") and t.shape == head)]
    if left:
        raise BadInput(f"{file}: {left[0]} has no place in this base; it was made for another one")
    return lora, adapter


def _read_config(file: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says; BadInput for what we do not support. An option not known yet counts, too."""
    try:
        said = json.loads(file.read_text())
        kind = said.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{file}: cannot be read as an adapter's configuration ({error})") from None
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
        raise BadInput(f"{file}: base_model_name_or_path is {json.dumps(base)}; it must be a name")
    if not all(isinstance(name, str) for name in (named if isinstance(named, list) else [named or ""])):
        raise BadInput(f"{file}: target_modules is {json.dumps(named)}; it must be names of layers")
    return said


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, mapped from it."""
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        remedy = f"; {pickled.name} is pickled and never read: convert it with safetensors" if pickled.exists() else ""
        raise BadInput(f"{file}: there is no such file{remedy}")
    tensors = {tensor.name: tensor for tensor in tensors_in(file)}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise BadInput(f"{file}: tensor {name} is {tensor.dtype}; supported are {', '.join(DTYPES)}")
    return {name: tensor.map() for name, tensor in tensors.items()}
