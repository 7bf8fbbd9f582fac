"""Rows of results.csv, errors.csv and samples.csv: their columns, how they are made, and how they are chosen."""

from __future__ import annotations

from collections.abc import Sequence

from instrdiv.config.groups import Group
from instrdiv.config.settings import Member, TaskSetting
from instrdiv.evaluation.statistics import exact_interval
from instrdiv.runtime.tables import Row
from instrdiv.tasks.task import Task

#: Columns of results.csv before and after those of the settings: what was tested, and what follows.
IDENTITY = (
    *("figure", "group", "member", "seed", "step", "examples_seen", "split", "slice", "exact_match", "tests", "status"),
)
DERIVED = ("examples_per_rule", "exact_match_low", "exact_match_high")
#: Columns of errors.csv: how many wrong answers of a member, split and slice are of each class of ``Task.mistakes``.
ERROR_COLUMNS = ("figure", "group", "member", "seed", "step", "split", "slice", "error", "count", "tests")


def result_columns(task: type[TaskSetting]) -> tuple[str, ...]:
    """Columns of results.csv."""
    return (*IDENTITY, *task.columns(), *DERIVED)


def sample_columns(task: type[Task]) -> tuple[str, ...]:
    """Columns of samples.csv: some decoded answers; ``error`` is empty where the answer is right."""
    identity = ("figure", "group", "member", "seed", "step", "split", "slice")
    return (*identity, *task.parts, "answer", "decoded", "error")


def setting_names(row: Row) -> tuple[str, ...]:
    """Of a row of results.csv or of a setting, the columns that are settings, in order."""
    return tuple(name for name in row if name not in IDENTITY and name not in DERIVED)


def status_of(diverged_at: int) -> str:
    """What tables say of a member that was frozen at a step, or (-1) was not."""
    return "ok" if diverged_at < 0 else f"diverged at step {int(diverged_at)}"


def at_the_end(rows: Sequence[Row]) -> list[Row]:
    """The rows about each member's last step: an evaluation may have added others."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["member"]] = max(row["step"], last.get(row["member"], 0))
    return [row for row in rows if row["step"] == last[row["member"]]]


def varying(rows: Sequence[Row], names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The settings that differ among the rows (of results.csv, or of settings), in the order of the columns.

    One that always equals an earlier one is left out: a length that was left open follows another. ``names``: of the
    settings, by default all that the rows have.
    """
    found: dict[tuple, str] = {}
    for name in (setting_names(rows[0]) if rows else ()) if names is None else names:
        values = tuple(row[name] for row in rows)
        if len(set(values)) > 1:
            found.setdefault(values, name)
    return tuple(found.values())


def identity(figure: str, group: Group, member: Member, step: int) -> Row:
    """The cells that every row about a member begins with."""
    return {
        "figure": figure,
        "group": group.name,
        "member": member.id,
        "seed": member.seed,
        "step": step,
        "examples_seen": step * group.config.batch_size,
    }


def tested_row(who: Row, setting: Row, split: str, slice: str, right: int, tests: int, status: str) -> Row:
    """A member's tests of one split and slice, ``right`` of them, with the exact binomial interval of 95 %.

    ``who`` and ``setting`` are the cells that say which member it is.
    """
    low, high = exact_interval(right, tests)
    found = {"split": split, "slice": slice, "exact_match": right / tests, "tests": tests, "status": status}
    return who | setting | found | {"exact_match_low": low, "exact_match_high": high}


def result_row(who: Row, member: Member, split: str, slice: str, right: int, tests: int, status: str) -> Row:
    """A row of results.csv; ``who`` is the member's ``identity``."""
    setting = member.setting
    row = tested_row(who, setting.as_row(), split, slice, right, tests, status)
    row |= {name: round(row[name], 6) for name in ("exact_match_low", "exact_match_high")}
    return row | {"examples_per_rule": setting.examples / setting.instructions}
