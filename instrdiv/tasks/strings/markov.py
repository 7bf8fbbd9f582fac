"""String rewriting: one step (in plain Python and in JAX), and whole Markov algorithms.

The two one-step versions check each other: the plain one is the papers' definition, the JAX one makes every training
example.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def rewrite(pattern: str, replacement: str, text: str) -> str:
    """``text`` with the leftmost occurrence of ``pattern`` replaced; ``text`` itself if there is none (a no-op).

    >>> rewrite("aa", "bac", "caaba")
    'cbacba'
    """
    start = text.find(pattern)
    return text if start < 0 else text[:start] + replacement + text[start + len(pattern) :]


class MarkovAlgorithm:
    """An ordered list of rules, applied until a stop rule fires or no rule applies.

    See P2 (arXiv 2410.04717), section 2. At each step the first rule whose pattern occurs rewrites its leftmost
    occurrence. Characters are arbitrary, so markers outside the input's alphabet need no special treatment.

    Args:
      rules: ``(pattern, replacement)`` or ``(pattern, replacement, stop)``, in order of priority.

    Raises:
      ValueError: a rule is not two strings and an optional bool.
    """

    def __init__(self, rules: Sequence[tuple[str, str] | tuple[str, str, bool]]):
        self.rules: list[tuple[str, str, bool]] = []
        for rule in rules:
            match rule:
                case (str(pattern), str(replacement)):
                    self.rules.append((pattern, replacement, False))
                case (str(pattern), str(replacement), bool(stop)):
                    self.rules.append((pattern, replacement, stop))
                case _:
                    raise ValueError(f"a rule is (pattern, replacement[, stop]), got {rule!r}")

    def step(self, text: str) -> tuple[str, bool]:
        """One rewriting step: the new text, and whether the run ends with it."""
        for pattern, replacement, stop in self.rules:
            if pattern in text:
                return rewrite(pattern, replacement, text), stop
        return text, True

    def run(self, text: str, max_steps: int = 10_000) -> str:
        """Runs to the end. Raises RuntimeError if ``max_steps`` rewriting steps are not enough."""
        for _ in range(max_steps):
            text, ended = self.step(text)
            if ended:
                return text
        if any(pattern in text for pattern, _, _ in self.rules):
            raise RuntimeError(f"did not end after {max_steps} steps; the text is {len(text)} characters long")
        return text


def occurrences(pattern: jax.Array, pattern_length: jax.Array, text: jax.Array, text_length: jax.Array) -> jax.Array:
    """Where ``pattern`` occurs in ``text``, overlaps included.

    Args:
      pattern: [P] letters, of which the first ``pattern_length`` (int32 scalar) count.
      text: [T] letters, of which the first ``text_length`` (int32 scalar) count.

    Returns:
      bool [T + 1]: whether an occurrence starts here. (Position T only matters to the empty pattern.)
    """
    place_T = jnp.arange(text.shape[0] + 1)
    here_T = place_T + pattern_length <= text_length
    for offset in range(pattern.shape[0]):  # P shifted comparisons: no gather, and XLA fuses them into one pass
        shifted_T = jnp.pad(text[offset:], (0, min(offset, text.shape[0]) + 1))
        here_T &= (shifted_T == pattern[offset]) | (offset >= pattern_length)
    return here_T


def rewrite_letters(
    pattern: jax.Array,
    pattern_length: jax.Array,
    replacement: jax.Array,
    replacement_length: jax.Array,
    text: jax.Array,
    text_length: jax.Array,
    answer_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``rewrite`` on padded letter arrays with static shapes, for use under ``vmap``.

    Args:
      pattern, replacement, text: [P], [R], [T] integer letters; anything past each length is ignored.
      pattern_length, replacement_length, text_length: int32 scalars.
      answer_size: static length A of the returned array; T + R always suffices.

    Returns:
      answer [A] (zeros past its length), answer_length (int32), and the number of occurrences of the pattern
      (int32, overlaps included; 0 for a no-op).
    """
    found_T = occurrences(pattern, pattern_length, text, text_length)
    count = found_T.sum(dtype=jnp.int32)
    # A no-op is a rewriting step past the end of the text that inserts nothing.
    start = jnp.where(count > 0, jnp.argmax(found_T), text_length).astype(jnp.int32)
    inserted = jnp.where(count > 0, replacement_length, 0)
    removed = jnp.where(count > 0, pattern_length, 0)
    length = text_length - removed + inserted

    place_A = jnp.arange(answer_size)
    replacement = jnp.pad(replacement, (0, 1))  # so that indexing works if all replacements are empty
    kept_A = text.at[jnp.where(place_A < start, place_A, place_A - inserted + removed)].get(mode="fill", fill_value=0)
    new_A = replacement.at[place_A - start].get(mode="fill", fill_value=0)
    in_replacement_A = (place_A >= start) & (place_A < start + inserted)
    answer_A = jnp.where(in_replacement_A, new_A, kept_A)
    return jnp.where(place_A < length, answer_A, 0), length, count
