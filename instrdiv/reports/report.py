"""The report of a run: one self-contained HTML page, built only from the files in the run's directory.

Numbers and coordinates are computed here; ``report.html.jinja`` writes all markup.
"""

from __future__ import annotations

import dataclasses
import difflib
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from instrdiv.analysis import thresholds
from instrdiv.analysis.claims import Claim, verdict
from instrdiv.reports.curves import curves_of
from instrdiv.reports.pages import (
    data_uri,
    in_words,
    labeled_thresholds,
    launched,
    write_page,
)
from instrdiv.reports.run_tables import (
    RunTables,
)
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.tables import Row, read_table
from instrdiv.runtime.units import clock

#: Sample answers shown per setting and split.
SAMPLES = 5


def write_report(run: Path | str | SavedRun, claims: Sequence[Claim] | None = None, command: str | None = None) -> Path:
    """Writes ``report.html`` into the directory of a finished run.

    Args:
      run: the directory of a finished run, as a path or as a SavedRun. ``figure.png``, ``figure.csv``, ``errors.csv``
        and ``samples.csv`` are shown if they exist; the other tables are required.
      claims: the figure's checked claims; None if the run is not judged.
      command: runs it again; by default the launcher command from provenance.json.

    Returns:
      The path of the page.

    Raises:
      BadInput: if a file is missing or damaged.
    """
    saved = run if isinstance(run, SavedRun) else SavedRun(run)
    run_dir, tables = saved.path, RunTables(saved)
    page = {
        "asked": _asked(tables),
        "task": tables.task,
        "picture": data_uri(picture) if (picture := run_dir / "figure.png").exists() else None,
        "numbers": _numbers(run_dir / "figure.csv"),
        "claims": claims,
        "verdict": None if claims is None else verdict(claims),
        "thresholds": _thresholds(tables),
        "fields": tables.fields,
        "summary": _summary(tables),
        "conditions": _conditions(tables),
        "curves": curves_of(tables),
        "errors": _errors(tables),
        "resemblance": _resemblance(tables),
        "samples": _samples(tables),
        "provenance": _provenance(tables),
        "command": command or launched(tables.provenance, tables.sweep.figure),
    }
    return write_page(run_dir / "report.html", "report.html.jinja", page)


def _asked(run: RunTables) -> dict[str, Any]:
    """What was trained: the varying and the constant settings, the seeds and the devices."""
    fields = {field.name: field for field in dataclasses.fields(run.task)}
    rows, setting = list(run.rows.values()), run.sweep.members[0].setting
    fixed: dict[bool, list[tuple[str, str, str]]] = {True: [], False: []}
    for name in run.task.columns():
        if len({row[name] for row in rows}) == 1:
            # An unset length follows another one, and counts as being at its default, too.
            reset: dict[str, Any] = {name: fields[name].default}
            default = dataclasses.replace(setting, **reset).as_row()[name]
            fixed[rows[0][name] == default].append((name, in_words(rows[0][name]), fields[name].metadata["help"]))
    values = dict(zip(run.fields, zip(*run.settings, strict=True), strict=True))
    return {
        "figure": run.sweep.figure,
        "members": len(rows),
        "settings": len(run.settings),
        "seeds": run.seeds,
        "devices": _counted(run.provenance["devices"][: run.devices]),
        "dev_tests": run.sweep.dev_tests,
        "tests": run.sweep.tests,
        "varied": [(name, _unique(map(in_words, values[name])), fields[name].metadata["help"]) for name in run.fields],
        "chosen": fixed[False],
        "default": fixed[True],
    }


def _numbers(path: Path) -> dict[str, Any] | None:
    """The table of numbers that the figure shows but results.csv lacks, verbatim except for rounding."""
    rows = read_table(path) if path.exists() else []
    return {"columns": list(rows[0]), "rows": [[_short(v) for v in row.values()] for row in rows]} if rows else None


def _thresholds(run: RunTables) -> list[tuple[str, str]]:
    """(label, I50 as text) pairs."""
    rows = [row | run.rows[row["member"]] for row in run.results]
    return [(label, found.text) for label, found in labeled_thresholds(rows, run.fields, run.task.headline)]


def _summary(run: RunTables) -> list[dict[str, Any]]:
    """One row per setting: mean, lowest and highest exact match (headline) over the seeds that did not diverge."""
    rows: dict[tuple[str, str], Row] = {}
    for split in ("unseen", "seen"):
        rows |= {(row["member"], split): row for row in thresholds.select(run.results, split, run.task.headline)}

    def spread(ids: Sequence[str], split: str) -> dict[str, float] | None:
        values = [rows[id, split]["exact_match"] for id in ids if (id, split) in rows]
        return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)} if values else None

    return [
        {
            "setting": [in_words(value) for value in key],
            "models": len(ids),
            "unseen": spread(ids, "unseen"),
            "seen": spread(ids, "seen"),
            "diverged": [(run.members[id].seed, run.diverged[id]) for id in ids if id in run.diverged],
        }
        for key, ids in run.settings.items()
    ]


