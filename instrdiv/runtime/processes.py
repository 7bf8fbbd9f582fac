"""Commands as processes of their own, one at a time: what they say is passed on as they say it, its end is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from types import FrameType

#: Bytes of a command's output, and lines of them, that are kept.
LAST_BYTES, LAST_LINES = 100_000, 100

_PIECE = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z])|(\n)|\r|([^\x1b\r\n]+)|\x1b")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: the exit status; -number for a command that a signal ended.
      last_lines: of what it said, as a terminal shows them.
    """

    status: int
    last_lines: Sequence[str]

    @property
    def text(self) -> str:
        return f"exit status {self.status}" if self.status >= 0 else f"ended by {signal.Signals(-self.status).name}"


class Commands:
    """Runs commands. While entered, SIGINT and SIGTERM go to the one that runs, which is then waited for.

    Attributes:
      stop: the last such signal that came; no further command should then be run.

    Python allows handlers in the main thread alone.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self._running: subprocess.Popen | None = None

    def __enter__(self) -> Commands:
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> Ended:
        """Runs a command, and passes on to standard output what it says there and on standard error.

        Where standard output is a terminal the command sees one, and may draw on it.
        """
        terminal = sys.stdout.isatty()
        ours, theirs = os.openpty() if terminal else os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ours)
            try:
                if terminal:
                    termios.tcsetwinsize(theirs, termios.tcgetwinsize(sys.stdout))
                # In a group of its own: a Ctrl-C then reaches it once, from here.
                process = subprocess.Popen(command, stdout=theirs, stderr=theirs, process_group=0)
            finally:
                os.close(theirs)
            try:
                self._running = process
                if self.stop:  # it came while the process was made
                    process.send_signal(self.stop)
                said = _pass_on_output(ours)
            except BaseException:  # nobody listens any more; but it may have something to save, and say
                process.terminate()
                while _read(ours):
                    pass
                raise
            finally:
                process.wait()
                self._running = None
        return Ended(process.returncode, on_screen(said.decode(errors="replace"))[-LAST_LINES:])

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stop = signal.Signals(number)
        if self._running:
            self._running.send_signal(number)


def on_screen(output: str) -> list[str]:
    """The lines that a terminal shows in the end: those that a progress bar drew again and again are there once."""
    lines = [""]
    for control, newline, text in _PIECE.findall(output):
        if newline:
            lines.append("")
        elif control == "\x1b[1A" and len(lines) > 1:  # up; what was there is erased and drawn anew
            lines.pop()
        elif control == "\x1b[2K":
            lines[-1] = ""
        lines[-1] += text
    return [line.rstrip() for line in lines if line.strip()]


def _pass_on_output(source: int) -> bytes:
    """Copies to standard output until nobody writes any more, and returns the last of it."""
    last = b""
    while piece := _read(source):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        last = (last + piece)[-LAST_BYTES:]
    return last


def _read(source: int) -> bytes:
    """What there is to read; nothing at the end, which Linux tells by an error where it is a terminal's."""
    try:
        return os.read(source, 1 << 16)
    except OSError as error:
        if error.errno == errno.EIO:
            return b""
        raise
