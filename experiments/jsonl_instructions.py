"""How many of your own instructions must a model be trained on before it follows the others?

    python -m experiments.jsonl_instructions --preset=laptop --config.data=my.jsonl --config.instructions=4,16,64

Figure 2a on a JSON Lines file with rows ``{"instruction": ..., "input": ..., "answer": ...}``, one token per character.
Whole instructions are held out (``--config.held_out_share``); the curve shows how well models trained on I of the
others follow them. About a third of the held-out ones are used for ``unseen_dev``. A share of the rows of each trained
instruction (``--config.test_rows``) is kept for the split ``seen``.

preset   hardware          time                         expect
smoke    two CPU cores     half a minute                no result: it only checks that everything runs
laptop   two CPU cores     a minute for each I          your curve: it depends on your rows
                                                        (for rows of about 30 characters; longer rows take longer)
"""

from collections.abc import Sequence
from pathlib import Path

from instrdiv.analysis import plots
from instrdiv.config import sizes
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.tables import Row
from instrdiv.tasks.jsonl import JsonLines

PRESETS = {
    "smoke": Preset(
        sizes.SMOKE.with_task(JsonLines(), instructions=4),
        {"instructions": (4, 16)},
        seeds=1,
        dev_tests=8,
        tests=16,
        judged=False,
    ),
    "laptop": Preset(
        sizes.LAPTOP.with_task(JsonLines(), instructions=16), {"instructions": (4, 16, 64)}, dev_tests=64, tests=256
    ),
}


def draw(results: Sequence[Row], path_stem: Path) -> None:
    title = f"Following instructions of {Path(results[0]['data']).name} that were never trained on"
    plots.instruction_curve(results, path_stem, title=title, slice=JsonLines.headline)


FIGURE = Figure("jsonl_instructions", PRESETS, draw)

if __name__ == "__main__":
    launch(FIGURE)
