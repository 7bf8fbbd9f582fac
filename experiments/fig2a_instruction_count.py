"""Figure 2a: how many different instructions must a model be trained on before it follows new ones?

Figure 2a of *Only-IF* (arXiv 2410.04717), and figure 2 of its predecessor (arXiv 2402.10891).

    python -m experiments.fig2a_instruction_count --preset=laptop --run_dir=runs/fig2a

The number of instructions I varies; the total number of different training examples N is fixed.

preset   hardware          time            expect
smoke    two CPU cores     half a minute   no result: it only checks that everything runs
laptop   two CPU cores     3 minutes       a step between I = 128 and 512: exact match on unseen rules below 0.1 before
                                           it, at least 0.95 at I = 16,384 (measured: results/laptop/)
gpu      one H200          half an hour    a step between I = 120 and 200 (measured with nine models, one seed:
                                           results/gpu/; the time is extrapolated to all 33)
paper    one H200          20-35 hours     not run: time is extrapolated; reported by the papers: about 0 up to I = 300,
                                           about 1 from I = 1,000 on, for any number of examples per instruction
"""

from collections.abc import Sequence
from pathlib import Path

from instrdiv.analysis import plots
from instrdiv.analysis.thresholds import instruction_step_claims
from instrdiv.config.presets import DEV_TESTS, GPU, LAPTOP, PAPER, SMOKE
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.tables import Row

REPORTED_STEP = (300, 1000)

PRESETS = {
    "smoke": Preset(SMOKE, {"instructions": (4, 64)}, seeds=2, dev_tests=DEV_TESTS["smoke"], tests=128, judged=False),
    "laptop": Preset(
        LAPTOP,
        {"instructions": (16, 64, 128, 256, 512, 1024, 4096, 16_384)},
        dev_tests=DEV_TESTS["laptop"],
        tests=2_000,
    ),
    "gpu": Preset(
        GPU,
        {"instructions": (100, 200, 300, 400, 500, 700, 1000, 2000, 10_000, 100_000, 1_000_000)},
        dev_tests=DEV_TESTS["gpu"],
        tests=10_000,
    ),
    "paper": Preset(
        PAPER,
        {
            "instructions": (
                *(10, 20, 50, 100, 200, 300, 400, 500, 600),
                *(1000, 2000, 2500, 5000, 10_000, 100_000, 1_000_000),
            )
        },
        dev_tests=DEV_TESTS["paper"],
        tests=100_000,
    ),
}


def draw(results: Sequence[Row], path_stem: Path) -> None:
    plots.instruction_curve(results, path_stem, reported_band=REPORTED_STEP)


FIGURE = Figure("fig2a_instruction_count", PRESETS, draw, instruction_step_claims)

if __name__ == "__main__":
    launch(FIGURE)
