"""Groups: members that share one compiled program, since all their static fields are equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from instrdiv.config.settings import Member, TaskSetting
from instrdiv.tasks.task import Shape


@dataclasses.dataclass(frozen=True)
class Group:
    """Members that share one compiled program.

    Attributes:
      name: in tables and among the checkpoints.
      config: their static fields, see ``TaskSetting.static``.
      shape: in which the examples of all of them fit.
      members: in the order of the rows of its arrays.
      attention: how it is computed, one of ``layout.ATTENTION``.
    """

    name: str
    config: TaskSetting
    shape: Shape
    members: tuple[Member, ...]
    attention: str = "plain"

    @property
    def task(self) -> type[TaskSetting]:
        """Whose static methods make, spell and judge examples."""
        return type(self.config)


def make_groups(members: Sequence[Member], first: int = 0, attention: str | None = None) -> list[Group]:
    """Members by their static fields, in order of first appearance; named g0, g1, … or from ``first`` on."""
    by_config: dict[TaskSetting, list[Member]] = {}
    for member in members:
        by_config.setdefault(member.setting.static, []).append(member)
    groups = []
    for number, (config, group) in enumerate(by_config.items(), first):
        shape = config.common_shape([member.setting.shape for member in group])
        groups.append(Group(f"g{number}", config, shape, tuple(group), attention or "plain"))
    return groups
