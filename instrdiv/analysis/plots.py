"""Plots, drawn from tables alone, so that a run can be redrawn without a model."""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instrdiv.analysis import thresholds
from instrdiv.evaluation.rows import setting_names
from instrdiv.evaluation.statistics import mean_interval
from instrdiv.runtime.tables import Row
from instrdiv.tasks.task import task_of

UNSEEN, SEEN, BAND = "#1f5fa8", "#c05a1c", "#8a8a8a"


def instruction_curve(
    results: Sequence[Row],
    path_stem: Path | None = None,
    reported_band: tuple[float, float] | None = None,
    title: str = "Following instructions that were never trained on",
    slice: str | None = None,
    notes: Sequence[str] = (),
):
    """Figure 2a: exact match on unseen and seen examples against the number of instructions.

    Args:
      results: rows of results.csv.
      path_stem: where to write ``.png`` and ``.pdf``; None writes nothing.
      reported_band: where the papers report their step, shown in the background.
      title: the first line.
      slice: the slice of tests to count; the task's headline by default.
      notes: lines below the caption.

    Returns:
      The matplotlib figure. Each member is a dot (a cross if it diverged), each line a mean with a 95 % t-interval
      over seeds.
    """
    figure = new_figure(8, 5.2)
    axes = figure.add_subplot()
    slice = slice or thresholds.headline(results)
    unseen = thresholds.select(results, "unseen", slice)
    if reported_band:
        low, high = reported_band
        label = f"step reported by the papers, {low:,.0f}–{high:,.0f}\n(their model, strings and budget)"
        axes.axvspan(low, high, color=BAND, alpha=0.13, lw=0, label=label)
    for split, color, marker, label in (
        ("seen", SEEN, "s", "seen rules, fresh inputs"),
        ("unseen", UNSEEN, "o", "unseen rules"),
    ):
        curve(axes, thresholds.by_value(thresholds.select(results, split, slice)), color, label, marker)
    for row in results:
        if row["split"] == "unseen" and row["slice"] == slice and row["status"] != "ok":
            axes.plot(row["instructions"], 0, "x", color="black", ms=8)
    if unseen:
        _threshold(axes, thresholds.threshold(unseen))
        _logistic(axes, unseen)
    count_axis(axes, {row["instructions"] for row in results})
    match_axis(axes, "exact match" if slice == "all" else f"exact match ({slice.replace('_', '-')})")
    axes.set_title(title, loc="left", fontsize=13, weight="bold")
    _shares(axes, thresholds.by_value(unseen))
    axes.legend(loc="center right" if not unseen else "best", fontsize=9, framealpha=0.9)
    finish(figure, results, path_stem, *notes, slice=slice)
    return figure


