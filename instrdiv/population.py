"""Populations: members in groups, their tables and knobs stacked, and the mesh they are spread over.

A *group* is one compiled program. Its members lie along the leading axis M of every array, sharded over the
``member`` axis of the mesh; on each device ``lax.map`` goes through them in blocks of ``members_per_vmap``.
M is padded to a multiple of devices times block with idle copies of the first member, whose results are dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.rewriting.examples import Example, Knobs, Rules, TaskShape, make_example
from instrdiv.rewriting.rules import FamilyTooSmall, RuleSource, RuleTable
from instrdiv.settings import BadInput, Member, Setting, StaticFields

#: Uses of randomness that must not share keys; folded into a key with the seed.
EXAMPLE_STREAM, INIT_STREAM, DROPOUT_STREAM, TEST_STREAM, SUITE_STREAM, ENCRYPTED_STREAM = range(6)


@struct.dataclass
class Tables:
    """What all members of a group look things up in, replicated on every device.

    Attributes:
      pools: rules [R, I]: one row a (seed, rule source), as long as its longest member needs.
    """

    pools: Rules


@struct.dataclass
class MemberData:
    """What a member is, on device: scalars and its own table; a group stacks them along M.

    Attributes:
      seed: uint32.
      pool: int32, row of ``Tables.pools``; the member uses the first ``instructions`` rules of it.
      cumulative_counts: int32 [I]; example i uses the first rule whose cumulative count exceeds i.
      knobs: settings of sampling.
      learning_rate, adam_learning_rate, weight_decay: float32.
    """

    seed: jax.Array
    pool: jax.Array
    cumulative_counts: jax.Array
    knobs: Knobs
    learning_rate: jax.Array
    adam_learning_rate: jax.Array
    weight_decay: jax.Array


def stream_key(stream: int, seed: jax.Array | int) -> jax.Array:
    """The PRNG key of one use of randomness and one seed."""
    return jax.random.fold_in(jax.random.key(stream, impl="threefry2x32"), seed)


def training_example(shape: TaskShape, tables: Tables, data: MemberData, index: jax.Array) -> Example:
    """Example ``index`` (int32 in [0, N)) of a member's fixed training set: always the same one."""
    rule = jnp.searchsorted(data.cumulative_counts, index, side="right")
    chosen = jax.tree.map(lambda table: table[data.pool, rule], tables.pools)
    key = jax.random.fold_in(stream_key(EXAMPLE_STREAM, data.seed), index)
    return make_example(shape, data.knobs, chosen, key)


def epoch_order(examples: int, epoch: int, seed: int = 0) -> np.ndarray:
    """The order in which an epoch visits the N examples, int32 [N]; shared by all members.

    Sorted raw Philox words: a permutation that no numpy version changes.
    """
    words = np.random.Philox(key=np.array([seed, 0x6F726465_00000000 + epoch], np.uint64)).random_raw(examples)
    return np.argsort(words, kind="stable").astype(np.int32)


class ExampleOrder:
    """Which examples each step visits: the epochs' orders, end to end, cut into batches; see ``epoch_order``."""

    def __init__(self, examples: int, batch_size: int, seed: int = 0):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def batches(self, first_step: int, steps: int) -> np.ndarray:
        """Example indices of consecutive steps, int32 [steps, batch_size]."""
        start, stop = first_step * self.batch_size, (first_step + steps) * self.batch_size
        epochs = range(start // self.examples, (stop - 1) // self.examples + 1)
        kept = self._epochs
        self._epochs = {e: kept[e] if e in kept else epoch_order(self.examples, e, self.seed) for e in epochs}
        joined = np.concatenate([self._epochs[e] for e in epochs])
        offset = epochs[0] * self.examples
        return joined[start - offset : stop - offset].reshape(steps, self.batch_size)


class RulePools:
    """Host-side rule tables of a sweep: built once, shared by the members that can share them."""

    def __init__(self, members: Sequence[Member]):
        """Builds every pool at the size its largest member needs. Raises BadInput where a family is too small."""
        if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
            raise BadInput("JAX_THREEFRY_PARTITIONABLE=0: examples are defined with JAX's default, 1; unset it")
        needed: dict[tuple[int, RuleSource], int] = {}
        for member in members:
            key = (member.seed, member.setting.rule_source)
            needed[key] = max(needed.get(key, 0), member.setting.instructions)
        self._pools = {key: build_rules(key[1], size, seed=key[0]) for key, size in needed.items()}

    def of(self, member: Member) -> RuleTable:
        """The rules of one member, in the order of its counts."""
        return self._pools[member.seed, member.setting.rule_source][: member.setting.instructions]

    def whole(self, member: Member) -> RuleTable:
        """The pool that the member's rules are the first of."""
        return self._pools[member.seed, member.setting.rule_source]


def build_rules(source: RuleSource, size: int, seed: int | None) -> RuleTable:
    """Training rules of a seed, or held-out rules (``seed`` None), with a user's error where there are too few."""
    try:
        return source.held_out(size) if seed is None else source.pool(seed, size)
    except FamilyTooSmall as error:
        remedy = "raise --config.held_out_share" if seed is None else "lower --config.instructions"
        raise BadInput(f"--config.family={'+'.join(source.pattern.families)}: {error}; {remedy}, "
                       "use longer strings, more letters or a wider family") from None  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Group:
    """Members that share one compiled program; ``attention`` is how it computes that (see ``model.ATTENTION``)."""

    name: str
    config: StaticFields
    shape: TaskShape
    members: tuple[Member, ...]
    attention: str = "plain"


def make_groups(members: Sequence[Member], first: int = 0, attention: str | None = None) -> list[Group]:
    """Members by their static fields, in order of first appearance; named g0, g1, … or from ``first`` on."""
    by_config: dict[StaticFields, list[Member]] = {}
    for member in members:
        by_config.setdefault(member.setting.static, []).append(member)
    groups = []
    for number, (config, group) in enumerate(by_config.items(), first):
        shape = common_shape([member.setting.task_shape for member in group])
        groups.append(Group(f"g{number}", config, shape, tuple(group), attention or "plain"))
    return groups


def common_shape(shapes: Sequence[TaskShape]) -> TaskShape:
    """The smallest shape in which tasks of all these shapes (and one alphabet) fit."""
    largest = {
        name: max(getattr(shape, name) for shape in shapes)
        for name in ("pattern", "replacement", "input", "answer", "planted")
    }
    prompts = {(shape.pattern, shape.replacement, shape.input) for shape in shapes}
    ragged = len(prompts) > 1 or any(shape.ragged for shape in shapes)
    return TaskShape(shapes[0].alphabet_size, **largest, ragged=ragged)


def stack_knobs(settings: Sequence[Setting]) -> Knobs:
    """What decides the sampling of each setting's examples, numpy, stacked along M."""
    choices = max(len(setting.occurrences) for setting in settings)

    def knobs(s: Setting) -> Knobs:
        values: dict[str, Any] = {
            "no_op_fraction": np.float32(s.no_op_fraction),
            "near_miss_fraction": np.float32(s.near_miss_fraction),
            "occurrences": _pad_to(np.array(s.occurrences, np.int32), choices),
            "choices": np.int32(len(s.occurrences)),
            "input_length_min": np.int32(s.shortest_input),
            "input_length_max": np.int32(s.input_length),
        }
        return Knobs(**values)

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(knobs, settings))


