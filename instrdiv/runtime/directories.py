"""The directory of a run: only one launch at a time may write to it, and each failure is reported in one clear line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import plain, write_json


def check_usable(path: Path) -> bool:
    """Whether the directory holds a run; it may be missing or empty. Writes nothing.

    Raises BadInput if it holds something else or cannot be written to.
    """
    try:
        _check_writable(path)
        there = [p for p in path.iterdir() if not p.name.startswith((".lock", ".config"))] if path.exists() else []
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"--run_dir={path}: cannot be used ({error}); choose another directory") from None
    if there and not (path / "config.json").exists():
        raise BadInput(f"--run_dir={path}: is not empty and holds no run; choose another directory")
    return bool(there)


def another_run(path: Path, differ: Sequence[str]) -> BadInput:
    """The error for a directory that holds a different run; ``differ`` lists each difference with both values."""
    return BadInput(f"--run_dir={path}: already contains a different run ({'; '.join(differ)}); "
                    "choose another directory, or pass --overwrite to start from scratch")  # fmt: skip


def _check_writable(path: Path) -> None:
    """Raises BadInput or OSError unless ``path`` or files in it can be created; leaves nothing behind."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BadInput(f"--run_dir={path}: {nearest} is a file; choose a directory")
    # As long as the longest path component, to find names that are too long.
    probe = nearest / f".instrdiv-{time.monotonic_ns()}".ljust(max(len(part) for part in path.parts), "-")
    try:
        probe.mkdir()
    except OSError as error:
        raise BadInput(
            f"--run_dir={path}: {nearest} is not writable ({error.strerror}); choose another directory"
        ) from None
    probe.rmdir()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the directory's lock, which the system releases however the process ends.

    Raises BadInput if another launch holds it.
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
                               "wait for it to finish, or choose another directory") from None  # fmt: skip
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turns an OSError, such as a full or read-only disk, into a one-line BadInput."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"--run_dir={path}: cannot be written to ({error.strerror or error}); fix this, then rerun the same "
            "command without --overwrite to resume from the last checkpoint"
        ) from error


@contextlib.contextmanager
def begun(
    path: Path, describe: Callable[[], dict[str, Any]], files: Sequence[str], folders: Sequence[str], overwrite: bool
) -> Iterator[None]:
    """Creates the directory and writes config.json; holds the directory's lock while entered.

    Args:
      path: the directory.
      describe: returns the content of config.json; called while the lock is held. Raises BadInput if the directory
        holds a different run.
      files, folders: what a run writes to the directory, see ``clear``.
      overwrite: remove the existing run and start a new one.
    """
    with clear_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        said = describe()
        with clear_errors(path):
            clear(path, files, folders, whole=overwrite)
            if not _holds(path / "config.json", plain(said)):
                write_json(path / "config.json", said)
        yield


def _holds(path: Path, value: Any) -> bool:
    try:
        return json.loads(path.read_text()) == value
    except (OSError, ValueError):
        return False


def clear(path: Path, files: Sequence[str], folders: Sequence[str], whole: bool) -> None:
    """Removes temporary versions of these files and of config.json that a killed launch left behind.

    With ``whole``, also removes the files and folders themselves, so that a new run can start. config.json stays until
    it is replaced at the end: without it, the directory would not be recognized as a run. Raises OSError on failure.
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
