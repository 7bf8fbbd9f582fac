"""Sweeps: the members that a run trains, and how they are tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from instrdiv.config.settings import DEFAULT_TASK, Member, TaskSetting, setting_of
from instrdiv.runtime.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The members that a run trains, and how they are tested.

    Attributes:
      figure: name for tables and titles.
      members: every setting with every seed.
      dev_tests: number of held-out instructions (one test each) in ``unseen_dev``, tested at every report.
      tests: number of held-out instructions in ``unseen``, tested once; ``seen`` has as many tests of trained ones.
    """

    figure: str
    members: tuple[Member, ...]
    dev_tests: int = 256
    tests: int = 2_000

    @classmethod
    def grid(cls, base: TaskSetting | None = None, seeds: int = 3, figure: str = "sweep", dev_tests: int = 256,
             tests: int = 2_000, **values: Iterable[Any]) -> Sweep:  # fmt: skip
        """Every combination of the given field values, with every seed.

        ``base`` sets all other fields and the task; by default it is ``Setting()``, string rewriting.

        Raises BadInput for a name that is not a field, or for a single value instead of a list.

        >>> len(Sweep.grid(Setting(examples=4096), seeds=3, instructions=[16, 256, 4096]).members)
        9
        """
        settings = [base or setting_of(DEFAULT_TASK)()]
        columns = settings[0].columns()
        for name, choices in values.items():
            if name not in columns:
                raise BadInput(f"Sweep.grid: {name} is not a field of Setting; the fields are {', '.join(columns)}")
            if isinstance(choices, str) or not isinstance(choices, Iterable):
                raise BadInput(f"Sweep.grid: {name}={choices!r} must be a list of values, as in {name}=[{choices!r}]")
            choices = list(choices)
            settings = [dataclasses.replace(setting, **{name: choice}) for setting in settings for choice in choices]
        members = tuple(Member(setting, seed) for setting in settings for seed in range(seeds))
        return cls(figure, members, dev_tests, tests)

    @property
    def task(self) -> type[TaskSetting]:
        """The class of the settings, which defines the task."""
        return type(self.members[0].setting)

    def validate(self) -> None:
        """Raises BadInput if the sweep cannot be run. Cheap."""
        if not self.members:
            raise BadInput("a sweep needs at least one member: give at least one setting and one seed")
        if len({type(member.setting) for member in self.members}) > 1:
            raise BadInput("a sweep needs a single task: the settings of all members must be of one class")
        for name in ("dev_tests", "tests"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name}={getattr(self, name)}: must be at least 1")
        for setting in dict.fromkeys(member.setting for member in self.members):
            setting.validate()
        for member in self.members:
            if not 0 <= member.seed < 2**31:
                raise BadInput(f"seeds must be whole numbers from 0 to 2^31 - 1, got {member.seed}")
        ids = [member.id for member in self.members]
        if len(set(ids)) < len(ids):
            raise BadInput("a sweep contains the same setting twice: all values of a swept field must be different")
