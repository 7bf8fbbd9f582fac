"""The directory of a run: one launch at a time may write to it, and what keeps it from doing so is one clear line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instrdiv.results import provenance, write_json
from instrdiv.settings import BadInput


def check_usable(path: Path) -> bool:
    """Whether the directory holds a run; it may be missing or empty. Writes nothing.

    Raises BadInput where it holds something else, or cannot be written to.
    """
    try:
        _check_writable(path)
        there = [p for p in path.iterdir() if not p.name.startswith((".lock", ".config"))] if path.exists() else []
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"--run_dir={path}: cannot be used ({error}); name another directory") from None
    if there and not (path / "config.json").exists():
        raise BadInput(f"--run_dir={path}: is not empty and holds no run; choose another directory")
    return bool(there)


def _check_writable(path: Path) -> None:
    """Raises BadInput or OSError unless files can be made in ``path``, or ``path`` be made; leaves nothing behind."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BadInput(f"--run_dir={path}: {nearest} is a file; name a directory")
    # A name as long as the longest one that will be made.
    probe = nearest / f".instrdiv-{time.monotonic_ns()}".ljust(max(len(part) for part in path.parts), "-")
    try:
        probe.mkdir()
    except OSError as error:
        raise BadInput(f"--run_dir={path}: {nearest} is not writable ({error.strerror}); name another") from None
    probe.rmdir()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the directory's lock, which the system gives back however the process ends.

    Raises BadInput where another launch holds it.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        with clear_errors(path):
            file = stack.enter_context(open(path / ".lock", "a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                file.seek(0)
                raise BadInput(f"--run_dir={path}: is in use by {file.read().strip() or 'another launch'}; "
                               "wait for it, or name another directory") from None  # fmt: skip
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """A disk that is full or read-only is one clear line."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"--run_dir={path}: cannot be written to ({error.strerror or error}); mend that, and the same command, "
            "without --overwrite, goes on from the last checkpoint"
        ) from error


def clear(path: Path, files: Sequence[str], folders: Sequence[str], whole: bool) -> None:
    """Removes what a launch that was killed in mid-write has left of these files and of config.json; where ``whole``,
    the files and folders themselves, for another run to begin. Raises OSError where that cannot be.

    config.json stays, to be replaced last: without it, the directory would be nobody's.
    """
    for name in (*files, "config.json"):
        for leftover in path.glob(f".{name}.*"):
            leftover.unlink()
    if whole:
        for name in folders:
            if (path / name).exists():
                shutil.rmtree(path / name)
        for name in files:
            (path / name).unlink(missing_ok=True)


class Provenance:
    """provenance.json of a run directory: where and with what this launch runs, and below it the earlier launches."""

    def __init__(self, path: Path):
        self.path, self._earlier = path, []
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nothing where it cannot be read
            last = json.loads((path / "provenance.json").read_text())
            self._earlier = [*last.pop("earlier_launches", []), last]

    def write(self, **facts: Any) -> None:
        with clear_errors(self.path):
            write_json(self.path / "provenance.json", provenance(**facts) | {"earlier_launches": self._earlier})
