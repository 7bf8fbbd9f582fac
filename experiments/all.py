"""Runs the launchers of the from-scratch figures in sequence, and writes an index page that links their reports.

    python -m experiments.all --preset=laptop --run_dir=runs/laptop

Each figure's run gets its own subdirectory of ``--run_dir``, and ``index.html`` there summarizes all outcomes. If a
figure fails, the others still run. Rerun the same command to resume; finished figures are not trained again.
"""

import ast
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from experiments.show_data import as_text
from instrdiv.config.presets import BASES
from instrdiv.launch.flags import STOPPED, ListParser, NameParser, define, define_preset_flag, start
from instrdiv.reports.index import Entry, log_of, read_entry, write_index, write_log
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.interruption import Interrupted
from instrdiv.runtime.processes import Commands

#: The figures, in the papers' order.
FIGURES = (
    "fig2a_instruction_count",
    "fig2b_no_ops",
    "fig3_long_tail",
    "table1_occurrences",
    "threshold_scaling",
)


def question(name: str) -> str:
    """The first line of a launcher's docstring, read without importing the launcher."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or name).splitlines()[0]


def prepare(directory: Path, names: Iterable[str]) -> None:
    """Creates the directories of all runs. Raises BadInput if that fails or ``directory`` holds something else."""
    try:
        there = {path.name for path in directory.iterdir()} if directory.exists() else set()
        if there and not there & set(FIGURES):
            raise BadInput(f"--run_dir={directory}: is not empty and holds no figures' runs; choose another directory")
        for name in names:
            (directory / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--run_dir={directory}: cannot be used ({error.strerror}); name another directory") from None


def run_all(commands: Mapping[str, Sequence[str]], questions: Mapping[str, str], directory: Path) -> list[Entry]:
    """Runs the launchers of figures in sequence, and keeps the index up to date.

    Args:
      commands: figure -> arguments for the Python interpreter, in the order to run.
      questions: figure -> the question it asks, for all figures in the index.
      directory: contains the run directories.

    Returns:
      The outcome of each figure in ``commands``.

    Raises:
      Interrupted: a launcher was stopped and has saved its run; the index has been written.
    """
    write_index(directory, questions)
    with Commands() as running:
        for number, (name, command) in enumerate(commands.items(), 1):
            print(f"[{number}/{len(commands)}] {name}", flush=True)
            log_of(directory, name).unlink(missing_ok=True)
            ended = running.run([sys.executable, *command])
            stopped = running.stop or ended.status == STOPPED
            if ended.status and not stopped:
                write_log(directory, name, shlex.join(["python", *command]), [*ended.last_lines, ended.text])
            write_index(directory, questions)
            if stopped and (ended.status or number < len(commands)):
                raise Interrupted(f"Stopped at {name} ({number} of {len(commands)}). Rerun the same command to resume.")
    return [read_entry(directory, name, questions[name]) for name in commands]


def summary(entries: Sequence[Entry], directory: Path) -> str:
    """A text table of the outcome of each figure."""
    return as_text([
        {
            "figure": entry.name,
            "status": entry.status,
            "verdict": entry.verdict if entry.status == "done" else "–",
            "I50": entry.i50 or "–",
            "wall time": entry.wall_time or "–",
            "report": str(directory / entry.files["report.html"]) if "report.html" in entry.files else "–",
        }
        for entry in entries
    ])  # fmt: skip


def main(values: FlagValues) -> int:
    directory = Path(values.run_dir or Path("runs") / values.preset)
    commands = {
        name: ["-m", f"experiments.{name}", f"--preset={values.preset}", f"--run_dir={directory / name}"]
        for name in FIGURES
        if name in (values.only or FIGURES)
    }
    prepare(directory, commands)
    entries = run_all(commands, {name: question(name) for name in FIGURES}, directory)
    print(f"\n{summary(entries, directory)}\nindex: {directory / 'index.html'}")
    failed = [entry for entry in entries if entry.status != "done"]
    for entry in failed:
        logs = [str(directory / path) for path in entry.files.values() if path.endswith(".log")]
        print("; ".join([f"{entry.name} {entry.status}", *entry.last_lines[-2:], *logs]), file=sys.stderr)
    return 1 if failed else 0


def define_flags(values: FlagValues) -> None:
    define_preset_flag(values, BASES)
    define(
        values,
        ListParser(flags.EnumParser(list(FIGURES))),
        "only",
        f"which figures to run: {', '.join(FIGURES)} (default: all)",
    )
    define(values, NameParser(), "run_dir", "directory for the runs and the index (default: runs/<preset>)")


def launch(argv: Sequence[str] | None = None) -> int:
    """Runs this command in this process, with the flags in ``argv`` or, by default, those of the command line."""
    return start(main, define_flags, __doc__, argv, "all.py")


if __name__ == "__main__":
    launch()
