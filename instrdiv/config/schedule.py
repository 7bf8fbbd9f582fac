"""Fields that from-scratch and adapter training share: the learning-rate schedule and the number of reports."""

from __future__ import annotations

import dataclasses

from instrdiv.runtime.fields import STATIC, at_least, field, from_zero_to_one, positive


@dataclasses.dataclass(frozen=True)
class ScheduleFields:
    """A base class of settings and recipes; see ``training.optimizers.rate_at``."""

    schedule: str = field(
        "linear", "learning-rate decay until the end of training", ("linear", "cosine", "constant"), kind=STATIC
    )
    warmup_steps: int = field(0, "steps of linear warmup", kind=STATIC, bound=at_least(0))
    final_rate: float = field(0.0, "final learning rate, as a fraction of the peak", kind=STATIC, bound=at_least(0))
    adam_b2: float = field(0.999, "decay rate of Adam's second moment", kind=STATIC, bound=from_zero_to_one)
    clip: float = field(1.0, "maximum global gradient norm", kind=STATIC, bound=positive, infinite=True)
    reports: int = field(
        100, "maximum number of progress reports; they split the run into equal chunks", kind=STATIC, bound=at_least(1)
    )
