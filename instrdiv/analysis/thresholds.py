"""Thresholds, intervals and verdicts: pure functions of the results table.

The *threshold* I50 is the number of instructions at which a seed's exact match on unseen has-op examples crosses one
half, from a monotone (isotonic) fit to its points, interpolated linearly in log I. It is computed per seed; the mean
and the interval are over seeds, in log I, since the variation is between seeds.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instrdiv.analysis.claims import Claim
from instrdiv.evaluation.statistics import NOTHING, Interval, mean_interval
from instrdiv.runtime.tables import Row
from instrdiv.tasks.task import task_of


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where one seed's curve crosses one half.

    Attributes:
      value: I50; NaN if the curve does not cross one half between two tested values.
      below, above: the tested values that bracket it; one of them is NaN if it lies outside the tested range.
    """

    value: float
    below: float
    above: float


def crossing(instructions: Sequence[float], exact_match: Sequence[float], level: float = 0.5) -> Crossing:
    """I50 of one seed, from its points in any order."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(instructions, kind="stable")
    x = np.asarray(instructions, float)[order]
    y = isotonic_regression(np.asarray(exact_match, float)[order]).x
    if y[0] >= level:
        return Crossing(math.nan, math.nan, float(x[0]))
    if y[-1] < level:
        return Crossing(math.nan, float(x[-1]), math.nan)
    i = int(np.argmax(y >= level))
    share = (level - y[i - 1]) / (y[i] - y[i - 1])
    return Crossing(float(x[i - 1] * (x[i] / x[i - 1]) ** share), float(x[i - 1]), float(x[i]))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """I50 of a figure.

    Attributes:
      values: the tested values, ascending.
      per_seed: crossing of every seed that is not ``incomplete``.
      interval: geometric mean over the seeds that have an I50, with its t-interval in log I; NaN if no seed has one.
      outside: number of seeds whose curve crosses one half outside their tested range; they are excluded from the mean,
        so report how many there are.
      incomplete: number of seeds with a gap in their tested values, such as a diverged member, or a single one; also
        excluded.
      below, above: the tested values that bracket the crossings of all seeds.
    """

    values: tuple[float, ...]
    per_seed: dict[int, Crossing]
    interval: Interval
    outside: int
    incomplete: int
    below: float
    above: float

    @property
    def text(self) -> str:
        """A one-line summary."""
        seeds = len(self.per_seed)
        if not seeds:
            return f"no threshold: each of the {self.incomplete} seeds lacks a point"
        if self.outside == seeds:
            below = sum(math.isnan(c.below) for c in self.per_seed.values())
            where = {0: "above", seeds: "below"}.get(below, "outside")
            return f"no threshold: the curves pass one half, if at all, {where} the tested range ({seeds} seeds)"
        text = f"I50 = {self.interval.mean:,.0f}"
        if not math.isnan(self.interval.low):
            low, high, count = self.interval.low, self.interval.high, self.interval.count
            text += f" (95 % interval {low:,.0f} to {high:,.0f} over {count} seeds)"
        text += f", between the tested {self.below:,.0f} and {self.above:,.0f}"
        if self.outside:
            text += f"; {self.outside} of {seeds} seeds pass outside the tested range and are left out"
        if self.incomplete:
            text += f"; {self.incomplete} seeds lack a point and are left out"
        return text


def comparison(found: Mapping[tuple, Threshold], fields: Sequence[str], baseline: tuple) -> list[Row]:
    """One row per setting: its threshold, and the ratio of that to the baseline's (see ``ratios``)."""
    others = {key: threshold for key, threshold in found.items() if key != baseline}
    against = ratios(others, found[baseline]) | {baseline: NOTHING}
    rows = []
    for key, threshold in found.items():
        interval, ratio = threshold.interval, against[key]
        rows.append(
            dict(zip(fields, key, strict=True))
            | {"i50": interval.mean, "i50_low": interval.low, "i50_high": interval.high, "seeds": interval.count}
            | {"seeds_outside": threshold.outside, "seeds_incomplete": threshold.incomplete}
            | {"below": threshold.below, "above": threshold.above}
            | {"ratio": ratio.mean, "ratio_low": ratio.low, "ratio_high": ratio.high, "comparisons": len(others)}
        )
    return rows


def headline(results: Sequence[Row]) -> str:
    """The headline slice of the task that these rows belong to."""
    return task_of(results[0] if results else ()).headline


def select(results: Sequence[Row], split: str, slice: str) -> list[Row]:
    """The rows of one split and slice, without diverged members."""
    return [r for r in results if (r["split"], r["slice"], r["status"]) == (split, slice, "ok")]


