"""Groups: members that share one compiled program because all their static fields are equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from instrdiv.config.settings import Member, TaskSetting
from instrdiv.tasks.task import Shape


@dataclasses.dataclass(frozen=True)
class Group:
    """Members that share one compiled program.

    Attributes:
      name: used in tables and for checkpoints.
      config: the static fields that they share; see ``TaskSetting.static``.
      shape: large enough for the examples of all members.
      members: in the row order of the group's arrays.
      attention: how attention is computed, one of ``layout.ATTENTION``.
    """

    name: str
    config: TaskSetting
    shape: Shape
    members: tuple[Member, ...]
    attention: str = "plain"

    @property
    def task(self) -> type[TaskSetting]:
        """The class whose static methods make, tokenize and classify examples."""
        return type(self.config)

    @property
    def program(self) -> Group:
        """The group without its members and name: what its compiled programs depend on, besides array shapes."""
        return dataclasses.replace(self, name="", members=())


def make_groups(members: Sequence[Member], first: int = 0, attention: str | None = None) -> list[Group]:
    """Groups members by their static fields, in order of first appearance; names are g0, g1, …, from ``first`` on."""
    by_config: dict[TaskSetting, list[Member]] = {}
    for member in members:
        by_config.setdefault(member.setting.static, []).append(member)
    groups = []
    for number, (config, group) in enumerate(by_config.items(), first):
        shape = config.common_shape([member.setting.shape for member in group])
        groups.append(Group(f"g{number}", config, shape, tuple(group), attention or "plain"))
    return groups
