"""Presets, the sizes of a figure, and the settings that follow from a preset and the flags."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instrdiv.models.lora import Lora
from instrdiv.runtime.errors import BadInput
from instrdiv.training.recipe import Recipe

if TYPE_CHECKING:  # it imports string rewriting, which figures of other tasks do not need
    from instrdiv.training.pretraining import SmallBase


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a preset's adapters are trained.

    Attributes:
      lora, learning_rate: for every member.
      recipe: shared by all members.
      small: the small base to train first; None if ``--base`` is required.
      int8: store the base in int8.
    """

    lora: Lora
    learning_rate: float
    recipe: Recipe
    small: SmallBase | None = None
    int8: bool = False


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of a figure.

    Attributes:
      base: the setting that the figure varies.
      values: field of the setting -> the values it takes; all combinations are trained.
      factors: name -> its levels, each a change to the base; all combinations of ``values`` are trained for every level
        of the factors that ``--factor`` names. ``{}`` is the base itself.
      seeds: models per setting.
      seeds_at: number of instructions -> models per setting there, if more; seeds differ most near the step.
      dev_tests, tests: see ``Sweep``.
      judged: large enough to confirm or contradict the papers' claims.
      tuning: how its adapters are trained; None if models are trained from scratch.
    """

    base: Any
    values: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    factors: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    seeds_at: Mapping[int, int] = dataclasses.field(default_factory=dict)
    dev_tests: int = 256
    tests: int = 2_000
    judged: bool = True
    tuning: Tuning | None = None

    def settings(self, given: Mapping[str, Any], changes: Sequence[Mapping[str, Any]] = ({},)) -> list[Any]:
        """The settings to train.

        Args:
          given: fields given as flags; those in ``values`` as lists.
          changes: changes to the base; all combinations of ``values`` are trained for each.

        Raises BadInput if a list contains a value twice.
        """
        fixed = {name: value for name, value in given.items() if name not in self.values}
        lists = {name: given.get(name, values) for name, values in self.values.items()}
        for name, values in lists.items():
            twice = [value for i, value in enumerate(values) if value in values[:i]]
            if twice:
                listed = ",".join(map(str, values))
                raise BadInput(f"--config.{name}={listed}: lists {twice[0]} twice")
        base = dataclasses.replace(self.base, **fixed)
        settings = [
            dataclasses.replace(base, **change, **dict(zip(lists, values, strict=True)))
            for change in changes
            for values in itertools.product(*lists.values())
        ]
        return list(dict.fromkeys(settings))  # the base is a level of every factor
