"""How fast is training, compared with the alternatives on this machine?

    python -m tools.benchmark --preset=laptop --startup --memory
    python -m tools.benchmark --preset=paper --config.precision=float32 --config.batch_size=64 --seconds=6
    python -m tools.benchmark --preset=gpu --config.optimizer=adamw --memory

The speed comparisons in the documentation come from here. Our trainer, PyTorch and others do the same work in turns, in
one process; each result is a median with its extremes, compared with the throughput of this machine's matrix products.
``tools/peers.py`` explains how fair the comparison is. A peer that is not installed, or fails, appears in the table
with the reason. ``--memory`` compiles 48 members of the papers' shape, and also runs them on an accelerator;
``--startup`` times a launcher's first step. Run nothing else on the machine; the load at the start is in the JSON.

The results go to ``results/benchmark/<preset>-<device>/``: ``benchmark.json`` (the machine and every sample; rewritten
during the run), ``benchmark.csv``, ``benchmark.png``, and ``targets.md``: the performance targets, and whether each was
met.

preset   hardware          time                      what it measures
smoke    two CPU cores     a minute                  nothing: checks that the benchmark runs
laptop   two CPU cores     4 minutes (measured)      the laptop presets of all figures
gpu      one H200          9 minutes (--minutes)     the papers' shape (measured in part: results/benchmark/)
paper    two CPU cores     10 minutes (estimated)    the papers' shape without an accelerator, flags as above
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl.flags import FlagValues

from instrdiv.config.layout import ATTENTION, Options
from instrdiv.config.presets import BASES, DEV_TESTS, Setting
from instrdiv.config.settings import Member
from instrdiv.launch.flags import (
    ListParser,
    NameParser,
    NumberParser,
    define,
    define_preset_flag,
    define_setting_flags,
    define_switch,
    refuse_idle_flags,
    setting_flags,
    start,
)
from instrdiv.runtime.devices import usable_cores, use_cpu_cores
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.memory import peak_device_bytes
from instrdiv.runtime.progress import telling
from tools import contenders, machine, peers, startup, targets
from tools.contenders import World
from tools.measuring import Contender, Outcome, in_one_line, take_turns
from tools.record import Record

#: Kinds of contenders; the choices of ``--only``.
KINDS = (
    *("population", "one_at_a_time", "sampling", "evaluation"),
    *("gpt2_eager_fp32", "gpt2_eager_bf16", "gpt2_compiled_fp32", "gpt2_compiled_bf16", "gpt2_graphs_bf16"),
    *("ensemble", "flax_loop"),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset measures, unless flags override it.

    Attributes:
      members: members trained together; for the papers' shape on CPU, one per core instead.
      tests: final tests of figure 2a.
      peer_batch_sizes: batch sizes of PyTorch's models; for the papers' shape on CPU, 64 and ours instead.
      seconds: approximate duration of a sample.
      rounds: samples per contender.
    """

    members: int
    tests: int
    peer_batch_sizes: tuple[int, ...]
    seconds: float = 2.0
    rounds: int = 5


SIZES = {
    "smoke": Size(members=2, tests=128, peer_batch_sizes=(32,), seconds=0.05, rounds=2),
    "laptop": Size(members=8, tests=2_000, peer_batch_sizes=(64,)),
    "gpu": Size(members=48, tests=10_000, peer_batch_sizes=(64, 256, 1024)),
    "paper": Size(members=48, tests=100_000, peer_batch_sizes=(64, 256, 1024)),
}
#: Time to allow for setting up one contender, mostly compilation, when there is a time limit.
_SET_UP_SECONDS = 45.0


