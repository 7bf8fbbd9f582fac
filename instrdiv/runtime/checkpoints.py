"""Checkpoints of a group: written during training, verified whenever they are read.

A checkpoint is one Orbax step with two items: ``state``, all arrays of the group's state as a flat dict by name, with a
leading member axis; and ``record``, JSON with the table rows up to that step and a digest of every array. A checkpoint
is therefore enough to resume a run, and the tables always match the state exactly.

Orbax writes a step atomically. Later damage (a power cut, a full disk, an interrupted deletion, a flipped bit) is
detected on reading: every array must match its digest. A step is deleted only after two later ones have been written,
and the last readable one is never deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from instrdiv.runtime.errors import BadInput


class Damaged(Exception):
    """A listed checkpoint does not match what was saved."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
      step: steps completed.
      arrays: name -> numpy array [M, ...]; M includes the idle members of the layout it was saved with.
      record: the record passed to ``Checkpoints.save``.
    """

    step: int
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


@dataclasses.dataclass
class Schedule:
    """When to save: every ``minutes``, and whenever training passes a multiple of ``steps``.

    Attributes:
      minutes: interval between temporary checkpoints, which only serve to resume; infinite for none.
      steps: approximate interval in steps between permanent checkpoints; None for none.
      clock: returns the time in seconds.
    """

    minutes: float = 2.0
    steps: int | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self._last = self.clock()

    def is_kept(self, step: int, chunk_steps: int) -> bool:
        """Whether the checkpoint at ``step``, the end of a chunk, is the first at or past a multiple of ``steps``."""
        return self.steps is not None and step // self.steps > (step - chunk_steps) // self.steps

    def is_due(self, step: int, chunk_steps: int) -> bool:
        return self.is_kept(step, chunk_steps) or self.clock() - self._last >= 60 * self.minutes

    def saved(self) -> None:
        self._last = self.clock()


class Checkpoints:
    """The checkpoints of one group, in their own directory.

    Args:
      path: the directory; created by the first save.
      say: called with each line that the user must see.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda line: None):
        self.path, self._say = path.absolute(), say
        self._saving: tuple[int, bool] | None = None  # step being saved, and whether to keep it
        self._known: dict[int, bool] = {}  # steps written or read -> whether to keep them
        # Orbax deletes nothing: ``wait`` deletes old steps, once the next one is known to be on disk.
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(create=False, cleanup_tmp_directories=False),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """The listed steps in ascending order; they may be damaged."""
        if not self.path.is_dir():
            return []
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any], keep: bool = False) -> None:
        """Saves the state of a group: copies its arrays to the host, then writes asynchronously.

        Args:
          step: steps completed.
          state: tree of arrays [M, ...] of four-byte types. Its buffers may be donated once this returns.
          record: JSON that belongs to this state.
          keep: never delete this checkpoint.

        Raises:
          BadInput: this save, or the previous one, could not be written.
        """
        self.wait()
        self._saving = (step, keep)
        arrays = named_leaves(state)
        digests = {name: digest.tolist() for name, digest in jax.device_get(_digests(arrays)).items()}
        text = json.dumps({"record": record, "digests": digests, "keep": keep})
        sealed = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        with self._clear_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            saving = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(sealed))
            if not self._manager.save(step, args=saving, force=True):
                raise OSError(f"step {step} already exists")

    def wait(self) -> None:
        """Waits until the last save is on disk, then deletes the checkpoints it supersedes. Raises BadInput."""
        with self._clear_errors():
            self._manager.wait_until_finished()
            if self._saving is not None:
                step, keep = self._saving
                self._saving, self._known[step] = None, keep
            passing = [step for step, keep in sorted(self._known.items()) if not keep]
            for step in passing[:-2]:
                self._manager.delete(step)
                del self._known[step]

    def settle(self) -> None:
        """Like ``wait``, but does nothing while a save is in progress."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def read(self, step: int) -> Checkpoint:
        """Reads a checkpoint and verifies every array.

        Raises Damaged; or BadInput if the machine prevents reading it, so that a later attempt may succeed.
        """
        try:
            sealed = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if hashlib.sha256(sealed["text"].encode()).hexdigest() != sealed["sha256"]:
                raise Damaged("its record has changed since it was written")
            content = json.loads(sealed["text"])
            names = content["digests"]
            as_numpy = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
            restore = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=as_numpy)
            arrays = dict(self._manager.restore(step, args=ocp.args.Composite(state=restore))["state"])
            wrong = [n for n in names if _digest(np, np.ascontiguousarray(arrays[n])).tolist() != names[n]]
        except (Damaged, MemoryError):
            raise
        except Exception as error:  # damaged files make the readers raise many types
            if _is_passing(error):
                raise BadInput(
                    f"{self.path / str(step)}: cannot be read now ({_reason(error)}); fix this and retry"
                ) from error
            raise Damaged(f"it cannot be read ({' '.join(str(error).split())[:120]})") from None
        if wrong:
            raise Damaged(f"{wrong[0]} has changed since it was written")
        self._known[step] = content["keep"]
        return Checkpoint(step, arrays, content["record"])

    def latest(self) -> Checkpoint | None:
        """The latest intact checkpoint, or None. Later, damaged ones are reported and set aside."""
        found, damaged = None, []
        for step in reversed(self.steps()):
            try:
                found = self.read(step)
                break
            except Damaged as error:
                damaged.append(step)
                self._say(f"checkpoint {self.path / str(step)} is damaged: {error}; set aside, using the previous one")
        for step in damaged:
            aside = self.path / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / str(step)).rename(aside)
        if damaged and not found:
            self._say(f"no intact checkpoint is left in {self.path}: training starts from the beginning")
        self._tidy(found.step if found else 0)
        self._manager.reload()
        return found

    def _tidy(self, latest: int) -> None:
        """Removes leftovers of an interrupted save, and records which checkpoints before ``latest`` to keep."""
        if not self.path.is_dir():
            return
        self.remove_unfinished()
        for step in self.steps():
            if step < latest:
                try:
                    sealed = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
                    keep = json.loads(sealed["record"]["text"])["keep"]
                except Exception as error:
                    if _is_passing(error):
                        continue  # it may be a permanent one
                    keep = False  # half deleted, so it was temporary
                self._known[step] = keep

    def remove_unfinished(self) -> None:
        """Removes leftovers of failed or interrupted saves."""
        for path in self.path.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.wait()
        with contextlib.suppress(Exception):  # any error here repeats an earlier one
            self.close()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns any error of a save or deletion into a one-line BadInput that names the last intact checkpoint."""
        try:
            yield
        except Exception as error:
            self.remove_unfinished()
            what = "an old checkpoint cannot be deleted"
            if self._saving is not None:
                what = f"the checkpoint of step {self._saving[0]} cannot be written"
            left = f"the last intact one is step {max(self._known)}" if self._known else "there is no earlier one"
            raise BadInput(
                f"{self.path}: {what} ({_reason(error)}); {left}. "
                "Fix this, then rerun the same command without --overwrite to resume"
            ) from error


