"""What the launchers of fine-tuning share: their flags, the base, and what a run will take."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from instrdiv.finetuning.config import ModelConfig
from instrdiv.finetuning.encrypted import EncryptedSetting
from instrdiv.finetuning.lora import TARGETS, Lora, linear_shapes
from instrdiv.finetuning.packing import Packed
from instrdiv.finetuning.pretraining import SmallBase, make_base, make_tokenizer, random_weights
from instrdiv.finetuning.tokenizer import Tokenizer
from instrdiv.finetuning.training import AdapterMember, AdapterTrainer, Recipe, make_mesh
from instrdiv.finetuning.weights import leaves, read_weights
from instrdiv.launcher import (
    ListParser,
    NameParser,
    NumberParser,
    define,
    define_setting_flags,
    define_switch,
    use_cpu_cores,
)
from instrdiv.pages import duration
from instrdiv.probing import program_bytes

FLAGS = flags.FLAGS


def define_adapter_flags(name: str) -> None:
    """The flags of base, adapters, recipe, devices and run directory, for the launcher of this name."""
    define_setting_flags(of=Recipe)
    whole = NumberParser(int, low=1)
    define(NameParser(), "base", "directory of the checkpoint that is adapted (default: the preset trains a small one)")
    define(whole, "rank", "of the adapters (default: the preset's)")
    define(
        NumberParser(float, low=0), "alpha", "what an adapter adds is scaled by alpha over rank (default: the preset's)"
    )
    define(
        ListParser(NameParser()),
        "targets",
        f"linear layers that are adapted, of {', '.join(TARGETS)} (default: the preset's)",
    )
    define(NumberParser(float, low=0), "learning_rate", "at its peak (default: the preset's)")
    define(whole, "seeds", "adapters a setting (default: the preset's)")
    define(NumberParser(int, low=1, high=256), "devices", "devices to use (default: all, on CPU one a core)")
    define(whole, "data_parallel", "devices that share one adapter's rows", default=1)
    define(whole, "tensor_parallel", "devices that share every matrix of the base", default=1)
    define_switch("fsdp", "spread the base over all devices; each layer is gathered when it is used")
    define_switch("int8", "hold the base's layers in eight bits (default: the preset's)", default=None)
    define(NameParser(), "run_dir", f"where tables and pictures go (default: runs/{name}-<preset>)")
    define_switch("dry_run", "say what it would take, and stop")
    define_switch("overwrite", "start anew in a directory that holds another run")
    define(NumberParser(float, low=0), "checkpoint_minutes", "a checkpoint every so many minutes; inf: none", default=2)


def lora_of_flags(lora: Lora) -> Lora:
    """A preset's adapter, with what the flags say of it."""
    given = {name: value for name in ("rank", "alpha", "targets") if (value := FLAGS[name].value) is not None}
    return dataclasses.replace(lora, **given)


def mesh_of_flags() -> Mesh:
    """The devices that the flags ask for. Call it before anything else uses JAX."""
    use_cpu_cores(FLAGS.devices)
    return make_mesh(FLAGS.devices or jax.device_count(), FLAGS.data_parallel, FLAGS.tensor_parallel)


def int8_of_flags(preset: bool) -> bool:
    """Whether the base's layers are held in eight bits: as the flag says, else the preset."""
    return preset if FLAGS.int8 is None else FLAGS.int8


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that is adapted.

    Attributes:
      path: of its checkpoint.
      config, tokenizer: of the model.
      trained: False in a dry run that would train it first: its weights are random ones then, which are as fast.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    trained: bool = True

    @classmethod
    def of_flags(
        cls, run_dir: Path, small: SmallBase | None, setting: EncryptedSetting, mesh: Mesh, say: Callable[[str], None]
    ) -> Base:
        """The checkpoint that ``--base`` names; else a preset's small one, which is trained beside the run directory.

        Raises BadInput where there is no such checkpoint, or it is not supported.
        """
        if FLAGS.base:
            path = Path(FLAGS.base)
            return cls(path, ModelConfig.from_json(path), Tokenizer.load(path))
        assert small is not None
        path = run_dir.with_name(f"{run_dir.name}-base")
        if FLAGS.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = make_tokenizer(Path(folder), setting)
            return cls(path, small.config(tokenizer.vocab_size, tokenizer.end_ids[0]), tokenizer, trained=False)
        make_base(path, setting, small, mesh, say)
        return cls(path, ModelConfig.from_json(path), Tokenizer.load(path))

    def weights(self, recipe: Recipe, mesh: Mesh, int8: bool, say: Callable[[str], None]) -> Any:
        """Its weights on the mesh, in the recipe's precision, or their layers in eight bits."""
        if not self.trained:
            return random_weights(self.config, seed=0)
        say(f"reading {self.path}")
        return read_weights(self.path, self.config, recipe.precision, mesh=mesh, fsdp=FLAGS.fsdp, int8=int8)


def plan(config: ModelConfig, members: Sequence[AdapterMember], recipe: Recipe, places: int, int8: bool) -> str:
    """What it will take, counted; ``places`` are the tokens of a row."""
    shapes = linear_shapes(config)
    base = sum(layers * inputs * outputs for layers, inputs, outputs in shapes.values())
    rank = max(member.lora.rank for member in members)
    targets = [name for name in TARGETS if any(name in member.lora.targets for member in members)]
    adapter = sum(rank * shapes[name][0] * (shapes[name][1] + shapes[name][2]) for name in targets)
    tokens = len(members) * recipe.steps * recipe.batch_size * places
    # Forward, and back to the activations: two products each; the thin ones also back to themselves.
    flops = tokens * (4 * base + 6 * adapter)
    return (
        f"{len(members)} adapters of rank {rank}, {adapter:,} parameters each ({12 * adapter / 1e9:.3g} GB with their "
        f"optimiser), over {base:,} of the base ({base_bytes(config, recipe, int8) / 1e9:.3g} GB), held once; "
        f"{recipe.steps:,} steps of {recipe.batch_size} rows of {places} tokens: {tokens:.3g} tokens, {flops:.3g} FLOP"
    )


def base_bytes(config: ModelConfig, recipe: Recipe, int8: bool) -> int:
    """Bytes of the base's weights; the scales of eight bits, which are few, are left out."""
    wide = jnp.dtype(recipe.precision).itemsize
    total = 0
    for leaf in leaves(config):
        total += math.prod(leaf.whole_shape) * (1 if int8 and leaf.is_kernel and leaf.layers else wide)
    return total


def forecast(
    config: ModelConfig, weights: Any, members: Sequence[AdapterMember], data: Sequence[Packed], recipe: Recipe,
    mesh: Mesh, say: Callable[[str], None],
) -> str:  # fmt: skip
    """How long training takes and how much memory, by two steps that are taken and the compiler's own account."""
    two_steps = dataclasses.replace(recipe, steps=2, reports=2, warmup_steps=0)
    trainer = AdapterTrainer(config, weights, members, data, two_steps, mesh)
    say("compiling, and taking two steps")
    trainer.program = trainer.program.lower(*trainer.chunk_arguments()).compile()
    jax.block_until_ready(trainer.advance())
    started = time.monotonic()
    jax.block_until_ready(trainer.advance())
    took = duration(recipe.steps * (time.monotonic() - started))
    where = f"{mesh.size} {jax.devices()[0].device_kind} device{'s' * (mesh.size > 1)}"
    return (
        f"training: about {took} on {where}, by the rate of two steps; "
        f"{program_bytes(trainer.program) / 1e9:.3g} GB a device, the base included"
    )