def line_up(
    world: World,
    batch_sizes: Sequence[int],
    blocks: Sequence[int],
    attentions: Sequence[str],
    peer_batch_sizes: Sequence[int],
    dev_tests: int,
    tests: int,
) -> list[Contender]:
    """All contenders, the most important first: if time runs out, the last ones are not run."""
    on_cpu, optimizer = jax.default_backend() == "cpu", world.setting.optimizer

    def ours(batch_size: int, block: int, optimizer: str, attention: str = attentions[0]) -> Contender:
        return contenders.population(world, batch_size, optimizer, block, devices_for(world, block), attention)

    def gpt2(mode: str, precision: str) -> list[Contender]:
        return [peers.gpt2(world, batch_size, precision, mode) for batch_size in peer_batch_sizes]

    first, *others = [ours(batch_size, block, optimizer) for batch_size in batch_sizes for block in blocks]
    batch_size, block = batch_sizes[0], blocks[0]
    others = [ours(batch_size, block, optimizer, attention) for attention in attentions[1:]] + others
    compiled, *more_compiled = gpt2("compiled", "float32" if on_cpu else "bfloat16")
    eager, *more_eager = gpt2("eager", "float32")
    eager_bf16 = [] if on_cpu else gpt2("eager", "bfloat16")
    graphs = [] if on_cpu else gpt2("graphs", "bfloat16")
    as_peers = [] if optimizer == "adamw" else ["adamw"]
    return [
        *(first, compiled, *graphs[:1], eager, contenders.one_at_a_time(world, batch_size, optimizer)),
        contenders.sampling(world, batch_size, block, devices_for(world, block)),
        *others,
        *more_compiled,
        *(ours(batch_size, block, name) for name in as_peers),
        contenders.evaluation(world, block, devices_for(world, block), dev_tests, tests),
        peers.ensemble(world, peer_batch_sizes[0]),
        peers.flax_loop(world, batch_size),
        *eager_bf16[:1],
        *(contenders.one_at_a_time(world, batch_size, name) for name in as_peers),
        *more_eager,
        *eager_bf16[1:],
        *graphs[1:],
    ]


