"""How adapters are trained: the recipe that the members of a run share, and what a member is."""

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
    """How the members of a run are trained: what they share. Hashable.

    The fields are flags, ``--config.<field>``. The last of the equal chunks between reports may be shorter.
    """

    steps: int = field(2000, "training steps; the schedule ends with them", bound=at_least(1))
    batch_size: int = field(64, "rows a step of one member", bound=at_least(1))
    microbatch_size: int | None = field(None, "rows of a member that go through the model at once (default: all)")
    weight_decay: float = field(
        0.0, "decoupled weight decay of the adapters, times the learning rate", bound=at_least(0)
    )
    precision: str = field("bfloat16", "compute precision; adapters are float32", ("float32", "bfloat16"))
    remat: bool = field(False, "keep only the input of every layer for the backward pass: less memory, a third slower")
    attention: str = field("plain", "how attention is computed", llama.ATTENTION)

    @property
    def chunk_steps(self) -> int:
        """Steps between two reports."""
        return math.ceil(self.steps / self.reports)

    @property
    def parts(self) -> int:
        """Parts that a batch goes through the model in."""
        return self.batch_size // (self.microbatch_size or self.batch_size)

    def validate(self) -> None:
        """Raises BadInput, naming the flag, for a recipe that cannot be followed."""
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
    """A member of a population: an adapter, how it is trained, and what tables say of it. Its rate is a flag, too.

    Attributes:
      lora: its shape.
      learning_rate: at the peak.
      seed: decides its initial weights and the order of its rows.
      setting: whatever else tells it from others, for tables: column -> value, such as ``{"instructions": 1000}``. Its
        data come beside it, one ``Packed`` a member.
    """

    lora: Lora
    learning_rate: float = field(1e-5, "at its peak", bound=at_least(0))
    seed: int = 0
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def as_row(self) -> dict[str, Any]:
        """Flat values for tables, except the seed."""
        return {
            **self.setting,
            "rank": self.lora.rank,
            "alpha": float(self.lora.alpha),
            "targets": "+".join(self.lora.targets),
            "learning_rate": float(self.learning_rate),
        }

    @property
    def id(self) -> str:
        """Stable name: a hash of its row and its seed."""
        text = json.dumps(plain(self.as_row() | {"seed": self.seed}), sort_keys=True)
        return "a" + hashlib.sha256(text.encode()).hexdigest()[:9]
