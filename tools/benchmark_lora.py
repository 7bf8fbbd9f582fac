"""How fast is a population of adapters, compared with one adapter after another and with Transformers plus PEFT?

    python -m tools.benchmark_lora --preset=laptop
    python -m tools.benchmark_lora --preset=gpu --minutes=9

The adapters of four members train over one frozen base, together or one at a time, exactly as in a run: in chunks of
compiled steps, with clipping, schedule and metrics, and rows gathered on the host. The base has random weights, in
bfloat16 or float32 and in int8. The peer trains one adapter on the same rows, which are on the device before timing
starts, with the same rematerialization, but without clipping, schedule or metrics. The contenders take turns in one
process (``tools/measuring.py``).

The results go to ``results/finetuning/benchmark-<device>/``: ``benchmark.json`` (the machine, every sample, and
``memory``: bytes of the bases, bytes that each of our contenders adds on the device, and the compiler's memory
analysis), ``benchmark.csv``, ``benchmark.png``.

preset   hardware          time                     what it measures
smoke    two CPU cores     half a minute            nothing: checks that the benchmark runs
laptop   two CPU cores     3 minutes (measured)     a decoder of 3 M parameters
gpu      one H200          9 minutes (--minutes)    the shape of Llama-2-7B, not run
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.flags import FlagValues
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.data.packing import Packed
from instrdiv.launch.flags import ListParser, NameParser, NumberParser, define, define_preset_flag, start
from instrdiv.models.llama import BLOCK_LINEAR, Model
from instrdiv.models.llama_config import ModelConfig, Rope
from instrdiv.models.lora import Lora, linear_shapes
from instrdiv.models.weights import quantize
from instrdiv.runtime.devices import usable_cores
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.memory import peak_device_bytes, program_bytes
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.progress import telling
from instrdiv.runtime.tables import Row
from instrdiv.runtime.units import in_bytes
from instrdiv.training.adapter_trainer import AdapterTrainer, Job
from instrdiv.training.recipe import AdapterMember, Recipe
from tools import machine, peers
from tools.contenders import compile_program
from tools.measuring import Contender, NotRun, Outcome, Ready, ratio, take_turns
from tools.record import Record

#: Kinds of contenders; the choices of ``--only``.
KINDS = ("population", "one_at_a_time", "population_int8", "one_at_a_time_int8", "peft")
#: Number of different batches that the peer cycles through.
_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset measures.

    Attributes:
      config: configuration of the base.
      members: members trained together.
      batch_size, places: rows per step of one member, and tokens per row.
      rank: rank of every adapter; all linear layers of the blocks are targeted.
      precision, remat: as in ``Recipe``.
      seconds, rounds: approximate duration of a sample; samples per contender.
    """

    config: ModelConfig
    members: int
    batch_size: int
    places: int
    rank: int
    precision: str = "float32"
    remat: bool = False
    seconds: float = 4.0
    rounds: int = 5

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def width(self) -> int:
        return self.config.width

    def as_row(self) -> Row:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"config": dataclasses.asdict(self.config)}

    @property
    def flops(self) -> float:
        """FLOPs of training on one row; for the base, of the forward pass and activation gradients, not of weights."""
        shapes = linear_shapes(self.config)
        base = sum(layers * inputs * outputs for layers, inputs, outputs in shapes.values())
        thin = sum(shapes[name][0] * self.rank * sum(shapes[name][1:]) for name in BLOCK_LINEAR)
        attention = self.config.layers * self.places * self.config.heads * self.config.head_dim
        return self.places * (4.0 * base + 6.0 * thin + 3.0 * 4.0 * attention)


def _llama(vocabulary: int, width: int, layers: int, heads: int, mlp: int, places: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=mlp,
        norm_epsilon=1e-5,
        rope=Rope(),
        max_positions=places,
        windows=(None,) * layers,
    )


SCALES = {
    "smoke": Scale(_llama(64, 16, 2, 2, 32, 64), members=2, batch_size=2, places=16, rank=2, seconds=0.05, rounds=2),
    "laptop": Scale(_llama(2048, 192, 6, 4, 512, 256), members=4, batch_size=2, places=96, rank=8),
    "gpu": Scale(
        _llama(32_000, 4096, 32, 32, 11_008, 4096),
        members=4,
        batch_size=4,
        places=512,
        rank=64,
        precision="bfloat16",
        remat=True,
    ),
}


