"""Reads the tables of a finished run for its report, checks that members are known, and groups them by setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instrdiv.analysis import thresholds
from instrdiv.evaluation.rows import varying
from instrdiv.reports.pages import (
    READ_OF_RESULTS,
    setting_label,
)
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.provenance import read_provenance
from instrdiv.runtime.tables import Row, read_cells, read_table

# Columns read from the other tables; runs of older versions may lack further columns.
_METRIC_COLUMNS = ("member", "step", "loss", "unseen_dev_exact_match", "status")


_TIMING_COLUMNS = ("group", "compiled", "seconds", "examples_per_second", "tokens_per_second")


_ERROR_COLUMNS = ("member", "step", "split", "slice", "error", "count", "tests")


class RunTables:
    """The files of a run, and its members grouped by setting.

    Attributes:
      sweep, task: what was run, and the class of its settings.
      members: id -> member.
      rows: id -> its settings.
      fields: the settings that differ between members.
      settings: values of ``fields`` -> ids of the members with these values, in order.
      results, errors, samples: rows at each member's last step (earlier steps may have been tested, too).
      diverged: id -> step, for the members that diverged.
    """

    def __init__(self, saved: SavedRun):
        path = saved.path
        self.sweep, self.task = saved.sweep, saved.sweep.task
        texts = (*self.task.parts, "answer", "decoded", "error")
        self.devices = saved.devices
        self.members = {member.id: member for member in self.sweep.members}
        self.rows = {id: member.setting.as_row() for id, member in self.members.items()}
        self.provenance = read_provenance(path / "provenance.json")
        self.metrics = self._of_members(path / "metrics.csv", _METRIC_COLUMNS)
        self.resemblance = self._of_members(
            path / "resemblance.csv", ("member", *(m.column for m in self.task.measures))
        )
        self.timings = read_table(path / "timings.csv", _TIMING_COLUMNS)
        self.results = self._at_the_end(path / "results.csv", READ_OF_RESULTS)
        self.errors = self._at_the_end(path / "errors.csv", _ERROR_COLUMNS, optional=True)
        self.samples = self._at_the_end(
            path / "samples.csv", ("member", "seed", "step", "split", *texts), texts, optional=True
        )

        self.fields = varying(list(self.rows.values())) or ("instructions",)
        self.settings: dict[tuple, list[str]] = {}
        for id in sorted(self.members, key=lambda id: (thresholds.ordering(self.key(id)), self.members[id].seed)):
            self.settings.setdefault(self.key(id), []).append(id)
        self.diverged = {row["member"]: _step_of(row["status"]) for row in self.results if row["status"] != "ok"}

    @property
    def seeds(self) -> list[int]:
        return sorted({member.seed for member in self.sweep.members})

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
        """Reads a table with a ``member`` column. Raises BadInput if it names a member that the run does not have."""
        rows = read_table(path, columns, text)
        strangers = [row["member"] for row in rows if row["member"] not in self.members]
        if strangers:
            raise BadInput(
                f"{path} names the member {strangers[0]}, which config.json lacks; it belongs to another run"
            )
        return rows


def _step_of(status: str) -> int:
    """The N of ``diverged at step N``."""
    return int(status.rpartition(" ")[2])
