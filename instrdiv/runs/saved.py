"""The files of a run: written by one launch at a time, readable by any process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instrdiv.config.groups import Group, make_groups
from instrdiv.config.layout import Layout, Options
from instrdiv.config.settings import DEFAULT_TASK, Member, TaskSetting, setting_of
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.rows import ERROR_COLUMNS, result_columns, sample_columns
from instrdiv.runtime.checkpoints import Checkpoints, Damaged
from instrdiv.runtime.directories import another_run, begun, check_usable, clear_errors, locked
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import plain
from instrdiv.runtime.provenance import Provenance
from instrdiv.runtime.tables import (
    Row,
    merge_table,
    read_cells,
    read_table,
    write_table,
)
from instrdiv.tasks.known import find_task
from instrdiv.tasks.task import Task
from instrdiv.training.chunks import TIMING_COLUMNS

#: Columns of metrics.csv: one row per member and report.
METRIC_COLUMNS = (
    *("figure", "group", "member", "seed", "step", "examples_seen", "loss", "gradient_norm", "train_exact_match"),
    *("unseen_dev_exact_match", "unseen_dev_tests", "status"),
)
#: Key columns of results.csv; together with the error class, also of errors.csv.
RESULT_KEY = ("member", "step", "split", "slice")

_FILES = (
    *("results.csv", "errors.csv", "samples.csv", "metrics.csv", "timings.csv", "resemblance.csv"),
    *("claims.csv", "provenance.json", "figure.png", "figure.pdf", "figure.csv", "report.html"),
)
_FOLDERS = ("checkpoints", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Members that were launched together, and their layout. Members added later form another cohort.

    Attributes:
      members, layout: shared by all its groups.
      block_rates: if a probe chose ``members_per_vmap``, examples per second for each size that it tried.
    """

    members: tuple[Member, ...]
    layout: Layout
    block_rates: Mapping[int, float] = dataclasses.field(default_factory=dict)


def task_named(said: Mapping[str, Any], config: Path) -> type[Task]:
    """The task that a config.json names. Raises BadInput if it is not defined."""
    name = said.get("task", DEFAULT_TASK)
    task = find_task(name)
    if task is None:
        raise BadInput(f"{config} uses the task {name}, which is not defined here: pass the file that defines it with "
                       "--task=FILE.py; a launcher needs a different --run_dir, or --overwrite")  # fmt: skip
    return task


def other_rules(path: Path) -> str:
    """The message for a checkpoint trained on other instructions than those generated now."""
    return (f"{path}: was trained on different instructions than are generated now; restore the data file that "
            "they were read from, use the version of instrdiv named in provenance.json")  # fmt: skip


def number_groups(cohorts: Sequence[Cohort]) -> list[tuple[Group, Layout]]:
    """The groups of all cohorts with their layouts, numbered g0, g1, … across cohorts."""
    groups: list[tuple[Group, Layout]] = []
    for cohort in cohorts:
        made = make_groups(cohort.members, len(groups), cohort.layout.attention)
        groups += [(group, cohort.layout) for group in made]
    return groups


