"""Rule tables, built exactly on the host: which rules are trained on, and which are held out.

**Held out by construction.** A fixed hash of its letters assigns every string (or, for the loosest split, every rule)
to one side, *training* or *held out*. Training and held-out rules are drawn from opposite sides, so they never overlap,
whatever the seed, the family or the number of rules.

**One nested pool per seed.** A pool is a prefix of an endless stream of distinct rules that depends only on the seed:
a member with I instructions takes the first I, so the pool for a small I is a subset of the pool for a large one.

All randomness comes from raw Philox words (a counter-based generator whose output numpy guarantees), so tables are the
same on every machine and with every numpy version; ``RuleTable.digest`` checks this.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import ClassVar

import jax
import numpy as np
from flax import struct

from instrdiv.tasks.instructions import Instructions, TooFew, as_opaque
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.families import FAMILIES, orders

#: Which part of a held-out rule is never trained on, strictest first.
HELD_OUT_PARTS = ("pattern_and_replacement", "pattern", "replacement", "rule")

_NO_LETTER = 255  # padding after a string shorter than its column
_BLOCK = 1 << 14  # strings drawn at a time; part of the definition of a pool
_ENUMERATE_BELOW = 1 << 18  # families of up to this many strings are counted exactly
_GIVE_UP_AFTER = 200  # consecutive blocks without a new rule


class FamilyTooSmall(TooFew):
    """A family, with its split, has fewer distinct rules than requested."""


@dataclasses.dataclass(frozen=True)
class StringFamily:
    """The strings that a pattern (or a replacement) is drawn from.

    A draw picks one of ``families``, then a length, then an order, each uniformly among those possible, then the free
    letters. Pattern and replacement are drawn independently [our choice: paper P2, arXiv 2410.04717, is silent].
    """

    alphabet_size: int
    families: tuple[str, ...]
    length_min: int
    length_max: int
    k_min: int = 1
    k_max: int = 1

    @functools.cached_property
    def components(self) -> list[list[tuple[int, list[int]]]]:
        """For each family, its (length, orders) with at least one order. Raises ValueError if a family has none."""
        table = []
        for family in self.families:
            lengths = range(self.length_min, self.length_max + 1)
            usable = [(n, ks) for n in lengths if (ks := orders(family, n, self.k_min, self.k_max))]
            if not usable:
                raise ValueError(
                    f"no order k in {self.k_min}..{self.k_max} divides a length in {self.length_min}..{self.length_max}"
                )
            table.append(usable)
        return table

    def sample(self, words: np.ndarray) -> np.ndarray:
        """Strings from random words, uint64 [N, 3 + length_max] -> uint8 [N, length_max], padded with 255."""
        strings = np.full((len(words), self.length_max), _NO_LETTER, np.uint8)
        family_N = words[:, 0] % len(self.families)
        for f, (family, usable) in enumerate(zip(self.families, self.components, strict=True)):
            length_N = words[:, 1] % len(usable)
            for j, (length, ks) in enumerate(usable):
                order_N = words[:, 2] % len(ks)
                for i, k in enumerate(ks):
                    rows = np.flatnonzero((family_N == f) & (length_N == j) & (order_N == i))
                    free = (words[rows, 3 : 3 + length // k] % self.alphabet_size).astype(np.uint8)
                    strings[rows, :length] = FAMILIES[family](free, k)
        return strings

    def enumerate(self) -> np.ndarray | None:
        """All distinct strings, uint8 [N, length_max], or None if there are too many to list."""
        parts = []
        for family, usable in zip(self.families, self.components, strict=True):
            for length, ks in usable:
                for k in ks:
                    if self.alphabet_size ** (length // k) > _ENUMERATE_BELOW:
                        return None
                    letters = length // k
                    free = (
                        np.indices((self.alphabet_size,) * letters, np.uint8).reshape(letters, -1).T
                        if letters
                        else (np.zeros((1, 0), np.uint8))
                    )
                    part = np.full((len(free), self.length_max), _NO_LETTER, np.uint8)
                    part[:, :length] = FAMILIES[family](free, k)
                    parts.append(part)
        return np.unique(np.concatenate(parts), axis=0)


@struct.dataclass
class Rules:
    """Rules on the device: letters [N, P] and [N, R] (uint8), lengths [N] (int32). One rule has no N axis."""

    patterns: jax.Array
    pattern_lengths: jax.Array
    replacements: jax.Array
    replacement_lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class RuleTable(Instructions):
    """N rules as padded letter arrays.

    Attributes:
      patterns, replacements: uint8 [N, P], [N, R] letters; 255 past the length.
      pattern_lengths, replacement_lengths: uint8 [N].
    """

    patterns: np.ndarray
    replacements: np.ndarray

    @property
    def pattern_lengths(self) -> np.ndarray:
        return (self.patterns != _NO_LETTER).sum(1).astype(np.uint8)

    @property
    def replacement_lengths(self) -> np.ndarray:
        return (self.replacements != _NO_LETTER).sum(1).astype(np.uint8)

    def keys(self) -> np.ndarray:
        return as_opaque(np.concatenate([self.patterns, self.replacements], axis=1))

    def arrays(self) -> Rules:
        return Rules(
            patterns=self.patterns,  # type: ignore[arg-type]
            pattern_lengths=self.pattern_lengths.astype(np.int32),  # type: ignore[arg-type]
            replacements=self.replacements,  # type: ignore[arg-type]
            replacement_lengths=self.replacement_lengths.astype(np.int32),  # type: ignore[arg-type]
        )

    def text(self, row: int, alphabet: Alphabet) -> tuple[str, str]:
        """Pattern and replacement of one rule as strings."""
        return (
            alphabet.decode(self.patterns[row, : self.pattern_lengths[row]]),
            alphabet.decode(self.replacements[row, : self.replacement_lengths[row]]),
        )


@dataclasses.dataclass(frozen=True)
class RuleSource:
    """Where rules come from: two string families and the split between training and held-out.

    Attributes:
      pattern, replacement: the families of the two strings.
      split: one of ``HELD_OUT_PARTS``. By default neither the pattern nor the replacement of a held-out rule is ever
        trained on, in either role; ``pattern`` and ``replacement`` hold out only that string, ``rule`` only the pair.
      held_out_share: share of all strings (for ``rule``: of all pairs) on the held-out side, in (0, 1).
      split_seed: selects the strings (or pairs) that are held out.
    """

    pattern: StringFamily
    replacement: StringFamily
    split: str = "pattern_and_replacement"
    held_out_share: float = 0.2
    split_seed: int = 0

    remedy: ClassVar[str] = "or use longer strings, more letters or a wider family"

    @property
    def flag(self) -> str:
        return f"--config.family={'+'.join(self.pattern.families)}"

    def none(self) -> RuleTable:
        return RuleTable(*(np.zeros((0, family.length_max), np.uint8) for family in (self.pattern, self.replacement)))

    def pool(self, seed: int, size: int) -> RuleTable:
        """The first ``size`` training rules of the seed's stream: distinct, and with pattern and replacement different.

        Raises FamilyTooSmall if there are fewer.
        """
        return self._take(size, seed, held_out=False)

    def held_out(self, size: int) -> RuleTable:
        """The first ``size`` held-out rules. They depend only on ``split_seed``: all members share them."""
        return self._take(size, self.split_seed, held_out=True)

    def tests(self, dev_tests: int, tests: int) -> tuple[RuleTable, RuleTable]:
        """Held-out rules to tune on, and others to test on."""
        rules = self.held_out(dev_tests + tests)
        return rules[:dev_tests], rules[dev_tests:]

    def capacity(self, held_out: bool) -> int | None:
        """How many distinct rules one side has; None if there are too many to count by listing."""
        sides = []
        for role, family in (("pattern", self.pattern), ("replacement", self.replacement)):
            strings = family.enumerate()
            sides.append(None if strings is None else strings[self._string_side(role, strings, held_out)])
        patterns, replacements = sides
        if any(side is not None and len(side) == 0 for side in sides):
            return 0
        if patterns is None or replacements is None:
            return None
        if self.split == "rule":
            if len(patterns) * len(replacements) > _ENUMERATE_BELOW:
                return None
            i, j = np.indices((len(patterns), len(replacements))).reshape(2, -1)
            pairs = RuleTable(patterns[i], replacements[j])
            return int((self._pair_side(pairs, held_out) & ~same_strings(pairs)).sum())
        width = max(patterns.shape[1], replacements.shape[1])
        same = len({p.tobytes() for p in _widen(patterns, width)} & {r.tobytes() for r in _widen(replacements, width)})
        return len(patterns) * len(replacements) - same

    def _string_side(self, role: str, strings: np.ndarray, held_out: bool) -> np.ndarray:
        """bool [N]: whether the string may play this role on this side."""
        if self.split not in (role, "pattern_and_replacement"):
            return np.ones(len(strings), bool)
        return (_hash(strings, self.split_seed) < self._boundary) == held_out

    def _pair_side(self, rules: RuleTable, held_out: bool) -> np.ndarray:
        """bool [N]: whether the pair is on this side; always true unless the split is by pairs."""
        if self.split != "rule":
            return np.ones(len(rules), bool)
        hashes = _hash(rules.replacements, self.split_seed, start=_hash(rules.patterns, self.split_seed))
        return (hashes < self._boundary) == held_out

    @property
    def _boundary(self) -> np.uint64:
        return np.uint64(int(self.held_out_share * 2.0**64))

    def _strings(self, role: str, family: StringFamily, seed: int, held_out: bool) -> Iterator[np.ndarray]:
        """An endless stream of strings that may play a role on a side, ``_BLOCK`` at a time, repetitions included."""
        columns = 3 + family.length_max
        waiting = np.zeros((0, family.length_max), np.uint8)
        for block in itertools.count():
            stream = (seed * 2 + held_out) * 2 + (role == "replacement")
            words = np.random.Philox(key=np.array([stream, block], np.uint64)).random_raw(_BLOCK * columns)
            # Philox words have 64 bits: the bias of `% alphabet` is below 1e-17.
            strings = family.sample(words.reshape(_BLOCK, columns))
            waiting = np.concatenate([waiting, strings[self._string_side(role, strings, held_out)]])
            while len(waiting) >= _BLOCK:
                yield waiting[:_BLOCK]
                waiting = waiting[_BLOCK:]

    def _take(self, size: int, seed: int, held_out: bool) -> RuleTable:
        """The first ``size`` distinct rules of a side's stream: pattern i with replacement i."""
        what = f"{size} {'held-out' if held_out else 'training'} rules were requested"
        capacity = self.capacity(held_out)
        if capacity is not None and capacity < size:
            raise FamilyTooSmall(f"{what}, but the family has only {capacity}")
        patterns = self._strings("pattern", self.pattern, seed, held_out)
        replacements = self._strings("replacement", self.replacement, seed, held_out)
        blocks: list[RuleTable] = []
        stale = 0
        while stale < _GIVE_UP_AFTER:
            rules = RuleTable(next(patterns), next(replacements))
            blocks.append(rules[self._pair_side(rules, held_out) & ~same_strings(rules)])
            if sum(map(len, blocks)) >= size:
                before = len(blocks[0])
                blocks = [_distinct(blocks)]
                if len(blocks[0]) >= size:
                    return blocks[0][:size]
                stale = 0 if len(blocks[0]) > before else stale + 1
        raise FamilyTooSmall(f"{what}, but only {len(blocks[0])} distinct ones were found")


