"""Encrypted rewriting (P1, arXiv 2402.10891, section 5): each rule is encrypted, and its key is in the prompt.

An example is a prompt and its answer, as text:

    Key: d                          the cipher: a becomes d, b becomes e, ...
    Rule: fvv -> duw                decrypted: iss -> art
    Input: mississippi
    Answer: martissippi

Input and answer are plain: the model has to decrypt the rule, then follow it. Our choices, where the paper is silent:
the prompt and the ciphers; keys are drawn per example from a fixed list, the same in training and tests; a rule counts
as unseen if neither its plain pattern nor its plain replacement was trained on; which half is dropped.

Rules, inputs, the share of no-ops and the held-out split are those of from-scratch rewriting (``tasks/strings``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from instrdiv.data.schemas import TextRow
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import at_least, check_fields, field, positive, size
from instrdiv.runtime.streams import ENCRYPTED_STREAM, stream_key
from instrdiv.tasks.counts import rule_counts
from instrdiv.tasks.instructions import take
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.examples import make_input
from instrdiv.tasks.strings.markov import rewrite
from instrdiv.tasks.strings.rewriting import Rewriting
from instrdiv.tasks.strings.rules import Rules, RuleTable

#: ``shift``: the key shifts every letter by the same number of positions (Caesar); ``substitution``: a permutation.
CIPHERS = ("shift", "substitution")
#: What is kept of the training set: all of it; half of each rule's examples; half of all examples, where some rules
#: keep all of theirs and others lose nearly all, or all.
KEPT = ("all", "half_even", "half_uneven")
#: Splits: trained rules, held-out rules for tuning, held-out rules for final tests. Inputs and keys are fresh in all.
ENCRYPTED_SPLITS = ("seen", "unseen_dev", "unseen")
#: Words of the prompt that are single tokens in a tokenizer of single letters.
PROMPT_WORDS = ("Key:", "\nRule:", " ->", "\nInput:", "\nAnswer:")


@dataclasses.dataclass(frozen=True)
class EncryptedSetting:
    """What one member is trained on. The fields are flags, ``--config.<field>``."""

    instructions: int = field(1000, "number of different training rules I", bound=at_least(1))
    kept: str = field("all", "what is kept of the training set", KEPT)
    examples: int = field(40_000, "size of the training set, before any of it is dropped", bound=size)
    uneven_shape: float = field(0.1, "half_uneven: power-law shape of the shares that the rules keep", bound=positive)
    no_op_fraction: float = field(0.4, "probability that an example's input lacks the pattern")
    cipher: str = field("shift", "how rules are encrypted", CIPHERS)
    keys: int = field(25, "number of different keys")
    alphabet_size: int = field(26, "number of letters")
    pattern_length: int = field(3, "length of patterns and replacements")
    input_length: int = field(12, "length of inputs")
    separator: str = field("space", "separator between letters: a space makes each letter a token", ("space", "none"))
    held_out_share: float = field(0.2, "share of all strings that is reserved for held-out rules")
    split_seed: int = field(0, "seed that selects those strings and which held-out rules are tested")

    @property
    def plain(self) -> Rewriting:
        """The same task without encryption, as trained from scratch."""
        names = ("no_op_fraction", "alphabet_size", "pattern_length", "input_length", "held_out_share", "split_seed")
        return Rewriting(**{name: getattr(self, name) for name in names})

    def validate(self) -> None:
        """Raises BadInput, naming the flag."""
        check_fields(self)
        check_fields(self.plain)
        self.plain.check_task()
        if self.instructions > self.examples:
            raise BadInput(f"--config.instructions={self.instructions}: must not exceed "
                           f"--config.examples={self.examples}")  # fmt: skip
        most = self.alphabet_size - 1 if self.cipher == "shift" else math.factorial(self.alphabet_size) - 1
        if not 1 <= self.keys <= most:
            raise BadInput(f"--config.keys={self.keys}: must be from 1 to {most}, the number of keys of the cipher")
        if self.kept != "all" and 2 * self.instructions > self.examples:
            raise BadInput(f"--config.kept={self.kept}: needs two examples per rule, "
                           f"{2 * self.instructions} in all; raise --config.examples={self.examples}")  # fmt: skip

    @functools.cached_property
    def cipher_alphabets(self) -> np.ndarray:
        """What each letter becomes, uint8 [keys, alphabet_size]; all keys differ, and none is the plain alphabet."""
        letters = np.arange(self.alphabet_size)
        if self.cipher == "shift":
            return ((letters + 1 + np.arange(self.keys)[:, None]) % self.alphabet_size).astype(np.uint8)
        found: dict[bytes, None] = {letters.astype(np.uint8).tobytes(): None}
        for stream in range(100 * self.keys):
            words = np.random.Philox(key=np.array([stream, 0x6B657973], np.uint64)).random_raw(self.alphabet_size)
            found.setdefault(np.argsort(words, kind="stable").astype(np.uint8).tobytes())
            if len(found) > self.keys:
                break
        else:
            raise BadInput(f"--config.keys={self.keys}: too few different keys were found; lower it")
        return np.frombuffer(b"".join(list(found)[1:]), np.uint8).reshape(self.keys, -1)

    def rule_counts(self) -> np.ndarray:
        """How many examples each rule has after dropping, int32 [I]."""
        counts = rule_counts(self.instructions, self.examples)
        if self.kept == "all":
            return counts
        half = self.examples // 2
        if self.kept == "half_even":
            return rule_counts(self.instructions, half)
        return _capped_counts(self.instructions, counts, half, self.uneven_shape)

    def as_row(self) -> dict[str, Any]:
        """Flat values for tables."""
        return dataclasses.asdict(self)


def _capped_counts(instructions: int, most: np.ndarray, total: int, shape: float) -> np.ndarray:
    """Power-law counts (``rule_counts``) capped at the ``most`` examples of each rule: int32 [I], summing to ``total``.

    The excess goes to the other rules, by the same law.
    """
    # The law's weights do not depend on the total: a large one gives them at full precision.
    weights = rule_counts(instructions, 2**31 - 1, shape).astype(np.float64) + 1e-3
    low, high = 0.0, float(most.max() / weights.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(most, middle * weights).sum() < total else (low, middle)
    exact = np.minimum(most, high * weights)
    counts = np.floor(exact + 1e-6).astype(np.int64)
    order = np.argsort(-np.round(np.where(counts < most, exact - counts, -1), 6), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts.astype(np.int32)


def training_rows(setting: EncryptedSetting, seed: int) -> list[TextRow]:
    """The training set of one member, as text; the same on every machine.

    With the same seed, fewer rules are a prefix of more rules, and ``kept`` selects from the examples of the whole set.
    """
    rules = take(setting.plain.source, setting.instructions, seed)
    first = np.concatenate([[0], np.cumsum(rule_counts(setting.instructions, setting.examples))[:-1]])
    counts = setting.rule_counts()
    of_rule = np.repeat(np.arange(setting.instructions), counts)
    place = np.arange(len(of_rule)) - np.repeat(np.cumsum(counts) - counts, counts)
    return _rows(setting, rules[of_rule], seed, first[of_rule] + place, "training")


def rows_of_split(setting: EncryptedSetting, split: str, tests: int, dev_tests: int, seed: int) -> list[TextRow]:
    """Tests of a split: ``tests`` of them (``dev_tests`` for unseen_dev), one per rule if there are enough rules.

    The unseen splits are the same for all members of a task; ``seen`` cycles through the rules trained with ``seed``.
    """
    source = setting.plain.source
    if split == "seen":
        rules = take(source, setting.instructions, seed)
        rules = rules[np.resize(np.flatnonzero(setting.rule_counts()), tests)]
    else:
        held_out = take(source, dev_tests + tests, None)
        rules = held_out[:dev_tests] if split == "unseen_dev" else held_out[dev_tests:]
    stream = 2**30 + len(ENCRYPTED_SPLITS) * setting.split_seed + ENCRYPTED_SPLITS.index(split)
    return _rows(setting, rules, stream, np.arange(len(rules)), split)


def plain_rows(setting: EncryptedSetting, seed: int, count: int) -> list[TextRow]:
    """Training examples of plain rewriting, evenly over the rules, to pretrain a small base model on."""
    rules = take(setting.plain.source, setting.instructions, seed)
    of_rule = np.arange(count) % setting.instructions
    return _rows(setting, rules[of_rule], seed, np.arange(count), "plain", encrypted=False)


def plain_test_rows(setting: EncryptedSetting, tests: int, dev_tests: int) -> list[TextRow]:
    """The ``unseen`` tests, with plain rules."""
    rules = take(setting.plain.source, dev_tests + tests, None)[dev_tests:]
    stream = 2**30 + len(ENCRYPTED_SPLITS) * setting.split_seed + ENCRYPTED_SPLITS.index("unseen")
    return _rows(setting, rules, stream, np.arange(tests), "plain", encrypted=False)


def is_no_op(row: TextRow) -> bool:
    """Whether the pattern does not occur in the input, so that the answer is the input."""
    return row.instruction.split("Input:")[1].removesuffix("\nAnswer:").strip() == row.response.strip()


def _rows(
    setting: EncryptedSetting, rules: RuleTable, seed: int, index: np.ndarray, source: str, encrypted: bool = True
) -> list[TextRow]:
    """Example ``index`` [N] of a stream for each of N rules."""
    plain = setting.plain
    keys, texts = _draw(plain.shape, plain.knobs(), rules.arrays(), np.uint32(seed), index.astype(np.uint32))
    keys, texts = (np.asarray(keys) % setting.keys), np.asarray(texts)
    alphabet = Alphabet(setting.alphabet_size)
    between = " " if setting.separator == "space" else ""

    def spelled(letters: Sequence[int] | np.ndarray) -> str:
        return between + between.join(alphabet.decode(letters))

    rows = []
    for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
        pattern, replacement = rules.patterns[i], rules.replacements[i]
        answer = rewrite(alphabet.decode(pattern), alphabet.decode(replacement), alphabet.decode(text))
        shown = ""
        if encrypted:
            becomes = setting.cipher_alphabets[key]
            pattern, replacement = becomes[pattern], becomes[replacement]
            shown = f"Key:{spelled(becomes[:1] if setting.cipher == 'shift' else becomes)}\n"
        prompt = f"{shown}Rule:{spelled(pattern)} ->{spelled(replacement)}\nInput:{spelled(text)}\nAnswer:"
        rows.append(TextRow(prompt, between + between.join(answer), source, f"{source} example {index[i]}"))
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _draw(shape: Any, knobs: Any, rules: Rules, seed: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A random word and an input int32 [input] for each rule."""

    def one(rule, i):
        key = jax.random.fold_in(stream_key(ENCRYPTED_STREAM, seed), i)
        word = jax.random.bits(jax.random.fold_in(key, 2), (), "uint32")
        return word, make_input(shape, knobs, rule, key)[0]

    return jax.vmap(one)(rules, index)