def _conditions(run: RunTables) -> dict[str, Any] | None:
    """Mean exact match over seeds, per setting and per slice tested in addition to the run's own."""
    values: dict[tuple[str, tuple], list[float]] = {}
    for row in run.results:
        if "/" in row["slice"] and row["status"] == "ok":
            values.setdefault((row["slice"], run.key(row["member"])), []).append(row["exact_match"])
    slices = _unique(slice for slice, _ in values)
    if not slices:
        return None
    return {
        "slices": slices,
        "rows": [
            ([in_words(value) for value in key],
             [statistics.fmean(values[s, key]) if (s, key) in values else None for s in slices])
            for key in run.settings
        ],
    }  # fmt: skip


def _errors(run: RunTables) -> dict[str, Any] | None:
    """Per setting, the shares of right answers and of each class of wrong answers (unseen, headline slice)."""
    if not run.errors:
        return None
    classes = _unique(row["error"] for row in run.errors)
    counts: Counter[tuple] = Counter()
    tests: dict[str, int] = {}
    for row in run.errors:
        if (row["split"], row["slice"]) == ("unseen", run.task.headline) and row["member"] not in run.diverged:
            counts[run.key(row["member"]), row["error"]] += row["count"]
            tests[row["member"]] = row["tests"]
    rows = []
    for key, ids in run.settings.items():
        total = sum(tests.get(id, 0) for id in ids)
        if total:
            wrong = [counts[key, error] / total for error in classes]
            rows.append({"setting": [in_words(value) for value in key], "right": 1 - sum(wrong), "wrong": wrong})
    return {"classes": classes, "rows": rows}


def _resemblance(run: RunTables) -> dict[str, Any]:
    """One row per setting: the mean of each measure over its members, or the minimum for some measures."""
    of_member = {row["member"]: row for row in run.resemblance}
    table = []
    for key, ids in run.settings.items():
        rows = [of_member[id] for id in ids if id in of_member]
        if rows:
            shown = [(m, [row[m.column] for row in rows]) for m in run.task.measures]
            cells = [(m, min(values) if m.least else statistics.fmean(values)) for m, values in shown]
            table.append(([in_words(value) for value in key], cells))
    about = run.task.measures_about.format(**run.resemblance[0])
    return {"about": about, "measures": run.task.measures, "rows": table}


def _samples(run: RunTables) -> list[dict[str, Any]] | None:
    """The first sample answers of each setting and split, in the table's order."""
    if not run.samples:
        return None
    of_setting: dict[tuple, list[Row]] = {key: [] for key in run.settings}
    for row in run.samples:
        of_setting[run.key(row["member"])].append(row)
    shown = []
    for key, rows in of_setting.items():
        taken: Counter[str] = Counter()
        kept = []
        for row in rows:
            taken[row["split"]] += 1
            if taken[row["split"]] <= SAMPLES:
                rule, site = run.task.instruction_words(row, "→"), run.task.site(row)
                kept.append(row | {"rule": rule, "input": site, "decoded": compare(row["answer"], row["decoded"])})
        if rows:
            right = sum(not row["error"] for row in kept)
            shown.append({"label": run.label(key), "rows": kept, "of": len(rows), "right": right})
    return shown


def compare(answer: str, decoded: str) -> list[tuple[str, str]]:
    """Compares a decoded answer with the right one, as pieces (kind, letters).

    A kind is ``same`` (as in the answer), ``wrong``, or ``missing`` (in the answer only). The pieces that are not
    missing spell what was decoded; those that are not wrong spell the answer, unless a wrong piece replaces
    letters of it.
    """
    pieces = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, answer, decoded, autojunk=False).get_opcodes():
        if kind == "delete":
            pieces.append(("missing", answer[a:b]))
        else:
            pieces.append(("same" if kind == "equal" else "wrong", decoded[c:d]))
    return pieces


def _provenance(run: RunTables) -> dict[str, Any]:
    """Versions, machine and rates; facts that an older run did not record are omitted."""
    said = run.provenance
    facts = {
        "commit": said.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in said["versions"].items() if version),
        "devices": _counted(said["devices"]),
        "processor": said.get("processor"),
        "processor cores": said.get("processor_cores"),
        "platform": said.get("platform"),
        "launches": 1 + len(said.get("earlier_launches", [])),
        "wall time of the last launch": clock(said["wall_seconds"]) if "wall_seconds" in said else None,
    }
    groups: dict[str, list[Row]] = {}
    for row in run.timings:
        groups.setdefault(row["group"], []).append(row)
    rates = []
    for group, rows in groups.items():
        steady = [row for row in rows if not row["compiled"]]
        rates.append(
            {
                "group": group,
                "reports": len(rows),
                "seconds": clock(sum(row["seconds"] for row in rows)),
                "compiling": sum(row["seconds"] for row in rows if row["compiled"]),
                "examples": statistics.median(row["examples_per_second"] for row in steady) if steady else None,
                "tokens": statistics.median(row["tokens_per_second"] for row in steady) if steady else None,
            }
        )
    return {"facts": {name: str(fact) for name, fact in facts.items() if fact}, "rates": rates}


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in Counter(names).items())


def _short(value: Any) -> str:
    """Formats a table cell for people."""
    return "–" if value != value else f"{value:.4g}" if isinstance(value, float) else in_words(value)
