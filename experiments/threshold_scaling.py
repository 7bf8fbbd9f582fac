"""What moves the threshold?

    python -m experiments.threshold_scaling --preset=laptop --run_dir=runs/scaling --factor=width,depth

How does I50 depend on the model (width, depth, positions), the training (optimizer, rate, epochs), the strings
(alphabet, pattern) and the number of examples? One factor is changed at a time, with all else as in the base;
``--factor`` selects one or several factors (default: all). Levels that change a shape form separate groups in the same
run. ``examples`` changes the number of different examples N at a fixed number of steps, ``epochs`` the number of steps
at a fixed N; ``rate`` changes both of Muon's rates together; with ``pattern``, the replacement is as long as the
pattern. A level changes nothing else, so it is not tuned: heads, rates and warmup steps stay those of the base (AdamW's
rate, 3e-3, is from our first trials). Shorter patterns and smaller alphabets also mean fewer strings: there are only
676 with 2 letters, so many rules share a pattern.

``figure.csv`` has the threshold of each level, its ratio to the base's (with intervals corrected for the number of
comparisons), and the exponent of a power law through the levels.

preset   hardware          time                  expect
smoke    two CPU cores     a minute              no result: it only checks that everything runs
laptop   two CPU cores     6 minutes per factor  one epoch raises I50; width, depth and the number of examples
                                                 show no effect (measured: results/laptop/; the other factors: not run)
gpu      one H200          1 hour per factor     not run: time and recipe are extrapolated
paper    one H200          1-2 days per factor   not run: time is extrapolated; the papers report one threshold only
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instrdiv.analysis import plots, thresholds
from instrdiv.analysis.thresholds import Threshold
from instrdiv.config.presets import DEV_TESTS, GPU, LAPTOP, PAPER, SETTING_COLUMNS, SMOKE
from instrdiv.evaluation.statistics import NOTHING, Interval
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.tables import Row, write_table

Level = Mapping[str, Any]

#: Factor -> the columns that its levels change; the first one identifies the level.
FIELDS = {
    "width": ("width",),
    "depth": ("layers",),
    "positions": ("positions",),
    "optimizer": ("optimizer", "learning_rate", "weight_decay", "adam_b2"),
    "rate": ("learning_rate", "adam_learning_rate"),
    "alphabet": ("alphabet_size",),
    "pattern": ("pattern_length", "replacement_length", "pattern_length_min", "replacement_length_min"),
    "examples": ("examples", "epochs"),
    "epochs": ("epochs",),
}

#: Factors whose trend may be a power law. (A rate has an optimum instead.)
TRENDS = ("width", "depth", "pattern", "examples", "epochs")

LAPTOP_FACTORS: Mapping[str, Sequence[Level]] = {
    "width": ({"width": 32}, {}, {"width": 96}),
    "depth": ({"layers": 2}, {}, {"layers": 4}),
    "examples": ({"examples": 4096, "epochs": 12.0}, {}, {"examples": 49_152, "epochs": 1.0}),
    "epochs": ({"epochs": 1.0}, {}, {"epochs": 5.0}),
    "rate": (
        {"learning_rate": 1e-2, "adam_learning_rate": 4e-3},
        {},
        {"learning_rate": 4e-2, "adam_learning_rate": 1.6e-2},
    ),
    "positions": ({}, {"positions": "rotary"}),
    "pattern": ({"pattern_length": 2}, {}, {"pattern_length": 4}),
    "alphabet": ({"alphabet_size": 13}, {}),
    "optimizer": ({}, {"optimizer": "adamw", "learning_rate": 3e-3}),
}
# Factors shared by the gpu and the paper preset, which both use the papers' model and strings.
PAPER_FACTORS: Mapping[str, Sequence[Level]] = {
    "width": ({"width": 128}, {}, {"width": 512}),
    "depth": ({"layers": 3}, {}, {"layers": 12}),
    "positions": ({}, {"positions": "rotary"}, {"positions": "none"}),
    "alphabet": ({"alphabet_size": 13}, {}),
    "pattern": ({"pattern_length": 5}, {"pattern_length": 10}, {}),
}

PRESETS = {
    "smoke": Preset(
        SMOKE,
        {"instructions": (4, 64)},
        factors={"width": ({"width": 16}, {}), "rate": ({}, {"learning_rate": 1e-2, "adam_learning_rate": 4e-3})},
        dev_tests=DEV_TESTS["smoke"],
        tests=128,
        seeds=1,
    ),
    "laptop": Preset(
        LAPTOP,
        {"instructions": (64, 128, 192, 256, 512)},
        factors=LAPTOP_FACTORS,
        dev_tests=DEV_TESTS["laptop"],
        tests=2_000,
    ),
    "gpu": Preset(
        GPU,
        {"instructions": (100, 200, 400, 800, 1600)},
        factors={
            **PAPER_FACTORS,
            "examples": ({"examples": 250_000, "epochs": 6.0}, {}, {"examples": 1_500_000, "epochs": 1.0}),
            "epochs": ({"epochs": 1.0}, {}, {"epochs": 4.5}),
            "rate": (
                {"learning_rate": 1e-2, "adam_learning_rate": 1e-3},
                {},
                {"learning_rate": 4e-2, "adam_learning_rate": 4e-3},
            ),
            "optimizer": ({}, {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "adam_b2": 0.999}),
        },
        dev_tests=DEV_TESTS["gpu"],
        tests=10_000,
    ),
    "paper": Preset(
        PAPER,
        {"instructions": (100, 200, 300, 400, 500, 700, 1000, 2000)},
        factors={
            **PAPER_FACTORS,
            "examples": ({"examples": 100_000, "epochs": 500.0}, {}, {"examples": 10_000_000, "epochs": 5.0}),
            "epochs": ({"epochs": 5.0}, {}, {"epochs": 150.0}),
            "rate": ({"learning_rate": 5e-4}, {}, {"learning_rate": 2e-3}),
            "optimizer": ({}, {"optimizer": "muon", "learning_rate": 2e-2, "weight_decay": 0.1, "adam_b2": 0.98}),
        },
        dev_tests=DEV_TESTS["paper"],
        tests=100_000,
    ),
}


def by_level(results: Sequence[Row]) -> tuple[dict[str, dict[Any, Threshold]], dict[str, Any]]:
    """The thresholds of each factor's levels, computed from the rows of a run alone.

    Returns:
      factor -> its levels, in order -> threshold; and factor -> the base's level. All factors share the base. Settings
      that no single factor explains (such as a changed base added to the run later) are ignored.
    """
    headline = thresholds.select(results, "unseen", "has_op")
    fields = tuple(name for name in SETTING_COLUMNS if name != "instructions")
    found = {key: t for key, t in thresholds.by_setting(headline, fields).items() if len(t.values) > 1}
    variants = {key: dict(zip(fields, key, strict=True)) for key in found}

    def factor_of(variant: Row, base: Row) -> str | None:
        changed = {name for name in fields if variant[name] != base[name]}
        return next((f for f, names in FIELDS.items() if names[0] in changed and changed <= set(names)), None)

    # The base is the variant from which all others differ by one factor. With a single factor, that is ambiguous: take
    # the variant most like the base of a preset.
    bases = [preset.base.as_row() for preset in PRESETS.values()]

    def likeness(key: tuple) -> tuple[int, int]:
        explained = sum(factor_of(variant, variants[key]) is not None for variant in variants.values())
        return explained, max(sum(variants[key][name] == base[name] for name in fields) for base in bases)

    levels: dict[str, dict[Any, Threshold]] = {}
    if not variants:
        return levels, {}
    base = max(variants, key=likeness)
    for key, variant in variants.items():
        factor = factor_of(variant, variants[base])
        if factor:
            levels.setdefault(factor, {})[variant[FIELDS[factor][0]]] = found[key]
    at_base = {factor: variants[base][FIELDS[factor][0]] for factor in levels}
    for factor, of_factor in levels.items():
        of_factor[at_base[factor]] = found[base]
        levels[factor] = dict(sorted(of_factor.items(), key=lambda item: thresholds.ordering((item[0],))))
    return {factor: levels[factor] for factor in FIELDS if factor in levels}, at_base


def trends_of(levels: Mapping[str, Mapping[Any, Threshold]]) -> dict[str, Interval]:
    """The exponents of the factors in ``TRENDS`` with at least three levels, with simultaneous intervals."""
    factors = [factor for factor in TRENDS if len(levels.get(factor, ())) >= 3]
    return {factor: thresholds.trend(levels[factor], len(factors)) for factor in factors}


def summary(levels: Mapping[str, Mapping[Any, Threshold]], at_base: Mapping[str, Any]) -> list[Row]:
    """One row per factor and level (see ``by_level``): threshold, ratio to the base's, and the factor's trend, if any.

    The intervals of the ratios are simultaneous, and so are those of the trends.
    """
    if not levels:
        return []
    base = [(factor, at_base[factor]) for factor in levels]
    once = base[0]
    found = {(factor, level): t for factor, of_factor in levels.items() for level, t in of_factor.items()}
    compared = thresholds.comparison(
        {key: t for key, t in found.items() if key == once or key not in base}, ["factor", "level"], once
    )
    row_of = {(row["factor"], row["level"]): row for row in compared}
    trends = trends_of(levels)
    rows = []
    for factor, level in found:
        trend = trends.get(factor, NOTHING)
        row = row_of[once if (factor, level) in base else (factor, level)] | {"factor": factor, "level": level}
        exponent = {"exponent": trend.mean, "exponent_low": trend.low, "exponent_high": trend.high}
        rows.append(row | exponent | {"trends": len(trends)})
    return rows


def draw(results: Sequence[Row], path_stem: Path) -> None:
    levels, at_base = by_level(results)
    rows, trends = summary(levels, at_base), trends_of(levels)
    columns = 2 if len(levels) in (2, 4) else min(3, max(1, len(levels)))
    lines = -(-max(1, len(levels)) // columns)
    figure = plots.new_figure(max(6.0, 3.5 * columns), 1.6 + 2.7 * lines, "What moves the threshold?")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    tested = sorted({row["instructions"] for row in results})
    for axes in panels[len(levels) :]:
        axes.set_visible(False)
    for axes, (factor, of_factor) in zip(panels, levels.items(), strict=False):
        trend = trends.get(factor, NOTHING)
        title = factor if math.isnan(trend.mean) else f"{factor}: I50 ~ level ^ {trend.text()}"
        axes.set_title(title, loc="left", fontsize=9.5)
        plots.threshold_levels(axes, of_factor, at_base[factor], tested)
    figure.supylabel("threshold I50, unseen has-op", fontsize=10)
    comparisons = sum(len(of_factor) - 1 for of_factor in levels.values())
    notes = (
        "Orange: the base, in every panel. Bars: geometric means. Arrows: seeds whose step is beyond the tested I.",
        f"{comparisons} comparisons with the base; {len(trends)} trends, exponents with simultaneous 95 % intervals.",
    )
    plots.finish(figure, results, path_stem, *notes)
    if rows:
        write_table(path_stem.with_suffix(".csv"), rows, list(rows[0]))


FIGURE = Figure("threshold_scaling", PRESETS, draw)

if __name__ == "__main__":
    launch(FIGURE)
