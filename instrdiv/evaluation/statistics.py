"""Means, rates and their intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its interval, 95% unless noted otherwise; the ends are NaN if there is only one value."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, form: str = ".2f") -> str:
        """Text such as ``0.98 (0.91 to 1.05)``."""
        if math.isnan(self.mean):
            return "none"
        ends = "" if math.isnan(self.low) else f" ({self.low:{form}} to {self.high:{form}})"
        return f"{self.mean:{form}}{ends}"


#: The interval of no values.
NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def exact_interval(successes: int, tests: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (Clopper-Pearson) binomial interval of one member's exact match."""
    from scipy import stats

    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, tests - successes + 1))
    high = 1.0 if successes == tests else float(stats.beta.ppf(1 - tail, successes + 1, tests - successes))
    return low, high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and t-interval over seeds; ``NOTHING`` if there are no values."""
    from scipy import stats

    if not len(values):
        return NOTHING
    array = np.asarray(values, float)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1) * array.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)
