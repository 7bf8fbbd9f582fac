"""Compiled programs, kept on disk for later launches by JAX's persistent compilation cache.

What a program is compiled for is part of its name there: jax and XLA with their flags, and the processor with its
features, or the GPU. So machines may share a home directory.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax

#: A directory that holds more loses, at the next launch, what was not used for longest.
MOST_BYTES = 1 << 30


def use_compile_cache(say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Has JAX keep every compiled program on disk, and take it from there in later processes.

    To be called before anything is compiled; commands do. The directory is ``JAX_COMPILATION_CACHE_DIR`` (empty: none),
    or else ``$XDG_CACHE_HOME/instrdiv``, by default ``~/.cache/instrdiv``; ``JAX_ENABLE_COMPILATION_CACHE=false``
    turns it off. Nothing that is wrong with it ends a run: ``say`` is told where nothing can be kept, and an entry that
    cannot be read is compiled anew and replaced.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not jax.config.jax_enable_compilation_cache or "://" in (named or ""):  # type: ignore[attr-defined]
        return
    if named == "":  # JAX would put XLA's own caches into the working directory
        jax.config.update("jax_enable_compilation_cache", False)
        return
    try:
        directory = Path(named) if named else _default_directory()
        if not named:
            prune(directory)
        if not _is_writable(directory):
            raise OSError("not writable")
    except (OSError, RuntimeError) as error:  # a RuntimeError: there is no home directory
        say(f"compiled programs are not kept in {named or '~/.cache/instrdiv'} ({error}); "
            "JAX_COMPILATION_CACHE_DIR names another directory")  # fmt: skip
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # All of them: there are few, and by default those that take less than a second are left out.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _replace_damaged(directory)


def _default_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "instrdiv"


def _is_writable(directory: Path) -> bool:
    """Files can be made in the directory, or it can be made. Writes nothing."""
    nearest = directory.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def prune(directory: Path) -> None:
    """Removes what was not used for longest, until the directory holds at most three quarters of what it may.

    (JAX would do it, with the package filelock, under a lock that every reader has to wait for.)
    """
    found = []
    for path in directory.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another launch was faster
            continue
        if path.is_file():
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(size for _, size, _ in found)
    if size <= MOST_BYTES:
        return
    for _, bytes_, path in sorted(found):
        if size <= MOST_BYTES * 3 // 4:
            break
        path.unlink(missing_ok=True)
        size -= bytes_


def _replace_damaged(directory: Path) -> None:
    """Removes what JAX says it cannot read, or could not write to its end, instead of passing that on.

    JAX does not write atomically, and leaves what is there as it is: what a full disk or a kill has cut short would
    be compiled anew, with a warning, at every launch. Removed when it is read, it is written again in this launch.
    """
    show = warnings.showwarning
    if getattr(show, "removes_from", None) == directory:  # called before
        return

    def remove_or_show(message, *args, **kwargs):
        named = re.match(r"Error (?:read|writ)ing persistent compilation cache entry for '([\w-]+)'", str(message))
        if not named:
            return show(message, *args, **kwargs)
        for entry in directory.glob(f"{named[1]}*"):  # of this name; the others are only compiled once more
            try:
                entry.unlink(missing_ok=True)
            except OSError:
                break

    remove_or_show.removes_from = directory  # type: ignore[attr-defined]
    warnings.showwarning = remove_or_show
    # Python shows a warning once, but a program of one name may have several entries.
    warnings.filterwarnings("always", message="Error (read|writ)ing persistent compilation cache entry")
