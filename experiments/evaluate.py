"""Tests the members of a run on further rules and inputs, at any saved step, and shows their answers.

    python -m experiments.evaluate --run_dir=runs/fig2a --suite=held_out --show=5

docs/evaluation.md describes the suites and how wrong answers are classified. Rows are added to the run's
results.csv and errors.csv; they replace only those of an earlier evaluation of the same members, step, and suite.
"""

from collections.abc import Mapping, Sequence

from absl import flags
from absl.flags import FlagValues

from instrdiv.config.layout import Options
from instrdiv.launch.flags import ListParser, NameParser, NumberParser, define, define_task_flag, start
from instrdiv.runs.evaluate import evaluate
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.devices import use_cpu_cores
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.progress import telling
from instrdiv.runtime.tables import Row
from instrdiv.tasks.conditions import Suite
from instrdiv.tasks.known import load_file
from instrdiv.tasks.task import TASKS, Task

#: The suites of the known tasks, for --help.
KNOWN = "; ".join(f"for {name}: {', '.join(task.suites)}" for name, task in TASKS.items())


def summary(results: Sequence[Row]) -> str:
    """A text table per slice: number of tests, and exact match over the members (mean, lowest, highest)."""
    by_slice: dict[str, list[Row]] = {}
    for row in results:
        by_slice.setdefault(row["slice"], []).append(row)
    width = max(map(len, by_slice))
    lines = [f"{'condition':{width}}  members   tests  exact match: mean  min–max"]
    for name, rows in by_slice.items():
        exact = [row["exact_match"] for row in rows]
        tests = sum(row["tests"] for row in rows) / len(rows)
        lines.append(f"{name:{width}}  {len(rows):7}  {tests:6.0f}  {sum(exact) / len(exact):17.3f}  "
                     f"{min(exact):.3f}–{max(exact):.3f}")  # fmt: skip
    return "\n".join(lines)


def shown(task: type[Task], samples: Sequence[Row], count: int) -> str:
    """Decoded answers next to the right ones: ``count`` per slice, cycling through members; carets mark differences."""
    by_slice: dict[str, dict[str, list[Row]]] = {}
    for row in samples:
        by_slice.setdefault(row["slice"], {}).setdefault(row["member"], []).append(row)
    lines = []
    for name, members in by_slice.items():
        lines.append(name)
        of_members = list(members.values())
        for number in range(count):
            of_member = of_members[number % len(of_members)]
            if number < len(of_member):
                lines += _show(task, of_member[number])
    return "\n".join(lines)


def _show(task: type[Task], row: Row) -> list[str]:
    right, decoded = row["answer"], row["decoded"]
    width = max(len(right), len(decoded))
    pairs = zip(right.ljust(width), decoded.ljust(width), strict=True)
    marks = "".join(" " if a == b else "^" for a, b in pairs).rstrip()
    lines = [
        f"  {task.instruction_words(row)}  member {row['member']}",
        *([f"    asked    {row['asked']}"] if row["asked"] else []),
        f"    input    {row[task.parts[-1]]}",
        f"    right    {right}",
        f"    decoded  {decoded.ljust(width)}  {row['error'] or 'right'}",
    ]
    return [*lines, f"             {marks}"] if marks else lines


def suites_of(task: type[Task], name: str) -> Mapping[str, Suite]:
    """The suite with this name, or the task's suites if it is ``all``. Raises BadInput if there is no such suite."""
    if name != "all" and name not in task.suites:
        raise BadInput(f"--suite={name}: unknown suite; choose one of {', '.join(task.suites)}, all")
    return task.suites if name == "all" else {name: task.suites[name]}


def main(values: FlagValues) -> None:
    if values.run_dir is None:
        raise BadInput("--run_dir=DIR: name the run to evaluate")
    if values.task:
        load_file(values.task)
    use_cpu_cores(values.devices)
    saved = SavedRun(values.run_dir)
    suites = suites_of(saved.sweep.task, values.suite)
    with saved.locked(), telling() as say:
        outcome = evaluate(
            saved, suites, values.members, values.step, values.tests, Options(values.devices), values.show, say
        )
        saved.write_results(outcome.results, outcome.errors)
    if values.show:
        print(shown(saved.sweep.task, outcome.samples, values.show))
    for line in outcome.left_out:
        print(f"left out: {line}")
    print(summary(outcome.results))
    print(f"tables: {saved.path / 'results.csv'}, {saved.path / 'errors.csv'}")


def define_flags(values: FlagValues) -> None:
    define(values, NameParser(), "run_dir", "the run directory")
    define_task_flag(values)
    define(values, NameParser(), "suite", f"suite of tests ({KNOWN}), or all", "all")
    whole = NumberParser(int, low=1)
    define(values, NumberParser(int, low=0), "step", "step of the checkpoint to test (default: the last one saved)")
    help = "ids of the members to test, as in results.csv (default: all)"
    define(values, ListParser(flags.ArgumentParser()), "members", help)
    define(values, whole, "tests", "tests per condition; fewer if there are not enough rules (default: the run's)")
    help = "number of decoded answers to show per condition (one kind of test of a suite)"
    define(values, NumberParser(int, low=0), "show", help, 0)
    define(values, NumberParser(int, low=1, high=256), "devices", "number of devices to use (default: all)")


def launch(argv: Sequence[str] | None = None) -> int:
    """Runs this command in this process, with the flags in ``argv`` or, by default, those of the command line."""
    return start(main, define_flags, __doc__, argv, "evaluate.py")


if __name__ == "__main__":
    launch()
