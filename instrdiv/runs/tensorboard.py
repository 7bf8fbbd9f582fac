"""Curves for TensorBoard: the rows of metrics.csv as events, one TensorBoard run per member.

Needs the package ``tensorboard`` (``pip install 'instrdiv[tensorboard]'``), not TensorFlow.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from instrdiv.config.settings import Member
from instrdiv.evaluation.rows import varying
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.tables import Row

#: The columns of metrics.csv that become curves.
CURVES = ("loss", "gradient_norm", "train_exact_match", "unseen_dev_exact_match")


def available() -> bool:
    """Whether the package ``tensorboard`` is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoard:
    """Writes members' curves into a directory that ``tensorboard --logdir`` shows.

    A resumed run creates a new writer and writes all its rows again; events left in the directory by an earlier writer
    are removed first, so that no point appears twice.

    Args:
      directory: directory for the members' subdirectories; created if necessary.
      members: the members whose rows will be written.

    Raises:
      BadInput: the package is not installed, or the directory cannot be written.
    """

    def __init__(self, directory: Path | str, members: Sequence[Member]):
        if not available():
            raise BadInput("TensorBoard is not installed: pip install 'instrdiv[tensorboard]'")
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        directory = self._directory = Path(directory)
        with self._clear_errors():
            for old in directory.glob("*seed=* m*/events.out.tfevents.*"):
                old.unlink()
                if not any(old.parent.iterdir()):
                    old.parent.rmdir()
            names = zip(members, member_names(members), strict=True)
            self._writers = {member.id: EventFileWriter(str(directory / name)) for member, name in names}

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows of metrics.csv. Raises BadInput if they cannot be written."""
        with self._clear_errors():
            self._write(rows)

    def _write(self, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            values = [Summary.Value(tag=name, simple_value=row[name]) for name in CURVES]
            event = Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values))
            self._writers[row["member"]].add_event(event)
        for writer in self._writers.values():
            writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Closes the event files."""
        with contextlib.suppress(Exception) if error else self._clear_errors():
            for writer in self._writers.values():
                writer.close()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadInput(f"{self._directory} cannot be written for TensorBoard: {error.strerror}") from error


def member_names(members: Sequence[Member]) -> list[str]:
    """One file name per member: the fields that vary, seed and id, such as ``instructions=256 seed=1 m1f3a90c27``."""
    rows = [member.setting.as_row() for member in members]
    fields = varying(rows)
    names = []
    for member, row in zip(members, rows, strict=True):
        text = "".join(f"{name}={row[name]:g} " if isinstance(row[name], float) else f"{name}={row[name]} "
                       for name in fields)  # fmt: skip
        # File names are limited to 255 bytes.
        names.append(re.sub(r"[^\w.=+ -]", "_", f"{text[:200]}seed={member.seed} {member.id}", flags=re.ASCII))
    return names
