"""What a run will take: parameters, memory, arithmetic, time. Nothing is built or compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from instrdiv.config.groups import Group
from instrdiv.config.layout import Layout
from instrdiv.config.pools import RulePools
from instrdiv.runtime.units import duration, in_bytes
from instrdiv.training.members import abstract_member

#: Training arithmetic that is really reached, FLOP/s a device: a rough guess to turn FLOPs into an ETA. CPU: measured
#: on one 2.x GHz AVX-512 core at the laptop shape. GPU and TPU: a tenth of a current one's bf16 peak, not measured.
REACHED_FLOPS = {"cpu": 5e10, "gpu": 8e13, "tpu": 4e13}


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """What one group takes.

    Attributes:
      name, members, idle: who is in it; ``idle`` pads it to the layout.
      parameters: of one member.
      steps, examples_seen: of one member.
      tokens: tokens of one sequence.
      compute_flops: FLOPs of the group's training, idle members included (a multiply-add is two).
      state_bytes: parameters and optimizer state of the whole group, all devices together.
      device_bytes: estimate of what one device needs at its peak, state and tables included.
      seconds: rough.
    """

    name: str
    members: int
    idle: int
    parameters: int
    steps: int
    examples_seen: int
    tokens: int
    compute_flops: float
    state_bytes: int
    device_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes; ``text`` shows it. ``block_is_guess``: the first launch will measure ``members_per_vmap``."""

    groups: tuple[GroupPlan, ...]
    devices: int
    data_parallel: int
    members_per_vmap: int
    dev_tests: int
    tests: int
    device_kind: str
    block_is_guess: bool = False

    @property
    def text(self) -> str:
        guess = " (a guess: a probe chooses at the first launch)" if self.block_is_guess else ""
        lines = [
            f"{sum(g.members for g in self.groups)} members in {len(self.groups)} group(s), "
            f"on {self.devices} device(s) ({self.device_kind}), {self.members_per_vmap} member(s) per vmap{guess}, "
            f"{self.data_parallel} device(s) a batch"
        ]
        for g in self.groups:
            idle = f" (+{g.idle} idle)" if g.idle else ""
            lines += [
                f"group {g.name}: {g.members} members{idle}, {g.parameters:,} parameters each",
                f"  {g.steps:,} steps, {g.examples_seen:,} examples a member, {g.tokens} tokens an example",
                f"  {g.compute_flops:.3g} FLOPs; state {in_bytes(g.state_bytes)}; "
                f"about {in_bytes(g.device_bytes)} a device at the peak (estimate)",
            ]
        seconds = sum(g.seconds for g in self.groups)
        lines.append(f"tests: {self.dev_tests:,} unseen_dev at every report; {self.tests:,} unseen and seen at the end")
        lines.append(f"ETA {duration(seconds)} of training (rough: assumes {REACHED_FLOPS[jax.default_backend()]:.0e} "
                     "FLOP/s a device), plus compilation")  # fmt: skip
        return "\n".join(lines)


def make_plan(groups: Sequence[Group], layout: Layout, dev_tests: int, tests: int) -> Plan:
    """Plans groups on a layout."""
    plans = tuple(_plan_group(group, layout) for group in groups)
    kind = jax.devices()[0].device_kind
    return Plan(plans, layout.devices, layout.data_parallel, layout.members_per_vmap, dev_tests, tests, kind)


def flops_per_example(group: Group) -> float:
    """FLOPs of training on one example, forward and backward: matrix products and attention, nothing else."""
    c, shape = group.config, group.shape
    T, A, D = shape.sequence - 1, shape.answer + 1, c.width
    vocabulary = shape.vocabulary

    def block(queries: int) -> float:
        projections = 2 * T * D * 2 * D + 2 * queries * D * 2 * D  # keys and values; queries and output
        # Queries are computed everywhere, in one product with keys and values, and cut afterward.
        projections += 2 * (T - queries) * D * D
        return projections + 2 * 2 * queries * D * c.mlp_ratio * D + 2 * 2 * queries * T * D

    forward = (c.layers - 1) * block(T) + block(A) + 2 * T * vocabulary * D + 2 * A * D * vocabulary
    return 3.0 * forward


def _plan_group(group: Group, layout: Layout) -> GroupPlan:
    c, shape = group.config, group.shape
    rows = layout.rows
    unit = rows * layout.members_per_vmap
    size = -(-len(group.members) // unit) * unit
    state = abstract_member(group)
    parameters = _size(state.params)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    # Per token and layer, the backward pass keeps about: the two norms' inputs, q, k, v, attention out, two MLP
    # activations, in compute precision; scores and weights are kept per pair of positions.
    width_bytes = np.dtype(np.float32).itemsize if c.precision == "float32" else 2
    T = shape.sequence - 1
    batch = c.batch_size // layout.data_parallel
    per_layer = T * c.width * (7 + 2 * c.mlp_ratio) * width_bytes + 2 * c.heads * T * T * width_bytes
    activations = layout.members_per_vmap * batch * c.layers * per_layer
    longest = max(member.setting.instructions for member in group.members)
    pools = len({RulePools.key(member) for member in group.members})
    tables = pools * longest * shape.instruction_bytes + size // rows * longest * 4
    # The state is read and written by the chunk's loop over blocks: twice; gradients and updates for a block.
    device_bytes = 2 * size // rows * state_bytes + layout.members_per_vmap * parameters * 8 + activations + tables

    examples = c.steps * c.batch_size
    flops = flops_per_example(group) * examples * size
    seconds = flops / (REACHED_FLOPS[jax.default_backend()] * layout.devices)
    return GroupPlan(
        name=group.name,
        members=len(group.members),
        idle=size - len(group.members),
        parameters=parameters,
        steps=c.steps,
        examples_seen=examples,
        tokens=shape.sequence,
        compute_flops=flops,
        state_bytes=state_bytes * size,
        device_bytes=int(device_bytes),
        seconds=seconds,
    )


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
