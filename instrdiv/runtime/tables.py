"""Tidy tables: CSV files that are written atomically and read back with their types."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import replacing

Row = dict[str, Any]


def shortest(value: Any) -> float:
    """The value as a float with the shortest repr, without digits beyond float32 precision."""
    return float(str(value))


def write_table(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Writes a CSV atomically (a temporary file, then a rename)."""
    with replacing(path) as file:
        # csv quotes cells that contain line terminator characters, and an answer may contain "\r", so that must be one.
        writer = csv.DictWriter(_Lines(file), columns, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows({name: _cell(row[name]) for name in columns} for row in rows)


class Table(NamedTuple):
    """A table to be written."""

    columns: Sequence[str]
    rows: Iterable[Row]


def write_table_files(directory: Path, tables: Mapping[str, Table]) -> None:
    """Writes tables by file name, in order: if the last one exists, all do."""
    for name, (columns, rows) in tables.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_table(directory / name, rows, columns)


class _Lines(NamedTuple):
    """A file for csv's output that ends lines with a line feed only."""

    file: IO[str]

    def write(self, line: str) -> None:
        self.file.write(line.removesuffix("\r\n") + "\n")


def read_table(path: Path, columns: Sequence[str] = (), text: Sequence[str] = ()) -> list[Row]:
    """Reads a CSV; cells that are numbers become int or float, empty ones NaN.

    Args:
      path: the file.
      columns: columns that the caller needs; if given, a table without rows is an error too.
      text: columns that are kept as strings: a rule may be ``nan -> inf``.

    Raises:
      BadInput: if the file is not a table, or lacks these columns.
    """
    if not path.exists():
        raise BadInput(f"{path} cannot be read as a table: there is no such file")
    cells = read_cells(path)
    missing = [name for name in columns if not cells or name not in cells[0]]
    if missing:
        raise BadInput(
            f"{path} {f'lacks the column {missing[0]}' if cells else 'has no rows'}; it was not written by a run"
        )
    return [{name: cell if name in text else _value(cell) for name, cell in row.items()} for row in cells]


def read_cells(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as strings; empty if there is no such file. Raises BadInput if the file is not a table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a table: {error}") from None
    if any(None in row or None in row.values() for row in rows):
        raise BadInput(f"{path} cannot be read as a table: its rows differ in length")
    return rows


def merge_table(
    path: Path,
    rows: Iterable[Row],
    columns: Sequence[str],
    key: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Adds rows to a CSV: each replaces the row with the same cells in the columns ``key``, or is appended.

    Columns that an older CSV lacks are filled from ``defaults``: the behavior before the column was introduced.
    """
    older = dict(defaults or {})
    merged = {tuple(row[name] for name in key): older | row for row in read_cells(path)}
    for row in rows:
        cells = {name: str(_cell(row[name])) for name in columns}
        merged[tuple(cells[name] for name in key)] = cells
    write_table(path, merged.values(), columns)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return value


def _value(cell: str) -> Any:
    if cell == "":
        return math.nan
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
