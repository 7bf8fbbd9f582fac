"""Tidy tables and provenance: what a run leaves behind, and how it is read back.

Nothing in ``metrics.csv`` or ``results.csv`` depends on the clock or the machine; what does goes to ``timings.csv`` and
``provenance.json``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from instrdiv.settings import DEFAULT_ROW, SETTING_COLUMNS, BadInput

Row = dict[str, Any]

#: Columns of results.csv: what was tested, then every setting by its name, then what follows from them.
RESULT_COLUMNS = (
    *("figure", "group", "member", "seed", "step", "examples_seen", "split", "slice", "exact_match", "tests", "status"),
    *SETTING_COLUMNS,
    *("examples_per_rule", "exact_match_low", "exact_match_high"),
)
#: Columns of metrics.csv: one row a member a report.
METRIC_COLUMNS = (
    *("figure", "group", "member", "seed", "step", "examples_seen", "loss", "gradient_norm", "train_exact_match"),
    *("unseen_dev_exact_match", "unseen_dev_tests", "status"),
)
#: Columns of errors.csv: how many wrong answers of a member, split and slice are of each class (see errors.py).
ERROR_COLUMNS = ("figure", "group", "member", "seed", "step", "split", "slice", "error", "count", "tests")
#: Columns of samples.csv: some decoded answers; ``error`` is empty where the answer is right.
SAMPLE_COLUMNS = (
    *("figure", "group", "member", "seed", "step", "split", "slice"),
    *("pattern", "replacement", "input", "answer", "decoded", "error"),
)
#: Columns of claims.csv: what the papers say of a figure, and whether its table bears that out.
CLAIM_COLUMNS = ("claim", "holds", "evidence")
#: Columns of timings.csv: one row a report. Seconds include the tests on unseen_dev; where a row has ``compiled`` 1,
#: they include compilation, and there is no rate. Tokens are all places of a row: where lengths vary, padding is among
#: them. ``elapsed_seconds`` adds the seconds up, over all launches, for a group; ``checkpoint_seconds``, besides, is
#: how long training stood still for a checkpoint.
TIMING_COLUMNS = (
    *("group", "step", "compiled", "seconds", "examples_per_second", "tokens_per_second", "elapsed_seconds"),
    "checkpoint_seconds",
)


def status_of(diverged_at: int) -> str:
    """What tables say of a member that was frozen at a step, or (-1) was not."""
    return "ok" if diverged_at < 0 else f"diverged at step {int(diverged_at)}"


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


def merge_table(path: Path, rows: Iterable[Row], columns: Sequence[str], key: Sequence[str]) -> None:
    """Adds rows to a CSV, each in place of the one that has the same cells in the columns ``key``, else at the end.

    A setting that the CSV is too old to have gets its default: what was done before there was one.
    """
    merged = {tuple(row[name] for name in key): DEFAULT_ROW | row for row in read_cells(path)}
    for row in rows:
        cells = {name: str(_cell(row[name])) for name in columns}
        merged[tuple(cells[name] for name in key)] = cells
    write_table(path, merged.values(), columns)


def at_the_end(rows: Sequence[Row]) -> list[Row]:
    """The rows about each member's last step: an evaluation may have added others."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["member"]] = max(row["step"], last.get(row["member"], 0))
    return [row for row in rows if row["step"] == last[row["member"]]]


def varying(rows: Sequence[Row]) -> tuple[str, ...]:
    """The settings that differ among the rows, in the order of the columns.

    One that always equals an earlier one is left out: a length that was left open follows another.
    """
    found: dict[tuple, str] = {}
    for name in SETTING_COLUMNS:
        values = tuple(row[name] for row in rows)
        if len(set(values)) > 1:
            found.setdefault(values, name)
    return tuple(found.values())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all. Infinities are written as the strings "inf" and "-inf"."""
    with replacing(path) as file:
        json.dump(plain(value), file, indent=1)
        file.write("\n")


class replacing:
    """Context manager: a file that takes its place when the block ends without an error; ``mode`` is "w" or "wb"."""

    def __init__(self, path: Path, mode: str = "w"):
        self.path, self.mode = Path(path), mode

    def __enter__(self):
        encoding = None if "b" in self.mode else "utf-8"
        self.file = tempfile.NamedTemporaryFile(
            self.mode, encoding=encoding, dir=self.path.parent, prefix=f".{self.path.name}.", delete=False
        )
        return self.file

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())  # or a power cut may leave the new name with the old length, or none
                os.chmod(self.file.name, 0o644)
                os.replace(self.file.name, self.path)
        finally:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.file.name)


def provenance(**facts: Any) -> dict[str, Any]:
    """Where and with what a run was made: versions, device, commit, command; and whatever else is passed in."""
    import jax

    packages = ("instrdiv", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processor_cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "commit": _commit(),
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit of the source tree this package is imported from (``-dirty`` if it differs); None outside git."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


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


def plain(value: Any) -> Any:
    """The value with what JSON lacks (tuples, infinities) replaced by what it has (lists, strings)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