def threshold(rows: Sequence[Row], x: str = "instructions") -> Threshold:
    """The threshold of rows that differ only in ``x`` and seed (see ``select``). Needs at least one row.

    A seed may have been tested at only some neighboring values, so that there are more seeds near the step.
    """
    values, seeds = sorted({row[x] for row in rows}), sorted({row["seed"] for row in rows})
    per_seed = {}
    for seed in seeds:
        points = [row for row in rows if row["seed"] == seed]
        tested = sorted({row[x] for row in points})
        first = values.index(tested[0])
        if len(tested) > 1 and tested == values[first : first + len(tested)]:
            per_seed[seed] = crossing([row[x] for row in points], [row["exact_match"] for row in points])
    incomplete = len(seeds) - len(per_seed)
    inside = [c for c in per_seed.values() if not math.isnan(c.value)]
    if not inside:
        return Threshold(tuple(values), per_seed, NOTHING, len(per_seed), incomplete, math.nan, math.nan)
    interval = _exponential([math.log(c.value) for c in inside])
    bracket = min(c.below for c in inside), max(c.above for c in inside)
    return Threshold(tuple(values), per_seed, interval, len(per_seed) - len(inside), incomplete, *bracket)


def by_setting(rows: Sequence[Row], fields: Sequence[str], x: str = "instructions") -> dict[tuple, Threshold]:
    """The threshold for each combination of values of ``fields``, sorted by value."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in fields), []).append(row)
    return {key: threshold(groups[key], x) for key in sorted(groups, key=ordering)}


def ordering(key: tuple) -> list[tuple[bool, Any]]:
    """Sort key for values of settings: numbers before names."""
    return [(isinstance(value, str), value) for value in key]


def ratios(found: Mapping[Any, Threshold], baseline: Threshold) -> dict[Any, Interval]:
    """The ratio of each threshold to the baseline's, as ratios of geometric means over seeds.

    The intervals are Dunnett's, for comparing several settings with one baseline: with 95 % confidence, ALL of them
    hold simultaneously. They assume that log I50 has the same variance over seeds in every setting. NaN if a seed of a
    setting, or of the baseline, crosses one half outside the tested range (excluding it would bias the ratio); the ends
    are NaN if there are too few seeds to estimate the variance.
    """
    from scipy import stats

    def logs(threshold: Threshold) -> list[float]:
        return [] if threshold.outside else [math.log(c.value) for c in threshold.per_seed.values()]

    control = logs(baseline)
    samples = {key: values for key, threshold in found.items() if control and (values := logs(threshold))}
    nothing = dict.fromkeys(found, NOTHING)
    if not samples:
        return nothing
    differences = {key: float(np.mean(values) - np.mean(control)) for key, values in samples.items()}
    ends = np.full((2, len(samples)), math.nan)
    if sum(map(len, samples.values())) + len(control) > len(samples) + 1:
        if len(samples) == 1:
            interval = stats.ttest_ind(*samples.values(), control).confidence_interval(0.95)
        else:
            test = stats.dunnett(*samples.values(), control=control, random_state=np.random.default_rng(0))
            with warnings.catch_warnings():  # it integrates by sampling, and warns if the level is, say, 0.949
                warnings.simplefilter("ignore", UserWarning)
                interval = test.confidence_interval(0.95)
        ends = np.array([np.ravel(interval.low), np.ravel(interval.high)])
    found_ratios = {
        key: Interval(math.exp(differences[key]), math.exp(low), math.exp(high), len(samples[key]))
        for key, low, high in zip(samples, *ends, strict=True)
    }
    return nothing | found_ratios


def trend(levels: Mapping[float, Threshold], trends: int = 1) -> Interval:
    """The exponent b of I50 ~ level ** b, from a least-squares line through the seeds of all levels, in logs.

    The interval has a confidence of 1 - 0.05 / ``trends`` (Bonferroni), for one of ``trends`` trends. NaN if a seed
    crosses one half outside the tested range (excluding it would bias the trend), or there are fewer than two levels.
    """
    from scipy import stats

    points = [
        (math.log(level), math.log(crossing.value))
        for level, found in levels.items()
        for crossing in found.per_seed.values()
        if not math.isnan(crossing.value)
    ]
    if any(found.outside for found in levels.values()) or len({x for x, _ in points}) < 2:
        return NOTHING
    fit = stats.linregress(*zip(*points, strict=True))
    half = float(stats.t.ppf(1 - 0.025 / trends, len(points) - 2) * fit.stderr) if len(points) > 2 else math.nan
    return Interval(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half, len(points))


def _exponential(logs: Sequence[float]) -> Interval:
    """The geometric mean and interval of values, given their logarithms."""
    found = mean_interval(logs)
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count)


def by_value(rows: Sequence[Row], x: str = "instructions") -> dict[float, list[float]]:
    """Exact matches of the members at each value of ``x``, in order of ``x``."""
    values: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row[x], row["seed"])):
        values.setdefault(row[x], []).append(row["exact_match"])
    return values


def mean_of(rows: Sequence[Row]) -> float:
    """Mean exact match; NaN without rows."""
    return float(np.mean([row["exact_match"] for row in rows])) if rows else math.nan


def residual(x: Sequence[float], exact_match: Sequence[float], seeds: Sequence[int]) -> float:
    """How far members are from ONE curve that increases with x: the root mean square error of each seed's members
    against the best such curve fitted to the other seeds, interpolated linearly in log(1 + x).

    Leaving a seed out keeps it from fitting the curve to itself, so an x with many different values has no advantage.
    NaN if there is only one seed.
    """
    from scipy.optimize import isotonic_regression

    place, match, seed = np.log1p(np.asarray(x, float)), np.asarray(exact_match, float), np.asarray(seeds)
    if len(set(seeds)) < 2:
        return math.nan
    errors = np.zeros(len(match))
    for left_out in set(seeds):
        fitted, there = seed != left_out, seed == left_out
        knots, knot_of = np.unique(place[fitted], return_inverse=True)  # members with the same x share a knot
        weights = np.bincount(knot_of)
        curve = isotonic_regression(np.bincount(knot_of, match[fitted]) / weights, weights=weights).x
        errors[there] = match[there] - np.interp(place[there], knots, curve)
    return float(np.sqrt(np.mean(errors**2)))


def onset(metrics: Sequence[Row]) -> int | None:
    """The step at which a member's exact match on ``unseen_dev`` first exceeds one half; None if it never does.

    ``metrics`` are the member's rows of metrics.csv, in order; the resolution is that of its reports.
    """
    return next((row["step"] for row in metrics if row["unseen_dev_exact_match"] > 0.5), None)


def logistic_fit(instructions: Sequence[float], exact_match: Sequence[float]) -> tuple[float, float, float] | None:
    """For the overlay only: (center, width in log I, top) of ``top / (1 + exp(-(log I - log center) / width))``.

    None if there are fewer than four values of I, or no fit is found.
    """
    from scipy.optimize import curve_fit

    x, y = np.log(np.asarray(instructions, float)), np.asarray(exact_match, float)

    def curve(x, center, width, top):
        return top / (1 + np.exp(np.clip(-(x - center) / width, -60, 60)))

    bounds = ([x.min(), 0.02, 0.0], [x.max(), 10.0, 1.0])
    if len(set(x)) < 4:
        return None
    try:
        (center, width, top), _ = curve_fit(curve, x, y, p0=(np.median(x), 0.3, 0.9), bounds=bounds)
    except (RuntimeError, ValueError):
        return None
    return float(np.exp(center)), float(width), float(top)


def instruction_step_claims(
    results: Sequence[Row], low: float = 0.1, high: float = 0.95, slice: str = "has_op"
) -> list[Claim]:
    """The claims of figure 2a, except for the location of the step, which depends on the papers' recipe.

    With few instructions, models never follow unseen rules, though they follow the trained ones; with many, they always
    do; in between there is a step. Claims are about means over seeds. ``slice``: the slice of tests to count; by
    default that of string rewriting, the papers' task.
    """
    unseen, seen = (by_value(select(results, split, slice)) for split in ("unseen", "seen"))
    both = sorted(unseen.keys() & seen.keys())
    if not both:
        return [Claim("there is something to judge", False, f"no member finished with {slice.replace('_', '-')} tests")]
    fewest, most = both[0], both[-1]
    few, few_seen, many = (float(np.mean(v)) for v in (unseen[fewest], seen[fewest], unseen[most]))
    found = threshold(select(results, "unseen", slice))
    return [
        Claim(f"few instructions never generalize (unseen below {low})", few < low, f"I = {fewest:,}: {few:.3f}"),
        Claim(f"though they are learned (seen above {1 - low})", few_seen > 1 - low, f"I = {fewest:,}: {few_seen:.3f}"),
        Claim(f"many instructions generalize (unseen above {high})", many > high, f"I = {most:,}: {many:.3f}"),
        Claim("every seed has its step inside the tested range", found.outside + found.incomplete == 0, found.text),
    ]
