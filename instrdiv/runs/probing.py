"""Measures the cost of a run and its best block size, from a few steps and the compiler's own memory analysis.

``planning`` only counts and guesses, instantly; ``forecast`` compiles a group's program at full shape, without
allocating its memory, and runs one block of members for a second or two. The groups with the most FLOPs are probed
first; after a minute, the remaining groups are extrapolated from them. ``choose_block`` tries several block sizes on
the group with the most FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.config.groups import Group, make_groups
from instrdiv.config.layout import Layout, Options
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.decoding import GroupDecoder
from instrdiv.evaluation.exact_match import Evaluator, piece_size
from instrdiv.evaluation.tally import split_prompts
from instrdiv.evaluation.test_sets import make_test_set
from instrdiv.runs.planning import REACHED_FLOPS, GroupPlan, flops_per_example, make_plan
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.memory import peak_host_bytes, program_bytes
from instrdiv.runtime.mesh import make_mesh, padded_size, put
from instrdiv.runtime.units import duration, in_bytes
from instrdiv.training.members import Trainer, abstract_member, chunk_program, chunk_shapes
from instrdiv.training.order import ExampleOrder
from instrdiv.training.population import stack_group

#: Approximate duration of each timed part of a probe, in seconds.
_SECONDS = 1.5
#: Seconds after which no further group is probed.
_ENOUGH_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The forecast cost of a run.

    Attributes:
      compile_seconds, training_seconds, test_seconds: totals over all groups.
      device_bytes: peak memory of one device; for a CPU device, its share of ``host_bytes``.
      host_bytes: peak memory of this process; with CPU devices it includes theirs.
      groups, probed: number of groups, and of those that were probed; the others are extrapolated from these.
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
        """A one-line summary."""
        peak = f"{in_bytes(self.host_bytes)} of this machine's memory"
        if jax.default_backend() != "cpu":
            peak = f"{in_bytes(self.device_bytes)} per device"
        probe = "from a short probe"
        if self.probed < self.groups:
            probe += f" of {self.probed} of {self.groups} groups (the others scaled by FLOPs)"
        return (
            f"{probe}: {duration(self.seconds)} in total (compilation {duration(self.compile_seconds)}, "
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
    """Probes groups of a sweep on this machine; calls ``say`` for each. Raises BadInput as ``run`` would.

    ``conditions``: number of additional conditions under which the members are tested after training.
    """
    started = time.monotonic()
    layout = options.resolve(sweep.members)
    pools = RulePools(sweep.members)
    groups = make_groups(sweep.members, attention=layout.attention)
    plans = make_plan(groups, layout, sweep.dev_tests, sweep.tests).groups
    probed: dict[int, _GroupForecast] = {}
    for place in sorted(range(len(groups)), key=lambda place: -plans[place].compute_flops):
        if probed and time.monotonic() - started > _ENOUGH_SECONDS:
            break
        group = groups[place]
        say(f"probing group {group.name} ({len(probed) + 1} of at most {len(groups)})")
        probed[place] = _probe(group, layout, pools, sweep, conditions)

    def in_all(seconds: str, work: Sequence[float]) -> float:
        return sum(getattr(p, seconds) for p in probed.values()) * sum(work) / sum(work[place] for place in probed)

    # Assume that the memory estimates of unprobed groups are off by the same factor as the worst probed one.
    error = max(p.device_bytes / plans[place].device_bytes for place, p in probed.items())
    device_bytes = [
        probed[place].device_bytes if place in probed else error * plan.device_bytes for place, plan in enumerate(plans)
    ]
    # Groups run one after another. A run needs what the probe needed of this process, plus a copy of the state for
    # checkpointing.
    on_cpu = layout.devices if jax.default_backend() == "cpu" else 0
    needed = max(on_cpu * peak + plan.state_bytes for peak, plan in zip(device_bytes, plans, strict=True))
    more = needed - on_cpu * max(p.probe_bytes for p in probed.values())
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


@dataclasses.dataclass(frozen=True)
class BlockChoice:
    """A layout whose block size was chosen by measurement.

    Attributes:
      layout: the layout with the chosen block size.
      rates: block size -> measured examples per second of the whole group.
      too_large: why the next larger block does not fit; empty if none was too large.
    """

    layout: Layout
    rates: dict[int, float]
    too_large: str = ""

    @property
    def text(self) -> str:
        """A one-line summary."""
        rates = ", ".join(f"{rate:,.0f} with {size}" for size, rate in self.rates.items())
        limit = f"; {self.too_large}" if self.too_large else ""
        return f"members_per_vmap={self.layout.members_per_vmap} chosen by a probe: examples/s {rates}{limit}"


def choose_block(
    members: Sequence[Member], options: Options, pools: RulePools, say: Callable[[str], None] = lambda line: None
) -> BlockChoice:
    """Measures which block size trains fastest, on the group with the most FLOPs.

    The size is roughly doubled until it is slower than the one before or does not fit into a device's memory, either
    by the compiler's analysis (scaled, by the plan's estimates, to the group that needs the most) or because running it
    fails for lack of memory. The smallest size within 2 % of the best is chosen. Each size costs a compilation and a
    second or two.

    Args:
      members: the members of one cohort.
      options: the layout; ``members_per_vmap`` is ignored.
      pools: the members' instructions.
      say: called with a message for every size that is tried.

    Raises BadInput if the layout is impossible, or not even one member at a time fits.
    """
    groups = make_groups(members, attention=options.attention)

    def arithmetic(place: int) -> float:
        group = groups[place]
        return flops_per_example(group) * group.config.steps * group.config.batch_size * len(group.members)

    place = max(range(len(groups)), key=arithmetic)
    rates: dict[int, float] = {}
    too_large = ""
    for size in _block_sizes(max(len(group.members) for group in groups), options):
        layout = dataclasses.replace(options, members_per_vmap=size).resolve(members)
        plans = make_plan(groups, layout, 1, 1).groups
        say(f"probing group {groups[place].name}: {size} member(s) at a time")
        try:
            scale = max(plan.device_bytes for plan in plans) / plans[place].device_bytes
            rates[size] = _block_rate(groups[place], layout, pools, scale)
        except _TooLarge as reason:
            too_large = f"{size} member(s) need {reason}"
            break
        if len(rates) > 1 and rates[size] < list(rates.values())[-2]:
            break
    if not rates:
        raise BadInput(f"--members_per_vmap=1: {too_large}; lower --config.batch_size, or raise --data_parallel")
    best = next(size for size, rate in rates.items() if rate >= 0.98 * max(rates.values()))
    return BlockChoice(dataclasses.replace(options, members_per_vmap=best).resolve(members), rates, too_large)


def _probe(group: Group, layout: Layout, pools: RulePools, sweep: Sweep, conditions: int) -> _GroupForecast:
    mesh = make_mesh(layout.devices, layout.data_parallel)
    unit = padded_size(1, mesh, layout.members_per_vmap)
    blocks = padded_size(len(group.members), mesh, layout.members_per_vmap) // unit
    config = group.config
    whole_piece = piece_size(sweep.dev_tests, sweep.tests, layout.data_parallel)

    # One block of members per device, with fewer examples or tests if a step or a piece would take long.
    guess = flops_per_example(group) * layout.members_per_vmap
    guess /= REACHED_FLOPS[jax.default_backend()] * layout.data_parallel
    batch = _as_many(config.batch_size, guess, layout.data_parallel)
    piece = _as_many(whole_piece, guess / 3, layout.data_parallel)  # forward only
    steps = max(1, min(config.chunk_steps, int(_SECONDS / (guess * config.batch_size))))
    few = dataclasses.replace(group, members=group.members[:unit], config=dataclasses.replace(config, batch_size=batch))
    started = time.monotonic()
    trainer = Trainer(few, pools, mesh, layout.members_per_vmap)
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

    decoder = GroupDecoder(few, few.shape, mesh, layout.members_per_vmap, piece)
    prompts = split_prompts(sweep, few, pools, "unseen_dev")
    rules = [table[:piece] for table in prompts.rules]
    prompts = dataclasses.replace(prompts, rules=rules, shown=rules)
    decode_compile_seconds, decode_seconds = _time(lambda: list(decoder.answers(trainer.state.params, prompts)))

    started = time.monotonic()
    full = _compile_at_full_shape(group, pools, mesh, layout.members_per_vmap, config.chunk_steps)
    compile_seconds += time.monotonic() - started + evaluate_compile_seconds + decode_compile_seconds

    dev, rest = (math.ceil(count / whole_piece) for count in (sweep.dev_tests, sweep.tests))
    evaluated, decoded = (config.chunks + 1) * dev + 2 * rest, (1 + conditions) * rest
    return _GroupForecast(
        compile_seconds=compile_seconds,
        training_seconds=config.steps * blocks * step_seconds,
        test_seconds=blocks * (evaluated * evaluate_seconds + decoded * decode_seconds) * whole_piece / piece,
        device_bytes=program_bytes(full),
        probe_bytes=probe_bytes,
    )


class _TooLarge(Exception):
    """A program needs more memory than a device has."""


def _block_sizes(members: int, options: Options) -> list[int]:
    """Sizes to try for a group of ``members``: about 1, 2, 4, …, with blocks of equal size and few idle members."""
    each = math.ceil(members / ((options.devices or jax.device_count()) // options.data_parallel))
    doubled = [1 << power for power in range((each - 1).bit_length() + 1)]
    return list(dict.fromkeys(math.ceil(each / math.ceil(each / size)) for size in doubled))


def _block_rate(group: Group, layout: Layout, pools: RulePools, scale: float) -> float:
    """Examples per second of all members of a group, at full shape over a few steps.

    Raises _TooLarge if ``scale`` times its memory is more than a device has.
    """
    config, members, block = group.config, len(group.members), layout.members_per_vmap
    mesh = make_mesh(layout.devices, layout.data_parallel)
    size = padded_size(members, mesh, block)
    # The number of steps does not depend on the block. If a chunk is not longer, this is exactly the run's program.
    guess = flops_per_example(group) * config.batch_size * members / layout.devices
    steps = max(1, min(config.chunk_steps, int(_SECONDS * REACHED_FLOPS[jax.default_backend()] / guess)))

    # Not zeros, which a GPU multiplies faster than other numbers.
    def make_state():
        key = jax.random.key(0)
        return jax.tree.map(
            lambda leaf: (0.02 * jax.random.uniform(key, (size, *leaf.shape))).astype(leaf.dtype),
            abstract_member(group),
        )

    try:
        program = _compile_at_full_shape(group, pools, mesh, block, steps)
        needed, limit = scale * program_bytes(program), _device_bytes()
        if limit is not None and needed > limit:
            raise _TooLarge(f"{in_bytes(needed)}, but a device has {in_bytes(limit)}")
        state = jax.jit(make_state, out_shardings=NamedSharding(mesh, P("member")))()
        tables, data = stack_group(group, pools, size)
        tables, data = put(tables, mesh, P()), put(data, mesh, P("member"))
        order = ExampleOrder(config.examples, config.batch_size).batches(0, steps)
        indices = put(order, mesh, P(None, "data"))

        def train():
            nonlocal state
            state, metrics = program(tables, data, state, jnp.int32(0), indices)
            return metrics

        _, seconds = _time(train)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _TooLarge("more memory than is available") from None
    return members * steps * config.batch_size / seconds


def _device_bytes() -> int | None:
    """Device memory available to programs; None if the backend does not report it (CPU)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((limit for limit in limits if limit is not None), default=None)


