"""Examples as a pure function on the device: (shape, knobs, rule, key) -> tokens.

Nothing is stored: example i of a data set is recomputed whenever it is visited. Each is exactly one of three kinds:

- *has-op*: the pattern is planted `occurrences` times at random, non-overlapping positions in uniformly random letters;
- *no-op*: uniformly random letters, redrawn until the pattern is absent;
- *near miss*, a no-op: like has-op, but with one letter of the planted pattern changed; redrawn likewise.

Chance occurrences stay: the answer is found by search, so it always rewrites the leftmost occurrence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.markov import occurrences, rewrite_letters
from instrdiv.tasks.strings.rules import Rules
from instrdiv.tasks.task import Example
from instrdiv.tasks.tokens import answer_tokens, prompt_tokens


@dataclasses.dataclass(frozen=True)
class TaskShape:
    """The static sizes of a task, which determine all array shapes.

    Attributes:
      alphabet_size: number of letters.
      pattern, replacement, input: longest lengths.
      answer: longest answer, without its end token.
      planted: maximum number of occurrences planted in one input.
      ragged: some sequences are shorter than the longest, so rows are padded on the left.
    """

    alphabet_size: int
    pattern: int
    replacement: int
    input: int
    answer: int
    planted: int
    ragged: bool

    @property
    def vocabulary(self) -> int:
        return Alphabet(self.alphabet_size).vocabulary_size

    @property
    def instruction_bytes(self) -> int:
        return self.pattern + self.replacement + 8

    @property
    def prompt(self) -> int:
        """Number of tokens before the answer, separators included. The answer starts at this position in every row."""
        return self.pattern + self.replacement + self.input + 3

    @property
    def sequence(self) -> int:
        """Number of tokens in a whole row, T: prompt, answer, end."""
        return self.prompt + self.answer + 1


def common_shape(shapes: Sequence[TaskShape]) -> TaskShape:
    """The smallest shape that fits tasks of all these shapes (with one alphabet)."""
    largest = {
        name: max(getattr(shape, name) for shape in shapes)
        for name in ("pattern", "replacement", "input", "answer", "planted")
    }
    prompts = {(shape.pattern, shape.replacement, shape.input) for shape in shapes}
    ragged = len(prompts) > 1 or any(shape.ragged for shape in shapes)
    return TaskShape(shapes[0].alphabet_size, **largest, ragged=ragged)


@struct.dataclass
class Knobs:
    """The traced sampling settings, scalars except ``occurrences``; a population stacks them.

    Attributes:
      no_op_fraction: probability that an example is a no-op (float32).
      near_miss_fraction: probability that a no-op is a near miss (float32).
      occurrences: int32 [C]; the number of planted patterns is drawn uniformly from the first ``choices`` entries.
      choices: int32.
      input_length_min, input_length_max: input lengths are uniform between them (int32).
    """

    no_op_fraction: jax.Array
    near_miss_fraction: jax.Array
    occurrences: jax.Array
    choices: jax.Array
    input_length_min: jax.Array
    input_length_max: jax.Array


@struct.dataclass
class Facts:
    """What is known about an example (scalars; a batch has a leading axis).

    Attributes:
      occurrences: int32, how often the pattern actually occurs in the input, overlaps included; 0 for a no-op.
      near_miss: bool, a no-op that contains the pattern except for one letter.
    """

    occurrences: jax.Array
    near_miss: jax.Array


def spell(shape: TaskShape, rule: Rules, text: jax.Array, length: jax.Array, near_miss: jax.Array) -> Example:
    """The example of a rule and an input (see ``make_input``): prompt, answer, and the facts about them."""
    answer, answer_length, found = rewrite_letters(
        rule.patterns,
        rule.pattern_lengths,
        rule.replacements,
        rule.replacement_lengths,
        text,
        length,
        answer_size=shape.answer,
    )
    lengths = (rule.pattern_lengths, rule.replacement_lengths, length) if shape.ragged else None
    prompt, padding = prompt_tokens((rule.patterns, rule.replacements, text), lengths)
    right, loss_mask = answer_tokens(answer, answer_length)
    return Example(
        tokens=jnp.concatenate([prompt, right]).astype(jnp.int32),
        padding=padding,
        loss_mask=loss_mask,
        facts=Facts(found, near_miss),
    )


def make_input(shape: TaskShape, knobs: Knobs, rule: Rules, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The letters of a rule's input int32 [input], its length, and whether it is a near miss."""
    pattern = rule.patterns.astype(jnp.int32)
    pattern_length = rule.pattern_lengths
    choice_key, draw_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    words = jax.random.bits(choice_key, (4,), jnp.uint32)
    no_op = _unit(words[0]) < knobs.no_op_fraction
    near_miss = no_op & (_unit(words[1]) < knobs.near_miss_fraction)
    span = knobs.input_length_max - knobs.input_length_min + 1
    length = knobs.input_length_min + _below(words[2], span)
    planted = knobs.occurrences[_below(words[3], knobs.choices)]
    planted = jnp.where(no_op & ~near_miss, 0, planted)

    def draw(attempt):
        """A candidate input; only inputs that must lack the pattern ever need more than the first attempt."""
        bits = jax.random.bits(jax.random.fold_in(draw_key, attempt), (2 * shape.input + 2,), jnp.uint32)
        letters = _below(bits[: shape.input], shape.alphabet_size)
        # A near miss: one letter of the pattern becomes another one.
        changed = _below(bits[-1], pattern_length)
        other = (pattern + 1 + _below(bits[-2], shape.alphabet_size - 1)) % shape.alphabet_size
        word = jnp.where(near_miss & (jnp.arange(shape.pattern) == changed), other, pattern)
        starts = _places(bits[shape.input : 2 * shape.input], planted, pattern_length, length, shape.planted)
        # The last start at or before each position determines which letter of the word, if any, goes there.
        place_T = jnp.arange(shape.input)
        start_T = jnp.where(starts[None, :] <= place_T[:, None], starts[None, :], -shape.input - 1).max(1)
        offset_T = place_T - start_T
        return jnp.where(offset_T < pattern_length, word.at[offset_T].get(mode="clip"), letters)

    def must_redraw(state):
        _, text = state
        return no_op & occurrences(pattern, pattern_length, text, length).any()

    def redraw(state):
        attempt, _ = state
        return attempt + 1, draw(attempt)

    _, text = jax.lax.while_loop(must_redraw, redraw, (jnp.uint32(1), draw(jnp.uint32(0))))
    return text, length, near_miss


def _places(bits: jax.Array, count: jax.Array, size: jax.Array, length: jax.Array, most: int) -> jax.Array:
    """Starts of ``count`` non-overlapping words of length ``size``, uniform over all such arrangements.

    Arrangements correspond to ``count``-subsets of ``length - count * (size - 1)`` slots: sort the chosen slots, then
    let each word shift the later ones by ``size - 1`` positions. Unused entries of the result (int32 [most]) lie past
    the text.
    """
    slots = length - count * (size - 1)
    scores = jnp.where(jnp.arange(bits.shape[0]) < slots, (bits >> 1).astype(jnp.int32), -1)
    _, chosen = jax.lax.top_k(scores, most)
    rank = jnp.arange(most)
    beyond = bits.shape[0]
    return jnp.sort(jnp.where(rank < count, chosen, beyond)) + rank * (size - 1)


def _below(bits: jax.Array, bound) -> jax.Array:
    """Uniform integers in [0, bound), int32: the high half of the product of 32 random bits and bound < 2^16."""
    bound = jnp.asarray(bound).astype(jnp.uint32)
    product = (bits >> 16) * bound + (((bits & 0xFFFF) * bound) >> 16)
    return (product >> 16).astype(jnp.int32)


def _unit(bits: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
