"""Sweeps: what a run trains, how it is tested, and how it is laid out on the machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from instrdiv.model import ATTENTION
from instrdiv.population import make_groups
from instrdiv.settings import SETTING_COLUMNS, BadInput, Member, Setting


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a run trains and how it is tested.

    Attributes:
      figure: name, for tables and titles.
      members: all settings and seeds.
      dev_tests: held-out rules (one test each) of ``unseen_dev``, used at every report.
      tests: held-out rules of ``unseen``, used once; as many tests are made of trained rules (``seen``).
    """

    figure: str
    members: tuple[Member, ...]
    dev_tests: int = 256
    tests: int = 2_000

    @classmethod
    def grid(cls, base: Setting | None = None, seeds: int = 3, figure: str = "sweep", dev_tests: int = 256,
             tests: int = 2_000, **values: Iterable[Any]) -> Sweep:  # fmt: skip
        """Every combination of the values given for fields of ``Setting``, with every seed.

        Raises BadInput for a name that is no field, or a value where a list of values is meant.

        >>> len(Sweep.grid(Setting(examples=4096), seeds=3, instructions=[16, 256, 4096]).members)
        9
        """
        settings = [base or Setting()]
        for name, choices in values.items():
            if name not in SETTING_COLUMNS:
                raise BadInput(f"Sweep.grid: {name} is not a field of Setting; those are {', '.join(SETTING_COLUMNS)}")
            if isinstance(choices, str) or not isinstance(choices, Iterable):
                raise BadInput(f"Sweep.grid: {name}={choices!r} must be a list of values, as in {name}=[{choices!r}]")
            choices = list(choices)
            settings = [dataclasses.replace(setting, **{name: choice}) for setting in settings for choice in choices]
        members = tuple(Member(setting, seed) for setting in settings for seed in range(seeds))
        return cls(figure, members, dev_tests, tests)

    def validate(self) -> None:
        """Raises BadInput for what cannot be run. Cheap."""
        if not self.members:
            raise BadInput("a sweep needs at least one member: give at least one setting and one seed")
        for name in ("dev_tests", "tests"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name}={getattr(self, name)}: must be at least 1")
        for setting in dict.fromkeys(member.setting for member in self.members):
            setting.validate()
        for member in self.members:
            if not 0 <= member.seed < 2**31:
                raise BadInput(f"a seed is a whole number from 0 to 2^31 - 1, got {member.seed}")
        ids = [member.id for member in self.members]
        if len(set(ids)) < len(ids):
            raise BadInput("a sweep names the same setting twice: every value of a swept field must be different")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is laid out on the machine. None means: choose, and write the choice to config.json.

    Attributes:
      devices: how many devices are used.
      data_parallel: devices that share one member's batch; divides ``devices``.
      members_per_vmap: members vectorised together, a *block*; the others follow one after another.
      attention: how attention is computed, one of ``model.ATTENTION``; by default plain.
    """

    devices: int | None = None
    data_parallel: int = 1
    members_per_vmap: int | None = None
    attention: str | None = None

    @property
    def leaves_block_to_probe(self) -> bool:
        """Whether a run measures which block is fastest (see ``probing.choose_block``): nobody named one, and it is
        not known. On CPU one member at a time is; there, what a run computes must not hang on a clock, either.
        """
        return self.members_per_vmap is None and jax.default_backend() != "cpu"

    def resolve(self, members: Sequence[Member]) -> Options:
        """The choices made: all devices that the largest group can keep busy; on CPU one member at a time.

        Elsewhere a block that is not named is a guess, for plans; a run measures it.

        Raises BadInput where what was asked for does not fit.
        """
        for name in ("devices", "data_parallel", "members_per_vmap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name}={value}: must be at least 1")
        available = jax.device_count()
        if self.devices is not None and self.devices > available:
            raise BadInput(f"--devices={self.devices}: this machine has {available} ({jax.default_backend()})")
        if self.data_parallel > (self.devices or available) or (self.devices or 0) % self.data_parallel:
            whole = f"--devices={self.devices}" if self.devices else f"the {available} devices of this machine"
            raise BadInput(f"--data_parallel={self.data_parallel}: must divide {whole}")
        for batch in {member.setting.batch_size for member in members}:
            if batch % self.data_parallel:
                raise BadInput(f"--data_parallel={self.data_parallel}: must divide --config.batch_size={batch}")

        attention = self.attention or "plain"
        if attention != "plain":
            self._check_attention({member.setting for member in members})
        largest = max(len(group.members) for group in make_groups(members))
        rows = (self.devices or available) // self.data_parallel
        per_vmap = self.members_per_vmap
        if per_vmap is None:
            # On CPU one member already fills a core. Elsewhere small members leave the device idle: blocks of at most
            # eight are a guess, of equal size so that few members are idle.
            most = 1 if jax.default_backend() == "cpu" else 8
            blocks = math.ceil(largest / (rows * most))
            per_vmap = math.ceil(largest / (rows * blocks))
        if self.devices is None:
            rows = min(rows, math.ceil(largest / per_vmap))
        return Options(rows * self.data_parallel, self.data_parallel, per_vmap, attention)

    def _check_attention(self, settings: set[Setting]) -> None:
        if self.attention not in ATTENTION:
            raise BadInput(f"--attention={self.attention}: must be one of {', '.join(ATTENTION)}")
        if jax.default_backend() != "gpu":
            raise BadInput(f"--attention={self.attention}: needs an NVIDIA GPU; here is {jax.default_backend()}")
        for setting in settings:
            if setting.precision != "bfloat16":
                raise BadInput(f"--attention={self.attention}: needs --config.precision=bfloat16")
            if setting.task_shape.ragged:
                raise BadInput(f"--attention={self.attention}: needs strings of one length each")
            size = setting.width // setting.heads
            if size % 8 or size > 128:
                raise BadInput(f"--attention={self.attention}: needs heads of size 8, 16, … or 128, not {size}; "
                               "it is --config.width over --config.heads")  # fmt: skip
