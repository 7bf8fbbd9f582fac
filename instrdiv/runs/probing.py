"""What a run will take, and the block that suits it, measured: a few steps, and the compiler's own account of memory.

``planning`` counts and guesses in an instant; ``forecast`` compiles a group's program at full shape, without giving it
memory, and runs one block of members for a second or two. The groups with most arithmetic are probed first; when that
has taken a minute, what is left is scaled from them. ``choose_block`` tries blocks of several sizes on the group with
most arithmetic.
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

    # The estimates of memory that could not be checked err as those that could.
    error = max(p.device_bytes / plans[place].device_bytes for place, p in probed.items())
    device_bytes = [
        probed[place].device_bytes if place in probed else error * plan.device_bytes for place, plan in enumerate(plans)
    ]
    # Groups follow one another. What the probe took of this process, a run takes; and a copy of the state, to save.
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
    """A layout whose block was measured.

    Attributes:
      layout: with it.
      rates: size of a block -> examples a second of the whole group, as measured.
      too_large: why the next larger block was not tried; empty where none was too large.
    """

    layout: Layout
    rates: dict[int, float]
    too_large: str = ""

    @property
    def text(self) -> str:
        """One line for people."""
        rates = ", ".join(f"{rate:,.0f} by {size}" for size, rate in self.rates.items())
        limit = f"; {self.too_large}" if self.too_large else ""
        return f"members_per_vmap={self.layout.members_per_vmap} chosen by a probe: examples/s {rates}{limit}"


def choose_block(
    members: Sequence[Member], options: Options, pools: RulePools, say: Callable[[str], None] = lambda line: None
) -> BlockChoice:
    """Measures which block of members trains fastest, on the group with most arithmetic.

    Sizes about twice as large are tried until one is slower than the one before, or too large for the memory of a
    device: by the compiler's account, scaled to the group that needs most by the plan's estimates; or because running
    out of it says so. The smallest within 2 % of the best is chosen. A size costs a compilation and a second or two.

    Args:
      members: of one cohort.
      options: the layout; ``members_per_vmap`` is ignored.
      pools: the members' rules.
      say: is told of every size that is tried.

    Raises BadInput where the layout cannot be, or not even one member at a time fits.
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
            too_large = f"{size} need {reason}"
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

    # One block of members on every device; fewer examples, or tests, where a step, or a piece, would take long.
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
    """Sizes to try for a group of so many members: about 1, 2, 4, …, such that blocks are equal and few are idle."""
    each = math.ceil(members / ((options.devices or jax.device_count()) // options.data_parallel))
    doubled = [1 << power for power in range((each - 1).bit_length() + 1)]
    return list(dict.fromkeys(math.ceil(each / math.ceil(each / size)) for size in doubled))


def _block_rate(group: Group, layout: Layout, pools: RulePools, scale: float) -> float:
    """Examples a second of all members of a group; its full shape, few steps.

    Raises _TooLarge where ``scale`` times its memory is more than a device has.
    """
    config, members, block = group.config, len(group.members), layout.members_per_vmap
    mesh = make_mesh(layout.devices, layout.data_parallel)
    size = padded_size(members, mesh, block)
    # The same number of steps whatever the block; where the chunk is no longer, this is the very program of the run.
    guess = flops_per_example(group) * config.batch_size * members / layout.devices
    steps = max(1, min(config.chunk_steps, int(_SECONDS * REACHED_FLOPS[jax.default_backend()] / guess)))

    # Not zeros: a GPU multiplies those faster than other numbers.
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
            raise _TooLarge(f"{in_bytes(needed)} of {in_bytes(limit)} a device")
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
        raise _TooLarge("more memory than there is") from None
    return members * steps * config.batch_size / seconds


def _device_bytes() -> int | None:
    """Memory of a device that programs may use; None where the backend does not say (CPU)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((limit for limit in limits if limit is not None), default=None)


def _as_many(of: int, seconds: float, multiple: int) -> int:
    """As many of these, at so many seconds each, as take about ``_SECONDS``; a multiple, as ``of`` is."""
    return max(multiple, min(of, int(_SECONDS / seconds) // multiple * multiple))


def _test_flops(group: Group, plan: GroupPlan, sweep: Sweep, conditions: int) -> float:
    """FLOPs of a group's tests, nearly: as ``_probe`` counts them, a decoded answer like one that is read."""
    tests = (group.config.chunks + 1) * sweep.dev_tests + (3 + conditions) * sweep.tests
    return (plan.members + plan.idle) * tests * flops_per_example(group) / 3


def _compile_at_full_shape(group: Group, pools: RulePools, mesh: Mesh, members_per_vmap: int, steps: int) -> Any:
    """The program of a chunk of so many steps, for all members as the run will use it, from shapes alone."""
    program = chunk_program(group, mesh, members_per_vmap)
    return program.lower(*chunk_shapes(group, pools, mesh, members_per_vmap, steps)).compile()


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
