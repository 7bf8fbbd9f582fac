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

    Python allows handlers in the main thread alone: elsewhere this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, on_request: Callable[[str], None]):
        self.requested = False
        self._on_request = on_request
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        name = signal.Signals(number).name
        self.__exit__()
        self._on_request(f"{name}: what runs is finished and saved first; once more stops at once")
