"""Chunk after chunk: the device trains while the host reads what is done, reports it, and saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from instrdiv.runtime.checkpoints import Checkpoints, Schedule
from instrdiv.runtime.interruption import StopRequest
from instrdiv.runtime.tables import (
    Row,
)


class Trains(Protocol):
    """What is trained: ``advance`` dispatches the next chunk and returns at once; it replaces ``state``."""

    step: int
    state: Any

    def advance(self) -> Any: ...


class Work(NamedTuple):
    """What is to be done.

    Attributes:
      name: of the group, for tables.
      steps, chunk_steps: of all, and of a chunk; the last one may be shorter.
      examples: that a step trains on, members counted.
      tokens: of an example.
    """

    name: str
    steps: int
    chunk_steps: int
    examples: int
    tokens: int


class Saving(NamedTuple):
    """Where and when a group is saved.

    Attributes:
      checkpoints, schedule: where, and when.
      record: makes what is saved beside the state.
      stop: who may ask to stop.
    """

    checkpoints: Checkpoints
    schedule: Schedule
    record: Callable[[], dict[str, Any]]
    stop: StopRequest | None = None


class ChunkLoop:
    """Trains to the end, from where the trainer is; the seconds of the first chunk count from here.

    Args:
      work, trainer: what is done, and by whom.
      timings: rows of timings.csv so far; one per chunk is added.
      measure: dispatches what is to be known of a chunk, given what ``advance`` returned.
      report: takes the step, that, on the host, and the seconds that the chunk took (None where compilation was part
        of it); the chunk's row is in ``timings`` by then.
      saving: None saves nothing.
    """

    def __init__(
        self,
        work: Work,
        trainer: Trains,
        timings: list[Row],
        measure: Callable[[Any], Any],
        report: Callable[[int, Any, float | None], None],
        saving: Saving | None = None,
    ):
        self.work, self.trainer, self.timings, self.saving = work, trainer, timings, saving
        self._measure, self._report_results = measure, report
        self._clock = time.monotonic()

    def run(self) -> None:
        """The results of one chunk are read while the next one runs, unless it is to be saved."""
        trainer, pending, compiled = self.trainer, None, set()
        while trainer.step < self.work.steps:
            # Before the next one is dispatched: on CPU, that may take as long as it runs.
            seconds = self._wait(pending[-1]) if pending else 0.0
            before = trainer.step
            results = self._measure(trainer.advance())
            if pending:
                self._report(*pending, seconds=seconds)
            length = trainer.step - before
            compiling = length not in compiled
            compiled.add(length)
            pending = (trainer.step, length, compiling, results)
            save = trainer.step == self.work.steps or self._is_save_due()
            if save or compiling:  # what runs while this process compiles would make the next rate a wonder
                self._report(*pending, seconds=self._wait(results))
                pending = None
            if save:
                self._save()
                self.stop_if_asked()

    def _is_save_due(self) -> bool:
        if not self.saving:
            return False
        self.saving.checkpoints.settle()
        asked = self.saving.stop is not None and self.saving.stop.requested
        return asked or self.saving.schedule.is_due(self.trainer.step, self.work.chunk_steps)

    def _save(self) -> None:
        if not self.saving:
            return
        checkpoints, schedule, record, _ = self.saving
        started, step = time.monotonic(), self.trainer.step
        checkpoints.save(step, self.trainer.state, record(), keep=schedule.is_kept(step, self.work.chunk_steps))
        if step == self.work.steps:
            checkpoints.wait()
        schedule.saved()
        self._clock = time.monotonic()
        self.timings[-1]["checkpoint_seconds"] = self._clock - started

    def stop_if_asked(self) -> None:
        """Leaves, if that was asked for, once the last checkpoint is on disk. Raises Interrupted."""
        if self.saving and self.saving.stop and self.saving.stop.requested:
            self.saving.checkpoints.wait()
            where = f"group {self.work.name}, step {self.trainer.step} of {self.work.steps}"
            self.saving.stop.leave_if_asked(where)

    def _wait(self, results: Any) -> float:
        """Waits for a chunk's results; seconds since those of the one before were there."""
        jax.block_until_ready(results)
        last, self._clock = self._clock, time.monotonic()
        return self._clock - last

    def _report(self, step: int, length: int, compiling: bool, results: Any, seconds: float) -> None:
        rate = float("nan") if compiling else length * self.work.examples / seconds
        self.timings.append(
            {
                "group": self.work.name,
                "step": step,
                "compiled": int(compiling),
                "seconds": seconds,
                "examples_per_second": rate,
                "tokens_per_second": rate * self.work.tokens,
                "elapsed_seconds": seconds + (self.timings[-1]["elapsed_seconds"] if self.timings else 0),
                "checkpoint_seconds": 0.0,
            }
        )
        self._report_results(step, jax.device_get(results), None if compiling else seconds)


#: Columns of timings.csv: one row per report. Seconds include the tests on unseen_dev; where a row has ``compiled`` 1,
#: they include compilation, and there is no rate. Tokens are all places of a row: where lengths vary, padding is among
#: them. ``elapsed_seconds`` adds the seconds up, over all launches, for a group; ``checkpoint_seconds``, besides, is
#: how long training stood still for a checkpoint.
TIMING_COLUMNS = (
    *("group", "step", "compiled", "seconds", "examples_per_second", "tokens_per_second", "elapsed_seconds"),
    "checkpoint_seconds",
)
