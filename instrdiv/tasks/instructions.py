"""Instructions on the host: tables of them, and the sources that they come from, trained ones and held-out ones."""

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
    """N instructions on the host; a subclass has a field for each of their arrays, numpy [N, ...]."""

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def __len__(self) -> int:
        return len(self._arrays()[0])

    def __getitem__(self, rows: Any) -> Any:
        return type(self)(*(array[rows] for array in self._arrays()))

    def joined(self, others: Sequence[Any]) -> Any:
        """These and others, end to end."""
        columns = zip(self._arrays(), *(other._arrays() for other in others), strict=True)
        return type(self)(*(np.concatenate(column) for column in columns))

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays, to check that instructions made again are those that were trained on."""
        sha = hashlib.sha256()
        for array in self._arrays():
            sha.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def keys(self) -> np.ndarray:
        """Each instruction as one opaque value [N], equal for equal ones, for numpy's set operations."""
        flat = [
            np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).reshape(
                len(array), array[:1].nbytes // max(1, len(array[:1]))
            )
            for array in self._arrays()
        ]
        return as_opaque(np.concatenate(flat, axis=1))

    def arrays(self) -> Any:
        """What ``Task.make_input`` and ``spell`` get of it: a tree of arrays [N, ...], ready to be put on devices."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def as_opaque(rows: np.ndarray) -> np.ndarray:
    """Each row of bytes as one opaque value, for numpy's set operations."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.shape[1]))).ravel() if rows.shape[1] else np.zeros(len(rows))


class TooFew(ValueError):
    """A source holds fewer distinct instructions than were asked for. The message says how many of which.

    Attributes:
      found: how many there are of what was asked for; of tests, besides those to tune on.
    """

    def __init__(self, message: str, found: int = 0):
        super().__init__(message)
        self.found = found


class Source(Protocol):
    """Where instructions come from: one nested pool per seed, and held-out ones apart from all pools by construction.

    Hashable: members with equal sources and seeds share a pool. ``flag`` and ``remedy`` are for the message where there
    are too few: the flag that decides it, and what would help.
    """

    @property
    def flag(self) -> str: ...
    @property
    def remedy(self) -> str: ...

    def pool(self, seed: int, size: int) -> Any:
        """The first ``size`` training instructions of a seed's stream, distinct. Raises TooFew."""

    def held_out(self, size: int) -> Any:
        """The first ``size`` held-out instructions, the same for all seeds. Raises TooFew."""

    def tests(self, dev_tests: int, tests: int) -> tuple[Any, Any]:
        """Held-out instructions to tune on, and others to test on; one per test. Raises TooFew."""

    def capacity(self, held_out: bool) -> int | None:
        """How many distinct instructions one side holds; None where that is not known."""

    def none(self) -> Any:
        """No instructions."""


def take(source: Source, size: int, seed: int | None) -> Any:
    """Training instructions of a seed, or held-out ones (``seed`` None). Raises BadInput where there are too few."""
    with _too_few_in_words(source, "raise --config.held_out_share" if seed is None else "lower --config.instructions"):
        return source.held_out(size) if seed is None else source.pool(seed, size)


def take_tests(source: Source, dev_tests: int, tests: int) -> tuple[Any, Any]:
    """Held-out instructions to tune on, and others to test on. Raises BadInput where there are too few."""
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
    """Instructions that ``Task.draw`` makes of random words, each put on one side by a hash of what it is.

    Attributes:
      task: with the fields that decide its instructions; the others at their defaults.
    """

    task: Any

    BLOCK: ClassVar[int] = 1 << 10  # drawn at a time; part of the definition of a pool
    GIVE_UP_AFTER: ClassVar[int] = 200  # blocks in a row that bring nothing new

    @property
    def flag(self) -> str:
        return f"--config.held_out_share={self.task.held_out_share}"

    @property
    def remedy(self) -> str:
        return f"or choose other fields, of which {self.task.name} has more instructions"

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
        """bool [N]: by a hash of its bytes and the split's seed, for ever."""
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
            message = f"{size} {side} instructions were asked for, but only {len(found)} distinct ones turned up"
            raise TooFew(message, len(found))
        return found[:size]