class World:
    """What all contenders train on: members that differ in their seed, shared random rows, and a base of each kind.

    Attributes:
      members, rows: see above.
      memory: bytes of the bases and, by kind, of what each of our contenders adds.
    """

    def __init__(self, scale: Scale):
        self.scale = scale
        self.members = [
            AdapterMember(Lora(scale.rank, 2.0 * scale.rank), learning_rate=1e-5, seed=seed)
            for seed in range(scale.members)
        ]
        rng = np.random.default_rng(0)
        shape = (16 * scale.batch_size, scale.places)
        tokens = rng.integers(scale.config.vocab_size, size=shape, dtype=np.int32)
        positions = np.broadcast_to(np.arange(scale.places, dtype=np.int32), shape)
        response = positions >= scale.places // 2
        segments, sources = np.ones(shape, np.int32), np.zeros(shape, np.int8)
        self.rows = Packed(tokens, positions, segments, response, sources, ("random",))
        self.memory: dict[str, Any] = {}
        self._weights: dict[bool, Mapping[str, Any]] = {}

    def weights(self, int8: bool) -> Mapping[str, Any]:
        """The base, created on first use and shared by all of our contenders that use it.

        Raises NotRun if there is too little memory.
        """
        if int8 not in self._weights:
            config, dtype = self.scale.config, jnp.dtype(self.scale.precision)
            kernels = sum(math.prod(shape) for shape in linear_shapes(config).values())
            # Leaves are created one by one: a fifth on top for the largest one while it is created.
            needed = 1.2 * (config.vocab_size * config.width + kernels) * (1 if int8 else dtype.itemsize)
            if (free := _free_bytes()) < needed:
                raise NotRun(f"not run: the base needs {in_bytes(needed)} of memory, only {in_bytes(free)} are free")
            self._weights[int8] = self._random_weights(int8)
            self.memory[_base(int8)] = _size(self._weights[int8])
        return self._weights[int8]

    def _random_weights(self, int8: bool) -> Mapping[str, Any]:
        """Random weights on the first device, in the compute precision; with ``int8``, block kernels in int8."""
        config, dtype = self.scale.config, jnp.dtype(self.scale.precision)
        sharding = NamedSharding(make_mesh(), P())

        @functools.partial(jax.jit, static_argnums=(1, 2), out_shardings=sharding)
        def kernel(number, shape, as_int8):
            one = jax.random.normal(jax.random.key(number), shape, dtype) / math.sqrt(shape[-2])
            return quantize(one) if as_int8 else one

        shapes = linear_shapes(config)
        kernels = {n: {"kernel": kernel(i, shapes[n], int8)} for i, n in enumerate(BLOCK_LINEAR)}
        ones = jnp.ones((config.layers, config.width), dtype)
        return {
            "embed": kernel(100, (config.vocab_size, config.width), False),
            "norm": ones[0],
            "lm_head": {"kernel": kernel(101, (config.width, config.vocab_size), False)},
            "layers": {"input_norm": ones, "post_norm": ones, **kernels},
        }

    def trainer(self, members: int, int8: bool = False) -> AdapterTrainer:
        """A trainer of the first members on one device; chunks have two steps, so that a sample spans several."""
        scale = self.scale
        recipe = Recipe(
            steps=1_000_000,
            reports=500_000,
            batch_size=scale.batch_size,
            precision=scale.precision,
            remat=scale.remat,
            schedule="constant",
        )
        rows = [self.rows] * members
        return AdapterTrainer(
            Job(Model(scale.config, self.weights(int8)), self.members[:members], rows, recipe, make_mesh())
        )


def _base(int8: bool) -> str:
    return "base_int8" if int8 else "base"


