"""What a run will take, measured: a few steps of its first members, and the compiler's own account of memory.

``planning`` counts and guesses in an instant; this compiles a group's program at full shape, without giving it memory,
and runs one block of members for a second or two. The groups with most arithmetic are probed first; when that has taken
a minute, what is left is scaled from them.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from instrdiv.decoding import GroupDecoder
from instrdiv.evaluation import Evaluator, make_test_set, piece_size
from instrdiv.planning import REACHED_FLOPS, GroupPlan, duration, flops_per_example, in_bytes, make_plan
from instrdiv.population import ExampleOrder, Group, RulePools, make_groups, make_mesh, padded_size, put
from instrdiv.suites import split_prompts
from instrdiv.sweep import Options, Sweep
from instrdiv.training import Trainer, chunk_program, chunk_shapes

#: Seconds that each timed part of a probe takes, about.
_SECONDS = 1.5
#: Seconds after which no other group is probed.
_ENOUGH_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
      compile_seconds, training_seconds, test_seconds: of all groups.
      device_bytes: memory that one device needs at its peak; of a CPU, its share of ``host_bytes``.
      host_bytes: memory of this process at its peak; on CPU devices it includes theirs.
      groups, probed: how many there are, and how many of them were probed; the others are scaled from these.
    """

    compile_seconds: float
    training_seconds: float
    test_seconds: float
    device_bytes: int
    host_bytes: int
    groups: int
    probed: int

    @property
    def seconds(self) -> float:
        return self.compile_seconds + self.training_seconds + self.test_seconds

    @property
    def text(self) -> str:
        """One line for people."""
        peak = f"{in_bytes(self.host_bytes)} of this machine's memory"
        if jax.default_backend() != "cpu":
            peak = f"{in_bytes(self.device_bytes)} a device"
        probe = "from a short probe"
        if self.probed < self.groups:
            probe += f" of {self.probed} of {self.groups} groups (the others by their FLOPs)"
        return (
            f"{probe}: {duration(self.seconds)} in all (compilation {duration(self.compile_seconds)}, "
            f"training {duration(self.training_seconds)}, tests {duration(self.test_seconds)}); {peak} at the peak"
        )


@dataclasses.dataclass(frozen=True)
class _GroupForecast:
    compile_seconds: float
    training_seconds: float
    test_seconds: float
    device_bytes: float
    probe_bytes: int


def forecast(
    sweep: Sweep, options: Options, say: Callable[[str], None] = lambda line: None, conditions: int = 0
) -> Forecast:
    """Probes groups of a sweep on this machine; ``say`` is told of each. Raises BadInput as ``run`` would.

    ``conditions``: under how many the members are tested besides, once they are trained.
    """
    started = time.monotonic()
    options = options.resolve(sweep.members)
    pools = RulePools(sweep.members)
    groups = make_groups(sweep.members)
    plans = make_plan(groups, options, sweep.dev_tests, sweep.tests).groups
    probed: dict[int, _GroupForecast] = {}
    for place in sorted(range(len(groups)), key=lambda place: -plans[place].compute_flops):
        if probed and time.monotonic() - started > _ENOUGH_SECONDS:
            break
        group = groups[place]
        say(f"probing group {group.name} ({len(probed) + 1} of at most {len(groups)})")
        probed[place] = _probe(group, options, pools, sweep, conditions)

    def in_all(seconds: str, work: Sequence[float]) -> float:
        return sum(getattr(p, seconds) for p in probed.values()) * sum(work) / sum(work[place] for place in probed)

    # The estimates of memory that could not be checked err as those that could.
    error = max(p.device_bytes / plans[place].device_bytes for place, p in probed.items())
    device_bytes = [
        probed[place].device_bytes if place in probed else error * plan.device_bytes for place, plan in enumerate(plans)
    ]
    # Groups follow one another. What the probe took of this process, a run takes; and a copy of the state, to save.
    on_cpu = options.devices if jax.default_backend() == "cpu" else 0
    needed = max((on_cpu or 0) * peak + plan.state_bytes for peak, plan in zip(device_bytes, plans, strict=True))
    more = needed - (on_cpu or 0) * max(p.probe_bytes for p in probed.values())
    return Forecast(
        compile_seconds=in_all("compile_seconds", [1.0] * len(groups)),
        training_seconds=in_all("training_seconds", [plan.compute_flops for plan in plans]),
        test_seconds=in_all(
            "test_seconds", [_test_flops(g, p, sweep, conditions) for g, p in zip(groups, plans, strict=True)]
        ),
        device_bytes=int(max(device_bytes)),
        host_bytes=peak_host_bytes() + max(0, int(more)),
        groups=len(groups),
        probed=len(probed),
    )


