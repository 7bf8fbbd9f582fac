"""Live progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """Shows how far a run is, how fast, and how its members do.

    The rate leaves out compilation: it is measured between reports, from the first on.

    Args:
      total_examples: examples the whole run will train on, members counted.
      tokens_per_example: of a group, to turn rates into tokens/s.
      enabled: False shows nothing.
      stream: where to write; standard error by default.
      clock: seconds.
    """

    def __init__(
        self,
        total_examples: int,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = Console(file=stream or sys.stderr)
        self._enabled, self._clock = enabled, clock
        self._total, self._done = total_examples, 0
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("{task.fields[status]}"), console=self._console
            )
            self._task = self._bar.add_task("training", total=total_examples, status="compiling")

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def report(
        self, examples: int, seconds: float | None, tokens_per_example: int, exact_match: Sequence[float], where: str
    ) -> None:
        """One report.

        Args:
          examples: examples trained on since the last report, members counted.
          seconds: how long they took; None where compilation was part of it.
          tokens_per_example: to say tokens/s.
          exact_match: of every member on unseen_dev.
          where: such as "step 40 of 600".
        """
        self._done += examples
        spread = "unseen_dev exact match (min/median/max) " + "/".join(f"{value:.2f}" for value in _spread(exact_match))
        rate = eta = ""
        if seconds:
            rate = f"{examples / seconds:,.0f} examples/s, {examples * tokens_per_example / seconds:,.0f} tokens/s"
            eta = f"ETA {_duration((self._total - self._done) * seconds / examples)}"
        status = ", ".join(part for part in (eta, rate, spread) if part)
        if self._bar:
            self._bar.update(self._task, completed=self._done, status=status)
        else:
            self.say(f"{where}: {status}")

    def working(self, status: str) -> None:
        """What is being done between reports."""
        if self._bar:
            self._bar.update(self._task, status=status)
        else:
            self.say(status)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values) or [float("nan")]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
