"""Figure 2b: does it matter how many of the inputs lack the pattern?

Figure 2b of *Only-IF* (P2, arXiv 2410.04717).

    python -m experiments.fig2b_no_ops --preset=laptop --run_dir=runs/fig2b

A share of the training inputs lacks the pattern (no-ops, which must be copied unchanged). The panels show has-op, the
headline, with the threshold; the average over the member's own mixture, as plotted in the papers; random no-ops; and
*near misses*, no-ops that contain the pattern with one letter changed. As we read the papers, training uses random
no-ops only, so models see their first near miss when they are tested. The number of examples is fixed, so more no-ops
mean fewer has-ops.

preset   hardware          time            expect
smoke    two CPU cores     half a minute   no result: it only checks that everything runs
laptop   two CPU cores     8 minutes       the step of figure 2a at each share (three of the papers' five)
                                           (measured: results/laptop/)
gpu      one H200          25-50 minutes   not run: time and recipe are extrapolated
paper    one H200          2-4 days        not run: time is extrapolated; reported by the papers: generalizes from about
                                           I = 400 on; beyond that, the share hardly matters
"""

from collections.abc import Sequence
from pathlib import Path

from instrdiv.analysis import plots, thresholds
from instrdiv.analysis.claims import Claim
from instrdiv.config.presets import DEV_TESTS, GPU, LAPTOP, PAPER, SMOKE, Setting
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.tables import Row, write_table
from instrdiv.tasks.conditions import Condition
from instrdiv.tasks.strings.suites import SUITES

PAPER_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)

PRESETS = {
    "smoke": Preset(
        SMOKE,
        {"no_op_fraction": (0.1, 0.5), "instructions": (4, 64)},
        dev_tests=DEV_TESTS["smoke"],
        tests=128,
        seeds=1,
        judged=False,
    ),
    "laptop": Preset(
        LAPTOP,
        {"no_op_fraction": (0.1, 0.3, 0.5), "instructions": (64, 128, 256, 512, 4096)},
        seeds_at={64: 5, 128: 5, 256: 5, 512: 5},
        dev_tests=DEV_TESTS["laptop"],
        tests=2_000,
    ),
    "gpu": Preset(
        GPU,
        {"no_op_fraction": (0.1, 0.3, 0.5), "instructions": (200, 400, 1000, 10_000)},
        dev_tests=DEV_TESTS["gpu"],
        tests=10_000,
    ),
    "paper": Preset(
        PAPER,
        {"no_op_fraction": PAPER_SHARES, "instructions": (100, 200, 300, 400, 500, 1000, 10_000, 100_000)},
        dev_tests=DEV_TESTS["paper"],
        tests=100_000,
    ),
}

#: Slice -> title of its panel.
PANELS = {
    "has_op": "has-op: the rule applies",
    "all": "average over the member's own mixture",
    "no_op": "random no-ops: copied unchanged",
    "no_op/near_miss": "near misses: the pattern with one letter changed",
}


def conditions(settings: Sequence[Setting]) -> list[Condition]:
    return SUITES["no_op"](settings[0])


def draw(results: Sequence[Row], path_stem: Path) -> None:
    shares = sorted({row["no_op_fraction"] for row in results})
    headline = thresholds.select(results, "unseen", "has_op")
    found = thresholds.by_setting(headline, ["no_op_fraction"])
    figure = plots.new_figure(9.5, 7.6, "Unseen rules, trained with more or fewer no-ops")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (slice, title) in zip(panels.flat, PANELS.items(), strict=True):
        plots.count_axis(axes, (row["instructions"] for row in results))
        plots.match_axis(axes)
        axes.set_title(title, loc="left", fontsize=10.5)
        for share, color in zip(shares, plots.shades(len(shares)), strict=True):
            rows = [r for r in thresholds.select(results, "unseen", slice) if r["no_op_fraction"] == share]
            label = f"{share:.0%} no-ops"
            if slice == "has_op" and (share,) in found:
                label += f": {found[share,].interval.text(',.0f')}"
                plots.one_half(axes)
            plots.curve(axes, thresholds.by_value(rows), color, label)
        axes.label_outer()
    panels[0, 0].legend(fontsize=8, loc="center right", title="threshold I50 (95 % interval)", title_fontsize=8)
    panels[0, 1].legend(fontsize=8, loc="center right")
    plots.finish(figure, results, path_stem)
    if found:
        rows = thresholds.comparison(found, ["no_op_fraction"], baseline=min(found))
        write_table(path_stem.with_suffix(".csv"), rows, list(rows[0]))


def claims(results: Sequence[Row]) -> list[Claim]:
    """P2: "generalizes from about I = 400; the no-op share hardly matters beyond that"."""
    headline = thresholds.select(results, "unseen", "has_op")
    shares = sorted({row["no_op_fraction"] for row in headline})
    of_share = {share: [row for row in results if row["no_op_fraction"] == share] for share in shares}
    judged = {share: thresholds.instruction_step_claims(rows, high=0.8) for share, rows in of_share.items()}
    most = max(row["instructions"] for row in headline)
    top = thresholds.by_value([row for row in headline if row["instructions"] == most], "no_op_fraction")
    means = [sum(seeds) / len(seeds) for seeds in top.values()]
    found = thresholds.by_setting(headline, ["no_op_fraction"])
    others = {share: found[share,] for share in shares[1:]}
    ratios = [f"{r.text()} at {s:.0%}" for s, r in thresholds.ratios(others, found[shares[0],]).items()]
    return [
        *(
            Claim(f"{share:.0%} no-ops: {claim.text}", claim.holds, claim.evidence)
            for share, of_this in judged.items()
            for claim in of_this
        ),
        Claim(
            "beyond the step the share hardly matters (has-op exact match within 0.1)",
            max(means) - min(means) < 0.1,
            f"I = {most:,}: {min(means):.3f} to {max(means):.3f}; thresholds against {shares[0]:.0%} no-ops: "
            f"{'; '.join(ratios)} ({len(ratios)} comparisons)",
        ),
    ]


FIGURE = Figure("fig2b_no_ops", PRESETS, draw, claims, conditions)

if __name__ == "__main__":
    launch(FIGURE)
