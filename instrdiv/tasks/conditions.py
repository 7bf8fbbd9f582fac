"""Conditions: how the tests of a suite differ from training: in settings, instructions or prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.instructions import Source, TooFew, take_tests


@dataclasses.dataclass(frozen=True)
class Subject:
    """A member to be tested under one condition.

    Attributes:
      member: as it was trained.
      setting: as it is tested.
      pool: the instructions it was given.
      dev_tests, tests: number of held-out instructions used for tuning, and number of tests wanted.
    """

    member: Any
    setting: Any
    pool: Any
    dev_tests: int
    tests: int

    @functools.cached_property
    def trained(self) -> Any:
        """The instructions it was trained on: those of its pool that have examples."""
        return self.pool[np.flatnonzero(self.member.rule_counts())]

    def some_trained(self, count: int) -> Any:
        """Trained instructions, each equally often."""
        return self.pool[self.member.seen_rules(count)]


@dataclasses.dataclass(frozen=True)
class Condition:
    """How tests are made.

    Attributes:
      name: prefix of the slices in its rows.
      rules: the instructions it tests, one test each; as many as there are, up to ``tests``.
      changes: fields of the setting that differ from training, in addition to ``Task.plain_tests``.
      prompt: what the prompt shows: the instruction itself (``rule``), another test's (``shuffled``), or padding
        (``blanked``). If shuffled, only tests whose two instructions give different answers count.
      slices: of ``Task.slices``; the task's headline if empty.
    """

    name: str
    rules: Callable[[Subject], Any]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = "rule"
    slices: tuple[str, ...] = ()

    def setting(self, member: Any) -> Any:
        """The setting for tests of this member. Raises BadInput if it is not valid."""
        return self.applied_to(member.setting)

    def applied_to(self, setting: Any) -> Any:
        """The setting with this condition's changes. Raises BadInput if it is not valid."""
        changed = dataclasses.replace(setting, **(dict(setting.plain_tests) | dict(self.changes)))
        changed.validate()
        return changed


#: Returns the conditions that a member with this setting can be tested under. Raises BadInput if there are none.
Suite = Callable[[Any], list[Condition]]


def held_out(subject: Subject) -> Any:
    """Held-out instructions of the tested setting; the run's own ``unseen`` ones if the source is the same.

    Instructions that the member was tuned on are excluded.
    """
    source, own = subject.setting.source, subject.member.setting.source
    if source == own or not subject.dev_tests:
        return _held_out(source, subject.dev_tests, subject.tests)
    try:
        found = _held_out(source, 0, subject.tests + subject.dev_tests)
    except BadInput:  # there are not that many
        found = _held_out(source, 0, subject.tests)
    if len(found) == 0:
        return found
    tuned_on = take_tests(own, subject.dev_tests, 0)[0]
    return subject.setting.testable(tuned_on, found)[: subject.tests]


@functools.lru_cache(maxsize=64)
def _held_out(source: Source, skip: int, tests: int) -> Any:
    """The held-out instructions after the first ``skip``: ``tests`` of them, or as many as there are."""
    capacity = source.capacity(held_out=True)
    wanted = tests if capacity is None else min(tests, capacity - skip)
    if wanted <= 0:
        return source.none()
    try:
        return source.tests(skip, wanted)[1]
    except TooFew as few:
        if not few.found:
            return take_tests(source, skip, wanted)[1]  # raises BadInput with the full message
        return source.tests(skip, few.found)[1]


def of_the_prompt(setting: Any) -> list[Condition]:
    """A suite for any task: held-out instructions unchanged, blanked in the prompt, and shuffled among the prompts."""
    return [
        Condition("held_out", held_out),
        Condition("rule_blanked", held_out, prompt="blanked"),
        Condition("rules_shuffled", held_out, prompt="shuffled"),
    ]
