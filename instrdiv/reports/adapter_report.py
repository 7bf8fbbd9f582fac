"""The page of a fine-tuning run scored by right and wrong answers, built only from the files in its directory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instrdiv.analysis import thresholds
from instrdiv.analysis.claims import Claim, verdict
from instrdiv.evaluation.adapter_rows import ANSWER_COLUMNS, IDENTITY, INTERVAL, settings_in
from instrdiv.reports.pages import data_uri, in_words, launched, write_page
from instrdiv.runtime.provenance import read_provenance
from instrdiv.runtime.tables import Row, read_table
from instrdiv.runtime.units import clock

#: (split, slice) pairs that get a column on the page if they were tested. If none of them was, all tested pairs do.
_SLICES = (("unseen", "has_op"), ("unseen", "no_op"), ("seen", "has_op"))
#: Answers shown per setting and split.
_SAMPLES = 2


def settings_of(rows: Sequence[Row]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the settings in results.csv that vary, and the constant settings with their values."""
    names = settings_in(rows, IDENTITY, INTERVAL)
    varying = tuple(name for name in names if len({row[name] for row in rows}) > 1)
    return varying, {name: rows[0][name] for name in names if name not in varying}


def write_adapter_report(run_dir: Path, claims: Sequence[Claim] | None) -> Path:
    """Writes the ``report.html`` of a finished run and returns its path.

    Args:
      run_dir: contains results.csv, samples.csv, provenance.json and, optionally, figure.png.
      claims: the checked claims; None if the run is not judged.

    Raises BadInput if a file is missing or damaged.
    """
    results = read_table(run_dir / "results.csv", IDENTITY)
    samples = read_table(run_dir / "samples.csv", ANSWER_COLUMNS, ("prompt", "right_answer", "answer"))
    said = read_provenance(run_dir / "provenance.json")
    figure = results[0]["figure"]
    fields, same = settings_of(results)
    of_member = {row["member"]: tuple(in_words(row[name]) for name in fields) for row in results}
    by_setting: dict[tuple, list[Row]] = {}
    for row in sorted(results, key=lambda row: thresholds.ordering(tuple(row[name] for name in fields))):
        by_setting.setdefault(tuple(row[name] for name in fields), []).append(row)
    tested = dict.fromkeys((row["split"], row["slice"]) for row in results)
    slices = [pair for pair in _SLICES if pair in tested] or list(tested)
    picture = run_dir / "figure.png"
    page = {
        "figure": figure,
        "members": len(of_member),
        "seeds": sorted({row["seed"] for row in results}),
        "picture": data_uri(picture) if picture.exists() else None,
        "claims": claims,
        "verdict": None if claims is None else verdict(claims),
        "fields": fields,
        "slices": slices,
        "summary": [_summary(key, rows, slices) for key, rows in by_setting.items()],
        "same": [(name, in_words(value)) for name, value in same.items()],
        "samples": _some(samples, of_member),
        "made": made(said),
        "command": launched(said, figure),
    }
    return write_page(run_dir / "report.html", "adapters.html.jinja", page)


def _summary(key: tuple, rows: Sequence[Row], slices: Sequence[tuple[str, str]]) -> dict[str, Any]:
    def spread(pair: tuple[str, str]) -> dict[str, float] | None:
        values = [r["exact_match"] for r in rows if (r["split"], r["slice"]) == pair and r["status"] == "ok"]
        return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)} if values else None

    diverged = {f"seed {row['seed']} {row['status']}" for row in rows if row["status"] != "ok"}
    return {"setting": list(map(in_words, key)), "found": list(map(spread, slices)), "diverged": sorted(diverged)}


def _some(samples: Sequence[Row], of_member: Mapping[str, tuple]) -> list[dict[str, Any]]:
    """The first few answers of each setting and split."""
    shown: dict[tuple, list[dict[str, Any]]] = {}
    for row in samples:
        setting = of_member.get(row["member"], ("base",) * len(next(iter(of_member.values()))))
        rows = shown.setdefault((setting, row["split"]), [])
        if len(rows) < _SAMPLES:
            rows.append({"setting": setting, "split": row["split"], "prompt": row["prompt"],
                         "right": row["right_answer"], "answer": row["answer"], "is_right": row["right"]})  # fmt: skip
    return [sample for rows in shown.values() for sample in rows]


def made(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) pairs from a run's provenance: software versions, hardware, launches and time."""
    facts = {
        "commit": said.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in said["versions"].items() if version),
        "devices": ", ".join(said["devices"]),
        "processor": said.get("processor"),
        "launches": 1 + len(said.get("earlier_launches", [])),
        "wall time of the last launch": clock(said["wall_seconds"]) if "wall_seconds" in said else None,
    }
    return [(name, str(fact)) for name, fact in facts.items() if fact]
