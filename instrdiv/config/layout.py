"""The device layout of a run: as requested (``Options``), and with every choice made (``Layout``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax

from instrdiv.config.groups import make_groups
from instrdiv.config.settings import Member, TaskSetting
from instrdiv.runtime.errors import BadInput

#: How attention is computed: by separate operations, or in one cuDNN kernel (bfloat16 on an NVIDIA GPU).
ATTENTION = ("plain", "cudnn")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A complete layout, as ``config.json`` records it for each cohort. See ``Options`` for the attributes."""

    devices: int
    data_parallel: int
    members_per_vmap: int
    attention: str

    @property
    def rows(self) -> int:
        """Number of device sets, each of which trains different members."""
        return self.devices // self.data_parallel

    def check(self, members: Sequence[Member]) -> None:
        """Raises BadInput if this layout is not possible on this machine."""
        Options(**dataclasses.asdict(self)).resolve(members)


@dataclasses.dataclass(frozen=True)
class Options:
    """The requested layout of a run. None: chosen automatically; the choice is written to config.json.

    Attributes:
      devices: number of devices to use.
      data_parallel: devices that share one member's batch; must divide ``devices``.
      members_per_vmap: members vectorized together, a *block*; blocks run one after another.
      attention: how attention is computed, one of ``ATTENTION``; by default plain.
    """

    devices: int | None = None
    data_parallel: int = 1
    members_per_vmap: int | None = None
    attention: str | None = None

    @property
    def leaves_block_to_probe(self) -> bool:
        """Whether a run measures which block size is fastest (see ``probing.choose_block``): none was requested, and
        the answer is not known. On CPU it is one member at a time; results there must not depend on timing, either.
        """
        return self.members_per_vmap is None and jax.default_backend() != "cpu"

    def resolve(self, members: Sequence[Member]) -> Layout:
        """Makes the choices: all devices that the largest group can keep busy; on CPU, one member at a time.

        Elsewhere, a block size that was not requested is a guess, used by plans; a run measures it.

        Raises BadInput if the request cannot be met.
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
            # On CPU, one member already keeps a core busy. Elsewhere, small members underuse the device: guess blocks
            # of at most eight, of equal size so that few slots stay empty.
            most = 1 if jax.default_backend() == "cpu" else 8
            blocks = math.ceil(largest / (rows * most))
            per_vmap = math.ceil(largest / (rows * blocks))
        if self.devices is None:
            rows = min(rows, math.ceil(largest / per_vmap))
        return Layout(rows * self.data_parallel, self.data_parallel, per_vmap, attention)

    def _check_attention(self, settings: set[TaskSetting]) -> None:
        if self.attention not in ATTENTION:
            raise BadInput(f"--attention={self.attention}: must be one of {', '.join(ATTENTION)}")
        if jax.default_backend() != "gpu":
            raise BadInput(f"--attention={self.attention}: needs an NVIDIA GPU; the backend is {jax.default_backend()}")
        for setting in settings:
            if setting.precision != "bfloat16":
                raise BadInput(f"--attention={self.attention}: needs --config.precision=bfloat16")
            if setting.shape.ragged:
                raise BadInput(f"--attention={self.attention}: needs prompts of one fixed length")
            size = setting.width // setting.heads
            if size % 8 or size > 128:
                raise BadInput(f"--attention={self.attention}: needs a head size of 8, 16, … or 128, not {size}; "
                               "it is --config.width divided by --config.heads")  # fmt: skip
