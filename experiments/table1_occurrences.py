"""Table 1: does it matter how often the pattern occurs in the inputs?

Table 1 of *Instruction Diversity Drives Generalization To Unseen Tasks* (P1, arXiv 2402.10891), section 4.3.

    python -m experiments.table1_occurrences --preset=laptop --run_dir=runs/table1

Models are trained on inputs that contain the pattern a fixed number of times, or on the mixture of all these numbers;
each is tested on all numbers and on the mixture. Only the first occurrence must be replaced, so a model trained on
single occurrences never had to choose. P1 does not give the lengths: in the larger presets, inputs have 150 letters and
patterns 5, so that 20 occurrences fit.

preset   hardware          time            expect
smoke    two CPU cores     half a minute   no result: it only checks that everything runs
laptop   two CPU cores     6 minutes       1, 2 and 3 occurrences in 12 letters: the mixture beats each of them
                                           (measured: results/laptop/)
gpu      one H200          40-70 minutes   not run: time and recipe are extrapolated
paper    one H200          3-5 days        not run: time is extrapolated; reported by the paper: the mixture beats any
                                           single number at every I where anything generalizes; I = 200 gives 0
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instrdiv.analysis import plots, thresholds
from instrdiv.analysis.claims import Claim
from instrdiv.config.presets import DEV_TESTS, GPU, LAPTOP, PAPER, SMOKE, Setting
from instrdiv.evaluation.statistics import mean_interval
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.tables import Row
from instrdiv.tasks.conditions import Condition, held_out

PAPER_OCCURRENCES = ((1,), (5,), (10,), (15,), (20,), (1, 5, 10, 15, 20))
PAPER_COUNTS = (200, 500, 1000, 2000)

PRESETS = {
    "smoke": Preset(
        SMOKE,
        {"instructions": (4, 64), "occurrences": ((1,), (2,), (1, 2))},
        dev_tests=DEV_TESTS["smoke"],
        tests=128,
        seeds=1,
        judged=False,
    ),
    "laptop": Preset(
        dataclasses.replace(LAPTOP, input_length=12),
        {"instructions": (64, 512, 4096), "occurrences": ((1,), (2,), (3,), (1, 2, 3))},
        dev_tests=DEV_TESTS["laptop"],
        tests=2_000,
    ),
    "gpu": Preset(
        dataclasses.replace(GPU, input_length=150, pattern_length=5),
        {"instructions": (200, 2000), "occurrences": ((1,), (10,), (20,), (1, 5, 10, 15, 20))},
        dev_tests=DEV_TESTS["gpu"],
        tests=10_000,
    ),
    "paper": Preset(
        dataclasses.replace(PAPER, input_length=150, pattern_length=5),
        {"instructions": PAPER_COUNTS, "occurrences": PAPER_OCCURRENCES},
        dev_tests=DEV_TESTS["paper"],
        tests=100_000,
    ),
}


def conditions(settings: Sequence[Setting]) -> list[Condition]:
    """Tests every member on each number of occurrences that some member was trained on: the columns of the matrix."""
    trained = dict.fromkeys(setting.occurrences for setting in settings)
    return [
        Condition(f"occurrences_tested={'+'.join(map(str, planted))}", held_out, {"occurrences": planted})
        for planted in trained
    ]


def tested_on(results: Sequence[Row]) -> dict[str, list[Row]]:
    """Occurrences in the tests -> has-op rows of unseen rules; single numbers first, the mixture last."""
    trained = sorted({row["occurrences"] for row in results}, key=_order)
    return {
        str(planted): thresholds.select(results, "unseen", f"occurrences_tested={planted}/has_op")
        for planted in trained
    }


def _order(planted: str | int) -> tuple[int, str]:
    """Sort key: fewest first, mixtures after all single numbers. (Tables read a single number as an int.)"""
    numbers = str(planted).split("+")
    return (len(numbers) * 1000 + int(numbers[-1]), str(planted))


def _name(planted: str | int) -> str:
    return "mixture" if "+" in str(planted) else str(planted)


def draw(results: Sequence[Row], path_stem: Path) -> None:
    columns = tested_on(results)
    mixture = list(columns.values())[-1]
    trained = sorted({row["occurrences"] for row in results}, key=_order)
    counts = sorted({row["instructions"] for row in results})
    figure = plots.new_figure(max(9.5, 3.2 * len(counts)), 7.4, "Unseen rules, by how often the pattern occurs")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = above.subplots()
    plots.count_axis(axes, counts)
    plots.match_axis(axes, "exact match (unseen, has-op)")
    for planted, color in zip(trained, [*plots.shades(len(trained) - 1), plots.SEEN], strict=True):
        rows = [row for row in mixture if row["occurrences"] == planted]
        plots.curve(axes, thresholds.by_value(rows), color, f"trained on {_name(planted)}")
    axes.legend(fontsize=9, loc="upper left")
    axes.set_title(f"tested on the mixture ({list(columns)[-1]})", loc="left", fontsize=10.5)
    for axes, count in zip(below.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True):
        means = [
            [
                thresholds.mean_of([r for r in rows if (r["occurrences"], r["instructions"]) == (planted, count)])
                for rows in columns.values()
            ]
            for planted in trained
        ]
        plots.heat_map(axes, np.array(means), list(map(_name, trained)), list(map(_name, columns)))
        axes.set_title(f"I = {count:,}", loc="left", fontsize=10.5)
        axes.set_xlabel("occurrences tested")
        axes.set_ylabel("occurrences trained")
        axes.label_outer()
    plots.finish(figure, results, path_stem, "Heat maps: means over seeds.")


def claims(results: Sequence[Row], low: float = 0.1) -> list[Claim]:
    """P1, on means: the mixture beats any single number at each I where anything generalizes; few rules give 0."""
    mixture = list(tested_on(results).values())[-1]
    counts = sorted({row["instructions"] for row in mixture})
    found = []
    for count in counts:
        rows = [row for row in mixture if row["instructions"] == count]
        kinds = sorted({row["occurrences"] for row in rows}, key=_order)
        trained = {planted: [row for row in rows if row["occurrences"] == planted] for planted in kinds}
        means = {planted: thresholds.mean_of(of_this) for planted, of_this in trained.items()}
        evidence = f"I = {count:,}: " + ", ".join(f"trained on {_name(p)} {mean:.3f}" for p, mean in means.items())
        if count == counts[0]:
            text = f"few rules never generalize, however often the pattern occurs (unseen below {low})"
            found.append(Claim(text, max(means.values()) < low, evidence))
        elif max(means.values()) > low:
            *singles, both = means
            best = max(singles, key=means.__getitem__)
            ahead = mean_interval(_differences(trained[both], trained[best]))
            evidence += f"; ahead of the best of {len(singles)} by {ahead.text()} over {ahead.count} seeds"
            text = "the mixture beats every single number of occurrences"
            found.append(Claim(text, means[both] > means[best], evidence))
    if len(found) < 2:
        found.append(Claim("something generalizes", False, f"no mean above {low}"))
    return found


def _differences(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """Exact match minus that of the other member with the same seed, for each seed that both have."""
    theirs = {row["seed"]: row["exact_match"] for row in others}
    return [row["exact_match"] - theirs[row["seed"]] for row in rows if row["seed"] in theirs]


FIGURE = Figure("table1_occurrences", PRESETS, draw, claims, conditions)

if __name__ == "__main__":
    launch(FIGURE)
