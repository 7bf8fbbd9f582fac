"""Rows of results.csv, errors.csv and samples.csv: their columns, and how they are made and selected."""

from __future__ import annotations

from collections.abc import Sequence

from instrdiv.config.groups import Group
from instrdiv.config.settings import Member, TaskSetting
from instrdiv.evaluation.statistics import exact_interval
from instrdiv.runtime.tables import Row
from instrdiv.tasks.task import Task

#: Columns of results.csv before and after the settings: what was tested with its result, and derived values.
IDENTITY = (
    *("figure", "group", "member", "seed", "step", "examples_seen", "split", "slice", "exact_match", "tests", "status"),
)
DERIVED = ("examples_per_rule", "exact_match_low", "exact_match_high")
#: Columns of errors.csv: number of wrong answers by member, split, slice and class of ``Task.mistakes``.
ERROR_COLUMNS = ("figure", "group", "member", "seed", "step", "split", "slice", "error", "count", "tests")


def result_columns(task: type[TaskSetting]) -> tuple[str, ...]:
    """Columns of results.csv."""
    return (*IDENTITY, *task.columns(), *DERIVED)


def sample_columns(task: type[Task]) -> tuple[str, ...]:
    """Columns of samples.csv: some decoded answers; ``error`` is empty if the answer is right."""
    identity = ("figure", "group", "member", "seed", "step", "split", "slice")
    return (*identity, *task.parts, "answer", "decoded", "error")


def setting_names(row: Row) -> tuple[str, ...]:
    """The columns that are settings, in order, of a row of results.csv or of a setting."""
    return tuple(name for name in row if name not in IDENTITY and name not in DERIVED)


def status_of(diverged_at: int) -> str:
    """The status column of a member that was frozen at this step, or never (-1)."""
    return "ok" if diverged_at < 0 else f"diverged at step {int(diverged_at)}"


def at_the_end(rows: Sequence[Row]) -> list[Row]:
    """The rows of each member's last step: an evaluation may have added rows for earlier ones."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["member"]] = max(row["step"], last.get(row["member"], 0))
    return [row for row in rows if row["step"] == last[row["member"]]]


def varying(rows: Sequence[Row], names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The settings that differ among the rows (of results.csv, or of settings), in column order.

    A setting that always equals an earlier one is omitted, such as a length that defaults to another length. ``names``
    are the settings to consider, by default all of them.
    """
    found: dict[tuple, str] = {}
    for name in (setting_names(rows[0]) if rows else ()) if names is None else names:
        values = tuple(row[name] for row in rows)
        if len(set(values)) > 1:
            found.setdefault(values, name)
    return tuple(found.values())


def identity(figure: str, group: Group, member: Member, step: int) -> Row:
    """The leading cells of every row about a member."""
    return {
        "figure": figure,
        "group": group.name,
        "member": member.id,
        "seed": member.seed,
        "step": step,
        "examples_seen": step * group.config.batch_size,
    }


def tested_row(who: Row, setting: Row, split: str, slice: str, right: int, tests: int, status: str) -> Row:
    """A member's result on one split and slice: ``right`` of ``tests``, with the exact 95% binomial interval.

    ``who`` and ``setting`` are the cells that identify the member.
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