def _free_bytes() -> float:
    """Free memory of the first device; infinite if unknown."""
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def _size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def ours(world: World, members: int, int8: bool) -> Contender:
    """Members trained together, or a single one.

    One member represents training them one after another: they differ only in their seeds and share a program.
    """
    scale, together = world.scale, members > 1
    kind = ("population" if together else "one_at_a_time") + ("_int8" if int8 else "")

    def set_up() -> Ready:
        world.weights(int8)
        before = _size(jax.live_arrays())
        trainer = world.trainer(members, int8)
        trainer.program, seconds = compile_program(trainer.program, *trainer.chunk_arguments())
        analysis = trainer.program.memory_analysis()
        world.memory[kind] = {
            "members": members,
            "state": _size(trainer.state),
            "added": _size(jax.live_arrays()) - before,  # to the memory in use on the device: the base is not copied
            "arguments": analysis.argument_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
        }
        return Ready(
            call=trainer.advance,
            wait=lambda: jax.block_until_ready(trainer.state),
            examples=members * trainer.recipe.chunk_steps * scale.batch_size,
            compile_seconds=seconds,
            peak_bytes=functools.partial(program_bytes, trainer.program),
        )

    base = "8-bit base" if int8 else f"{scale.precision} base"
    who = f"{members} adapters together" if together else "one adapter at a time"
    return Contender(
        kind=kind,
        side="ours",
        label=f"ours: {who}, {base}",
        batch_size=scale.batch_size,
        members=members,
        set_up=set_up,
        facts={"base": "int8" if int8 else scale.precision, "rank": scale.rank, "remat": scale.remat},
    )


def peft(world: World) -> Contender:
    """Transformers' Llama with PEFT's LoRA: one adapter, eager, attention by ``scaled_dot_product_attention``."""
    scale, config = world.scale, world.scale.config

    def set_up() -> Ready:
        import peft as library
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        device, before = peers.torch_device(), peers.allocated()
        dtype = getattr(torch, scale.precision)
        if device == "cuda":
            needed = 2.5 * 2 * scale.flops / scale.places / 4  # the bfloat16 base, and 1.5 times that
            free, _ = torch.cuda.mem_get_info()
            if free < needed:
                raise NotRun(f"not run: needs about {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")
        make: Any = LlamaConfig
        asked = make(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_positions,
            use_cache=False,
            attn_implementation="sdpa",
        )
        kept = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                base: Any = LlamaForCausalLM(asked)
        finally:
            torch.set_default_dtype(kept)
        if scale.remat:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = library.LoraConfig(r=scale.rank, lora_alpha=2 * scale.rank, target_modules=list(BLOCK_LINEAR))
        model: Any = library.get_peft_model(base, lora)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
        count = _BATCHES * scale.batch_size
        tokens = torch.from_numpy(world.rows.tokens[:count].astype(np.int64)).to(device)
        labels = torch.where(torch.from_numpy(world.rows.loss_mask[:count]).to(device), tokens, -100)
        batches = itertools.cycle(list(zip(*(part.split(scale.batch_size) for part in (tokens, labels)), strict=True)))

        def step() -> None:
            inputs, targets = next(batches)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=scale.precision == "bfloat16"):
                loss = model(input_ids=inputs, labels=targets).loss
            loss.backward()
            optimizer.step()

        return Ready(step, peers.wait, scale.batch_size, peak_bytes=lambda: peers.peak_since(before))

    return Contender(
        kind="peft",
        side="peers",
        label=f"Transformers + PEFT: one adapter at a time, {scale.precision} base",
        batch_size=scale.batch_size,
        members=1,
        set_up=peers.with_torch(set_up, ("torch", "transformers", "peft")),
        facts={"base": scale.precision, "rank": scale.rank, "remat": scale.remat, "threads": usable_cores()},
    )


def line_up(world: World, only: Sequence[str] | None) -> list[Contender]:
    members = world.scale.members
    everyone = [
        *(ours(world, members, False), ours(world, 1, False), peft(world)),
        *(ours(world, members, True), ours(world, 1, True)),
    ]
    return [contender for contender in everyone if not only or contender.kind in only]


