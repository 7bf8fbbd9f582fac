"""The index of several figures: one HTML page that links their reports, made from the files in a directory alone.

In the directory, every figure's run has a directory of its own, by the figure's name. A figure whose launcher failed
has a ``<name>.log`` beside it: the command, what it said last, and how it ended.
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

#: Lines of a log that the page shows.
LAST_LINES = 12

_FILES = ("report.html", "figure.png", "figure.pdf", "figure.csv", "results.csv")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one figure.

    Attributes:
      name: of its launcher, and of its directory.
      question: that it asks.
      status: ``done``, ``failed``, ``not finished`` (it was stopped, or runs right now) or ``not run``.
      files: name -> path from the index, of those that are there.
      command: that runs it again; None where it is not known.
      claims: as checked; None where the run is not judged.
      found: (which, I50).
      seconds: wall time, as provenance.json has it, of all launches that came to their end; None where none did.
      last_lines: of a launcher that failed.
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
        """``reproduced``, ``not reproduced`` or ``not judged``; what became of a run that did not finish."""
        if self.status != "done":
            return self.status
        return "not judged" if self.claims is None else verdict(self.claims)

    @property
    def i50(self) -> str:
        """The threshold, or the least and the greatest of several; empty where there is none."""
        means = [found.interval.mean for _, found in self.found if not math.isnan(found.interval.mean)]
        return " to ".join(f"{mean:,.0f}" for mean in sorted({min(means), max(means)})) if means else ""

    @property
    def wall_time(self) -> str:
        return "" if self.seconds is None else clock(self.seconds)


def read_entry(directory: Path, name: str, question: str) -> Entry:
    """What became of one figure. Where its files cannot be read it has failed, and the last line says why."""
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
    except (OSError, ValueError, TypeError, KeyError) as error:  # whatever is wrong with one, the others are shown
        why = (
            str(error) if isinstance(error, BadInput) else f"{run_dir} cannot be read: {type(error).__name__}: {error}"
        )
        return dataclasses.replace(entry, status="failed", last_lines=[why])


def log_of(directory: Path, name: str) -> Path:
    """Where the last words of a launcher that failed are."""
    return directory / f"{name}.log"


def write_log(directory: Path, name: str, command: str, last_lines: Iterable[str]) -> Path:
    """Says that a figure's launcher failed: its command, and what there is to say of its end."""
    with replacing(log_of(directory, name)) as file:
        file.writelines(f"{line}\n" for line in (command, *last_lines))
    return log_of(directory, name)


def write_index(directory: Path | str, figures: Mapping[str, str]) -> Path:
    """Writes ``index.html`` into a directory of runs.

    Args:
      directory: with the run directories of the figures, as far as there are any.
      figures: name -> the question it asks, in order.

    Returns:
      The path of the page.
    """
    directory = Path(directory)
    entries = [read_entry(directory, name, question) for name, question in figures.items()]
    counts = Counter(entry.verdict for entry in entries)
    return write_page(directory / "index.html", "index.html.jinja", {"entries": entries, "counts": counts})
