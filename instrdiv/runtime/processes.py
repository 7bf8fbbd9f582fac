"""Runs commands as subprocesses, one at a time: streams their output and keeps the end of it."""

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

#: How much of the end of a command's output is kept, in bytes and in lines.
LAST_BYTES, LAST_LINES = 100_000, 100

_PIECE = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z])|(\n)|\r|([^\x1b\r\n]+)|\x1b")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: the exit status, or minus the signal number if a signal ended the command.
      last_lines: the last lines of its output, as a terminal shows them.
    """

    status: int
    last_lines: Sequence[str]

    @property
    def text(self) -> str:
        return f"exit status {self.status}" if self.status >= 0 else f"ended by {signal.Signals(-self.status).name}"


class Commands:
    """Runs commands. While entered, SIGINT and SIGTERM are forwarded to the running command, which is then waited for.

    Attributes:
      stop: the last such signal received; once set, no further command should be run.

    Python allows signal handlers only in the main thread.
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
        """Runs a command and copies its standard output and standard error to standard output.

        If standard output is a terminal, the command also sees a terminal and may draw on it.
        """
        terminal = sys.stdout.isatty()
        ours, theirs = os.openpty() if terminal else os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ours)
            try:
                if terminal:
                    termios.tcsetwinsize(theirs, termios.tcgetwinsize(sys.stdout))
                # In its own process group, so that a Ctrl-C reaches it only once, from here.
                process = subprocess.Popen(command, stdout=theirs, stderr=theirs, process_group=0)
            finally:
                os.close(theirs)
            try:
                self._running = process
                if self.stop:  # the signal came during process creation
                    process.send_signal(self.stop)
                said = _pass_on_output(ours)
            except BaseException:  # the command may still save and print; drain its output
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
    """The lines that a terminal shows in the end: lines redrawn by a progress bar appear once."""
    lines = [""]
    for control, newline, text in _PIECE.findall(output):
        if newline:
            lines.append("")
        elif control == "\x1b[1A" and len(lines) > 1:  # cursor up: the line is erased and redrawn
            lines.pop()
        elif control == "\x1b[2K":
            lines[-1] = ""
        lines[-1] += text
    return [line.rstrip() for line in lines if line.strip()]


def _pass_on_output(source: int) -> bytes:
    """Copies everything from ``source`` to standard output until it is closed; returns the last bytes."""
    last = b""
    while piece := _read(source):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        last = (last + piece)[-LAST_BYTES:]
    return last


def _read(source: int) -> bytes:
    """Reads available bytes; empty at the end of the output, which Linux signals by EIO on a terminal."""
    try:
        return os.read(source, 1 << 16)
    except OSError as error:
        if error.errno == errno.EIO:
            return b""
        raise
