"""Figure 3: does it matter that most rules are rare?

Figure 3 of *Only-IF* (P2, arXiv 2410.04717), with the shares of its figure 7 and a test of its explanation.

    python -m experiments.fig3_long_tail --preset=laptop --run_dir=runs/fig3

The shares of the rules follow a power law; the smaller its shape, the fewer rules have most of the examples. Shapes are
read as weights (P2 does not say; ``--config.tail_reading=index`` is the other reading). The paper explains the collapse
by rules that are seen too rarely. The lower panels plot the same models against the number of rules that count: by
entropy, and by the number of rules with at least n examples. A way of counting suffices if one rising curve, fitted to
the other seeds, predicts the models of the left-out seed at each I and shape. ``figure.csv`` has the error of each way.

preset   hardware          time            expect
smoke    two CPU cores     half a minute   no result: it only checks that everything runs
laptop   two CPU cores     5 minutes       I = 512 collapses below shape 0.2, I = 8,192 holds at all shapes
                                           (measured: results/laptop/)
gpu      one H200          25-40 minutes   not run: time and recipe are extrapolated
paper    one H200          1-2 days        not run: time is extrapolated; reported by the papers: I = 1,000 collapses
                                           below a shape of about 0.2, I >= 10,000 holds at all shapes
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from instrdiv.analysis import plots, thresholds
from instrdiv.analysis.claims import Claim
from instrdiv.config.presets import DEV_TESTS, GPU, LAPTOP, PAPER, SMOKE
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.tables import Row, write_table
from instrdiv.tasks.counts import effective_number, rule_counts

PAPER_SHAPES = (math.inf, 2.0, 1.0, 0.5, 0.2, 0.1, 0.07, 0.03)

PRESETS = {
    "smoke": Preset(
        SMOKE,
        {"instructions": (16, 64), "tail_shape": (math.inf, 0.1)},
        dev_tests=DEV_TESTS["smoke"],
        tests=128,
        seeds=1,
        judged=False,
    ),
    "laptop": Preset(
        LAPTOP,
        {"instructions": (512, 2048, 8192), "tail_shape": (math.inf, 0.5, 0.2, 0.1, 0.03)},
        dev_tests=DEV_TESTS["laptop"],
        tests=2_000,
    ),
    "gpu": Preset(
        GPU,
        {"instructions": (1000, 10_000), "tail_shape": (math.inf, 0.5, 0.2, 0.1, 0.03)},
        dev_tests=DEV_TESTS["gpu"],
        tests=10_000,
    ),
    "paper": Preset(
        PAPER,
        {"instructions": (1000, 10_000, 100_000), "tail_shape": PAPER_SHAPES},
        dev_tests=DEV_TESTS["paper"],
        tests=100_000,
    ),
}

#: Candidate minimum numbers of training examples for a rule to count.
AT_LEAST = (1, 2, 4, 8, 16, 32)
#: Ways to count the rules that a member was trained on: name -> function from the examples per rule to a number.
MEASURES: Mapping[str, Callable[[np.ndarray], float]] = {
    "all rules": len,
    "effective number (entropy)": effective_number,
} | {f"rules with at least {n} example{'s' * (n > 1)}": lambda counts, n=n: int((counts >= n).sum()) for n in AT_LEAST}


def counts_of(row: Row) -> np.ndarray:
    """The number of training examples per rule, int32 [I], of the member in a row of results.csv."""
    return _counts(*(row[name] for name in ("instructions", "examples", "tail_shape", "tail_reading", "seed")))


_counts = functools.lru_cache(maxsize=None)(rule_counts)


def explained(rows: Sequence[Row], name: str) -> float:
    """The error of predicting each seed's members from the curve of the other seeds; see ``thresholds.residual``."""
    values = [MEASURES[name](counts_of(row)) for row in rows]
    return thresholds.residual(values, [row["exact_match"] for row in rows], [row["seed"] for row in rows])


def at_least(results: Sequence[Row]) -> str:
    """The at-least-n measure that best explains ``unseen_dev``; it is then plotted on ``unseen``."""
    dev = thresholds.select(results, "unseen_dev", "has_op")
    return min((name for name in MEASURES if "at least" in name), key=lambda name: explained(dev, name))


def draw(results: Sequence[Row], path_stem: Path) -> None:
    unseen = thresholds.select(results, "unseen", "has_op")
    figure = plots.new_figure(9.5, 8.4, "Unseen rules, trained with a long tail of rare ones")
    (shares, by_shape), (by_entropy, by_count) = figure.subplots(2, 2)
    draw_shares(shares, results)
    draw_by_shape(by_shape, results)
    for axes, name in ((by_entropy, "effective number (entropy)"), (by_count, at_least(results))):
        draw_against(axes, unseen, name)
    plots.finish(figure, results, path_stem)
    rows = [
        {"measure": name, "residual": explained(unseen, name), "members": len(unseen), "compared": len(MEASURES)}
        for name in MEASURES
    ]
    write_table(path_stem.with_suffix(".csv"), rows, list(rows[0]))


