"""Checkpoints of a group: written during training, trusted only when read.

A checkpoint is one Orbax step of two items: ``state``, every array of the group's state, flat, by name, with a leading
axis of members; and ``record``, JSON: the rows of the tables up to that step, and a digest of every array. So a run
is resumed from a checkpoint alone, and no table has a row more or fewer than the state it belongs to.

Orbax makes a step appear whole or not at all; what happens to it afterward (a power cut, a full disk, a deletion cut
short, a flipped bit) is found out by reading it: every array must have its digest. A step is deleted only when two
later ones have been written, and never the last that could be read.
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
    """A checkpoint that is listed is not what was saved."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Attributes:
      step: steps done.
      arrays: name -> numpy array [M, ...]; M includes the idle members of the layout it was saved with.
      record: what ``Checkpoints.save`` was given.
    """

    step: int
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


@dataclasses.dataclass
class Schedule:
    """When to save: after so many minutes, and whenever a multiple of so many steps has been passed.

    Attributes:
      minutes: between two saves that only serve to go on from; infinite for none.
      steps: checkpoints about every so many steps, which are kept for good; None for none.
      clock: seconds.
    """

    minutes: float = 2.0
    steps: int | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self._last = self.clock()

    def is_kept(self, step: int, chunk_steps: int) -> bool:
        """The checkpoint at ``step``, a chunk's end, is the first past a multiple of ``steps``."""
        return self.steps is not None and step // self.steps > (step - chunk_steps) // self.steps

    def is_due(self, step: int, chunk_steps: int) -> bool:
        return self.is_kept(step, chunk_steps) or self.clock() - self._last >= 60 * self.minutes

    def saved(self) -> None:
        self._last = self.clock()


class Checkpoints:
    """The checkpoints of one group, in a directory of their own.

    Args:
      path: the directory; made by the first save.
      say: takes a line that the user must see.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda line: None):
        self.path, self._say = path.absolute(), say
        self._saving: tuple[int, bool] | None = None  # its step, and whether it is to be kept
        self._known: dict[int, bool] = {}  # steps that were written or read, likewise
        # Nothing is deleted by Orbax: what may go is decided here, when the next one is known to be on disk.
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(create=False, cleanup_tmp_directories=False),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """Steps that are listed, ascending; they may be damaged."""
        if not self.path.is_dir():
            return []
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any], keep: bool = False) -> None:
        """Saves the state of a group, asynchronously once its arrays have been copied to the host.

        Args:
          step: steps done.
          state: tree of arrays [M, ...] of four-byte types. Its buffers may be donated when this returns.
          record: JSON; what belongs to this state.
          keep: never delete it.

        Raises:
          BadInput: this save, or the one before, could not be written.
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
                raise OSError(f"step {step} is there already")

    def wait(self) -> None:
        """Waits until what was saved is on disk, then deletes what it makes superfluous. Raises BadInput."""
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
        """As ``wait``, but does nothing while a save is under way."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def read(self, step: int) -> Checkpoint:
        """Reads a checkpoint and checks every array.

        Raises Damaged; or BadInput where it is the machine that keeps it from being read, and a later try may succeed.
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
        except Exception as error:  # whatever a damaged file makes the readers raise
            if _is_passing(error):
                raise BadInput(f"{self.path / str(step)}: cannot be read now ({_reason(error)}); mend that") from error
            raise Damaged(f"it cannot be read ({' '.join(str(error).split())[:120]})") from None
        if wrong:
            raise Damaged(f"{wrong[0]} has changed since it was written")
        self._known[step] = content["keep"]
        return Checkpoint(step, arrays, content["record"])

    def latest(self) -> Checkpoint | None:
        """The latest whole checkpoint, or None. Damaged ones after it are said, and set aside."""
        found, damaged = None, []
        for step in reversed(self.steps()):
            try:
                found = self.read(step)
                break
            except Damaged as error:
                damaged.append(step)
                self._say(f"checkpoint {self.path / str(step)} is damaged: {error}; set aside, the one before is used")
        for step in damaged:
            aside = self.path / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / str(step)).rename(aside)
        if damaged and not found:
            self._say(f"no whole checkpoint is left in {self.path}: training starts from the beginning")
        self._tidy(found.step if found else 0)
        self._manager.reload()
        return found

    def _tidy(self, latest: int) -> None:
        """Removes what an interrupted save left, and finds the earlier checkpoints that may go one day."""
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
                        continue  # it may be one to keep
                    keep = False  # half deleted: it served only to go on from
                self._known[step] = keep

    def remove_unfinished(self) -> None:
        """Removes what saves that failed, or were cut short, have left."""
        for path in self.path.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.wait()
        with contextlib.suppress(Exception):  # what could go wrong is what went wrong already
            self.close()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns whatever a failed save or deletion raises into one line that says what is left."""
        try:
            yield
        except Exception as error:
            self.remove_unfinished()
            what = "an old checkpoint cannot be deleted"
            if self._saving is not None:
                what = f"the checkpoint of step {self._saving[0]} cannot be written"
            left = (
                f"the last whole one is that of step {max(self._known)}" if self._known else "there is none before it"
            )
            raise BadInput(
                f"{self.path}: {what} ({_reason(error)}); {left}. "
                "Mend that, and the same command, without --overwrite, goes on from there"
            ) from error


def does_not_fit(path: Path, step: int, error: Exception) -> BadInput:
    """The error for a checkpoint whose state does not match the run that would resume from it."""
    return BadInput(
        f"{path}: the checkpoint of step {step} does not fit: {error}; "
        "use the version that provenance.json names, or --overwrite to start anew"
    )


@functools.cache
def quieten_orbax() -> None:
    """For commands: what fails in Orbax is one line of ours; what its threads and coroutines add to it is noise."""
    logging.set_verbosity(logging.FATAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    show = sys.unraisablehook

    def show_others(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = show_others


#: What the system says of itself, not of a file; the words reach us through the messages of other libraries.
_PASSING = [os.strerror(number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM,
                                               errno.ESTALE, errno.EIO, errno.ETIMEDOUT)]  # fmt: skip


def _is_passing(error: BaseException) -> bool:
    """The machine kept a file from being read; nothing is known of the file."""
    return any(words in str(error) for words in _PASSING)


def _reason(error: BaseException) -> str:
    """The operating system's words where the error has them, however deep."""
    text = " ".join(str(error).split())
    for words in (*_PASSING, *map(os.strerror, (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG))):
        if words in text:
            return words
    return text[:160]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, its parts joined by dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def stacked_state(arrays: dict[str, np.ndarray], abstract: Any, members: int, size: int) -> Any:
    """The state of a group from the arrays of a checkpoint.

    Args:
      arrays: by name, with a leading axis of ``members`` or more.
      abstract: one member's state, as shapes and types.
      members, size: of the group; with the idle members of the layout, which repeat the first.

    Raises ValueError where they are another state's.
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
    """uint32 [M] of an array [M, ...]: the words of each member's part, weighted by odd numbers, modulo 2^32.

    The same on host and device. Any change of one word changes it; of several, all but one in 2^32.
    """
    words = array.view(xp.uint32).reshape(array.shape[0], -1)
    weights = 2 * xp.arange(words.shape[1], dtype=xp.uint32) + xp.uint32(1)
    return (words * weights).sum(1, dtype=xp.uint32)


@jax.jit
def _digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _digest(jnp, array) for name, array in arrays.items()}
