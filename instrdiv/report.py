"""The report of a run: one HTML page that needs nothing else, made from the files in the run's directory alone.

Numbers and coordinates are computed here; ``report.html.jinja`` writes all markup.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from instrdiv import thresholds
from instrdiv.pages import (
    READ_OF_RESULTS,
    data_uri,
    duration,
    in_words,
    labelled_thresholds,
    launched,
    read_provenance,
    setting_label,
    write_page,
)
from instrdiv.results import Row, read_cells, read_table, varying
from instrdiv.saved import SavedRun
from instrdiv.settings import SETTING_COLUMNS, BadInput, Setting

#: Points a curve keeps, at most.
CURVE_POINTS = 160
#: Colours of the page; where there are more seeds, the same ones again, dashed.
COLORS = 8
#: Sample answers shown, of a setting and a split.
SAMPLES = 5

#: 1, 2, 5, 10 ...: where axes end and have ticks.
_ROUND = [float(f"{digit}e{power}") for power in range(-12, 13) for digit in (1, 2, 5)]

# What is read of the other tables; a run of an older version may lack others.
_METRIC_COLUMNS = ("member", "step", "loss", "unseen_dev_exact_match", "status")
_TIMING_COLUMNS = ("group", "compiled", "seconds", "examples_per_second", "tokens_per_second")
_ERROR_COLUMNS = ("member", "step", "split", "slice", "error", "count", "tests")
_SAMPLE_TEXTS = ("pattern", "replacement", "input", "answer", "decoded", "error")
_SAMPLE_COLUMNS = ("member", "seed", "step", "split", *_SAMPLE_TEXTS)
_RESEMBLANCE_COLUMNS = ("member", "trained", "held_out", "compared", "pattern_seen", "replacement_seen", "rule_seen",
                        "pattern_distance_mean", "replacement_distance_mean", "rule_distance_min")  # fmt: skip


def write_report(
    run_dir: Path | str, claims: Sequence[thresholds.Claim] | None = None, command: str | None = None
) -> Path:
    """Writes ``report.html`` into the directory of a finished run.

    Args:
      run_dir: where the run's tables are. ``figure.png``, ``figure.csv``, ``errors.csv`` and ``samples.csv`` are shown
        if they are there; the others must be.
      claims: what the figure claims, as checked; None where the run is not judged.
      command: that runs it again; by default the launcher's, from provenance.json.

    Returns:
      The path of the page.

    Raises:
      BadInput: where a file is missing or damaged.
    """
    run_dir = Path(run_dir)
    run = _Tables(run_dir)
    page = {
        "asked": _asked(run),
        "picture": data_uri(picture) if (picture := run_dir / "figure.png").exists() else None,
        "numbers": _numbers(run_dir / "figure.csv"),
        "claims": claims,
        "verdict": None if claims is None else thresholds.verdict(claims),
        "thresholds": _thresholds(run),
        "fields": run.fields,
        "summary": _summary(run),
        "conditions": _conditions(run),
        "curves": _curves(run),
        "errors": _errors(run),
        "resemblance": _resemblance(run),
        "samples": _samples(run),
        "provenance": _provenance(run),
        "command": command or launched(run.provenance, run.sweep.figure),
    }
    return write_page(run_dir / "report.html", "report.html.jinja", page)


class _Tables:
    """The files of a run, and its members sorted into settings.

    Attributes:
      sweep: what was run.
      members: id -> member.
      rows: id -> its settings.
      fields: the settings that differ between members.
      settings: members of every setting, by their values of ``fields``, in order.
      results, errors, samples: of the members at their last step (a run may have tested earlier ones too).
      diverged: id -> step, of the members that diverged.
    """

    def __init__(self, path: Path):
        saved = SavedRun(path)
        self.sweep = saved.sweep
        self.devices = max(cohort.options.devices or 0 for cohort in saved.cohorts)
        self.members = {member.id: member for member in self.sweep.members}
        self.rows = {id: member.setting.as_row() for id, member in self.members.items()}
        self.provenance = read_provenance(path / "provenance.json")
        self.metrics = self._of_members(path / "metrics.csv", _METRIC_COLUMNS)
        self.resemblance = self._of_members(path / "resemblance.csv", _RESEMBLANCE_COLUMNS)
        self.timings = read_table(path / "timings.csv", _TIMING_COLUMNS)
        self.results = self._at_the_end(path / "results.csv", READ_OF_RESULTS)
        self.errors = self._at_the_end(path / "errors.csv", _ERROR_COLUMNS, optional=True)
        self.samples = self._at_the_end(path / "samples.csv", _SAMPLE_COLUMNS, _SAMPLE_TEXTS, optional=True)

        self.fields = varying(list(self.rows.values())) or ("instructions",)
        self.settings: dict[tuple, list[str]] = {}
        for id in sorted(self.members, key=lambda id: (thresholds.ordering(self.key(id)), self.members[id].seed)):
            self.settings.setdefault(self.key(id), []).append(id)
        self.diverged = {row["member"]: _step_of(row["status"]) for row in self.results if row["status"] != "ok"}

    def key(self, id: str) -> tuple:
        return tuple(self.rows[id][name] for name in self.fields)

    def label(self, key: tuple) -> str:
        return setting_label(self.fields, key)

    def _at_the_end(
        self, path: Path, columns: Sequence[str], text: Sequence[str] = (), optional: bool = False
    ) -> list[Row]:
        if optional and not read_cells(path):
            return []
        rows = self._of_members(path, columns, text)
        return [row for row in rows if row["step"] == self.members[row["member"]].setting.steps]

    def _of_members(self, path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> list[Row]:
        """A table that has a column ``member``."""
        rows = read_table(path, columns, text)
        strangers = [row["member"] for row in rows if row["member"] not in self.members]
        if strangers:
            raise BadInput(f"{path} names the member {strangers[0]}, which config.json lacks; it is not this run's")
        return rows


def _asked(run: _Tables) -> dict[str, Any]:
    """What was trained: the settings that vary, those that do not, the seeds and the devices."""
    fields = {field.name: field for field in dataclasses.fields(Setting)}
    rows, setting = list(run.rows.values()), run.sweep.members[0].setting
    fixed: dict[bool, list[tuple[str, str, str]]] = {True: [], False: []}
    for name in SETTING_COLUMNS:
        if len({row[name] for row in rows}) == 1:
            # A length that was left open follows another one, and is at its default too.
            reset: dict[str, Any] = {name: fields[name].default}
            default = dataclasses.replace(setting, **reset).as_row()[name]
            fixed[rows[0][name] == default].append((name, in_words(rows[0][name]), fields[name].metadata["help"]))
    values = dict(zip(run.fields, zip(*run.settings, strict=True), strict=True))
    return {
        "figure": run.sweep.figure,
        "members": len(rows),
        "settings": len(run.settings),
        "seeds": _seeds(run),
        "devices": _counted(run.provenance["devices"][: run.devices]),
        "dev_tests": run.sweep.dev_tests,
        "tests": run.sweep.tests,
        "varied": [(name, _unique(map(in_words, values[name])), fields[name].metadata["help"]) for name in run.fields],
        "chosen": fixed[False],
        "default": fixed[True],
    }


def _numbers(path: Path) -> dict[str, Any] | None:
    """What the picture shows and results.csv does not have, as it is, but for the length of its numbers."""
    rows = read_table(path) if path.exists() else []
    return {"columns": list(rows[0]), "rows": [[_short(v) for v in row.values()] for row in rows]} if rows else None


def _thresholds(run: _Tables) -> list[tuple[str, str]]:
    """(which, I50 in words)."""
    rows = [row | run.rows[row["member"]] for row in run.results]
    return [(label, found.text) for label, found in labelled_thresholds(rows, run.fields)]


def _summary(run: _Tables) -> list[dict[str, Any]]:
    """A row a setting: mean, least and greatest exact match on has-op tests over the seeds that did not diverge."""
    rows: dict[tuple[str, str], Row] = {}
    for split in ("unseen", "seen"):
        rows |= {(row["member"], split): row for row in thresholds.select(run.results, split, "has_op")}

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


def _conditions(run: _Tables) -> dict[str, Any] | None:
    """Of every setting, the mean exact match over seeds in every slice that was tested besides the run's own."""
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


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes that the panels of one kind share, so that they can be compared; coordinates are the page's."""

    steps: int
    low: float
    high: float
    log: bool = False

    WIDTH, HEIGHT = 280, 130
    LEFT, RIGHT, TOP, BOTTOM = 34, 272, 20, 112

    def x(self, step: float) -> float:
        return round(self.LEFT + (self.RIGHT - self.LEFT) * step / self.steps, 1)

    def y(self, value: float) -> float:
        """Values outside the axes are drawn at their edge."""
        value, low, high = min(max(value, self.low), self.high), self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.BOTTOM - (self.BOTTOM - self.TOP) * (value - low) / (high - low), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the y axis."""
        if not self.log:
            return [(self.y(value), f"{value:g}") for value in (0, 0.5, 1)]
        steps = [value for value in _ROUND if self.low <= value <= self.high]
        decades = [value for value in steps if f"{value:e}".startswith("1")]
        if len(decades) > 1:
            steps = decades[:: max(1, len(decades) // 3)]
        return [(self.y(value), f"{value:g}") for value in steps]


def _curves(run: _Tables) -> dict[str, Any]:
    """A panel of exact match and one of loss for every setting, with a line a member."""
    rows: dict[str, list[Row]] = {id: [] for id in run.members}
    for row in sorted(run.metrics, key=lambda row: row["step"]):
        rows[row["member"]].append(row)
    steps = max(row["step"] for row in run.metrics)
    match_frame, loss_frame = Frame(steps, 0.0, 1.0), Frame(steps, *_loss_range(rows.values()), log=True)
    seeds = _seeds(run)

    def member(id: str) -> dict[str, Any]:
        onset, diverged = thresholds.onset(rows[id]), run.diverged.get(id)
        draw = functools.partial(_line, rows[id], diverged)
        place = seeds.index(run.members[id].seed)
        return {
            "id": id,
            "seed": run.members[id].seed,
            "color": place % COLORS,
            "dashed": place // COLORS % 2 == 1,
            "onset": onset,
            "diverged": diverged,
            "match": draw(match_frame, "unseen_dev_exact_match")
            | {"onset": [(match_frame.x(row["step"]), match_frame.y(row["unseen_dev_exact_match"]))
                         for row in rows[id] if row["step"] == onset]},
            "loss": draw(loss_frame, "loss"),
        }  # fmt: skip

    panels = [(run.label(key), [member(id) for id in ids]) for key, ids in run.settings.items()]
    return {
        "match_frame": match_frame,
        "loss_frame": loss_frame,
        "panels": panels,
        "onsets": any(member["onset"] is not None for _, members in panels for member in members),
        "diverged": bool(run.diverged),
        "reports": max(map(len, rows.values())),
    }


def _line(rows: Sequence[Row], diverged: int | None, frame: Frame, name: str) -> dict[str, Any]:
    """A member's curve up to its divergence: the points of a polyline, and where a cross marks the divergence."""
    drawn = [(row["step"], row[name]) for row in rows if row["status"] == "ok" and not math.isnan(row[name])]
    points = " ".join(f"{frame.x(step)},{frame.y(value)}" for step, value in thin(drawn, CURVE_POINTS))
    cross = None if diverged is None else (frame.x(diverged), frame.y(drawn[-1][1] if drawn else frame.low))
    return {"points": points, "cross": cross}