def does_not_fit(path: Path, step: int, error: Exception) -> BadInput:
    """The error for a checkpoint whose state does not match the run that would resume from it."""
    return BadInput(
        f"{path}: the checkpoint of step {step} does not match this run: {error}; "
        "use the version recorded in provenance.json, or --overwrite to start from scratch"
    )


@functools.cache
def quieten_orbax() -> None:
    """Silences Orbax, for commands: failed saves are reported in one line, without extra noise from its threads."""
    logging.set_verbosity(logging.FATAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    show = sys.unraisablehook

    def show_others(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = show_others


#: Errors of the system rather than of a file, as text, because other libraries only pass on the message.
_PASSING = [os.strerror(number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM,
                                               errno.ESTALE, errno.EIO, errno.ETIMEDOUT)]  # fmt: skip


def _is_passing(error: BaseException) -> bool:
    """Whether the machine prevented reading a file, which says nothing about the file itself."""
    return any(words in str(error) for words in _PASSING)


def _reason(error: BaseException) -> str:
    """The operating system's message if the error text contains one, else the beginning of that text."""
    text = " ".join(str(error).split())
    for words in (*_PASSING, *map(os.strerror, (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG))):
        if words in text:
            return words
    return text[:160]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, keyed by their dot-separated path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def stacked_state(arrays: dict[str, np.ndarray], abstract: Any, members: int, size: int) -> Any:
    """Builds the state of a group from the arrays of a checkpoint.

    Args:
      arrays: by name, with a leading axis of ``members`` or more.
      abstract: one member's state, as shapes and dtypes.
      members: number of members in the group.
      size: the same plus the idle members of the layout, which repeat the first member.

    Raises ValueError if the arrays belong to a different state.
    """
    expected = named_leaves(abstract)
    if set(arrays) != set(expected):
        raise ValueError(f"its arrays differ in {sorted(set(arrays) ^ set(expected))[0]}")
    rows = [*range(members), *[0] * (size - members)]
    leaves = []
    for name, leaf in expected.items():
        array = arrays[name]
        if (array.shape[1:], array.dtype) != (leaf.shape, leaf.dtype) or len(array) < members:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not {leaf.dtype}{[members, *leaf.shape]}")
        leaves.append(array if len(array) == size else array[rows])
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _digest(xp: Any, array: Any) -> Any:
    """uint32 [M] of an array [M, ...]: the sum of each member's 32-bit words, weighted by odd numbers, modulo 2^32.

    The same on host and device. Changing one word always changes it; changes to several go unnoticed once in 2^32.
    """
    words = array.view(xp.uint32).reshape(array.shape[0], -1)
    weights = 2 * xp.arange(words.shape[1], dtype=xp.uint32) + xp.uint32(1)
    return (words * weights).sum(1, dtype=xp.uint32)


@jax.jit
def _digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _digest(jnp, array) for name, array in arrays.items()}
