"""Graceful stop on SIGINT and SIGTERM: finish the current chunk and checkpoint first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was stopped on request; the message says what was saved and how to resume."""


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets ``requested``; the second has its usual effect.

    Args:
      on_request: called with a line for the user, from the signal handler.
      overwrites: whether the command has --overwrite, which must be dropped to resume.

    Python allows signal handlers only in the main thread; in other threads this does nothing.
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
        """Raises Interrupted if a stop was requested. Call it once everything up to ``where`` is on disk."""
        if self.requested:
            command = "the same command without --overwrite" if self._overwrites else "the same command"
            raise Interrupted(f"Checkpoint saved at {where}. Rerun {command} to resume.")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        name = signal.Signals(number).name
        self.__exit__()
        self._on_request(
            f"{name} received: finishing the current chunk and checkpointing; send again to quit immediately."
        )
