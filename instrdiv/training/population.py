"""Populations on the device: the stacked tables and knobs of a group's members, and the example for an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from instrdiv.config.groups import Group
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member, TaskSetting
from instrdiv.runtime.streams import (
    EXAMPLE_STREAM,
    stream_key,
)
from instrdiv.tasks.task import Example


@struct.dataclass
class Tables:
    """Lookup tables shared by all members of a group, replicated on every device.

    Attributes:
      pools: instructions, a tree of arrays [R, I, ...]: one row per seed and source, with I large enough for every
        member of the group.
    """

    pools: Any


@struct.dataclass
class MemberData:
    """A member on the device: scalars and its own table; groups stack these along M.

    Attributes:
      seed: uint32.
      pool: int32, row of ``Tables.pools``; the member uses its first ``instructions`` instructions.
      cumulative_counts: int32 [I]; example i uses the first instruction whose cumulative count exceeds i.
      knobs: sampling settings, see ``Task.knobs``.
      learning_rate, adam_learning_rate, weight_decay: float32.
    """

    seed: jax.Array
    pool: jax.Array
    cumulative_counts: jax.Array
    knobs: Any
    learning_rate: jax.Array
    adam_learning_rate: jax.Array
    weight_decay: jax.Array


def training_example(group: Group, tables: Tables, data: MemberData, index: jax.Array) -> Example:
    """Example ``index`` (int32 in [0, N)) of a member's fixed training set; deterministic."""
    rule = jnp.searchsorted(data.cumulative_counts, index, side="right")
    chosen = jax.tree.map(lambda table: table[data.pool, rule], tables.pools)
    if group.task.finite:
        key = index - jnp.where(rule > 0, data.cumulative_counts[rule - 1], 0)
    else:
        key = jax.random.fold_in(stream_key(EXAMPLE_STREAM, data.seed), index)
    return group.task.example(group.shape, data.knobs, chosen, key)


def stack_knobs(settings: Sequence[TaskSetting]) -> Any:
    """Stacks the knobs of settings along M (numpy); arrays [n] are padded to the longest."""
    knobs = [setting.knobs() for setting in settings]

    def stacked(*leaves: np.ndarray) -> np.ndarray:
        longest = max((len(leaf) for leaf in leaves if np.ndim(leaf)), default=0)
        return np.stack([_pad_to(leaf, longest) if np.ndim(leaf) else leaf for leaf in leaves])

    return jax.tree.map(stacked, *knobs)


def stack_group(group: Group, pools: RulePools, size: int) -> tuple[Tables, MemberData]:
    """The tables of a group, and its member data stacked to ``size`` members, as numpy arrays."""
    members = [*group.members, *[group.members[0]] * (size - len(group.members))]
    longest = max(member.setting.instructions for member in members)
    rows: dict[Any, int] = {}
    tables = []
    for member in group.members:
        key = pools.key(member)
        if key not in rows:
            rows[key] = len(rows)
            # A pool may be longer than this group needs, or shorter than another of its pools.
            tables.append(pools.whole(member)[:longest].arrays())
    stacked = jax.tree.map(lambda *parts: np.stack([_pad_to(part, longest) for part in parts]), *tables)

    def data(member: Member) -> dict[str, Any]:
        s = member.setting
        cumulative = np.full(longest, s.examples, np.int32)
        cumulative[: s.instructions] = np.cumsum(member.rule_counts())
        return {
            "seed": np.uint32(member.seed),
            "pool": np.int32(rows[pools.key(member)]),
            "cumulative_counts": cumulative,
            "learning_rate": np.float32(s.learning_rate),
            "adam_learning_rate": np.float32(s.adam_learning_rate),
            "weight_decay": np.float32(s.weight_decay),
        }

    values = jax.tree.map(lambda *leaves: np.stack(leaves), *map(data, members))
    knobs = stack_knobs([member.setting for member in members])
    return Tables(pools=stacked), MemberData(knobs=knobs, **values)


def _pad_to(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))
