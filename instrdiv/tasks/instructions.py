"""Instructions on the host: tables of instructions, and the sources that trained and held-out ones come from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from instrdiv.runtime.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Instructions:
    """N instructions on the host; a subclass has one field per array, numpy [N, ...]."""

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def __len__(self) -> int:
        return len(self._arrays()[0])

    def __getitem__(self, rows: Any) -> Any:
        return type(self)(*(array[rows] for array in self._arrays()))

    def joined(self, others: Sequence[Any]) -> Any:
        """These and others, concatenated."""
        columns = zip(self._arrays(), *(other._arrays() for other in others), strict=True)
        return type(self)(*(np.concatenate(column) for column in columns))

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays, to check that regenerated instructions are those that were trained on."""
        sha = hashlib.sha256()
        for array in self._arrays():
            sha.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def keys(self) -> np.ndarray:
        """Each instruction as one opaque value [N], equal for equal instructions, for numpy's set operations."""
        flat = [
            np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).reshape(
                len(array), array[:1].nbytes // max(1, len(array[:1]))
            )
            for array in self._arrays()
        ]
        return as_opaque(np.concatenate(flat, axis=1))

    def arrays(self) -> Any:
        """What ``Task.make_input`` and ``spell`` get: a tree of arrays [N, ...], ready to be put on devices."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def as_opaque(rows: np.ndarray) -> np.ndarray:
    """Each row of bytes as one opaque value, for numpy's set operations."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.shape[1]))).ravel() if rows.shape[1] else np.zeros(len(rows))


class TooFew(ValueError):
    """A source has fewer distinct instructions than requested. The message says how many of which kind.

    Attributes:
      found: how many were found; for tests, not counting those to tune on.
    """

    def __init__(self, message: str, found: int = 0):
        super().__init__(message)
        self.found = found


class Source(Protocol):
    """Where instructions come from: one nested pool per seed, and held-out ones that by construction are in no pool.

    Hashable: members with equal sources and seeds share a pool. ``flag`` and ``remedy`` are for the message if there
    are too few: the flag responsible, and what would help.
    """

    @property
    def flag(self) -> str: ...
    @property
    def remedy(self) -> str: ...

    def pool(self, seed: int, size: int) -> Any:
        """The first ``size`` training instructions of the seed's stream, distinct. Raises TooFew."""

    def held_out(self, size: int) -> Any:
        """The first ``size`` held-out instructions, the same for all seeds. Raises TooFew."""

    def tests(self, dev_tests: int, tests: int) -> tuple[Any, Any]:
        """Held-out instructions to tune on, and others to test on; one per test. Raises TooFew."""

    def capacity(self, held_out: bool) -> int | None:
        """How many distinct instructions one side has; None if unknown."""

    def none(self) -> Any:
        """An empty table of instructions."""


def take(source: Source, size: int, seed: int | None) -> Any:
    """Training instructions of ``seed``, or held-out ones if it is None. Raises BadInput if there are too few."""
    with _too_few_in_words(source, "raise --config.held_out_share" if seed is None else "lower --config.instructions"):
        return source.held_out(size) if seed is None else source.pool(seed, size)


def take_tests(source: Source, dev_tests: int, tests: int) -> tuple[Any, Any]:
    """Held-out instructions to tune on, and others to test on. Raises BadInput if there are too few."""
    with _too_few_in_words(source, "raise --config.held_out_share"):
        return source.tests(dev_tests, tests)


@contextlib.contextmanager
def _too_few_in_words(source: Source, remedy: str) -> Iterator[None]:
    try:
        yield
    except TooFew as error:
        raise BadInput(f"{source.flag}: {error}; {remedy}, {source.remedy}") from None


@dataclasses.dataclass(frozen=True)
class DrawnSource:
    """Instructions that ``Task.draw`` makes from random words, each assigned to one side by a hash of its content.

    Attributes:
      task: with the fields that determine its instructions; the others have their defaults.
    """

    task: Any

    BLOCK: ClassVar[int] = 1 << 10  # drawn at a time; part of the definition of a pool
    GIVE_UP_AFTER: ClassVar[int] = 200  # consecutive blocks without a new instruction

    @property
    def flag(self) -> str:
        return f"--config.held_out_share={self.task.held_out_share}"

    @property
    def remedy(self) -> str:
        return f"or choose a setting for which {self.task.name} has more instructions"

    def pool(self, seed: int, size: int) -> Any:
        return self._take(size, seed, held_out=False)

    def held_out(self, size: int) -> Any:
        return self._take(size, self.task.split_seed, held_out=True)

    def tests(self, dev_tests: int, tests: int) -> tuple[Any, Any]:
        try:
            found = self.held_out(dev_tests + tests)
        except TooFew as few:
            raise TooFew(str(few), max(0, few.found - dev_tests)) from None
        return found[:dev_tests], found[dev_tests:]

    def capacity(self, held_out: bool) -> int | None:
        return None

    def none(self) -> Any:
        return self.task.draw(np.zeros((1, self.task.words_drawn), np.uint64))[:0]

    def _is_held_out(self, instructions: Any) -> np.ndarray:
        """bool [N]: decided by a hash of the instruction's bytes and the split's seed, so it never changes."""
        salt = self.task.split_seed.to_bytes(8, "little")
        keys = instructions.keys()
        hashed = [hashlib.blake2b(key.tobytes(), digest_size=8, key=salt).digest() for key in keys]
        share = np.frombuffer(b"".join(hashed), "<u8") / 2.0**64
        return share < self.task.held_out_share

    def _take(self, size: int, seed: int, held_out: bool) -> Any:
        bits = np.random.Philox(key=np.array([seed, 0x6472617765 + held_out], np.uint64))
        found, stale = self.none(), 0
        while len(found) < size and stale < self.GIVE_UP_AFTER:
            words = bits.random_raw(self.BLOCK * self.task.words_drawn).reshape(self.BLOCK, -1)
            drawn = self.task.draw(words)
            both = found.joined([drawn[self._is_held_out(drawn) == held_out]])
            _, first = np.unique(both.keys(), return_index=True)
            stale = stale + 1 if len(first) == len(found) else 0
            found = both[np.sort(first)]
        if len(found) < size:
            side = "held-out" if held_out else "training"
            message = f"{size} {side} instructions were requested, but only {len(found)} distinct ones were found"
            raise TooFew(message, len(found))
        return found[:size]
