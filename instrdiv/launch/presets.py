"""What one size of a figure is, and the settings that it and the flags ask for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instrdiv.models.lora import Lora
from instrdiv.runtime.errors import BadInput
from instrdiv.training.recipe import Recipe

if TYPE_CHECKING:  # it knows string rewriting, which a figure of another task does without
    from instrdiv.training.pretraining import SmallBase


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a preset's adapters are trained.

    Attributes:
      lora, learning_rate: of every member.
      recipe: that they share.
      small: the base that is trained first; None where ``--base`` has to name one.
      int8: hold the base in eight bits.
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
      values: field of the setting -> the values it takes; their product is trained.
      factors: name -> its levels, each a change of the base; for every level of those that ``--factor`` names, the
        product is trained. ``{}`` is the base itself.
      seeds: models per setting.
      seeds_at: number of instructions -> models per setting there, where that is more: near the step seeds differ most.
      dev_tests, tests: see ``Sweep``.
      judged: large enough to bear out, or contradict, what the papers say.
      tuning: how its adapters are trained; None where models are trained from scratch.
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
        """The settings that are trained.

        Args:
          given: fields that flags give; those of ``values`` as lists.
          changes: of the base; the product is trained for each of them.

        Raises BadInput where a list names a value twice.
        """
        fixed = {name: value for name, value in given.items() if name not in self.values}
        lists = {name: given.get(name, values) for name, values in self.values.items()}
        for name, values in lists.items():
            twice = [value for i, value in enumerate(values) if value in values[:i]]
            if twice:
                listed = ",".join(map(str, values))
                raise BadInput(f"--config.{name}={listed}: names a value twice ({twice[0]} twice)")
        base = dataclasses.replace(self.base, **fixed)
        settings = [
            dataclasses.replace(base, **change, **dict(zip(lists, values, strict=True)))
            for change in changes
            for values in itertools.product(*lists.values())
        ]
        return list(dict.fromkeys(settings))  # the base is a level of every factor
