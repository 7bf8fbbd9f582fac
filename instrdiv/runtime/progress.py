"""Live progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from instrdiv.runtime.units import clock


class Reporter:
    """Shows the progress and speed of a run, and how well its members do.

    Args:
      total_examples: examples that the whole run trains on, summed over members.
      enabled: whether to show progress.
      stream: where to write; standard error by default.
    """

    def __init__(self, total_examples: int, enabled: bool = True, stream: TextIO | None = None):
        self._console = Console(file=stream or sys.stderr)
        self._enabled = enabled
        self._total, self._done = total_examples, 0
        self._noted: set[str] = set()
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                BarColumn(None), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), expand=True
            )
            self._task = self._bar.add_task("", total=total_examples)
            self._status = Text(overflow="fold")
            self._live = Live(Group(self._bar, self._status), console=self._console, refresh_per_second=4)

    def __enter__(self) -> Reporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def report(
        self,
        examples: int,
        seconds: float | None,
        tokens_per_example: int,
        values: Sequence[float],
        where: str,
        what: str = "unseen_dev exact match",
    ) -> None:
        """Reports progress.

        Args:
          examples: examples trained on since the last report, summed over members.
          seconds: how long they took; None if that includes compilation.
          tokens_per_example: used to compute tokens/s.
          values: one per member.
          where: such as "step 40 of 600".
          what: name of the values.
        """
        self._done += examples
        spread = "/".join(f"{value:.2f}" for value in _spread(values))
        parts = [f"{what} {spread} (min/median/max over members)"]
        if seconds:
            rate = f"{examples / seconds:,.0f} examples/s, {examples * tokens_per_example / seconds:,.0f} tokens/s"
            parts = [f"ETA {clock((self._total - self._done) * seconds / examples)}", rate, *parts]
        self.working(f"{where}: {', '.join(parts)}")

    def resume(self, examples: int) -> None:
        """Counts ``examples`` as already trained on in earlier launches."""
        self._done += examples

    def note(self, line: str) -> None:
        """Prints a permanent line, even if progress is not shown."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note_frozen(self, member: str, who: str, status: str) -> None:
        """Reports, once per member, that it has diverged; ``who`` describes the member in words."""
        if member not in self._noted:
            self._noted.add(member)
            self.note(f"member {member} ({who}) {status}: it is frozen; the others continue")

    def working(self, status: str) -> None:
        """Shows what is being done."""
        if self._live:
            self._bar.update(self._task, completed=self._done)
            self._status.plain = status
        elif self._enabled:
            self._console.print(status, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a status: as one changing line on a terminal, as plain lines elsewhere."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with console.status("") as status:

        def say(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        yield say


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values) or [float("nan")]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