def stack_group(group: Group, pools: RulePools, size: int) -> tuple[Tables, MemberData]:
    """The tables and the stacked member data of a group, as numpy arrays with a leading axis of ``size`` members."""
    members = [*group.members, *[group.members[0]] * (size - len(group.members))]
    longest = max(member.setting.instructions for member in members)
    rows: dict[tuple[int, RuleSource], int] = {}
    tables = []
    for member in group.members:
        key = (member.seed, member.setting.rule_source)
        if key not in rows:
            rows[key] = len(rows)
            # A pool may be longer than this group needs, or shorter than another pool of it.
            tables.append(Rules.from_table(pools.whole(member)[:longest]))
    stacked = jax.tree.map(lambda *parts: np.stack([_pad_to(part, longest) for part in parts]), *tables)

    def data(member: Member) -> dict[str, Any]:
        s = member.setting
        cumulative = np.full(longest, s.examples, np.int32)
        cumulative[: s.instructions] = np.cumsum(member.rule_counts())
        return {
            "seed": np.uint32(member.seed),
            "pool": np.int32(rows[member.seed, s.rule_source]),
            "cumulative_counts": cumulative,
            "learning_rate": np.float32(s.learning_rate),
            "adam_learning_rate": np.float32(s.adam_learning_rate),
            "weight_decay": np.float32(s.weight_decay),
        }

    values = jax.tree.map(lambda *leaves: np.stack(leaves), *map(data, members))
    knobs = stack_knobs([member.setting for member in members])
    return Tables(pools=stacked), MemberData(knobs=knobs, **values)


def make_mesh(devices: int, data_parallel: int = 1, available: Sequence[jax.Device] | None = None) -> Mesh:
    """A ('member', 'data') mesh over the first ``devices`` devices; ``data_parallel`` of them share a batch.

    ``available``: all devices (of a machine that is only described, say); default: those of this one.
    """
    available = jax.devices() if available is None else available
    grid = np.array(available[:devices]).reshape(devices // data_parallel, data_parallel)
    return Mesh(grid, ("member", "data"))


def padded_size(members: int, mesh: Mesh, members_per_vmap: int) -> int:
    """Members including idle ones: a multiple of the mesh's member axis times the block."""
    unit = mesh.shape["member"] * members_per_vmap
    return math.ceil(members / unit) * unit


def put(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Host arrays onto the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def over_members(
    name: str, function: Any, mesh: Mesh, members_per_vmap: int, in_specs: Any, donate: tuple[int, ...] = ()
) -> Any:
    """Compiles ``function``, written for one member, for the members of a group.

    Args:
      name: of the program, as logs and profiles show it.
      function: takes its arguments for one member and returns a tree for one member.
      mesh: from ``make_mesh``.
      members_per_vmap: members that are vectorised together; blocks of them run one after another.
      in_specs: a PartitionSpec an argument; those that start with 'member' have a leading axis M, the others are
        passed to every member as they are (their own shard of them, where sharded over 'data').
      donate: arguments whose buffers may be reused.

    Returns:
      A jitted function of the stacked arguments; its results have a leading axis M. Members never communicate; the
      function itself may reduce over 'data'.
    """
    mapped = [len(spec) > 0 and spec[0] == "member" for spec in in_specs]

    def local(*args):
        def one(stacked):
            stacked = iter(stacked)
            return function(*(next(stacked) if m else arg for m, arg in zip(mapped, args, strict=True)))

        stacked = tuple(arg for m, arg in zip(mapped, args, strict=True) if m)
        return jax.lax.map(one, stacked, batch_size=members_per_vmap if members_per_vmap > 1 else None)

    # check_vma=False: the one reduction over 'data' is written out, in the step.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=P("member"), check_vma=False)
    sharded.__name__ = name
    return jax.jit(sharded, donate_argnums=donate, out_shardings=NamedSharding(mesh, P("member")))


def _pad_to(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))