def peak_host_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes() -> int | None:
    """The most memory that one device has had so far; None where the backend does not say (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _probe(group: Group, options: Options, pools: RulePools, sweep: Sweep, conditions: int) -> _GroupForecast:
    assert options.devices and options.members_per_vmap
    mesh = make_mesh(options.devices, options.data_parallel)
    unit = padded_size(1, mesh, options.members_per_vmap)
    size = padded_size(len(group.members), mesh, options.members_per_vmap)
    config = group.config
    whole_piece = piece_size(sweep.dev_tests, sweep.tests, options.data_parallel)

    # One block of members on every device; fewer examples, or tests, where a step, or a piece, would take long.
    guess = flops_per_example(group) * options.members_per_vmap
    guess /= REACHED_FLOPS[jax.default_backend()] * options.data_parallel
    batch = _as_many(config.batch_size, guess, options.data_parallel)
    piece = _as_many(whole_piece, guess / 3, options.data_parallel)  # forward only
    steps = max(1, min(config.chunk_steps, int(_SECONDS / (guess * config.batch_size))))
    few = dataclasses.replace(group, members=group.members[:unit], config=dataclasses.replace(config, batch_size=batch))
    started = time.monotonic()
    trainer = Trainer(few, pools, mesh, options.members_per_vmap)
    jax.block_until_ready(trainer.state)
    compile_seconds = time.monotonic() - started
    order = ExampleOrder(config.examples, batch).batches(0, steps)
    indices = put(order, mesh, P(None, "data"))

    def arguments():
        return trainer.tables, trainer.data, trainer.state, jnp.int32(0), indices

    program = trainer.train_chunk.lower(*arguments()).compile()
    probe_bytes = program_bytes(program)

    def train():
        trainer.state, metrics = program(*arguments())
        return metrics

    _, train_seconds = _time(train)
    step_seconds = train_seconds / steps * config.batch_size / batch

    evaluator = Evaluator(trainer, piece)
    tests = make_test_set("unseen_dev", few.members, pools, sweep.dev_tests, sweep.tests)
    first = [next(evaluator.pieces(tests))]
    evaluate_compile_seconds, evaluate_seconds = _time(lambda: evaluator.count(first))

    decoder = GroupDecoder(few, few.shape, mesh, options.members_per_vmap, piece)
    prompts = split_prompts(sweep, few, pools, "unseen_dev")
    rules = [table[:piece] for table in prompts.rules]
    prompts = dataclasses.replace(prompts, rules=rules, shown=rules)
    decode_compile_seconds, decode_seconds = _time(lambda: list(decoder.answers(trainer.state.params, prompts)))

    started = time.monotonic()
    program = chunk_program(group, mesh, options.members_per_vmap)
    full = program.lower(*chunk_shapes(group, pools, mesh, options.members_per_vmap)).compile()
    compile_seconds += time.monotonic() - started + evaluate_compile_seconds + decode_compile_seconds

    blocks = size // unit
    dev, rest = (math.ceil(count / whole_piece) for count in (sweep.dev_tests, sweep.tests))
    evaluated, decoded = (config.chunks + 1) * dev + 2 * rest, (1 + conditions) * rest
    return _GroupForecast(
        compile_seconds=compile_seconds,
        training_seconds=config.steps * blocks * step_seconds,
        test_seconds=blocks * (evaluated * evaluate_seconds + decoded * decode_seconds) * whole_piece / piece,
        device_bytes=program_bytes(full),
        probe_bytes=probe_bytes,
    )


def _as_many(of: int, seconds: float, multiple: int) -> int:
    """As many of these, at so many seconds each, as take about ``_SECONDS``; a multiple, as ``of`` is."""
    return max(multiple, min(of, int(_SECONDS / seconds) // multiple * multiple))


def _test_flops(group: Group, plan: GroupPlan, sweep: Sweep, conditions: int) -> float:
    """FLOPs of a group's tests, nearly: as ``_probe`` counts them, a decoded answer like one that is read."""
    tests = (group.config.chunks + 1) * sweep.dev_tests + (3 + conditions) * sweep.tests
    return (plan.members + plan.idle) * tests * flops_per_example(group) / 3


def program_bytes(program: Any) -> int:
    """What a compiled program needs on one device: arguments, results and temporaries."""
    memory = program.memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)  # fmt: skip


def _time(work: Callable[[], Any]) -> tuple[float, float]:
    """By how many seconds the first call takes longer than the others, to compile; and seconds of one of these."""
    started = time.monotonic()
    jax.block_until_ready(work())
    first = time.monotonic() - started
    calls, started = 0, time.monotonic()
    while (passed := time.monotonic() - started) < _SECONDS:
        jax.block_until_ready(work())
        calls += 1
    return max(0.0, first - passed / calls), passed / calls