def draw_shares(axes, results: Sequence[Row]) -> None:
    """Draws figure 7 of P2: the shares of the rules, most frequent first, for the smallest I and the first seed."""
    fewest, first = min(row["instructions"] for row in results), min(row["seed"] for row in results)
    shapes = sorted({row["tail_shape"] for row in results}, reverse=True)
    for shape, color in zip(shapes, plots.shades(len(shapes)), strict=True):
        row = next(r for r in results if (r["instructions"], r["seed"], r["tail_shape"]) == (fewest, first, shape))
        counts = np.sort(counts_of(row))[::-1]
        counts = counts[counts > 0]
        axes.plot(np.arange(1, len(counts) + 1), 100 * counts / counts.sum(), color=color, label=name_of(shape))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"rank of the rule, of I = {fewest:,}")
    axes.set_ylabel("share of the examples, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, title="shape", title_fontsize=8)
    axes.set_title("shares of the rules", loc="left", fontsize=10.5)


def draw_by_shape(axes, results: Sequence[Row]) -> None:
    """Draws figure 3 of P2, with trained rules added, tested equally often and in proportion to their shares."""
    shapes = sorted({row["tail_shape"] for row in results}, reverse=True)
    counts = sorted({row["instructions"] for row in results})
    for count, color in zip(counts, plots.shades(len(counts)), strict=True):
        for split, style in (("unseen", "-"), ("seen", ":"), ("seen_by_share", "--")):
            rows = [
                row | {"place": shapes.index(row["tail_shape"])}
                for row in thresholds.select(results, split, "has_op")
                if row["instructions"] == count
            ]
            values = thresholds.by_value(rows, "place")
            if split == "unseen":
                plots.curve(axes, values, color, f"I = {count:,}")
            else:
                plots.curve(axes, values, color, style=style, light=True)
    axes.plot([], [], color="black", ls=":", lw=1, label="seen rules, each equally often")
    axes.plot([], [], color="black", ls="--", lw=1, label="seen rules, by their shares")
    axes.set_xticks(range(len(shapes)), [name_of(shape) for shape in shapes])
    axes.set_xlabel("shape of the power law")
    plots.match_axis(axes, "exact match (has-op)")
    axes.legend(fontsize=8)
    axes.set_title("unseen rules, by shape", loc="left", fontsize=10.5)


def draw_against(axes, unseen: Sequence[Row], name: str) -> None:
    """Plots each member's exact match against the number of rules it was trained on, by one way of counting."""
    counts = sorted({row["instructions"] for row in unseen})
    for count, color in zip(counts, plots.shades(len(counts)), strict=True):
        rows = [row for row in unseen if row["instructions"] == count]
        x = [MEASURES[name](counts_of(row)) for row in rows]
        match = [row["exact_match"] for row in rows]
        axes.plot(x, match, "o", color=color, ms=5, alpha=0.7, mec="white", mew=0.4, label=f"I = {count:,}")
    axes.set_xscale("symlog", linthresh=1)  # a member may have no rules that count
    axes.set_xlabel(name)
    plots.match_axis(axes, "exact match (unseen, has-op)")
    if unseen:
        axes.legend(fontsize=8, loc="lower right")
    residual = explained(unseen, name)
    axes.set_title(f"one curve for all? left-out seeds: rms error {residual:.3f}", loc="left", fontsize=10.5)


def name_of(shape: float) -> str:
    return "uniform" if math.isinf(shape) else f"{shape:g}"


def claims(results: Sequence[Row], low: float = 0.1, high: float = 0.7) -> list[Claim]:
    """P2: many rules generalize at all shapes; few rules collapse when the tail is long."""
    unseen = thresholds.select(results, "unseen", "has_op")
    counts = sorted({row["instructions"] for row in unseen})
    fewest, most = counts[0], counts[-1]

    def means(count: int) -> dict[str, float]:
        """Mean exact match by shape, uniform first."""
        of_shape = thresholds.by_value([row for row in unseen if row["instructions"] == count], "tail_shape")
        return {name_of(shape): float(np.mean(of_shape[shape])) for shape in reversed(of_shape)}

    few, many = means(fewest), means(most)

    def listed(means: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())

    uniform, *_, longest = few.values()
    return [
        Claim(f"many rules hold at every shape (unseen above {high})", min(many.values()) > high,
                         f"I = {most:,}: {listed(many)}"),
        Claim(f"few rules generalize where they are equally frequent (unseen above {high})", uniform > high,
                         f"I = {fewest:,}: {listed(few)}"),
        Claim(f"and collapse where the tail is longest (unseen below {low})", longest < low,
                         f"I = {fewest:,}: {listed(few)}"),
    ]  # fmt: skip


FIGURE = Figure("fig3_long_tail", PRESETS, draw, claims)

if __name__ == "__main__":
    launch(FIGURE)
