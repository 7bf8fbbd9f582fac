"""How many of YOUR instructions must a model be trained on before it follows the others?

    python -m experiments.jsonl_instructions --preset=laptop --config.data=my.jsonl --config.instructions=4,16,64

Figure 2a on a file of JSON lines, a row ``{"instruction": ..., "input": ..., "answer": ...}``, one token per character.
Whole instructions are held out (``--config.held_out_share``); the curve says how well models that were trained on
I of the others follow them. A third or so of the held-out ones serve ``unseen_dev``. Of a trained instruction,
``--config.test_rows`` of the rows are kept for the split ``seen``.

preset   hardware          time                         expect
smoke    two CPU cores     half a minute                nothing: it only has to run
laptop   two CPU cores     a minute for each I          your curve: it depends on your rows
                                                        (for rows of some 30 characters; longer ones take longer)
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
