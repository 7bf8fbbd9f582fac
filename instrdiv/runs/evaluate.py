"""Decodes trained members on additional tests that their run did not include: the suites of their task.

A suite is a list of *conditions*. A condition defines how test examples are made (which instructions, and what differs
from the member's own setting) and what the prompt shows. Its rows have the split ``unseen`` and a slice such as
``occurrences_tested=5/has_op``, so they never collide with the run's own rows. Test i of a condition has the same key
for all members that share a ``split_seed``, and the same held-out instruction for all that share a source; no condition
ever tests an instruction that the member was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.config.groups import Group
from instrdiv.config.layout import Layout, Options
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import TaskSetting
from instrdiv.evaluation.decoding import GroupDecoder, Prompts
from instrdiv.evaluation.rows import identity, result_row, status_of
from instrdiv.evaluation.tally import error_rows, slices_of, tally
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.streams import SUITE_STREAM, stream_key
from instrdiv.runtime.tables import Row
from instrdiv.tasks.conditions import Condition, Subject, Suite
from instrdiv.tasks.task import Shape
from instrdiv.training.population import stack_knobs


@dataclasses.dataclass
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
      results, errors, samples: rows of the tables.
      left_out: messages on what could not be tested, and why.
    """

    results: list[Row] = dataclasses.field(default_factory=list)
    errors: list[Row] = dataclasses.field(default_factory=list)
    samples: list[Row] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


