"""The index of several figures: one HTML page that links their reports, built only from the files in a directory.

Each figure's run is in a subdirectory named after the figure. If a figure's launcher failed, there is also a
``<name>.log`` next to it: the command, its last lines of output, and how it ended.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from instrdiv.analysis import thresholds
from instrdiv.analysis.claims import Claim, read_claims, verdict
from instrdiv.config.settings import setting_of
from instrdiv.evaluation.rows import at_the_end, varying
from instrdiv.reports.pages import READ_OF_RESULTS, labeled_thresholds, launched, write_page
from instrdiv.runs.saved import task_named
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import replacing
from instrdiv.runtime.provenance import read_provenance
from instrdiv.runtime.tables import read_table
from instrdiv.runtime.units import clock

#: Number of log lines shown on the page.
LAST_LINES = 12

_FILES = ("report.html", "figure.png", "figure.pdf", "figure.csv", "results.csv")


@dataclasses.dataclass(frozen=True)
class Entry:
    """The outcome of one figure.

    Attributes:
      name: of its launcher and of its directory.
      question: the question it asks.
      status: ``done``, ``failed``, ``not finished`` (stopped or still running) or ``not run``.
      files: name -> path relative to the index, for the files that exist.
      command: runs it again; None if unknown.
      claims: the checked claims; None if the run is not judged.
      found: (label, I50) pairs.
      seconds: total wall time of all launches that finished, from provenance.json; None if none did.
      last_lines: the last lines of output of a launcher that failed.
    """

    name: str
    question: str
    status: str
    files: Mapping[str, str]
    command: str | None = None
    claims: Sequence[Claim] | None = None
    found: Sequence[tuple[str, thresholds.Threshold]] = ()
    seconds: float | None = None
    last_lines: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """``reproduced``, ``not reproduced`` or ``not judged``; the status if the figure is not done."""
        if self.status != "done":
            return self.status
        return "not judged" if self.claims is None else verdict(self.claims)

    @property
    def i50(self) -> str:
        """The threshold, or the range from the lowest to the highest of several; empty if there is none."""
        means = [found.interval.mean for _, found in self.found if not math.isnan(found.interval.mean)]
        return " to ".join(f"{mean:,.0f}" for mean in sorted({min(means), max(means)})) if means else ""

    @property
    def wall_time(self) -> str:
        return "" if self.seconds is None else clock(self.seconds)


def read_entry(directory: Path, name: str, question: str) -> Entry:
    """Reads the outcome of one figure; if its files cannot be read, it is ``failed`` and the last line says why."""
    log, run_dir = log_of(directory, name), directory / name
    there = {path.name: path for path in (log, *(run_dir / file for file in _FILES)) if path.exists()}
    entry = Entry(name, question, "not run", {file: str(path.relative_to(directory)) for file, path in there.items()})
    if log.is_file():
        command, *said = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        return dataclasses.replace(entry, status="failed", command=command, last_lines=said[-LAST_LINES:])
    if "report.html" not in there:
        started = (run_dir / "config.json").exists()
        return dataclasses.replace(entry, status="not finished") if started else entry
    try:
        said_of_itself = read_provenance(run_dir / "provenance.json")
        launches = [*said_of_itself.get("earlier_launches", []), said_of_itself]
        seconds = [launch["wall_seconds"] for launch in launches if "wall_seconds" in launch]
        config = run_dir / "config.json"
        task = task_named(json.loads(config.read_text()), config)
        results = at_the_end(read_table(run_dir / "results.csv", READ_OF_RESULTS))
        return dataclasses.replace(
            entry,
            status="done",
            command=launched(said_of_itself, name),
            claims=read_claims(run_dir / "claims.csv"),
            found=labeled_thresholds(results, varying(results, setting_of(task).columns()), task.headline),
            seconds=sum(seconds) if seconds else None,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:  # one unreadable run must not hide the others
        why = (
            str(error) if isinstance(error, BadInput) else f"{run_dir} cannot be read: {type(error).__name__}: {error}"
        )
        return dataclasses.replace(entry, status="failed", last_lines=[why])


def log_of(directory: Path, name: str) -> Path:
    """The path of the log of a launcher that failed."""
    return directory / f"{name}.log"


def write_log(directory: Path, name: str, command: str, last_lines: Iterable[str]) -> Path:
    """Writes the log of a launcher that failed: its command, its last lines of output and how it ended."""
    with replacing(log_of(directory, name)) as file:
        file.writelines(f"{line}\n" for line in (command, *last_lines))
    return log_of(directory, name)


def write_index(directory: Path | str, figures: Mapping[str, str]) -> Path:
    """Writes ``index.html`` into a directory of runs.

    Args:
      directory: contains the run directories of the figures that exist so far.
      figures: name -> the question it asks, in order.

    Returns:
      The path of the page.
    """
    directory = Path(directory)
    entries = [read_entry(directory, name, question) for name, question in figures.items()]
    counts = Counter(entry.verdict for entry in entries)
    return write_page(directory / "index.html", "index.html.jinja", {"entries": entries, "counts": counts})