class SavedRun:
    """A run directory opened for reading: what was run, and its checkpoints.

    Attributes:
      path: the directory.
      sweep: all members, in the order of the tables.
      cohorts: the same members, as they were launched.
      groups: the groups as trained; row i of a group's arrays is ``group.members[i]``.

    Raises BadInput if there is no run, or its config.json is damaged.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        config = self.path / "config.json"
        if not config.is_file():
            why = "it has no config.json" if self.path.is_dir() else "there is no such directory"
            raise BadInput(f"--run_dir={path}: holds no run ({why})")
        try:
            there = json.loads(config.read_text())
            settings = setting_of(task_named(there, config))
            self.cohorts = [_read_cohort(cohort, settings) for cohort in there["cohorts"]]
            members = tuple(member for cohort in self.cohorts for member in cohort.members)
            self.sweep = Sweep(there["figure"], members, there["dev_tests"], there["tests"])
            self.sweep.validate()
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(
                f"{config} cannot be read ({type(error).__name__}: {error}); pass --overwrite to start from scratch"
            ) from None
        self.groups = tuple(group for group, _ in number_groups(self.cohorts))

    @classmethod
    def at(cls, path: Path | str) -> SavedRun | None:
        """The run in a directory, or None if it has none. Raises BadInput if config.json is damaged."""
        # Not Path.is_file, which raises if the name is too long; ``RunDirectory.check`` has a clearer message for that.
        return cls(path) if os.path.isfile(Path(path) / "config.json") else None

    @property
    def devices(self) -> int:
        """The largest number of devices used by any cohort."""
        return max(cohort.layout.devices for cohort in self.cohorts)

    def checkpoints(self, group: Group, say: Callable[[str], None] = lambda line: None) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints" / group.name, say)

    def steps(self, group: Group) -> list[int]:
        """The saved steps, ascending."""
        with self.checkpoints(group) as checkpoints:
            return checkpoints.steps()

    def params(
        self,
        group: Group,
        step: int | None = None,
        say: Callable[[str], None] = lambda line: None,
        rules: Mapping[int, str] | None = None,
    ) -> tuple[int, Any, np.ndarray]:
        """Loads the saved parameters of a group.

        Args:
          group: one of ``groups``.
          step: one of ``steps``; by default the last intact one.
          say: called with a message for each damaged checkpoint that is skipped.
          rules: row of a member -> digest of its instructions; must match those it was trained on.

        Returns:
          The step, the decoder's parameters (numpy, leading axis ``len(group.members)``), ``diverged_at`` int32 [M].

        Raises BadInput if there is no such checkpoint, it is damaged, or the digests do not match.
        """
        with self.checkpoints(group) as checkpoints:
            saved = checkpoints.steps()
            if not saved or step not in (None, *saved):
                listed = f"saved steps: {', '.join(map(str, saved))}" if saved else "nothing is saved yet"
                asked = "" if step is None else f"--step={step}: "
                raise BadInput(f"{asked}{checkpoints.path} has no such checkpoint; {listed}")
            damaged = []
            for number in saved[::-1] if step is None else [step]:
                try:
                    found = checkpoints.read(number)
                except Damaged as error:
                    damaged.append(f"{checkpoints.path / str(number)}: the checkpoint is damaged: {error}")
                    continue
                for line in damaged:
                    say(f"{line}; using step {number} instead")
                if any(found.record["rules"][row] != digest for row, digest in (rules or {}).items()):
                    raise BadInput(other_rules(checkpoints.path))
                members = len(group.members)
                params = _nested({n: a[:members] for n, a in found.arrays.items() if n.startswith("params.")})
                return number, params["params"], found.arrays["diverged_at"][:members]
            raise BadInput(damaged[0])

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Context manager that locks the directory. Raises BadInput if another launch holds the lock."""
        return locked(self.path)

    def done(self) -> set[str]:
        """Names of the groups that are fully trained and tested, with all their rows in the tables."""
        tested = {
            (row["member"], row["step"]) for row in read_cells(self.path / "results.csv") if row["split"] == "seen"
        }
        reports = Counter(row["group"] for row in read_cells(self.path / "metrics.csv"))
        return {
            group.name
            for group in self.groups
            if {(member.id, str(group.config.steps)) for member in group.members} <= tested
            and reports[group.name] == len(group.members) * group.config.chunks
        }

    def write_results(self, results: Sequence[Row], errors: Sequence[Row] = (), samples: Sequence[Row] = ()) -> None:
        """Merges rows into the result tables, replacing rows with the same key; writes results.csv last.

        Call only while ``locked``. Raises BadInput if they cannot be written.
        """
        task = self.sweep.task
        with clear_errors(self.path):
            merge_table(self.path / "errors.csv", errors, ERROR_COLUMNS, (*RESULT_KEY, "error"))
            merge_table(self.path / "samples.csv", samples, sample_columns(task), (*RESULT_KEY, *task.parts))
            merge_table(self.path / "results.csv", results, result_columns(task), RESULT_KEY, task.default_row())

    def read_metrics(self) -> list[Row]:
        """The rows written to metrics.csv so far."""
        path = self.path / "metrics.csv"
        return read_table(path) if path.exists() else []

    def is_finished(self) -> bool:
        """Whether every group is done and resemblance.csv, which is written last, covers every member."""
        compared = {row["member"] for row in read_cells(self.path / "resemblance.csv")}
        return len(self.done()) == len(self.groups) and {member.id for member in self.sweep.members} <= compared


