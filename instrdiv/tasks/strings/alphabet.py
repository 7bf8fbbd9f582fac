"""Letters and tokens: how strings are represented for people and for the model.

Letters are the integers 0..size-1, shown as ``a..z`` then ``A..Z`` and ``0..9``. Rule tables hold letters.
Tokens are what the model reads: three special tokens, then the letters shifted past them. A sequence is

    pattern # replacement # input # answer $

aligned so that the answer starts at the same position in every row (see ``examples.py``).
"""

from __future__ import annotations

import dataclasses
import string

import numpy as np

from instrdiv.tasks.tokens import FIRST_TOKEN, SPECIAL

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """The first ``size`` letters (the papers use 26, lowercase Latin)."""

    size: int = 26

    def __post_init__(self):
        if not 1 <= self.size <= len(LETTERS):
            raise ValueError(f"an alphabet has 1 to {len(LETTERS)} letters, got {self.size}")

    @property
    def letters(self) -> str:
        return LETTERS[: self.size]

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens: the letters and the three special tokens."""
        return FIRST_TOKEN + self.size

    def encode(self, text: str) -> np.ndarray:
        """The letters of ``text``, uint8 [len(text)]. Raises ValueError on a character outside the alphabet."""
        codes = [self.letters.find(character) for character in text]
        if -1 in codes:
            raise ValueError(f"{text[codes.index(-1)]!r} is not in the alphabet {self.letters!r}")
        return np.array(codes, np.uint8)

    def decode(self, letters) -> str:
        """The text of an integer array of letters."""
        return "".join(self.letters[int(code)] for code in letters)

    def decode_tokens(self, tokens) -> str:
        """The text of an integer array of tokens; special tokens appear as ``_`` (padding), ``#`` and ``$`` (end)."""
        characters = SPECIAL + self.letters
        return "".join(characters[int(token)] for token in tokens)
