"""Exports a trained member as a Transformers GPT-2 checkpoint, for example for interpretability tools.

    python -m experiments.export --run_dir=runs/fig2a --member=m0123456789 --out=exported

The run's ``config.json`` lists its members. docs/export.md describes the files and how to load them.
"""

from collections.abc import Sequence
from pathlib import Path

from absl.flags import FlagValues

from instrdiv.launch.flags import NameParser, NumberParser, define, define_task_flag, start
from instrdiv.runs.export import export_member
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.known import load_file


def main(values: FlagValues) -> None:
    for name in ("run_dir", "member", "out"):
        if values[name].value is None:
            raise BadInput(f"--{name}: must be given: {values[name].help}")
    if values.task:
        load_file(values.task)
    out = Path(values.out)
    step = export_member(SavedRun(Path(values.run_dir)), values.member, out, values.step, say=print)
    print(f"{values.member}, step {step}: {out}")


def define_flags(values: FlagValues) -> None:
    define(values, NameParser(), "run_dir", "the run directory")
    define_task_flag(values)
    define(values, NameParser(), "member", "the id of the member to export")
    define(values, NumberParser(int, low=0), "step", "a saved step (default: the last one)")
    define(values, NameParser(), "out", "the output directory, empty or new")


def launch(argv: Sequence[str] | None = None) -> int:
    """Runs this command in this process, with the flags in ``argv`` or, by default, those of the command line."""
    return start(main, define_flags, __doc__, argv, "export.py")


if __name__ == "__main__":
    launch()
