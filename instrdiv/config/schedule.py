"""Fields of every training, from scratch or of adapters: how the rate changes, and how often a run reports."""

from __future__ import annotations

import dataclasses

from instrdiv.runtime.fields import STATIC, at_least, field, from_zero_to_one, positive


@dataclasses.dataclass(frozen=True)
class ScheduleFields:
    """A base of settings and recipes; see ``training.optimizers.rate_at``."""

    schedule: str = field(
        "linear", "decay of the rate to the end of the budget", ("linear", "cosine", "constant"), kind=STATIC
    )
    warmup_steps: int = field(0, "steps of linear warm-up", kind=STATIC, bound=at_least(0))
    final_rate: float = field(0.0, "rate at the end, as a share of the peak", kind=STATIC, bound=at_least(0))
    adam_b2: float = field(0.999, "decay of Adam's second moment", kind=STATIC, bound=from_zero_to_one)
    clip: float = field(1.0, "largest global norm of a gradient", kind=STATIC, bound=positive, infinite=True)
    reports: int = field(
        100, "progress reports per run, at most; they cut it into equal chunks", kind=STATIC, bound=at_least(1)
    )
