"""Populations on the device: the tables and knobs of a group's members stacked, and the example that an index means."""

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
    """What all members of a group look things up in, replicated on every device.

    Attributes:
      pools: instructions, a tree of arrays [R, I, ...]: one row per seed and source, as long as its longest member
        needs.
    """

    pools: Any


@struct.dataclass
class MemberData:
    """What a member is, on device: scalars and its own table; a group stacks them along M.

    Attributes:
      seed: uint32.
      pool: int32, row of ``Tables.pools``; the member uses the first ``instructions`` rules of it.
      cumulative_counts: int32 [I]; example i uses the first rule whose cumulative count exceeds i.
      knobs: settings of sampling, see ``Task.knobs``.
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
    """Example ``index`` (int32 in [0, N)) of a member's fixed training set: always the same one."""
    rule = jnp.searchsorted(data.cumulative_counts, index, side="right")
    chosen = jax.tree.map(lambda table: table[data.pool, rule], tables.pools)
    if group.task.finite:
        key = index - jnp.where(rule > 0, data.cumulative_counts[rule - 1], 0)
    else:
        key = jax.random.fold_in(stream_key(EXAMPLE_STREAM, data.seed), index)
    return group.task.example(group.shape, data.knobs, chosen, key)


def stack_knobs(settings: Sequence[TaskSetting]) -> Any:
    """The knobs of settings, numpy, stacked along M; arrays [n] are padded to the longest."""
    knobs = [setting.knobs() for setting in settings]

    def stacked(*leaves: np.ndarray) -> np.ndarray:
        longest = max((len(leaf) for leaf in leaves if np.ndim(leaf)), default=0)
        return np.stack([_pad_to(leaf, longest) if np.ndim(leaf) else leaf for leaf in leaves])

    return jax.tree.map(stacked, *knobs)


def stack_group(group: Group, pools: RulePools, size: int) -> tuple[Tables, MemberData]:
    """The tables and the stacked member data of a group, as numpy arrays with a leading axis of ``size`` members."""
    members = [*group.members, *[group.members[0]] * (size - len(group.members))]
    longest = max(member.setting.instructions for member in members)
    rows: dict[Any, int] = {}
    tables = []
    for member in group.members:
        key = pools.key(member)
        if key not in rows:
            rows[key] = len(rows)
            # A pool may be longer than this group needs, or shorter than another pool of it.
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
