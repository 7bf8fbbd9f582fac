"""Texts as words and n-grams: what duplicates, contamination and the hashed embedder compare.

A word is a run of letters, digits and underscores; case, width and composition of letters do not count (NFKC, case
folding), nor does what stands between words. Scripts that do not separate words make long ones.

N-grams are compared by 64-bit hashes of what they say, equal on every machine. That two different ones among ten
million have equal hashes has a probability of 3e-6.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash; odd


def normalize(text: str) -> str:
    """The text without differences of case, width, composition of letters, and white space."""
    return " ".join(_folded(text).split())


def words_of(text: str) -> list[str]:
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of N texts as hashes.

    Attributes:
      hashes: uint64 [W], all words one after another.
      starts: int64 [N + 1]: text i has the words ``starts[i]`` to ``starts[i + 1]``.
    """

    hashes: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Words:
        hash_of = _HashOfWord()
        hashes = [np.array([hash_of[word] for word in words_of(text)], np.uint64) for text in texts]
        starts = np.cumsum([0, *map(len, hashes)])
        return cls(np.concatenate([np.zeros(0, np.uint64), *hashes]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: words of each text."""
        return np.diff(self.starts)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of all texts in order: their hashes, uint64 [G], and the place of the first word, int64 [G]."""
        places = np.arange(len(self.hashes))
        ends = np.repeat(self.starts[1:], self.lengths)
        places = places[places + n <= ends]
        grams = np.zeros(len(places), np.uint64)
        for offset in range(n):
            grams = grams * _BASE + self.hashes[places + offset]
        return _mix(grams), places

    def text_at(self, places: np.ndarray) -> np.ndarray:
        """int64: which text these words are of."""
        return np.searchsorted(self.starts, places, side="right") - 1


class _HashOfWord(dict[str, int]):
    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = int.from_bytes(digest, "little")
        return self[word]


def _mix(state: np.ndarray) -> np.ndarray:
    """The low bits of a product depend on the low bits of its factors alone; this makes all depend on all."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
