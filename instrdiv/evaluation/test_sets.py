"""The instructions that a run is tested on in each split, and their test inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from instrdiv.config.groups import Group
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member
from instrdiv.runtime.streams import TEST_STREAM, stream_key
from instrdiv.tasks.instructions import Source, take_tests
from instrdiv.tasks.task import Example
from instrdiv.training.population import MemberData

#: The splits, in order: trained instructions with fresh inputs, each equally often; held-out instructions for curves
#: and tuning; held-out instructions for the end; trained instructions as often as in training. The number identifies
#: the split's stream of inputs.
SPLITS = {"seen": 0, "unseen_dev": 1, "unseen": 2, "seen_by_share": 0}


@dataclasses.dataclass(frozen=True)
class TestSet:
    """The tests of one split for the members of a group.

    Attributes:
      split: one of ``SPLITS``.
      rules: a table of instructions [tests] per member (the same object if members share it).
      relations: ``Task.relation`` of the *unseen* instructions to the member's own, bool [tests, K] per member.
    """

    split: str
    rules: Sequence[Any]
    relations: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.rules[0])


@functools.lru_cache(maxsize=32)
def held_out_rules(source: Source, dev_tests: int, tests: int) -> dict[str, Any]:
    """The held-out instructions of ``unseen_dev`` and ``unseen``: disjoint, one per test, shared by all members."""
    return dict(zip(("unseen_dev", "unseen"), take_tests(source, dev_tests, tests), strict=True))


def make_test_set(split: str, members: Sequence[Member], pools: RulePools, dev_tests: int, tests: int) -> TestSet:
    """The tests of a split for these members."""
    task = type(members[0].setting)
    if split in ("seen", "seen_by_share"):
        tables = [pools.of(member)[member.seen_rules(tests, split == "seen_by_share")] for member in members]
        return TestSet(split, tables, [np.zeros_like(task.relation(table[:1], table)) for table in tables])
    tables = [held_out_rules(member.setting.source, dev_tests, tests)[split] for member in members]
    relations = [task.relation(pools.of(member), table) for member, table in zip(members, tables, strict=True)]
    return TestSet(split, tables, relations)


def stream_of_split(split: str, split_seed: int) -> int:
    """The number that keys a split's inputs."""
    return split_seed * len(set(SPLITS.values())) + SPLITS[split]


def sample_test(group: Group, data: MemberData, rule: Any, stream: Any, index: Any) -> Example:
    """Test example ``index`` of a split (see ``stream_of_split``): an instruction with a fresh input."""
    key = group.task.test_key(stream_key(TEST_STREAM, stream), index)
    return group.task.example(group.shape, data.knobs, rule, key)


def stack_rules(tables: Sequence[Any], places: np.ndarray, rows: Sequence[int] | np.ndarray) -> Any:
    """The instructions at ``places`` in each row's table, numpy [M, B, ...]; past its end, the last one repeats."""
    chosen = [tables[row][np.minimum(places, len(tables[row]) - 1)].arrays() for row in rows]
    return jax.tree.map(lambda *parts: np.stack(parts), *chosen)