def likely_blocks(world: World) -> list[int]:
    """Block sizes that may be the fastest: one member on CPU; elsewhere a guess, half of it and twice it.

    A run measures which one is fastest (``probing.choose_block``); here each is a contender.
    """
    guess = Options().resolve(world.members).members_per_vmap
    assert guess
    if jax.default_backend() == "cpu":
        return [guess]
    return list(dict.fromkeys((guess, max(1, guess // 2), min(2 * guess, len(world.members)))))


def likely_attentions(setting: Setting) -> list[str]:
    """Implementations of attention that work on this machine, for this setting."""
    found = []
    for attention in ATTENTION:
        try:
            Options(attention=attention).resolve([Member(setting, 0)])
            found.append(attention)
        except BadInput:
            continue
    return found


def devices_for(world: World, block: int) -> int:
    """The number of devices that a run would use with blocks of this many members."""
    devices = Options(members_per_vmap=block).resolve(world.members).devices
    assert devices
    return devices


def chosen_size(values: FlagValues) -> Size:
    """The preset's size, with ``--seconds`` and ``--rounds`` applied."""
    size = SIZES[values.preset]
    return dataclasses.replace(size, seconds=values.seconds or size.seconds, rounds=values.rounds or size.rounds)


def chosen_setting(values: FlagValues) -> tuple[Setting, list[int]]:
    """The preset's setting with the flags applied, and the batch sizes to measure ours at."""
    given = setting_flags(values, Setting)
    base = BASES[values.preset]
    batch_sizes = list(dict.fromkeys(given.pop("batch_size", (base.batch_size,))))
    settings = [dataclasses.replace(base, **given, batch_size=batch_size) for batch_size in batch_sizes]
    for setting in settings:
        setting.validate()
    refuse_idle_flags(settings, given)
    return settings[0], batch_sizes


def set_up(
    record: Record, folder: Path, size: Size, time_left: Callable[[], float], say: Callable[[str], None]
) -> None:
    """Sets up contenders while time allows, keeping enough for the rounds of those that are already set up."""
    for number, outcome in enumerate(record.outcomes, 1):
        ready = sum(other.ready is not None for other in record.outcomes)
        if ready and time_left() < _SET_UP_SECONDS + size.rounds * size.seconds * (ready + 1):
            return
        say(f"setting up {number} of {len(record.outcomes)}: {outcome.contender.label}")
        outcome.prepare(size.seconds)
        if not outcome.ready:
            say(f"{outcome.contender.label}: {outcome.status}")
        record.write(folder)


def compete(
    record: Record, folder: Path, size: Size, time_left: Callable[[], float], say: Callable[[str], None]
) -> None:
    """Samples all contenders in turns."""

    def before(round: int, place: int, outcome: Outcome) -> None:
        if place == 0:
            record.write(folder)
        say(f"round {round + 1} of {size.rounds}: {outcome.contender.label}")

    take_turns(record.outcomes, size.rounds, time_left, before)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of the work or, if it fails, the reason, so that a failure does not lose earlier measurements."""
    try:
        return work()
    except Exception as error:
        return {"failed": in_one_line(error)}


def publish(record: Record, folder: Path) -> None:
    """Writes all files."""
    record.write(folder)
    record.draw(folder / "benchmark.png")
    (folder / "targets.md").write_text(targets.markdown(record))


def benchmark(values: FlagValues) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave some of the memory to PyTorch
    use_cpu_cores()
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured
    on_cpu = jax.default_backend() == "cpu"
    kept = 2 * _SET_UP_SECONDS * values.startup  # reserved for what follows the contenders
    end = time.monotonic() + 60 * (values.minutes or (math.inf if on_cpu else 9)) - kept

    def time_left() -> float:
        return end - time.monotonic()

    setting, batch_sizes = chosen_setting(values)
    size = chosen_size(values)
    members, peer_batch_sizes = size.members, size.peer_batch_sizes
    if on_cpu and values.preset in ("gpu", "paper"):
        members, peer_batch_sizes = usable_cores(), tuple({64: None, setting.batch_size: None})
    members, peer_batch_sizes = values.members or members, values.peer_batch_sizes or peer_batch_sizes
    world = World(setting, members, size.seconds)
    blocks = values.members_per_vmap or likely_blocks(world)
    attentions = values.attention or likely_attentions(setting)
    for attention in attentions:
        Options(attention=attention).resolve(world.members)  # raises BadInput before anything is compiled
    line = line_up(world, batch_sizes, blocks, attentions, peer_batch_sizes, DEV_TESTS[values.preset], size.tests)
    line = [contender for contender in line if not values.only or contender.kind in values.only]
    if not line:
        raise BadInput(f"--only={','.join(values.only)}: none of these is measured on {jax.default_backend()}")

    device = "cpu" if on_cpu else re.sub(r"\W+", "-", jax.devices()[0].device_kind).lower()
    folder = Path(values.out or f"results/benchmark/{values.preset}-{device}")
    folder.mkdir(parents=True, exist_ok=True)
    with telling() as say:
        say("measuring this machine's matrix products and copies")
        record = Record(
            preset=values.preset,
            setting=setting,
            members=members,
            tokens=world.tokens,
            flops=world.flops,
            command=["python", "-m", "tools.benchmark", *sys.argv[1:]],
            machine=machine.describe(),
            ceilings=machine.ceilings(setting.precision),
            outcomes=[Outcome(contender) for contender in line],
        )
        record.write(folder)
        if values.memory:  # first, so that the peak memory is its own
            say("compiling 48 members of the papers' shape at batch 512")
            record.memory = attempt(contenders.memory)
            record.write(folder)
        set_up(record, folder, size, time_left, say)
        compete(record, folder, size, time_left, say)
        record.device_peak_bytes = peak_device_bytes()
        publish(record, folder)
        if values.startup:
            say("timing a launcher's first step, twice")
            record.startup = attempt(lambda: startup.measure(values.preset, setting.steps))
            publish(record, folder)
    print(record.as_text(), targets.markdown(record), f"full results: {folder}", sep="\n\n")


def define_flags(values: FlagValues) -> None:
    whole = NumberParser(int, low=1)
    define_preset_flag(values, BASES)
    define_setting_flags(values, Setting, {"batch_size"})
    define(values, whole, "members", "members trained together (default: the preset's)")
    define(values, ListParser(whole), "members_per_vmap", "our block sizes, a list (default: 1 on CPU, else a few)")
    kernels = ListParser(flags.EnumParser(list(ATTENTION)))
    define(values, kernels, "attention", f"ours, a list of {', '.join(ATTENTION)} (default: all that work)")
    define(values, ListParser(whole), "peer_batch_sizes", "PyTorch's batch sizes, a list (default: the preset's)")
    define(values, NumberParser(float, low=0), "seconds", "approximate seconds per sample (default: the preset's)")
    define(values, whole, "rounds", "samples per contender (default: the preset's)")
    define(values, NumberParser(float, low=0), "minutes", "time limit in minutes (default: 9; on CPU, none)")
    define(values, ListParser(flags.EnumParser(list(KINDS))), "only", f"contenders, a list of {', '.join(KINDS)}")
    define(values, NameParser(), "out", "results directory (default: results/benchmark/<preset>-<device>)")
    define_switch(values, "startup", "also time a launcher's first step")
    define_switch(values, "memory", "also compile the papers' population, and run it on an accelerator")


if __name__ == "__main__":
    start(benchmark, define_flags, __doc__)