def verdict(record: Record) -> list[str]:
    """The main conclusions, as sentences."""
    said = []
    memory = record.memory or {}
    for suffix, int8 in (("", False), ("_int8", True)):
        together, alone = record.best(f"population{suffix}"), record.best(f"one_at_a_time{suffix}")
        if together and alone:
            words = "8-bit" if int8 else record.setting.precision
            said.append(f"{record.members} adapters together over one {words} base of {in_bytes(memory[_base(int8)])}, "
                        f"which add {in_bytes(memory[f'population{suffix}']['added'])}, take "
                        f"{1 / ratio(together, alone):.2f} of the time of as many runs one after another")  # fmt: skip
    together, peer = record.best("population"), record.best("peft")
    if together and peer:
        said.append(f"adapters together take {1 / ratio(together, peer):.2f} of the time of Transformers + PEFT")
    return said


def benchmark(values: FlagValues) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave some of the memory to PyTorch
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured
    on_cpu = jax.default_backend() == "cpu"
    end = time.monotonic() + 60 * (values.minutes or (math.inf if on_cpu else 9))

    def time_left() -> float:
        return end - time.monotonic()

    changes = {name: getattr(values, name) for name in ("members", "batch_size", "places", "rank", "seconds", "rounds")}
    scale = dataclasses.replace(SCALES[values.preset], **{n: value for n, value in changes.items() if value})
    if scale.places > scale.config.max_positions:
        raise BadInput(f"--places={scale.places}: the base has {scale.config.max_positions} positions")
    world = World(scale)
    device = "cpu" if on_cpu else re.sub(r"\W+", "-", jax.devices()[0].device_kind).lower()
    folder = Path(values.out or f"results/finetuning/benchmark-{device}")
    folder.mkdir(parents=True, exist_ok=True)
    with telling() as say:
        say("measuring this machine's matrix products and copies")
        record = Record(
            preset=values.preset,
            setting=scale,
            members=scale.members,
            tokens=float(scale.places),
            flops=scale.flops,
            command=["python", "-m", "tools.benchmark_lora", *sys.argv[1:]],
            machine=machine.describe(),
            ceilings=machine.ceilings(scale.precision),
            outcomes=[Outcome(contender) for contender in line_up(world, values.only)],
        )
        record.memory = world.memory
        set_up(record, folder, time_left, say)

        def before(round: int, place: int, outcome: Outcome) -> None:
            if place == 0:
                record.write(folder)
            say(f"round {round + 1} of {scale.rounds}: {outcome.contender.label}")

        take_turns(record.outcomes, scale.rounds, time_left, before)
        record.device_peak_bytes = peak_device_bytes()
        record.write(folder)
        record.draw(folder / "benchmark.png")
    print(record.as_text(), *verdict(record), f"full results: {folder}", sep="\n\n")


def set_up(record: Record, folder: Path, time_left: Callable[[], float], say: Callable[[str], None]) -> None:
    """Sets up contenders while there is time left to sample them."""
    for outcome in record.outcomes:
        ready = sum(other.ready is not None for other in record.outcomes)
        if ready and time_left() < 60 + record.setting.rounds * record.setting.seconds * (ready + 1):
            return
        say(f"setting up: {outcome.contender.label}")
        outcome.prepare(record.setting.seconds)
        if not outcome.ready:
            say(f"{outcome.contender.label}: {outcome.status}")
        record.write(folder)


def define_flags(values: FlagValues) -> None:
    whole = NumberParser(int, low=1)
    define_preset_flag(values, SCALES)
    define(values, whole, "members", "adapters trained together (default: the preset's)")
    define(values, whole, "batch_size", "rows per step of one member (default: the preset's)")
    define(values, whole, "places", "tokens per row (default: the preset's)")
    define(values, whole, "rank", "rank of every adapter (default: the preset's)")
    define(values, NumberParser(float, low=0), "seconds", "approximate seconds per sample (default: the preset's)")
    define(values, whole, "rounds", "samples per contender (default: the preset's)")
    define(values, NumberParser(float, low=0), "minutes", "time limit in minutes (default: 9; on CPU, none)")
    define(values, ListParser(flags.EnumParser(list(KINDS))), "only", f"contenders, a list of {', '.join(KINDS)}")
    define(values, NameParser(), "out", "results directory (default: results/finetuning/benchmark-<device>)")


if __name__ == "__main__":
    start(benchmark, define_flags, __doc__)