def resemblance(trained: RuleTable, held_out: RuleTable, compared: int = 256) -> dict[str, float]:
    """How similar held-out rules are to trained ones.

    Args:
      trained: the rules of one member.
      held_out: held-out rules.
      compared: how many of them, counted from the first, are compared letter by letter with every trained rule.

    Returns:
      ``pattern_seen``, ``replacement_seen``, ``rule_seen``: share of the held-out rules whose pattern (replacement,
      pair) was trained on; ``{pattern,replacement,rule}_distance_{min,mean}``: Hamming distance to the nearest
      trained one, over ``compared`` held-out rules (a missing letter counts as a difference).
    """
    report: dict[str, float] = {"trained": len(trained), "held_out": len(held_out)}
    some = held_out[:compared]
    report["compared"] = len(some)
    views = {
        "pattern": (trained.patterns, held_out.patterns, some.patterns),
        "replacement": (trained.replacements, held_out.replacements, some.replacements),
        "rule": tuple(np.concatenate([t.patterns, t.replacements], 1) for t in (trained, held_out, some)),
    }
    for name, (ours, theirs, few) in views.items():
        report[f"{name}_seen"] = float(np.isin(as_opaque(theirs), as_opaque(ours)).mean())
        unique = np.unique(ours, axis=0)
        nearest = np.array([(unique != string).sum(1, dtype=np.int32).min() for string in few])
        report[f"{name}_distance_min"] = float(nearest.min())
        report[f"{name}_distance_mean"] = float(nearest.mean())
    return report


