"""The training loop over chunks: while the device trains, the host reads, reports and saves earlier results."""

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
    """A trainer: ``advance`` dispatches the next chunk, replaces ``state``, and returns without waiting."""

    step: int
    state: Any

    def advance(self) -> Any: ...


class Work(NamedTuple):
    """The work of a training loop.

    Attributes:
      name: name of the group, for tables.
      steps: total number of steps.
      chunk_steps: steps per chunk; the last chunk may be shorter.
      examples: examples per step, summed over members.
      tokens: tokens per example.
    """

    name: str
    steps: int
    chunk_steps: int
    examples: int
    tokens: int


class Saving(NamedTuple):
    """Where and when a group is saved.

    Attributes:
      checkpoints: where.
      schedule: when.
      record: returns what is saved alongside the state.
      stop: set when the user asks to stop.
    """

    checkpoints: Checkpoints
    schedule: Schedule
    record: Callable[[], dict[str, Any]]
    stop: StopRequest | None = None


class ChunkLoop:
    """Trains to the end from the trainer's current step; the first chunk's time is measured from construction.

    Args:
      work, trainer: the work, and the trainer that does it.
      timings: rows of timings.csv so far; one is added per chunk.
      measure: dispatches a chunk's measurements, given what ``advance`` returned.
      report: called with the step, the measurements on the host, and the chunk's seconds (None if they include
        compilation); by then, the chunk's row is in ``timings``.
      saving: None to save nothing.
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
        """Runs all chunks. A chunk's results are read while the next one runs, unless the chunk is to be saved."""
        trainer, pending, compiled = self.trainer, None, set()
        while trainer.step < self.work.steps:
            # Wait before dispatching the next chunk: on CPU, dispatching may block for as long as the chunk runs.
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
            if save or compiling:  # else a chunk that ran during compilation would inflate the next rate
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
        """If a stop was requested, waits until the last checkpoint is on disk and raises Interrupted."""
        if self.saving and self.saving.stop and self.saving.stop.requested:
            self.saving.checkpoints.wait()
            where = f"group {self.work.name}, step {self.trainer.step} of {self.work.steps}"
            self.saving.stop.leave_if_asked(where)

    def _wait(self, results: Any) -> float:
        """Waits for a chunk's results; returns the seconds since the previous chunk's results were ready."""
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


#: Columns of timings.csv: one row per report. Seconds include the tests on unseen_dev; if ``compiled`` is 1, they also
#: include compilation, and there is no rate. Tokens count all positions of a row, padding included.
#: ``elapsed_seconds`` is the sum of a group's seconds over all launches; ``checkpoint_seconds``, not part of it, is how
#: long training was paused for a checkpoint.
TIMING_COLUMNS = (
    *("group", "step", "compiled", "seconds", "examples_per_second", "tokens_per_second", "elapsed_seconds"),
    "checkpoint_seconds",
)
