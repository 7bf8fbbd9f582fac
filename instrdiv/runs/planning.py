"""Estimates what a run will take: parameters, memory, FLOPs, time. Nothing is built or compiled."""

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

#: Training throughput actually reached, in FLOP/s per device: a rough guess to turn FLOPs into an ETA. CPU: measured on
#: one 2.x GHz AVX-512 core at the laptop shape. GPU and TPU: a tenth of a current device's bf16 peak, not measured.
REACHED_FLOPS = {"cpu": 5e10, "gpu": 8e13, "tpu": 4e13}


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """The estimated cost of one group.

    Attributes:
      name: of the group.
      members, idle: number of members, and of idle members that pad the group to the layout.
      parameters: per member.
      steps, examples_seen: per member.
      tokens: per sequence.
      compute_flops: FLOPs to train the group, including idle members (a multiply-add counts as two).
      state_bytes: parameters and optimizer state of the whole group, over all devices.
      device_bytes: estimated peak memory of one device, including state and tables.
      seconds: rough estimate of the training time.
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
    """The estimated cost of a run; ``text`` shows it. ``block_is_guess``: the first launch will choose
    ``members_per_vmap`` by a probe."""

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
        guess = " (a guess; the first launch chooses by a probe)" if self.block_is_guess else ""
        lines = [
            f"{sum(g.members for g in self.groups)} members in {len(self.groups)} group(s), "
            f"on {self.devices} device(s) ({self.device_kind}), {self.members_per_vmap} member(s) per vmap{guess}, "
            f"{self.data_parallel} device(s) per batch"
        ]
        for g in self.groups:
            idle = f" (+{g.idle} idle)" if g.idle else ""
            lines += [
                f"group {g.name}: {g.members} members{idle}, {g.parameters:,} parameters each",
                f"  {g.steps:,} steps, {g.examples_seen:,} examples per member, {g.tokens} tokens per example",
                f"  {g.compute_flops:.3g} FLOPs in all; parameters and optimizer {in_bytes(g.state_bytes)}; "
                f"about {in_bytes(g.device_bytes)} per device at the peak (estimate)",
            ]
        seconds = sum(g.seconds for g in self.groups)
        lines.append(
            f"tests per member: {self.dev_tests:,} on held-out instructions (unseen_dev) at each report; at the end "
            f"{self.tests:,} on others (unseen), and {self.tests:,} on trained ones (seen)"
        )
        lines.append(f"ETA of training {duration(seconds)} (rough: assumes {REACHED_FLOPS[jax.default_backend()]:.0e} "
                     "FLOP/s per device), plus compilation")  # fmt: skip
        return "\n".join(lines)


def make_plan(groups: Sequence[Group], layout: Layout, dev_tests: int, tests: int) -> Plan:
    """Estimates the cost of groups on a layout."""
    plans = tuple(_plan_group(group, layout) for group in groups)
    kind = jax.devices()[0].device_kind
    return Plan(plans, layout.devices, layout.data_parallel, layout.members_per_vmap, dev_tests, tests, kind)


def flops_per_example(group: Group) -> float:
    """FLOPs to train on one example, forward and backward: matrix products and attention only."""
    c, shape = group.config, group.shape
    T, A, D = shape.sequence - 1, shape.answer + 1, c.width
    vocabulary = shape.vocabulary

    def block(queries: int) -> float:
        projections = 2 * T * D * 2 * D + 2 * queries * D * 2 * D  # keys and values; queries and output
        # Queries are computed at every position, in one product with keys and values, and sliced afterward.
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

    # Per token and layer, the backward pass keeps roughly the two norms' inputs, q, k, v, the attention output and two
    # MLP activations, in compute precision; scores and weights are kept per pair of positions.
    width_bytes = np.dtype(np.float32).itemsize if c.precision == "float32" else 2
    T = shape.sequence - 1
    batch = c.batch_size // layout.data_parallel
    per_layer = T * c.width * (7 + 2 * c.mlp_ratio) * width_bytes + 2 * c.heads * T * T * width_bytes
    activations = layout.members_per_vmap * batch * c.layers * per_layer
    longest = max(member.setting.instructions for member in group.members)
    pools = len({RulePools.key(member) for member in group.members})
    tables = pools * longest * shape.instruction_bytes + size // rows * longest * 4
    # The state counts twice, since the chunk's loop over blocks reads and writes it; gradients and updates per block.
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