def evaluate(
    saved: SavedRun,
    suites: Mapping[str, Suite],
    members: Sequence[str] | None = None,
    step: int | None = None,
    tests: int | None = None,
    options: Options | None = None,
    samples: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Tests saved members.

    Args:
      saved: the run.
      suites: by name, as in ``Task.suites``.
      members: ids; all members by default.
      step: a saved step; by default each group's last.
      tests: tests per condition, at most one per available instruction; by default the run's number.
      options: layout on the machine.
      samples: answers to return per member and slice.
      say: called with progress messages.

    Raises BadInput for an unknown member or step, and if nothing can be tested.
    """
    chosen = _choose(saved, members)
    for group, _ in chosen:
        if step is not None and step not in saved.steps(group):
            listed = ", ".join(map(str, saved.steps(group))) or "none"
            raise BadInput(f"--step={step}: group {group.name} has no such checkpoint; saved steps: {listed}")
    subjects = [group.members[row] for group, rows in chosen for row in rows]
    layout = (options or Options()).resolve(subjects)
    pools = RulePools(subjects)
    outcome = Evaluation()
    reasons: dict[str, None] = {}
    for group, rows in chosen:
        tester = _GroupTester(saved, group, rows, pools, step, tests or saved.sweep.tests, layout, samples, say)
        for name, suite in suites.items():
            conditions: dict[str, dict[int, Condition]] = {}
            for row in rows:
                try:
                    for condition in suite(group.members[row].setting):
                        condition.setting(group.members[row])
                        conditions.setdefault(condition.name, {})[row] = condition
                except BadInput as reason:
                    reasons[f"--suite={name}: {reason}"] = None
            tester.test(conditions, outcome, say)
    if not outcome.results:
        raise BadInput("; ".join([*reasons, *outcome.left_out]) or "nothing to test")
    outcome.left_out[:0] = reasons
    return outcome


def _choose(saved: SavedRun, members: Sequence[str] | None) -> list[tuple[Group, list[int]]]:
    """The groups that contain chosen members, with the rows of these members."""
    known = [member.id for member in saved.sweep.members]
    unknown = [name for name in members or () if name not in known]
    if unknown:
        listed = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        raise BadInput(f"--members={unknown[0]}: is not a member of {saved.path}; its members are {listed}")
    chosen = []
    for group in saved.groups:
        rows = [row for row, member in enumerate(group.members) if members is None or member.id in members]
        if rows:
            chosen.append((group, rows))
    return chosen


class _GroupTester:
    """Tests members of one group, one condition at a time; tests of the same shape share a compiled program."""

    def __init__(self, saved: SavedRun, group: Group, rows: Sequence[int], pools: RulePools, step: int | None,
                 tests: int, layout: Layout, samples: int, say: Callable[[str], None]):  # fmt: skip
        self.sweep, self.group, self.pools, self.tests = saved.sweep, group, pools, tests
        self.samples, self.layout = samples, layout
        digests = {row: pools.of(group.members[row]).digest for row in rows}
        self.step, self.params, self.diverged_at = saved.params(group, step, say, digests)
        self.decoder = functools.cache(self._make_decoder)

    def _make_decoder(self, shape: Shape) -> GroupDecoder:
        mesh = make_mesh(self.layout.devices, self.layout.data_parallel)
        size = -(-min(1024, self.tests) // self.layout.data_parallel) * self.layout.data_parallel
        return GroupDecoder(self.group, shape, mesh, self.layout.members_per_vmap, size)

    def test(
        self, conditions: Mapping[str, Mapping[int, Condition]], outcome: Evaluation, say: Callable[[str], None]
    ) -> None:
        """Adds the rows of these conditions (name -> row of the group -> condition) to ``outcome``."""
        members = self.group.members
        settings = {(n, row): c.setting(members[row]) for n, of_row in conditions.items() for row, c in of_row.items()}
        shape = self.group.task.common_shape([self.group.shape, *(setting.shape for setting in settings.values())])
        for number, (name, of_row) in enumerate(conditions.items(), 1):
            say(f"group {self.group.name}, step {self.step}: {name} ({number} of {len(conditions)})")
            rules = {}
            for row, condition in of_row.items():
                subject = Subject(
                    members[row], settings[name, row], self.pools.of(members[row]), self.sweep.dev_tests, self.tests
                )
                rules[row] = self.group.task.testable(subject.trained, condition.rules(subject))[: self.tests]
            none = [members[row].id for row in of_row if len(rules[row]) == 0]
            if none:
                outcome.left_out.append(f"{name} has no instructions to test for {', '.join(none)}")
            rows = [row for row in of_row if len(rules[row])]
            if rows:
                condition = of_row[rows[0]]
                prompts = self._prompts(condition, rows, [settings[name, r] for r in rows], [rules[r] for r in rows])
                params = jax.tree.map(lambda leaf, rows=rows: leaf[rows], self.params)
                answers = self.decoder(shape).answers(params, prompts)
                counts, samples = tally(answers, condition, self.samples, self.group)
                self._add(outcome, name, condition, rows, counts, samples)

    def _prompts(
        self, condition: Condition, rows: Sequence[int], settings: Sequence[TaskSetting], rules: Sequence[Any]
    ) -> Prompts:
        number = zlib.crc32(condition.name.encode())
        seeds = jnp.array([setting.split_seed for setting in settings], jnp.uint32)
        keys = jax.vmap(lambda seed: jax.random.fold_in(stream_key(SUITE_STREAM, seed), number))(seeds)
        shown = rules
        if condition.prompt == "shuffled":
            shown = [table[np.roll(np.arange(len(table)), -1)] for table in rules]
        pools = [self.pools.of(self.group.members[row]) for row in rows]
        relations = [self.group.task.relation(pool, table) for pool, table in zip(pools, rules, strict=True)]
        return Prompts(stack_knobs(settings), keys, rules, shown, condition.prompt == "blanked", relations)

    def _add(self, outcome: Evaluation, name: str, condition: Condition, rows: Sequence[int], counts, samples) -> None:
        for place, row in enumerate(rows):
            member = self.group.members[row]
            who = identity(self.sweep.figure, self.group, member, self.step)
            status = status_of(self.diverged_at[row])
            for column, slice in enumerate(slices_of(condition, self.group.task)):
                tests, right, *_ = map(int, counts[place, column])
                if not tests:
                    outcome.left_out.append(f"{name}/{slice} has no tests for {member.id}")
                    continue
                outcome.results.append(result_row(who, member, "unseen", f"{name}/{slice}", right, tests, status))
                outcome.errors += error_rows(who, self.group.task, "unseen", f"{name}/{slice}", counts[place, column])
                outcome.samples += [
                    who | {"split": "unseen", "slice": f"{name}/{slice}"} | sample for sample in samples[place, column]
                ]
