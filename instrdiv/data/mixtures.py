"""Mixtures: an exact number of rows from every source, the same on every machine, and nested.

A mixture is the first ``budget`` positions of one endless sequence that assigns each position to a source; each source
fills its positions in its own order. A larger budget therefore starts with the smaller one, and the rows chosen from a
source always extend a smaller selection from it, regardless of the other sources.

The sequence is Balinski and Young's quota method [our choice; the papers give round numbers]. At every budget, each
source gets its exact share rounded down or up, and whole shares are met exactly. The method of largest remainders
rounds the same way, but can take a row from a source as the budget grows (the Alabama paradox), so it does not nest. No
method also guarantees that a larger share never yields fewer rows (their impossibility theorem); here it can yield one
row fewer.

The order within a source is by a keyed hash of the rows' texts: it depends on the seed and the texts, but not on their
position in a file, on other sources, or on a random generator that may change.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from instrdiv.runtime.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How many rows are drawn from which sources.

    Attributes:
      shares: source -> its share, in (0, 1]; the shares sum to 1.
      budget: total number of rows.
    """

    shares: Mapping[str, Fraction]
    budget: int

    @classmethod
    def parse(cls, shares: str, budget: int | None = None, flag: str = "--shares") -> Mixture:
        """Parses ``oss=0.75,alpaca=0.15,cot=0.1`` with a budget, or ``oss=15000,alpaca=3000,cot=2000`` without one.

        Shares are parsed as exact decimals or fractions (``1/3``). Raises BadInput, naming the flag, if they are
        not a valid mixture.
        """
        flag = f"{flag}={shares}"
        given: dict[str, Fraction] = {}
        for part in shares.split(","):
            name, _, text = (piece.strip() for piece in part.partition("="))
            try:
                share = Fraction(text)
            except (ValueError, ZeroDivisionError):
                raise BadInput(f"{flag}: {part.strip()!r} is not SOURCE=NUMBER") from None
            if not name or share <= 0:
                raise BadInput(f"{flag}: {part.strip()!r} must name a source and an amount of more than 0")
            if name in given:
                raise BadInput(f"{flag}: names {name} twice")
            given[name] = share
        total = sum(given.values(), Fraction(0))
        if budget is None:
            if any(share.denominator > 1 for share in given.values()):
                raise BadInput(f"{flag}: without --budget, these are row counts and must be whole numbers")
            return cls({name: count / total for name, count in given.items()}, int(total))
        if total != 1:
            raise BadInput(f"{flag}: with --budget, these are shares and must sum to 1; they sum to {float(total):g}")
        return cls(given, budget)

    def places(self) -> np.ndarray:
        """int32 [budget]: the source (in the order of ``shares``) of each position of the sequence."""
        period = int(np.lcm.reduce(np.array([share.denominator for share in self.shares.values()], object)))
        weights = [int(share * period) for share in self.shares.values()]
        taken = [0] * len(weights)
        sequence = []
        for size in range(1, min(period, self.budget) + 1):
            # Of the sources below their rounded-up share of `size` rows, take the one with the largest weight per row.
            first, *others = (i for i, weight in enumerate(weights) if taken[i] * period < weight * size)
            for i in others:
                if weights[i] * (taken[first] + 1) > weights[first] * (taken[i] + 1):
                    first = i
            taken[first] += 1
            sequence.append(first)
        return np.resize(np.array(sequence, np.int32), self.budget)  # the sequence is periodic

    def counts(self) -> dict[str, int]:
        """Rows of each source; they sum to the budget."""
        counts = np.bincount(self.places(), minlength=len(self.shares))
        return dict(zip(self.shares, counts.tolist(), strict=True))

    def choose(self, texts: Mapping[str, Sequence[str]], seed: int) -> list[tuple[str, int]]:
        """(source, row number) for every position of the mixture.

        Args:
          texts: source -> the full text of each of its rows.
          seed: seed of the orders of the sources.

        Raises:
          BadInput: if a source is missing or has too few rows.
        """
        for name, asked in self.counts().items():
            if name not in texts:
                raise BadInput(f"--shares: there is no source {name}; --data has {', '.join(texts)}")
            if asked > len(texts[name]):
                has = f"{len(texts[name]):,} usable rows"
                raise BadInput(f"--shares: needs {asked:,} rows from {name}, which has {has}")
        orders = [iter(shuffled(texts[name], seed).tolist()) for name in self.shares]
        names = list(self.shares)
        return [(names[place], next(orders[place])) for place in self.places().tolist()]


def shuffled(texts: Sequence[str], seed: int) -> np.ndarray:
    """int64 [N]: a random order of the texts, by a keyed hash; equal texts are hashed with their occurrence number.

    Adding or removing a text does not change the relative order of the others.
    """
    key, seen = seed.to_bytes(8, "little"), Counter[str]()
    digests = bytearray()
    for text in texts:
        salt = seen[text].to_bytes(8, "little")
        seen[text] += 1
        digests += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key, salt=salt).digest()
    return np.argsort(np.frombuffer(bytes(digests), "<u8"), kind="stable")
