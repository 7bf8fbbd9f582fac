"""Learning curves as SVG: frames, axes and polylines."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from instrdiv.analysis import thresholds
from instrdiv.reports.run_tables import RunTables
from instrdiv.runtime.tables import Row

#: Maximum number of points per curve.
CURVE_POINTS = 160


#: Number of colors on the page. Further seeds reuse them with dashed lines.
COLORS = 8


#: 1, 2, 5, 10 ...: candidates for axis limits and ticks.
_ROUND = [float(f"{digit}e{power}") for power in range(-12, 13) for digit in (1, 2, 5)]


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes shared by all panels of one kind, so that they can be compared, in SVG coordinates."""

    steps: int
    low: float
    high: float
    log: bool = False

    WIDTH, HEIGHT = 280, 130
    LEFT, RIGHT, TOP, BOTTOM = 34, 272, 20, 112

    def x(self, step: float) -> float:
        return round(self.LEFT + (self.RIGHT - self.LEFT) * step / self.steps, 1)

    def y(self, value: float) -> float:
        """The y coordinate of a value; values outside the axis limits are clipped to them."""
        value, low, high = min(max(value, self.low), self.high), self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.BOTTOM - (self.BOTTOM - self.TOP) * (value - low) / (high - low), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The ticks of the y axis: (coordinate, label)."""
        if not self.log:
            return [(self.y(value), f"{value:g}") for value in (0, 0.5, 1)]
        steps = [value for value in _ROUND if self.low <= value <= self.high]
        decades = [value for value in steps if f"{value:e}".startswith("1")]
        if len(decades) > 1:
            steps = decades[:: max(1, len(decades) // 3)]
        return [(self.y(value), f"{value:g}") for value in steps]


def curves_of(run: RunTables) -> dict[str, Any]:
    """One exact-match panel and one loss panel per setting, with one line per member."""
    rows: dict[str, list[Row]] = {id: [] for id in run.members}
    for row in sorted(run.metrics, key=lambda row: row["step"]):
        rows[row["member"]].append(row)
    steps = max(row["step"] for row in run.metrics)
    match_frame, loss_frame = Frame(steps, 0.0, 1.0), Frame(steps, *_loss_range(rows.values()), log=True)
    seeds = run.seeds

    def member(id: str) -> dict[str, Any]:
        onset, diverged = thresholds.onset(rows[id]), run.diverged.get(id)
        draw = functools.partial(_line, rows[id], diverged)
        place = seeds.index(run.members[id].seed)
        return {
            "id": id,
            "seed": run.members[id].seed,
            "color": place % COLORS,
            "dashed": place // COLORS % 2 == 1,
            "onset": onset,
            "diverged": diverged,
            "match": draw(match_frame, "unseen_dev_exact_match")
            | {"onset": [(match_frame.x(row["step"]), match_frame.y(row["unseen_dev_exact_match"]))
                         for row in rows[id] if row["step"] == onset]},
            "loss": draw(loss_frame, "loss"),
        }  # fmt: skip

    panels = [(run.label(key), [member(id) for id in ids]) for key, ids in run.settings.items()]
    return {
        "match_frame": match_frame,
        "loss_frame": loss_frame,
        "panels": panels,
        "onsets": any(member["onset"] is not None for _, members in panels for member in members),
        "diverged": bool(run.diverged),
        "reports": max(map(len, rows.values())),
    }


def _line(rows: Sequence[Row], diverged: int | None, frame: Frame, name: str) -> dict[str, Any]:
    """A member's curve up to its divergence: the points of the polyline, and the position of the divergence cross."""
    drawn = [(row["step"], row[name]) for row in rows if row["status"] == "ok" and not math.isnan(row[name])]
    points = " ".join(f"{frame.x(step)},{frame.y(value)}" for step, value in thin(drawn, CURVE_POINTS))
    cross = None if diverged is None else (frame.x(diverged), frame.y(drawn[-1][1] if drawn else frame.low))
    return {"points": points, "cross": cross}


def _loss_range(members: Iterable[Sequence[Row]]) -> tuple[float, float]:
    """The limits of the loss axis, as round numbers, not stretched by members about to diverge or by losses of 0."""
    losses = [[row["loss"] for row in rows if 0 < row["loss"] < math.inf] for rows in members]
    losses = [member for member in losses if member]
    if not losses:
        return 0.1, 1.0
    high = min(max(map(max, losses)), 10 * statistics.median(member[0] for member in losses))
    low = max(min(map(min, losses)), high / 1e5)
    return max((v for v in _ROUND if v <= low), default=low), min((v for v in _ROUND if v > high), default=2 * high)


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` of the points, in order: the first, the last, and the lowest and highest of each stretch between
    them, so that no spike is lost."""
    if len(points) <= most:
        return list(points)

    def value(place: int) -> float:
        return points[place][1]

    stretches, inner = (most - 2) // 2, len(points) - 2
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(1 + inner * i // stretches, 1 + inner * (i + 1) // stretches)
        kept |= {min(stretch, key=value), max(stretch, key=value)}
    return [points[place] for place in sorted(kept)]