def new_figure(width: float, height: float, title: str | None = None):
    """An empty figure with an optional title, without pyplot and its global state; displays itself in a notebook."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, dpi=100, metadata={"Software": None})
            return png.getvalue()

    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=13)
    return figure


def finish(figure, results: Sequence[Row], path_stem: Path | None, *notes: str, slice: str | None = None) -> None:
    """Saves a figure with the caption of its table, followed by ``notes`` on separate lines."""
    save(figure, "\n".join((caption(results, slice), *notes)), path_stem)


def save(figure, text: str, path_stem: Path | None) -> None:
    """Adds a caption and writes ``.png`` and ``.pdf``, byte-identical for identical figures; writes nothing without a
    path."""
    letters = int(15 * figure.get_figwidth())  # that fit on a line
    lines = text.splitlines()
    text = "\n".join(textwrap.fill(line, letters) for line in lines)
    figure.supxlabel(text, fontsize=8.5, color="#444444", x=0.02, ha="left")
    if path_stem is not None:
        figure.savefig(path_stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
        figure.savefig(
            path_stem.with_suffix(".pdf"), metadata={"CreationDate": None, "Producer": None, "Creator": None}
        )


def caption(results: Sequence[Row], slice: str | None = None) -> str:
    """Seeds, tests, model, training regime and task, from the table; shows all values of what varies between members.

    ``slice``: the slice of tests to count; the task's headline by default.
    """
    slice = slice or thresholds.headline(results)
    headline = [row for row in results if row["split"] == "unseen" and row["slice"] == slice] or list(results)
    names = setting_names(headline[0])
    models = Counter(tuple(row[name] for name in names) for row in headline)
    diverged = len({row["member"] for row in results if row["status"] != "ok"})

    def values(name: str, form: str = "{:,}") -> str:
        found = sorted({row[name] for row in headline}, key=lambda value: thresholds.ordering((value,)))
        return "/".join(form.format(value) for value in found)

    tests = "tests" if slice == "all" else f"{slice.replace('_', '-')} tests"
    of_task = task_of(names).caption(headline)
    return (
        f"{_range(models.values())} seed{'s' * (max(models.values()) > 1)} per setting; "
        f"{_range(row['tests'] for row in headline)} unseen {tests} per model; dots: models; "
        "line and bars: mean and 95 % t-interval over seeds.\n"
        f"Fixed set of {values('examples')} examples, {values('epochs', '{:g}')} epochs ({values('examples_seen')} "
        f"examples seen), {values('optimizer', '{}')}; {values('layers')} layers, width {values('width')}"
        + (f";\n{of_task}" if of_task else ".")
        + (f" {diverged} diverged (left out; crosses, where drawn)." if diverged else "")
    )


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def shades(count: int) -> list:
    """Colors for an ordered quantity, dark to light; distinguishable in grayscale."""
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.0, 0.78, count)]


def count_axis(axes, counts: Iterable[int], label: str = "number of different instructions trained on, I") -> None:
    """A logarithmic x axis with a tick at each count, and as many labels as there is room for."""
    ticks = sorted(set(counts))
    axes.set_xscale("log")
    axes.set_xlim(min(ticks) / 1.5, max(ticks) * 1.5)
    axes.set_xticks(ticks, _with_room(axes, ticks, [f"{tick:,}" for tick in ticks], 0.09))
    axes.minorticks_off()
    axes.set_xlabel(label)


def _with_room(axes, ticks: Sequence[float], labels: Sequence[str], letter_inches: float) -> list[str]:
    """The labels, empty where they would run into the one before."""
    kept, end = [], -math.inf
    low, high = np.log(axes.get_xlim())
    width = axes.bbox.width / axes.figure.dpi
    for tick, label in zip(ticks, labels, strict=True):
        place, half = (np.log(tick) - low) / (high - low) * width, letter_inches * len(label) / 2
        fits = place - half >= end
        kept.append(label if fits else "")
        end = place + half if fits else end
    return kept


def match_axis(axes, label: str = "exact match") -> None:
    """A y axis for exact match."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)


def one_half(axes) -> None:
    """A horizontal line at one half, where thresholds are read off."""
    axes.axhline(0.5, color=BAND, lw=0.8, ls=":", zorder=1)


def curve(
    axes, values: Mapping[float, Sequence[float]], color, label: str | None = None, marker: str = "o", style: str = "-",
    light: bool = False,
) -> None:  # fmt: skip
    """Each member as a dot, and a line of means with 95 % t-intervals over seeds; ``light``: a thin line, no dots.

    ``values``: x -> exact matches of the seeds.
    """
    if not values:
        axes.plot([], [], color=color, ls=style, label=label)
        return
    means = [mean_interval(points) for points in values.values()]
    x = np.array(list(values))
    mean = np.array([interval.mean for interval in means])
    # Exact match cannot leave [0, 1]; a t-interval can.
    low, high = (np.clip([getattr(interval, end) for interval in means], 0, 1) for end in ("low", "high"))
    errors = np.nan_to_num(np.stack([mean - low, high - mean]))
    if light:
        axes.errorbar(
            x, mean, yerr=errors, color=color, lw=1, ls=style, elinewidth=0.6, label=label, alpha=0.7, zorder=2
        )
        return
    axes.errorbar(x, mean, yerr=errors, color=color, lw=1.8, ls=style, capsize=3, elinewidth=1, label=label, zorder=3)
    logarithmic = axes.get_xscale() == "log"
    for value, points in values.items():
        # Place seeds side by side, offset too little to be mistaken for another value.
        places = np.arange(len(points)) - (len(points) - 1) / 2
        x_points = value * 1.04**places if logarithmic else value + 0.05 * places
        axes.plot(x_points, points, marker, color=color, ms=4.5, alpha=0.65, mec="white", mew=0.4, zorder=4)


