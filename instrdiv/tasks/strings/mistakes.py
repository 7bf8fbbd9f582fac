"""What is wrong with a wrong answer: one of four classes, checked in this order.

1. ``wrong length``: it has more or fewer letters than the right answer, or no end token.
2. ``wrong site``: it is the input with the replacement at a position other than the leftmost occurrence, or the
   unchanged input although it contains the pattern.
3. ``wrong replacement``: right outside the site of the replacement, wrong inside.
4. ``copy error``: some letter outside the site is wrong.

A no-op has no site: a replacement anywhere is ``wrong site``, anything else ``copy error``. Since length is checked
first, an unchanged has-op and a rewritten no-op are ``wrong length`` where pattern and replacement differ in length.
"""

from __future__ import annotations

import numpy as np

from instrdiv.tasks.strings.rules import Rules
from instrdiv.tasks.tokens import FIRST_TOKEN, compare_answers

MISTAKES = ("wrong length", "wrong site", "wrong replacement", "copy error")


def classify(
    rules: Rules, text_NxT: np.ndarray, length_N: np.ndarray, right_NxA: np.ndarray, decoded_NxA: np.ndarray
) -> np.ndarray:
    """The class of each answer, as an index into ``MISTAKES``, or -1 if it is right: int8 [N].

    Args:
      rules: numpy arrays, one rule per answer.
      text_NxT, length_N: letters of the inputs; anything past the length is ignored.
      right_NxA, decoded_NxA: tokens: letters, end token, padding; anything past the end token is ignored. A >= T.
    """
    text_NxT = text_NxT.astype(np.int16) + FIRST_TOKEN
    pattern_length_N, replacement_length_N = map(np.asarray, (rules.pattern_lengths, rules.replacement_lengths))
    right_length_N, decoded_length_N, right_N = compare_answers(right_NxA, decoded_NxA)

    found_NxT = _occurrences(np.asarray(rules.patterns), pattern_length_N, text_NxT, length_N)
    has_op_N, start_N = found_NxT.any(1), found_NxT.argmax(1)
    # How many letters at the beginning, and at the end, match the input.
    place_T = np.arange(text_NxT.shape[1])
    first_N = _true_from_the_left((decoded_NxA[:, place_T] == text_NxT) & (place_T < length_N[:, None]))
    from_end, decoded_from_end = (length[:, None] - 1 - place_T for length in (length_N, decoded_length_N))
    same_NxT = _letter_at(text_NxT, from_end) == _letter_at(decoded_NxA, decoded_from_end)
    last_N = _true_from_the_left(same_NxT & (from_end >= 0) & (decoded_from_end >= 0))

    # The input rewritten at position s: its first s letters, the replacement, and what follows the pattern's length.
    rewritten_NxT = _occurrences(np.asarray(rules.replacements), replacement_length_N, decoded_NxA, decoded_length_N)[
        :, place_T
    ]
    after_NxT = (length_N - pattern_length_N)[:, None] - place_T
    rewritten_NxT &= (place_T <= first_N[:, None]) & (after_NxT <= last_N[:, None])
    rewritten_N = rewritten_NxT.any(1) & (decoded_length_N == length_N - pattern_length_N + replacement_length_N)
    unchanged_N = has_op_N & (first_N == length_N) & (decoded_length_N == length_N)
    outside_right_N = has_op_N & (first_N >= start_N) & (last_N >= length_N - start_N - pattern_length_N)

    tried = [right_N, decoded_length_N != right_length_N, rewritten_N | unchanged_N, outside_right_N]
    return np.select(tried, [-1, 0, 1, 2], 3).astype(np.int8)


def _true_from_the_left(array_NxT: np.ndarray) -> np.ndarray:
    """int [N]: how many entries are true before the first false one."""
    return np.logical_and.accumulate(array_NxT, axis=1).sum(1)


def _letter_at(tokens_NxT: np.ndarray, place_NxT: np.ndarray) -> np.ndarray:
    return np.take_along_axis(tokens_NxT, np.clip(place_NxT, 0, tokens_NxT.shape[1] - 1), axis=1)


def _occurrences(word_NxW: np.ndarray, size_N: np.ndarray, tokens_NxT: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """bool [N, T]: the word (letters, the first ``size_N`` of them) occurs at this position in the tokens."""
    T = tokens_NxT.shape[1]
    here_NxT = np.arange(T) + size_N[:, None] <= length_N[:, None]
    word_NxW = word_NxW.astype(np.int16) + FIRST_TOKEN
    for offset in range(min(T, word_NxW.shape[1])):
        shifted_NxT = np.pad(tokens_NxT[:, offset:], ((0, 0), (0, offset)))
        here_NxT &= (shifted_NxT == word_NxW[:, offset, None]) | (offset >= size_N)[:, None]
    return here_NxT
