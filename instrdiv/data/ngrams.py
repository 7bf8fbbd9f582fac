"""Texts as words and n-grams, for finding duplicates and contamination and for the hashed embedder.

A word is a run of letters, digits and underscores. Case, width and Unicode composition are normalized away (NFKC, case
folding), and characters between words are ignored. Scripts that do not separate words give long words.

N-grams are compared by 64-bit hashes, which are the same on every machine. The probability that any two different
n-grams among ten million collide is 3e-6.
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
    """The text with case, width, Unicode composition and white space normalized."""
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
      hashes: uint64 [W], all words concatenated.
      starts: int64 [N + 1]; text i has the words ``hashes[starts[i] : starts[i + 1]]``.
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
        """int64 [N]: the number of words in each text."""
        return np.diff(self.starts)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of all texts in order: their hashes, uint64 [G], and the index of the first word, int64 [G]."""
        places = np.arange(len(self.hashes))
        ends = np.repeat(self.starts[1:], self.lengths)
        places = places[places + n <= ends]
        grams = np.zeros(len(places), np.uint64)
        for offset in range(n):
            grams = grams * _BASE + self.hashes[places + offset]
        return _mix(grams), places

    def text_at(self, places: np.ndarray) -> np.ndarray:
        """int64: the text that the word at each position belongs to."""
        return np.searchsorted(self.starts, places, side="right") - 1


class _HashOfWord(dict[str, int]):
    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = int.from_bytes(digest, "little")
        return self[word]


def _mix(state: np.ndarray) -> np.ndarray:
    """Mixes all bits: without it, the low bits of a product depend only on the low bits of its factors."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
