"""How adapters are trained: the recipe that all members of a run share, and the members."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax

from instrdiv.config.schedule import ScheduleFields
from instrdiv.models import llama
from instrdiv.models.lora import Lora
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import at_least, check_fields, field
from instrdiv.runtime.files import plain


@dataclasses.dataclass(frozen=True)
class Recipe(ScheduleFields):
    """The training settings that all members of a run share. Hashable.

    The fields are flags, ``--config.<field>``. Chunks between reports have equal lengths, except that the last may be
    shorter.
    """

    steps: int = field(2000, "training steps; the schedule ends at the last one", bound=at_least(1))
    batch_size: int = field(64, "rows per step of one member", bound=at_least(1))
    microbatch_size: int | None = field(None, "rows per member that go through the model at once (default: all)")
    weight_decay: float = field(
        0.0, "decoupled weight decay of the adapters: a step decays them by learning rate * this", bound=at_least(0)
    )
    precision: str = field("bfloat16", "compute precision; adapters are float32", ("float32", "bfloat16"))
    remat: bool = field(
        False, "keep only each layer's input for the backward pass, which takes less memory and is a third slower"
    )
    attention: str = field("plain", "how attention is computed", llama.ATTENTION)

    @property
    def chunk_steps(self) -> int:
        """Number of steps between reports."""
        return math.ceil(self.steps / self.reports)

    @property
    def parts(self) -> int:
        """Number of parts in which a batch goes through the model."""
        return self.batch_size // (self.microbatch_size or self.batch_size)

    def validate(self) -> None:
        """Raises BadInput, naming the flag, if the recipe is not valid."""
        check_fields(self)
        if self.warmup_steps > self.steps:
            raise BadInput(f"--config.warmup_steps={self.warmup_steps}: must not exceed --config.steps={self.steps}")
        part = self.microbatch_size
        if part is not None and (part < 1 or self.batch_size % part):
            raise BadInput(f"--config.microbatch_size={part}: must divide --config.batch_size={self.batch_size}")
        if self.attention != "plain" and (jax.default_backend() != "gpu" or self.precision != "bfloat16"):
            raise BadInput(f"--config.attention={self.attention}: needs an NVIDIA GPU and --config.precision=bfloat16")


@dataclasses.dataclass(frozen=True)
class AdapterMember:
    """A member of a population: an adapter, its training, and its columns in tables. Its learning rate is a flag, too.

    Attributes:
      lora: its adapter's configuration.
      learning_rate: peak learning rate.
      seed: determines its initial weights and the order of its rows.
      setting: whatever else distinguishes it from other members, as table columns: column -> value, such as
        ``{"instructions": 1000}``. Its data are passed separately, one ``Packed`` per member.
    """

    lora: Lora
    learning_rate: float = field(1e-5, "peak learning rate", bound=at_least(0))
    seed: int = 0
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def as_row(self) -> dict[str, Any]:
        """Flat values for tables, without the seed."""
        return {
            **self.setting,
            "rank": self.lora.rank,
            "alpha": float(self.lora.alpha),
            "targets": "+".join(self.lora.targets),
            "learning_rate": float(self.learning_rate),
        }

    @property
    def id(self) -> str:
        """A stable name: a hash of its row and its seed."""
        text = json.dumps(plain(self.as_row() | {"seed": self.seed}), sort_keys=True)
        return "a" + hashlib.sha256(text.encode()).hexdigest()[:9]
