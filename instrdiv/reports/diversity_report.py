"""The diversity report of a set of instructions: tables, a figure drawn from them, and one self-contained HTML page.

``diversity.csv``, ``scales.csv``, ``overlap.csv`` and ``map.csv`` have the columns defined in ``diversity``, and
``map.csv`` also has ``where``, the origin of each text. ``cleaning.csv`` counts the dropped rows by reason,
``dropped.csv`` lists them, and ``mixture.csv`` lists the rows of a mixture in order. The figure and the page are built
only from these files and ``provenance.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from instrdiv.analysis import diversity, plots
from instrdiv.analysis.diversity import DIVERSITY_COLUMNS, MAP_COLUMNS, OVERLAP_COLUMNS, SCALE_COLUMNS, Diversity
from instrdiv.data import sources
from instrdiv.data.cleaning import CLEANING_COLUMNS, Dropped, cleaning_tables
from instrdiv.data.schemas import ALL
from instrdiv.reports.pages import data_uri, launched, write_page
from instrdiv.runtime.provenance import read_provenance
from instrdiv.runtime.tables import Row, read_table, write_table, write_table_files

#: Columns of mixture.csv.
MIXTURE_COLUMNS = ("place", "source", "where")

#: The files of a report, apart from report.html, provenance.json and the figure.
FILES = ("diversity.csv", "scales.csv", "overlap.csv", "map.csv", "cleaning.csv", "dropped.csv", "mixture.csv")

_TEXTS = ("source", "nearest", "where", "reason", "like", "embedder", *CLEANING_COLUMNS[4:])
_COLORS = ("#1f5fa8", "#c05a1c", "#1a7f4e", "#7a3fb8", "#b8286b", "#0f7c8a", "#7a5230", "#5c6370")
_MARKERS = "os^Dv"  # the next marker each time the colors repeat


def write_cleaning(run_dir: Path, kept: Mapping[str, Sequence[sources.TextRow]], dropped: Sequence[Dropped]) -> None:
    """Writes cleaning.csv and dropped.csv from the kept rows (by source) and the dropped rows."""
    write_table_files(run_dir, cleaning_tables(kept, dropped))


def write_tables(run_dir: Path, found: Diversity, rows: Mapping[str, Sequence[sources.TextRow]]) -> None:
    """Writes the tables of the measurements. ``rows`` has, for each source, the rows whose texts were measured."""
    write_table(run_dir / "diversity.csv", found.scores, DIVERSITY_COLUMNS)
    write_table(run_dir / "scales.csv", found.scales, SCALE_COLUMNS)
    write_table(run_dir / "overlap.csv", found.overlap, OVERLAP_COLUMNS)
    points = [point | {"where": rows[point["source"]][point["row"]].where} for point in found.map]
    write_table(run_dir / "map.csv", points, (*MAP_COLUMNS, "where"))


def draw(run_dir: Path, text: str, layout: str) -> None:
    """Draws the map, the effective numbers and the clusters per cosine threshold; writes figure.png and figure.pdf.

    Args:
      run_dir: contains the tables.
      text: which part of each row was measured.
      layout: of the map.
    """
    scores, scales, _, points = _read(run_dir)
    names = [row["source"] for row in scores]
    single = [name for name in names if name != ALL]
    color = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(single)} | {ALL: "#333333"}
    figure = plots.new_figure(11, 6.2, "How many different instructions do these texts amount to?")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), height_ratios=(max(len(names), 2), 3.2))

    axes = figure.add_subplot(grid[:, 0])
    vendi = {row["source"]: row["vendi"] for row in scores}
    for i, name in enumerate(single):
        places = [(point["x"], point["y"]) for point in points if point["source"] == name]
        style = {"color": color[name], "marker": _MARKERS[i // len(_COLORS) % len(_MARKERS)], "alpha": 0.6, "lw": 0}
        # Texts shared by several sources overlap on the map: the less diverse source is drawn on top.
        above = sum(vendi[other] > vendi[name] for other in single)
        axes.scatter(*zip(*places, strict=True), s=9, label=f"{name} ({len(places):,})", zorder=2 + above, **style)
    axes.set_xticks([])
    axes.set_yticks([])
    kind = {
        "tsne": "t-SNE: nearby texts are similar; distances and sizes mean little",
        "pca": "two principal components",
    }
    axes.set_xlabel(kind[layout], fontsize=9)
    axes.set_title(f"Map of the {text}s", loc="left", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, fontsize=9, markerscale=2.5, frameon=False)

    axes = figure.add_subplot(grid[0, 1])
    for place, row in enumerate(scores):
        for offset, name, alpha, label in ((-0.2, "clusters", 1.0, "clusters"), (0.2, "vendi", 0.45, "Vendi score")):
            value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
            errors = None if math.isnan(low) else [[value - max(low, 1)], [high - value]]
            axes.barh(place + offset, value - 1, 0.36, left=1, color=color[row["source"]], alpha=alpha,
                      xerr=errors, error_kw={"lw": 1, "capsize": 2})  # fmt: skip
            shown = f" {value:,.0f}" if value >= 100 else f" {value:,.1f}"
            end = value if errors is None else high
            axes.text(end, place + offset, f" {shown}  {label}", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(1, 6 * max(max(row["clusters"], row["vendi"]) for row in scores))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Effective number of {text}s in {scores[0]['drawn']:,}", loc="left", fontsize=11)

    axes = figure.add_subplot(grid[1, 1])
    for name in names:
        curve = [(row["same"], row["clusters"]) for row in scales if row["source"] == name]
        axes.plot(*zip(*curve, strict=True), color=color[name], ls="--" if name == ALL else "-", lw=1.6)
    same = scores[0]["same"]
    axes.axvline(same, color=plots.BAND, lw=1, ls=":")
    axes.annotate(f"{same:g}", (same, 1), (3, 3), textcoords="offset points", fontsize=8, color="#444444")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, 1)
    axes.set_xlabel("cosine threshold for counting texts as the same", fontsize=9)
    axes.set_ylabel("effective clusters", fontsize=9)
    axes.grid(alpha=0.25)
    draws = max(row["draws"] for row in scores)
    intervals = f"; means and 95 % intervals over {draws} draws" if draws > 1 else ""
    caption = (
        f"{scores[0]['drawn']:,} {text}s per source{intervals}.\n"
        f"Embedder: {scores[0]['embedder']}. The numbers and the map depend on it."
    )
    plots.save(figure, caption, run_dir / "figure")


def write_diversity_report(run_dir: Path) -> Path:
    """Writes report.html from the tables and the figure, and returns its path.

    Raises:
      BadInput: if a file is missing or damaged.
    """
    scores, _, overlap, _ = _read(run_dir)
    said = read_provenance(run_dir / "provenance.json")
    names = [row["source"] for row in scores if row["source"] != ALL]
    shares = {(row["source"], row["nearest"]): row["share"] for row in overlap}
    cleaning = run_dir / "cleaning.csv"
    page = {
        "asked": said.get("asked", {}),
        "scores": scores,
        "picture": data_uri(run_dir / "figure.png"),
        "names": names,
        "overlap": [(name, [shares[name, nearest] for nearest in names]) for name in names] if overlap else [],
        "cleaning": read_table(cleaning, text=_TEXTS) if cleaning.exists() else [],
        "scales": (diversity.SCALES[0], diversity.SCALES[-1]),
        "facts": {
            "commit": said.get("commit"),
            "versions": ", ".join(f"{name} {version}" for name, version in said["versions"].items() if version),
            "processor": said.get("processor"),
            "platform": said.get("platform"),
        },
        "command": launched(said, "diversity_report"),
    }
    return write_page(run_dir / "report.html", "diversity.html.jinja", page)


def _read(run_dir: Path) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Reads scores, scales, overlap (empty for a single source) and map."""
    overlap = run_dir / "overlap.csv"
    tables: list[list[Row]] = []
    for name, columns in (("diversity", DIVERSITY_COLUMNS), ("scales", SCALE_COLUMNS), ("map", MAP_COLUMNS)):
        tables.append(read_table(run_dir / f"{name}.csv", columns, _TEXTS))
    scores, scales, points = tables
    return scores, scales, read_table(overlap, text=_TEXTS), points
