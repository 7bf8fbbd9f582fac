"""SIGINT and SIGTERM as a wish to stop: what runs is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run stopped because it was asked to; the message says what was saved and how to go on."""


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets ``requested``; the second one acts as it always does.

    Args:
      on_request: called with a line for the user, from the signal handler.
      overwrites: the command says --overwrite, which must be left out to go on.

    Python allows handlers in the main thread alone: elsewhere this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, on_request: Callable[[str], None], overwrites: bool = False):
        self.requested = False
        self._on_request, self._overwrites = on_request, overwrites
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def leave_if_asked(self, where: str) -> None:
        """Raises Interrupted, if that was asked for. To be called where everything up to ``where`` is on disk."""
        if self.requested:
            command = "The same command, without --overwrite," if self._overwrites else "The same command"
            raise Interrupted(f"stopped and saved: {where}. {command} goes on from there")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        name = signal.Signals(number).name
        self.__exit__()
        self._on_request(f"{name}: what runs is finished and saved first; once more stops at once")
