"""Tests the members of a run again: other rules, other inputs, at any saved step; and shows what they answer.

    python -m experiments.evaluate --run_dir=runs/fig2a --suite=held_out --show=5

What the suites are, and what is made of wrong answers: docs/evaluation.md. The rows go to results.csv and errors.csv
of the run, in place of those of an earlier evaluation of the same members, step and suite.
"""

from collections.abc import Sequence

from absl import flags

from instrdiv.launcher import FLAGS, ListParser, NameParser, NumberParser, start, use_cpu_cores
from instrdiv.progress import telling
from instrdiv.results import Row
from instrdiv.saved import SavedRun
from instrdiv.settings import BadInput
from instrdiv.suites import SUITES, evaluate
from instrdiv.sweep import Options


def summary(results: Sequence[Row]) -> str:
    """A table: tests, and exact match over the members (mean, lowest, highest), for each slice."""
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


def shown(samples: Sequence[Row], count: int) -> str:
    """Decoded answers beside the right ones, ``count`` a slice, of its members in turn; carets mark what differs."""
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
                lines += _show(of_member[number])
    return "\n".join(lines)


def _show(row: Row) -> list[str]:
    right, decoded = row["answer"], row["decoded"]
    width = max(len(right), len(decoded))
    pairs = zip(right.ljust(width), decoded.ljust(width), strict=True)
    marks = "".join(" " if a == b else "^" for a, b in pairs).rstrip()
    lines = [
        f"  {row['pattern']} -> {row['replacement']}  member {row['member']}",
        *([f"    asked    {row['asked']}"] if row["asked"] else []),
        f"    input    {row['input']}",
        f"    right    {right}",
        f"    decoded  {decoded.ljust(width)}  {row['error'] or 'right'}",
    ]
    return [*lines, f"             {marks}"] if marks else lines


def main() -> None:
    if FLAGS.run_dir is None:
        raise BadInput("--run_dir=DIR: name the run to evaluate")
    use_cpu_cores(FLAGS.devices)
    saved = SavedRun(FLAGS.run_dir)
    suites = SUITES if FLAGS.suite == "all" else {FLAGS.suite: SUITES[FLAGS.suite]}
    with saved.locked(), telling() as say:
        outcome = evaluate(
            saved, suites, FLAGS.members, FLAGS.step, FLAGS.tests, Options(FLAGS.devices), FLAGS.show, say
        )
        saved.write_results(outcome.results, outcome.errors)
    if FLAGS.show:
        print(shown(outcome.samples, FLAGS.show))
    for line in outcome.left_out:
        print(f"left out: {line}")
    print(summary(outcome.results))
    print(f"tables: {saved.path / 'results.csv'}, {saved.path / 'errors.csv'}")


if __name__ == "__main__":
    flags.DEFINE(NameParser(), "run_dir", None, "the directory of a run")
    flags.DEFINE_enum("suite", "all", [*SUITES, "all"], "what is tested")
    whole = NumberParser(int, low=1)
    flags.DEFINE(NumberParser(int, low=0), "step", None, "a saved step (default: the last one)")
    flags.DEFINE(ListParser(flags.ArgumentParser()), "members", None, "ids, as in results.csv (default: all)")
    flags.DEFINE(whole, "tests", None, "tests a condition, as far as there are rules (default: the run's)")
    flags.DEFINE(NumberParser(int, low=0), "show", 0, "decoded answers to show, a condition")
    flags.DEFINE(NumberParser(int, low=1, high=256), "devices", None, "devices to use (default: all)")
    start(main)
