"""Contenders and their timing: in turns, all in one process, so that a disturbance affects all of them alike.

This module is independent of JAX and PyTorch. A contender is set up once; each call then does a fixed amount of work. A
sample consists of as many calls as fill about the requested number of seconds. They are dispatched without waiting in
between, as in a run, with a single wait at the end, so a peer never pays for a synchronization that it does not need.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class NotRun(Exception):
    """Raised where a contender cannot be set up. The message becomes its status: ``missing: pip install torch``."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A contender that is set up.

    Attributes:
      call: dispatches one call of work; need not wait for it.
      wait: blocks until everything that was dispatched is done.
      examples: number that one call trains on, or tests, over all members; idle members do not count.
      compile_seconds: None if the first call compiles.
      peak_bytes: returns the peak memory, after some calls; None if it is unknown.
    """

    call: Callable[[], Any]
    wait: Callable[[], Any]
    examples: int
    compile_seconds: float | None = None
    peak_bytes: Callable[[], int | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
      kind: its name on the command line.
      side: ``ours``, ``peers``, or ``parts`` (a part of what ours does, not a competitor).
      label: its human-readable name.
      batch_size: examples per step of one member.
      members: number trained together.
      set_up: builds and compiles it. Raises NotRun where it cannot; any other exception is recorded as a failure.
      facts: anything else that a reader needs to know.
    """

    kind: str
    side: str
    label: str
    batch_size: int
    members: int
    set_up: Callable[[], Ready]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed turn of a contender.

    Attributes:
      round, place: the round, and the position within it.
      seconds, examples: how long the turn took, and how many examples it processed.
      other_cores: CPU cores that other processes kept busy meanwhile; NaN where the system does not report it. If other
        processes were busy, the sample says little about a contender whose threads wait for one another, as PyTorch's
        do.
    """

    round: int
    place: int
    seconds: float
    examples: int
    other_cores: float


@dataclasses.dataclass
class Outcome:
    """The results of one contender.

    Attributes:
      status: ``ok``; or why there are no (more) samples: ``missing: …``, ``failed: …``, ``not run: …``.
      calls: calls per sample.
      compile_seconds: compile time of its program; if the first call compiled, how much slower it was than later calls.
    """

    contender: Contender
    status: str = "not run: out of time"
    compile_seconds: float = math.nan
    peak_bytes: int | None = None
    calls: int = 0
    samples: list[Sample] = dataclasses.field(default_factory=list)
    ready: Ready | None = None

    @property
    def rates(self) -> dict[int, float]:
        """Examples per second, by round."""
        return {sample.round: sample.examples / sample.seconds for sample in self.samples}

    @property
    def rate(self) -> float:
        """Examples per second, the median over rounds; NaN without samples."""
        return statistics.median(self.rates.values()) if self.samples else math.nan

    def prepare(self, seconds: float) -> None:
        """Sets the contender up, and finds how many of its calls take about this many seconds."""
        try:
            self.ready = ready = self.contender.set_up()
            first, calls = _time(ready, 1), 1
            while (took := _time(ready, calls)) < seconds / 4:
                calls *= 2
            self.peak_bytes = ready.peak_bytes()
        except NotRun as reason:
            self.status, self.ready = str(reason), None
        except Exception as error:  # a peer may fail in any way: record it, and continue with the others
            self._fail(error)
        else:
            self.status, self.calls = "ok", max(1, round(calls * seconds / took))
            compiled = ready.compile_seconds
            self.compile_seconds = max(0.0, first - took / calls) if compiled is None else compiled

    def sample(self, round: int, place: int) -> None:
        """Takes one sample."""
        assert self.ready
        others = _other_seconds()
        try:
            seconds = _time(self.ready, self.calls)
        except Exception as error:
            self._fail(error)
        else:
            others = max(0.0, _other_seconds() - others)
            self.samples.append(Sample(round, place, seconds, self.calls * self.ready.examples, others / seconds))

    def _fail(self, error: Exception) -> None:
        self.status, self.ready = f"failed: {in_one_line(error)}", None


def in_one_line(error: Exception) -> str:
    """The type of an error, and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def ratio(one: Outcome, other: Outcome) -> float:
    """How many times as fast ``one`` is as ``other``: the median ratio over common rounds; NaN if there are none."""
    common = one.rates.keys() & other.rates.keys()
    return statistics.median(one.rates[r] / other.rates[r] for r in common) if common else math.nan


def take_turns(
    outcomes: Sequence[Outcome],
    rounds: int,
    time_left: Callable[[], float] = lambda: math.inf,
    before: Callable[[int, int, Outcome], None] = lambda round, place, outcome: None,
) -> None:
    """Samples each contender that is set up once per round, rotating the order by one from round to round.

    A turn that would take longer than the time left is skipped.
    """
    ready = [outcome for outcome in outcomes if outcome.ready]
    for round in range(rounds):
        for place in range(len(ready)):
            outcome = ready[(round + place) % len(ready)]
            expected = max((sample.seconds for sample in outcome.samples), default=0.0)
            if outcome.ready and expected < time_left():
                before(round, place, outcome)
                outcome.sample(round, place)


def _other_seconds() -> float:
    """CPU seconds used since boot by everything except this process; NaN except on Linux."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return math.nan
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, first[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _time(ready: Ready, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        ready.call()
    ready.wait()
    return time.perf_counter() - started