def seen_in(trained: np.ndarray, strings: np.ndarray) -> np.ndarray:
    """bool [N]: whether the string (a row of letters) is a row of ``trained``."""
    return np.isin(as_opaque(strings), as_opaque(trained))


def _hash(strings: np.ndarray, seed: int, start: np.ndarray | None = None) -> np.ndarray:
    """A 64-bit hash of each row, uint64 [N]; padding is ignored, so a string has the same hash in every table."""
    state = np.full(len(strings), seed, np.uint64) if start is None else start
    state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
    for column in strings.T:
        mixed = (state ^ (column.astype(np.uint64) + np.uint64(1))) * np.uint64(0xFF51AFD7ED558CCD)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xC4CEB9FE1A85EC53)
        state = np.where(column == _NO_LETTER, state, mixed ^ (mixed >> np.uint64(29)))
    return _mix(state)  # because the split uses the highest bits


def _mix(state: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, a bijection of uint64 that mixes well."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _widen(strings: np.ndarray, width: int) -> np.ndarray:
    extra = width - strings.shape[1]
    return np.pad(strings, ((0, 0), (0, extra)), constant_values=_NO_LETTER)


def same_strings(rules: RuleTable) -> np.ndarray:
    """bool [N]: whether pattern and replacement are the same string."""
    width = max(rules.patterns.shape[1], rules.replacements.shape[1])
    return (_widen(rules.patterns, width) == _widen(rules.replacements, width)).all(1)


def _distinct(blocks: list[RuleTable]) -> RuleTable:
    """The blocks concatenated, keeping the first of equal rules."""
    patterns = np.concatenate([block.patterns for block in blocks])
    replacements = np.concatenate([block.replacements for block in blocks])
    _, first = np.unique(as_opaque(np.concatenate([patterns, replacements], 1)), return_index=True)
    return RuleTable(patterns, replacements)[np.sort(first)]
