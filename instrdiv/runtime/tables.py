"""Tidy tables: CSV files that are written whole or not at all, and read back with their types."""

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
    """The float whose repr has only the digits that a float32 has."""
    return float(str(value))


def write_table(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Writes a CSV whole or not at all (a temporary file, then a rename)."""
    with replacing(path) as file:
        # Cells with characters of the line's end are quoted, and a model may answer with a lone "\r": it has to be one.
        writer = csv.DictWriter(_Lines(file), columns, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows({name: _cell(row[name]) for name in columns} for row in rows)


class Table(NamedTuple):
    """A table that is to be written."""

    columns: Sequence[str]
    rows: Iterable[Row]


def write_table_files(directory: Path, tables: Mapping[str, Table]) -> None:
    """Writes tables by their file names, in order: where the last one is, all are."""
    for name, (columns, rows) in tables.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_table(directory / name, rows, columns)


class _Lines(NamedTuple):
    """A file for csv's lines, which then end with a line feed alone."""

    file: IO[str]

    def write(self, line: str) -> None:
        self.file.write(line.removesuffix("\r\n") + "\n")


def read_table(path: Path, columns: Sequence[str] = (), text: Sequence[str] = ()) -> list[Row]:
    """Reads a CSV; cells that are numbers become int or float, empty ones NaN.

    Args:
      path: of the file.
      columns: that the caller needs; then a table without rows is refused too.
      text: columns that stay as they are: a rule may be ``nan -> inf``.

    Raises:
      BadInput: if it is no table, or not this one.
    """
    if not path.exists():
        raise BadInput(f"{path} cannot be read as a table: there is no such file")
    cells = read_cells(path)
    missing = [name for name in columns if not cells or name not in cells[0]]
    if missing:
        raise BadInput(f"{path} {f'lacks the column {missing[0]}' if cells else 'has no rows'}; it is not a run's")
    return [{name: cell if name in text else _value(cell) for name, cell in row.items()} for row in cells]


def read_cells(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as they are written; none where there is no such file. Raises BadInput if it is no table."""
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
    """Adds rows to a CSV, each in place of the one that has the same cells in the columns ``key``, else at the end.

    A column that the CSV is too old to have gets its default: what was done before there was one.
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
