"""Keeps compiled programs on disk for later launches, in JAX's persistent compilation cache.

A cache key includes what the program was compiled for: the versions and flags of jax and XLA, and the CPU with its
features or the GPU. Machines may therefore share a home directory.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax

#: Size limit; the next launch prunes a larger default directory, least recently used entries first.
MOST_BYTES = 1 << 30


def use_compile_cache(say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Makes JAX cache every compiled program on disk and reuse it in later processes.

    Call it before anything is compiled, as the commands do. The directory is ``JAX_COMPILATION_CACHE_DIR`` (empty: no
    cache), else ``$XDG_CACHE_HOME/instrdiv``, by default ``~/.cache/instrdiv``; ``JAX_ENABLE_COMPILATION_CACHE=false``
    turns it off. Cache problems never stop a run: an unusable directory is reported to ``say``, and an unreadable entry
    is recompiled and replaced.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not jax.config.jax_enable_compilation_cache or "://" in (named or ""):  # type: ignore[attr-defined]
        return
    if named == "":  # JAX would put XLA's caches in the working directory
        jax.config.update("jax_enable_compilation_cache", False)
        return
    try:
        directory = Path(named) if named else _default_directory()
        if not named:
            prune(directory)
        if not _is_writable(directory):
            raise OSError("not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        say(f"compiled programs are not cached in {named or '~/.cache/instrdiv'} ({error}); "
            "set JAX_COMPILATION_CACHE_DIR to use another directory")  # fmt: skip
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Cache all programs: there are few, and the default skips those that compile in under a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _replace_damaged(directory)


def _default_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "instrdiv"


def _is_writable(directory: Path) -> bool:
    """Whether files can be created in the directory, or the directory itself can. Writes nothing."""
    nearest = directory.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def prune(directory: Path) -> None:
    """Removes the least recently used entries from a directory over the limit, down to three quarters of the limit.

    (JAX can do this with the package filelock, but under a lock that every reader has to wait for.)
    """
    found = []
    for path in directory.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another launch removed it first
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
    """Removes cache entries that JAX warns it cannot read or fully write, instead of showing the warning.

    JAX does not write atomically and never replaces an entry: one truncated by a full disk or a kill would be
    recompiled, with a warning, at every launch. An entry removed when it is read is rewritten in the same launch.
    """
    show = warnings.showwarning
    if getattr(show, "removes_from", None) == directory:  # already installed
        return

    def remove_or_show(message, *args, **kwargs):
        named = re.match(r"Error (?:read|writ)ing persistent compilation cache entry for '([\w-]+)'", str(message))
        if not named:
            return show(message, *args, **kwargs)
        for entry in directory.glob(f"{named[1]}*"):  # all entries of this name; intact ones are just recompiled
            try:
                entry.unlink(missing_ok=True)
            except OSError:
                break

    remove_or_show.removes_from = directory  # type: ignore[attr-defined]
    warnings.showwarning = remove_or_show
    # Python shows a warning only once, but several entries may share a program name.
    warnings.filterwarnings("always", message="Error (read|writ)ing persistent compilation cache entry")
