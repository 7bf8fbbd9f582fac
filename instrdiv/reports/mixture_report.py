"""The report on mixtures: a figure of the held-out losses, and one self-contained HTML page.

``results.csv`` has one row per member and source, ``base.csv`` the losses of the base without an adapter, and
``packing.csv`` the packing statistics of each member's rows. The figure is drawn from results.csv and base.csv; the
page is built only from these files, the figure, ``cleaning.csv`` and ``provenance.json``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instrdiv.analysis import plots
from instrdiv.data.mixing import PACKING_COLUMNS
from instrdiv.data.schemas import ALL
from instrdiv.evaluation.adapter_rows import LOSS_IDENTITY, settings_in
from instrdiv.evaluation.statistics import Interval, mean_interval
from instrdiv.reports.adapter_report import made
from instrdiv.reports.pages import data_uri, in_words, launched, write_page
from instrdiv.runs.adapter_tests import MIXTURE_TEXTS, read_losses
from instrdiv.runtime.provenance import read_provenance
from instrdiv.runtime.tables import Row, read_table

_COLUMNS = 3  # panels side by side


def summary(results: Sequence[Row]) -> dict[tuple[str, str], tuple[Interval, Interval]]:
    """(mixture, source) -> held-out loss, and how far it is below the base's, over the seeds that did not diverge."""
    found: dict[tuple[str, str], tuple[Interval, Interval]] = {}
    for mixture, source in dict.fromkeys((row["mixture"], row["source"]) for row in results):
        rows = [row for row in results if (row["mixture"], row["source"], row["status"]) == (mixture, source, "ok")]
        loss, less = (mean_interval([row[name] for row in rows]) for name in ("loss", "less_than_base"))
        # A loss cannot be below 0; a t-interval can.
        found[mixture, source] = dataclasses.replace(loss, low=max(loss.low, 0.0)), less
    return found


def draw(results: Sequence[Row], base: Sequence[Row], path_stem: Path | None) -> Any:
    """Draws one panel per source: its held-out loss after training on each mixture, with seeds as dots, means with 95 %
    intervals, and the base as a line. Writes ``.png`` and ``.pdf`` unless the path is None, and returns the figure."""
    found = summary(results)
    mixtures = list(dict.fromkeys(mixture for mixture, _ in found))
    sources = [row["source"] for row in base]
    columns = min(len(sources), _COLUMNS)
    lines = math.ceil(len(sources) / columns)
    labels = [mixture.replace(",", ",\n") for mixture in mixtures]
    height = lines * max(1.8, 0.22 * sum(1.5 + label.count("\n") for label in labels))
    figure = plots.new_figure(2.2 + 3.0 * columns, 1.6 + height, "Held-out loss after training on each mixture")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(sources) :]:
        axes.set_visible(False)
    for axes, of_base in zip(panels.flat, base, strict=False):
        source = of_base["source"]
        axes.axvline(of_base["loss"], color="black", lw=1, ls="--", zorder=1)
        axes.annotate("base", (of_base["loss"], 1), (3, -9), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=8)  # fmt: skip
        for place, mixture in enumerate(mixtures):
            own = source in (part.rpartition("=")[0] for part in mixture.split(","))
            color = plots.UNSEEN if own else plots.SEEN
            rows = [row for row in results if (row["mixture"], row["source"]) == (mixture, source)]
            points = [row["loss"] for row in rows if row["status"] == "ok"]
            nudged = [place + 0.14 * (i - (len(points) - 1) / 2) for i in range(len(points))]
            axes.plot(points, nudged, "o" if own else "s", color=color, ms=4.5, alpha=0.65, mec="white", mew=0.4)
            interval = found[mixture, source][0]
            if points:
                ends = (interval.mean - interval.low, interval.high - interval.mean)
                errors = None if math.isnan(interval.low) else [[end] for end in ends]
                axes.errorbar(interval.mean, place, xerr=errors, fmt="|", ms=13, color=color, capsize=3, elinewidth=1.2)
            if len(points) < len(rows):
                axes.plot(of_base["loss"], place, "x", color="black", ms=8)
        axes.set_title(source, loc="left", fontsize=11)
        axes.set_yticks(range(len(mixtures)), labels, fontsize=8.5)
        axes.set_ylim(len(mixtures) - 0.4, -0.6)
        axes.set_xlabel("loss, nats per response token", fontsize=9)
        axes.grid(alpha=0.25, axis="x")
        axes.margins(x=0.12)
    seeds = len({row["seed"] for row in results})
    diverged = len({row["member"] for row in results if row["status"] != "ok"})
    tokens = ", ".join(f"{row['source']} {row['tokens']:,}" for row in base)
    plots.save(
        figure,
        f"{seeds} seed{'s' * (seeds > 1)} per mixture; dots: adapters (squares: mixtures without this source); bars: "
        f"mean and 95 % t-interval over seeds. Predicted response tokens: {tokens}."
        + (f" {diverged} diverged (left out; crosses)." if diverged else ""),
        path_stem,
    )
    return figure


def write_mixture_report(run_dir: Path) -> Path:
    """Writes the report.html of a finished run and returns its path.

    Raises BadInput if a file is missing or damaged.
    """
    results, base = read_losses(run_dir)
    figure = results[0]["figure"]
    packing = read_table(run_dir / "packing.csv", PACKING_COLUMNS, MIXTURE_TEXTS)
    said = read_provenance(run_dir / "provenance.json")
    found = summary(results)
    names = [name for name in settings_in(results, LOSS_IDENTITY) if name != "mixture"]
    same = [name for name in names if len({row[name] for row in results}) == 1]
    picture = run_dir / "figure.png"
    status = {(row["mixture"], row["seed"]): row["status"] for row in results if row["status"] != "ok"}
    page = {
        "figure": figure,
        "members": len({row["member"] for row in results}),
        "mixtures": list(dict.fromkeys(mixture for mixture, _ in found)),
        "seeds": sorted({row["seed"] for row in results}),
        "sources": [row["source"] for row in base],
        "base": {row["source"]: row for row in base},
        "found": found,
        "diverged": [f"{mixture}, seed {seed}: {what}" for (mixture, seed), what in status.items()],
        "packing": [row for row in packing if row["source"] == ALL],
        "cleaning": [row for row in read_table(run_dir / "cleaning.csv", text=MIXTURE_TEXTS) if row["dropped"]],
        "same": [(name, in_words(results[0][name])) for name in same],
        "picture": data_uri(picture) if picture.exists() else None,
        "made": made(said),
        "command": launched(said, figure),
    }
    return write_page(run_dir / "report.html", "mixtures.html.jinja", page)