def threshold_levels(axes, levels: Mapping[Any, thresholds.Threshold], base: Any, tested: Sequence[float]) -> None:
    """I50 at each level of a factor: dots are seeds, bars geometric means with 95 % intervals; an arrow at the edge of
    the tested range shows how many seeds cross one half beyond it."""
    axes.set_yscale("log")
    axes.set_ylim(tested[0] / 1.6, tested[-1] * 1.6)
    axes.set_yticks(tested, [f"{tick:,}" for tick in tested])
    axes.minorticks_off()
    for place, (level, found) in enumerate(levels.items()):
        color = SEEN if level == base else UNSEEN
        inside = [crossing.value for crossing in found.per_seed.values() if not math.isnan(crossing.value)]
        places = place + 0.08 * (np.arange(len(inside)) - (len(inside) - 1) / 2)
        axes.plot(places, inside, "o", color=color, ms=4.5, alpha=0.65, mec="white", mew=0.4, zorder=4)
        if inside:
            low, mean, high = found.interval.low, found.interval.mean, found.interval.high
            errors = np.nan_to_num([[mean - low], [high - mean]])
            axes.errorbar(place, mean, yerr=errors, fmt="_", ms=14, color=color, capsize=3, elinewidth=1, zorder=3)
        for edge, side, marker in ((tested[-1] * 1.3, "above", "^"), (tested[0] / 1.3, "below", "v")):
            beyond = sum(math.isnan(getattr(crossing, side)) for crossing in found.per_seed.values())
            if beyond:
                axes.plot(place, edge, marker, color=color, ms=7, zorder=4)
                axes.annotate(f"{beyond} seeds", (place, edge), (7, -3), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(levels)), [v if isinstance(v, str) else f"{v:,g}" for v in levels])
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.grid(alpha=0.25)


def heat_map(axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Exact match as color, with the number in every cell; NaN cells stay empty."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9,
                      color="white" if value > 0.6 else "black")  # fmt: skip


def _logistic(axes, unseen: Sequence[Row]) -> None:
    """A visual overlay; the threshold is not computed from it."""
    fit = thresholds.logistic_fit([row["instructions"] for row in unseen], [row["exact_match"] for row in unseen])
    if fit:
        center, width, top = fit
        x = np.geomspace(min(r["instructions"] for r in unseen), max(r["instructions"] for r in unseen), 200)
        y = top / (1 + np.exp(-(np.log(x) - np.log(center)) / width))
        axes.plot(x, y, color=UNSEEN, lw=0.9, alpha=0.55, ls="-.", zorder=2, label="logistic fit (overlay only)")


def _shares(axes, values: dict[float, list[float]]) -> None:
    """Above the axes, how many seeds exceed one half at each count; the mean hides that they are bimodal near it."""
    top = axes.secondary_xaxis("top")
    labels = [f"{sum(point > 0.5 for point in points)}/{len(points)}" for points in values.values()]
    top.set_xticks(list(values), _with_room(axes, list(values), labels, 0.08), fontsize=8.5, color=UNSEEN)
    top.tick_params(length=0, pad=1)
    top.minorticks_off()
    top.set_xlabel("models above one half on unseen rules", fontsize=8.5, color=UNSEEN, loc="left", labelpad=2)


def _threshold(axes, found: thresholds.Threshold) -> None:
    if math.isnan(found.interval.mean):
        axes.plot([], [], " ", label=found.text)
        return
    interval = found.interval
    one_half(axes)
    axes.axvline(interval.mean, color=UNSEEN, lw=1.2, ls="--", zorder=2)
    label = f"threshold I50 = {interval.mean:,.0f}"
    if not math.isnan(interval.low):
        label += f"\n95 % interval {interval.low:,.0f}–{interval.high:,.0f}"
        axes.axvspan(interval.low, interval.high, color=UNSEEN, alpha=0.12, lw=0, zorder=1)
    axes.plot([], [], color=UNSEEN, lw=1.2, ls="--", label=label)
