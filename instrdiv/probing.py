"""What a run will take, measured: a few steps of its first members, and the compiler's own account of memory.

``planning`` counts and guesses in an instant; this compiles every group's program at full shape, without giving it
memory, and runs one block of members for a second or two.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.decoding import GroupDecoder
from instrdiv.evaluation import Evaluator, make_test_set, piece_size
from instrdiv.planning import REACHED_FLOPS, duration, flops_per_example, in_bytes
from instrdiv.population import ExampleOrder, Group, RulePools, make_groups, make_mesh, padded_size, put, stack_group
from instrdiv.suites import split_prompts
from instrdiv.sweep import Options, Sweep
from instrdiv.training import Trainer, abstract_member, chunk_program

#: Seconds that the timed part of a probe takes, about.
_SECONDS = 1.5


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
      compile_seconds, training_seconds, test_seconds: of all groups.
      device_bytes: memory that one device needs at its peak; of a CPU, its share of ``host_bytes``.
      host_bytes: memory of this process at its peak; on CPU devices it includes theirs.
    """

    compile_seconds: float
    training_seconds: float
    test_seconds: float
    device_bytes: int
    host_bytes: int

    @property
    def seconds(self) -> float:
        return self.compile_seconds + self.training_seconds + self.test_seconds

    @property
    def text(self) -> str:
        """One line for people."""
        peak = f"{in_bytes(self.host_bytes)} of this machine's memory"
        if jax.default_backend() != "cpu":
            peak = f"{in_bytes(self.device_bytes)} a device"
        return (
            f"from a short probe: {duration(self.seconds)} in all (compilation {duration(self.compile_seconds)}, "
            f"training {duration(self.training_seconds)}, tests {duration(self.test_seconds)}); {peak} at the peak"
        )


@dataclasses.dataclass(frozen=True)
class _GroupForecast:
    compile_seconds: float
    training_seconds: float
    test_seconds: float
    device_bytes: int
    probe_bytes: int
    state_bytes: int


def forecast(sweep: Sweep, options: Options) -> Forecast:
    """Probes every group of a sweep on this machine. Raises BadInput as ``run`` would."""
    options = options.resolve(sweep.members)
    pools = RulePools(sweep.members)
    groups = [_probe(group, options, pools, sweep) for group in make_groups(sweep.members)]
    # Groups follow one another. What the probe took of this process, a run takes; and a copy of the state, to save.
    on_cpu = options.devices if jax.default_backend() == "cpu" else 0
    more = max((on_cpu or 0) * (group.device_bytes - group.probe_bytes) + group.state_bytes for group in groups)
    return Forecast(
        compile_seconds=sum(group.compile_seconds for group in groups),
        training_seconds=sum(group.training_seconds for group in groups),
        test_seconds=sum(group.test_seconds for group in groups),
        device_bytes=max(group.device_bytes for group in groups),
        host_bytes=peak_host_bytes() + max(0, more),
    )


def peak_host_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes() -> int | None:
    """The most memory that one device has had so far; None where the backend does not say (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _probe(group: Group, options: Options, pools: RulePools, sweep: Sweep) -> _GroupForecast:
    assert options.devices and options.members_per_vmap
    mesh = make_mesh(options.devices, options.data_parallel)
    unit = padded_size(1, mesh, options.members_per_vmap)
    size = padded_size(len(group.members), mesh, options.members_per_vmap)
    config = group.config

    # One block of members on every device; a smaller batch where a step would take long.
    guess = flops_per_example(group) * config.batch_size * options.members_per_vmap
    guess /= REACHED_FLOPS[jax.default_backend()] * options.data_parallel
    share = min(1.0, _SECONDS / guess)
    batch = max(options.data_parallel, int(share * config.batch_size) // options.data_parallel * options.data_parallel)
    steps = max(1, min(config.chunk_steps, int(_SECONDS / guess)))
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
    probe_bytes = _peak_bytes(program)

    def train():
        trainer.state, metrics = program(*arguments())
        return metrics

    jax.block_until_ready(train())
    step_seconds = _time(train) / steps * config.batch_size / batch

    evaluator = Evaluator(trainer, piece_size(sweep.dev_tests, sweep.tests, options.data_parallel))
    tests = make_test_set("unseen_dev", few.members, pools, sweep.dev_tests, sweep.tests)
    piece = [next(evaluator.pieces(tests))]
    started = time.monotonic()
    jax.block_until_ready(evaluator.count(piece))
    compile_seconds += time.monotonic() - started
    piece_seconds = _time(lambda: evaluator.count(piece))
    dev, rest = (math.ceil(count / evaluator.piece) for count in (sweep.dev_tests, sweep.tests))

    decoder = GroupDecoder(few, few.shape, mesh, options.members_per_vmap, evaluator.piece)
    prompts = split_prompts(dataclasses.replace(sweep, dev_tests=evaluator.piece), few, pools, "unseen_dev")
    started = time.monotonic()
    list(decoder.answers(trainer.state.params, prompts))
    compile_seconds += time.monotonic() - started
    decode_seconds = _time(lambda: list(decoder.answers(trainer.state.params, prompts)))

    blocks = size // unit
    started = time.monotonic()
    full = _compile_at_full_shape(group, pools, mesh, options.members_per_vmap, size)
    compile_seconds += time.monotonic() - started
    return _GroupForecast(
        compile_seconds=compile_seconds,
        training_seconds=config.steps * blocks * step_seconds,
        test_seconds=blocks * (((config.chunks + 1) * dev + 2 * rest) * piece_seconds + rest * decode_seconds),
        device_bytes=_peak_bytes(full),
        probe_bytes=probe_bytes,
        state_bytes=size * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_member(group))),
    )


def _compile_at_full_shape(group: Group, pools: RulePools, mesh, members_per_vmap: int, size: int) -> Any:
    """The program of a chunk as the run will use it, from shapes alone."""

    def abstract(leaf, spec, leading=()):
        return jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

    tables, data = stack_group(group, pools, size)
    tables = jax.tree.map(lambda leaf: abstract(leaf, P()), tables)
    data = jax.tree.map(lambda leaf: abstract(leaf, P("member")), data)
    state = jax.tree.map(lambda leaf: abstract(leaf, P("member"), (size,)), abstract_member(group))
    order = np.broadcast_to(np.int32(0), (group.config.chunk_steps, group.config.batch_size))
    indices = abstract(order, P(None, "data"))
    return chunk_program(group, mesh, members_per_vmap).lower(tables, data, state, jnp.int32(0), indices).compile()


def _peak_bytes(program: Any) -> int:
    """What a compiled program needs on one device: arguments, results and temporaries."""
    memory = program.memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)  # fmt: skip


def _time(work: Callable[[], Any]) -> float:
    """Seconds of one call; it has been called before, so that it is compiled."""
    calls, started = 0, time.monotonic()
    while calls < 2 or time.monotonic() - started < _SECONDS:
        jax.block_until_ready(work())
        calls += 1
        if time.monotonic() - started > 4 * _SECONDS:
            break
    return (time.monotonic() - started) / calls
