"""Tokens that all tasks share, and how the parts of an example become one row of tokens.

A row is ``part # part # ... # answer $``: each part of the prompt ends with a separator, the answer with an end token.
The prompt is right-aligned, so that the answer starts at the same position in every row.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

#: Padding, the separator after a part of the prompt, and the end of the answer; a task's own tokens follow.
PAD, SEPARATOR, END = 0, 1, 2
FIRST_TOKEN = 3
#: How these three are shown.
SPECIAL = "_#$"


def prompt_tokens(
    parts: Sequence[jax.Array], lengths: Sequence[jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """The prompt of one example as tokens int32 [P], and the number of padding tokens before it (int32).

    Args:
      parts: integers [L_i], counted from 0: a task's token t is ``FIRST_TOKEN + t``. P = sum of (L_i + 1).
      lengths: of the parts, int32 scalars; anything past them is dropped, and the prompt is padded on the left. None
        if all parts have their full length.
    """
    sizes = [part.shape[0] for part in parts]
    source = jnp.concatenate(list(parts), dtype=jnp.int32) + FIRST_TOKEN
    if lengths is None:
        pieces = jnp.split(source, np.cumsum(sizes)[:-1].tolist())
        separator = jnp.full((1,), SEPARATOR, jnp.int32)
        return jnp.concatenate([piece for part in pieces for piece in (part, separator)]), jnp.int32(0)
    width = sum(sizes) + len(sizes)
    padding = jnp.int32(width) - (sum(lengths) + len(sizes))
    place = jnp.arange(width)
    prompt = jnp.full(width, PAD, jnp.int32)
    begin, first = padding, 0
    for size, length in zip(sizes, lengths, strict=True):
        letters = source.at[first + jnp.clip(place - begin, 0, size - 1)].get(mode="clip")
        prompt = jnp.where((place >= begin) & (place < begin + length), letters, prompt)
        prompt = jnp.where(place == begin + length, SEPARATOR, prompt)
        begin, first = begin + length + 1, first + size
    return prompt, padding


def answer_tokens(answer: jax.Array, length: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """An answer as tokens [A + 1] with its end token and padding, and its loss mask bool [A + 1].

    ``answer``: integers [A], counted from 0 as in ``prompt_tokens``, of which the first ``length`` are used.
    """
    place = jnp.arange(answer.shape[0] + 1)
    tokens = jnp.pad(answer + FIRST_TOKEN, (0, 1))
    tokens = jnp.where(place == length, END, jnp.where(place < length, tokens, PAD))
    return tokens, place <= length


def before_end(tokens: np.ndarray) -> np.ndarray:
    """The tokens before the first end token; all of them if there is none."""
    ends = np.flatnonzero(tokens == END)
    return tokens[: ends[0]] if len(ends) else tokens


def compare_answers(right: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For right and decoded answers, tokens [N, A + 1]: both lengths, int [N], and whether they agree, bool [N].

    An answer ends before its first end token, or never; anything past the end of the right one is ignored.
    """
    right_length, decoded_length = (
        np.logical_and.accumulate(tokens != END, axis=1).sum(1) for tokens in (right, decoded)
    )
    beyond = np.arange(right.shape[1]) > right_length[:, None]
    return right_length, decoded_length, ((right == decoded) | beyond).all(1)


def blank_instruction(prompt: jax.Array) -> jax.Array:
    """A prompt [P] with everything before its last part, the input, replaced by padding; separators stay."""
    separators_left = (prompt == SEPARATOR)[::-1].cumsum()[::-1]
    return jnp.where((separators_left >= 2) & (prompt >= FIRST_TOKEN), PAD, prompt)
