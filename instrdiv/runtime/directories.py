"""The directory of a run: one launch at a time may write to it, and what keeps it from doing so is one clear line."""

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


def another_run(path: Path, differ: Sequence[str]) -> BadInput:
    """For a directory that holds a run other than the one asked for; ``differ`` says in what, with both values."""
    return BadInput(f"--run_dir={path}: holds another run, which differs in {', '.join(differ)}; "
                    "choose another directory, or --overwrite to start anew")  # fmt: skip


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


@contextlib.contextmanager
def begun(
    path: Path, describe: Callable[[], dict[str, Any]], files: Sequence[str], folders: Sequence[str], overwrite: bool
) -> Iterator[None]:
    """Makes the directory and says in config.json what is being run; nobody else may meanwhile.

    Args:
      path: of the directory.
      describe: makes what config.json is to say; called once nobody else can change what is there. Raises BadInput
        where that is another run.
      files, folders: what a run leaves in it, see ``clear``.
      overwrite: another run begins; what is there is removed.
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