def _as_many(of: int, seconds: float, multiple: int) -> int:
    """How many of ``of`` items, at ``seconds`` each, take about ``_SECONDS``; a multiple of ``multiple``."""
    return max(multiple, min(of, int(_SECONDS / seconds) // multiple * multiple))


def _test_flops(group: Group, plan: GroupPlan, sweep: Sweep, conditions: int) -> float:
    """Approximate FLOPs of the tests of a group, as in ``_probe``, as if decoding cost as much as teacher forcing."""
    tests = (group.config.chunks + 1) * sweep.dev_tests + (3 + conditions) * sweep.tests
    return (plan.members + plan.idle) * tests * flops_per_example(group) / 3


def _compile_at_full_shape(group: Group, pools: RulePools, mesh: Mesh, members_per_vmap: int, steps: int) -> Any:
    """Compiles the run's program for a chunk of ``steps`` steps of all members, from shapes alone."""
    program = chunk_program(group, mesh, members_per_vmap)
    return program.lower(*chunk_shapes(group, pools, mesh, members_per_vmap, steps)).compile()


def _time(work: Callable[[], Any]) -> tuple[float, float]:
    """Returns the compile time (how much longer the first call takes) and the time of a later call, in seconds."""
    started = time.monotonic()
    jax.block_until_ready(work())
    first = time.monotonic() - started
    calls, started = 0, time.monotonic()
    while (passed := time.monotonic() - started) < _SECONDS:
        jax.block_until_ready(work())
        calls += 1
    return max(0.0, first - passed / calls), passed / calls