class RunDirectory(SavedRun):
    """A run directory that a launch writes to, once ``check`` has accepted it."""

    @classmethod
    def check(
        cls, path: Path, sweep: Sweep, options: Options, overwrite: bool, there: SavedRun | None = None
    ) -> list[Cohort]:
        """The cohorts of this sweep in this directory: the existing ones, plus one for any new members.

        ``there`` is the run in the directory, if it is already open. Writes nothing. Raises BadInput if the directory
        cannot be used for this sweep.
        """
        if not check_usable(path) or overwrite:
            return [Cohort(sweep.members, options.resolve(sweep.members))]
        run = there or SavedRun(path)
        differ = _differences(run, sweep, options)
        if differ:
            raise another_run(path, differ)
        there_already = {member.id for member in run.sweep.members}
        new = tuple(member for member in sweep.members if member.id not in there_already)
        # New members use the existing attention implementation, so that a figure does not mix two.
        options = dataclasses.replace(options, attention=options.attention or run.cohorts[0].layout.attention)
        return [*run.cohorts, Cohort(new, options.resolve(new))] if new else run.cohorts

    @classmethod
    @contextlib.contextmanager
    def begin(
        cls,
        path: Path,
        sweep: Sweep,
        options: Options,
        overwrite: bool,
        lay_out: Callable[[Cohort], Cohort] = lambda cohort: cohort,
    ) -> Iterator[RunDirectory]:
        """Creates and locks the directory, and writes config.json.

        A new cohort is passed through ``lay_out``, which may improve its layout.

        Raises BadInput as ``check`` does; ``check`` is repeated under the lock because another launch may have run in
        the meantime.
        """

        def describe() -> dict[str, Any]:
            there = None if overwrite else SavedRun.at(path)
            cohorts = cls.check(path, sweep, options, overwrite, there)
            known = len(there.cohorts) if there else 0
            cohorts = [*cohorts[:known], *map(lay_out, cohorts[known:])]
            config = {
                "figure": sweep.figure,
                "task": sweep.task.name,
                "dev_tests": sweep.dev_tests,
                "tests": sweep.tests,
            }
            return config | {"cohorts": [_write_cohort(cohort) for cohort in cohorts]}

        with begun(path, describe, _FILES, _FOLDERS, overwrite):
            yield cls(path)

    def check_layouts(self, groups: Sequence[tuple[Group, Layout]]) -> None:
        """Raises BadInput if a group's saved layout does not fit this machine."""
        for group, layout in groups:
            try:
                layout.check(group.members)
            except BadInput as error:
                raise BadInput(f"{self.path / 'config.json'}: the saved layout of group {group.name} does not fit this "
                               f"machine ({error}); resume on a machine like the original, or edit the layout in that "
                               "file") from None  # fmt: skip

    def write_progress(self, group: Group, metrics: Sequence[Row], timings: Sequence[Row]) -> None:
        """Replaces the group's rows in metrics.csv and timings.csv; keeps those of other groups."""
        with clear_errors(self.path):
            for name, rows, columns in (("metrics", metrics, METRIC_COLUMNS), ("timings", timings, TIMING_COLUMNS)):
                path = self.path / f"{name}.csv"
                others = [row for row in read_cells(path) if row["group"] != group.name]
                write_table(path, [*others, *rows], columns)

    def write_resemblance(self, rows: Sequence[Row]) -> None:
        with clear_errors(self.path):
            write_table(self.path / "resemblance.csv", rows, tuple(rows[0]))

    def write_provenance(self, **facts: Any) -> None:
        """Writes this launch's environment and ``facts`` to provenance.json; keeps the entries of earlier launches."""
        self._provenance.write(**facts)

    @functools.cached_property
    def _provenance(self) -> Provenance:
        return Provenance(self.path)


def _read_cohort(there: dict[str, Any], settings: type[TaskSetting]) -> Cohort:
    members = tuple(Member(settings.from_row(row), row["seed"]) for row in there["members"])
    there = {"attention": "plain"} | there
    layout = Layout(**{field.name: there[field.name] for field in dataclasses.fields(Layout)})
    return Cohort(members, layout, {int(size): rate for size, rate in there.get("block_rates", {}).items()})


def _write_cohort(cohort: Cohort) -> dict[str, Any]:
    members = [{"id": m.id, "seed": m.seed, **m.setting.as_row()} for m in cohort.members]
    probed = {"block_rates": cohort.block_rates} if cohort.block_rates else {}
    return plain(dataclasses.asdict(cohort.layout) | probed | {"members": members})


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Converts arrays with dotted names to nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _differences(run: SavedRun, sweep: Sweep, options: Options) -> list[str]:
    """How this sweep differs from the saved run, with both values; additional members are not a difference.

    A layout option that is not set (None, or its default) never differs.
    """
    theirs_is, ours_is = run.sweep.task.name, sweep.task.name
    if theirs_is != ours_is:  # members of different tasks have no fields in common to compare
        return [f"task: {theirs_is} saved, {ours_is} requested"]
    differ = [
        f"{name}: {getattr(run.sweep, name)} saved, {getattr(sweep, name)} requested"
        for name in ("figure", "dev_tests", "tests")
        if getattr(run.sweep, name) != getattr(sweep, name)
    ]
    for name, value in dataclasses.asdict(options).items():
        kept = {getattr(cohort.layout, name) for cohort in run.cohorts}
        if value not in (None, getattr(Options(), name)) and kept != {value}:
            differ.append(f"{name}: {', '.join(map(str, sorted(kept)))} saved, {value} requested")
    asked = {member.id for member in sweep.members}
    if all(member.id in asked for member in run.sweep.members):
        return differ
    theirs, ours = ([{**m.setting.as_row(), "seed": m.seed} for m in s.members] for s in (run.sweep, sweep))
    for name in ours[0]:
        old, new = ({row[name]: None for row in rows} for rows in (theirs, ours))
        if not set(old) <= set(new):
            differ.append(f"{name}: {_few(old)} saved, {_few(new)} requested")
    return differ or [f"members: {len(theirs)} saved, {len(ours)} requested"]


def _few(values: dict[Any, None]) -> str:
    names = list(map(str, values))
    return ",".join(names if len(names) <= 8 else [*names[:3], "…", names[-1]])