def _loss_range(members: Iterable[Sequence[Row]]) -> tuple[float, float]:
    """The axis of the losses, in round numbers; neither a member about to diverge nor a loss of 0 stretches it."""
    losses = [[row["loss"] for row in rows if 0 < row["loss"] < math.inf] for rows in members]
    losses = [member for member in losses if member]
    if not losses:
        return 0.1, 1.0
    high = min(max(map(max, losses)), 10 * statistics.median(member[0] for member in losses))
    low = max(min(map(min, losses)), high / 1e5)
    return max((v for v in _ROUND if v <= low), default=low), min((v for v in _ROUND if v > high), default=2 * high)


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` of the points, in order: the first, the last, and of every stretch between them the lowest and
    the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)

    def value(place: int) -> float:
        return points[place][1]

    stretches, inner = (most - 2) // 2, len(points) - 2
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(1 + inner * i // stretches, 1 + inner * (i + 1) // stretches)
        kept |= {min(stretch, key=value), max(stretch, key=value)}
    return [points[place] for place in sorted(kept)]


def _errors(run: _Tables) -> dict[str, Any] | None:
    """Of every setting, the share of right unseen has-op answers and of each class of wrong ones."""
    if not run.errors:
        return None
    classes = _unique(row["error"] for row in run.errors)
    counts: Counter[tuple] = Counter()
    tests: dict[str, int] = {}
    for row in run.errors:
        if (row["split"], row["slice"]) == ("unseen", "has_op") and row["member"] not in run.diverged:
            counts[run.key(row["member"]), row["error"]] += row["count"]
            tests[row["member"]] = row["tests"]
    rows = []
    for key, ids in run.settings.items():
        total = sum(tests.get(id, 0) for id in ids)
        if total:
            wrong = [counts[key, error] / total for error in classes]
            rows.append({"setting": [in_words(value) for value in key], "right": 1 - sum(wrong), "wrong": wrong})
    return {"classes": classes, "rows": rows}


def _resemblance(run: _Tables) -> list[dict[str, Any]]:
    """A row a setting: means over its members; the smallest distance is the smallest of all."""
    of_member = {row["member"]: row for row in run.resemblance}
    table = []
    for key, ids in run.settings.items():
        rows = [of_member[id] for id in ids if id in of_member]
        if rows:
            row = {name: statistics.fmean(row[name] for row in rows) for name in _RESEMBLANCE_COLUMNS[1:]}
            row["rule_distance_min"] = min(row["rule_distance_min"] for row in rows)
            table.append(row | {"setting": [in_words(value) for value in key]})
    return table


def _samples(run: _Tables) -> list[dict[str, Any]] | None:
    """The first sample answers of every setting and split, in the table's order."""
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
                before, site, after = (
                    row["input"].partition(row["pattern"]) if row["pattern"] else (row["input"], "", "")
                )
                parts = {"input": (before, site, after), "decoded": compare(row["answer"], row["decoded"])}
                kept.append(row | parts)
        if rows:
            right = sum(not row["error"] for row in kept)
            shown.append({"label": run.label(key), "rows": kept, "of": len(rows), "right": right})
    return shown


def compare(answer: str, decoded: str) -> list[tuple[str, str]]:
    """What was decoded, in pieces (kind, letters): ``same`` as in the answer, ``wrong``, or ``missing`` from it.

    Without the missing ones, the pieces are what was decoded; without the wrong ones, and where nothing stands in for
    other letters, they are the answer.
    """
    pieces = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, answer, decoded, autojunk=False).get_opcodes():
        if kind == "delete":
            pieces.append(("missing", answer[a:b]))
        else:
            pieces.append(("same" if kind == "equal" else "wrong", decoded[c:d]))
    return pieces


def _provenance(run: _Tables) -> dict[str, Any]:
    """Versions, machine and rates; facts that an older run did not write are left out."""
    said = run.provenance
    facts = {
        "commit": said.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in said["versions"].items() if version),
        "devices": _counted(said["devices"]),
        "processor": said.get("processor"),
        "processor cores": said.get("processor_cores"),
        "platform": said.get("platform"),
        "launches": 1 + len(said.get("earlier_launches", [])),
        "wall time of the last launch": duration(said["wall_seconds"]) if "wall_seconds" in said else None,
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
                "seconds": duration(sum(row["seconds"] for row in rows)),
                "compiling": sum(row["seconds"] for row in rows if row["compiled"]),
                "examples": statistics.median(row["examples_per_second"] for row in steady) if steady else None,
                "tokens": statistics.median(row["tokens_per_second"] for row in steady) if steady else None,
            }
        )
    return {"facts": {name: str(fact) for name, fact in facts.items() if fact}, "rates": rates}


def _seeds(run: _Tables) -> list[int]:
    return sorted({member.seed for member in run.sweep.members})


def _step_of(status: str) -> int:
    """The step in ``diverged at step N``."""
    return int(status.rpartition(" ")[2])


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in Counter(names).items())


def _short(value: Any) -> str:
    """A cell of any table for people."""
    return "–" if value != value else f"{value:.4g}" if isinstance(value, float) else in_words(value)
