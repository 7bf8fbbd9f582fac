"""Mixtures: so many rows of every source, exact to the row, the same on every machine, and nested.

A mixture is the first ``budget`` places of one endless sequence that says which source each place belongs to; the
sources fill their places in an order of their own. So a larger budget contains a smaller one as its beginning, and more
rows of a source contain fewer, whatever the other sources do.

The sequence is Balinski and Young's quota method [our choice; the papers give round numbers]. At every budget each
source has its share of it rounded down or up, and a share that comes out even is met exactly. Largest remainders round
as well, but can take a row from a source as the budget grows (the Alabama paradox), and would not nest. No method also
guarantees that a larger share never brings a row less (their impossibility theorem): within one row, it may.

The order of a source is by a keyed hash of the rows' texts: it depends on the seed and on what the rows say, not on
their place in a file, on other sources, or on a generator that may change.
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
    """How many rows, and of which sources.

    Attributes:
      shares: source -> its share, in (0, 1]; they sum to 1.
      budget: rows in all.
    """

    shares: Mapping[str, Fraction]
    budget: int

    @classmethod
    def parse(cls, shares: str, budget: int | None = None, flag: str = "--shares") -> Mixture:
        """From flags: ``oss=0.75,alpaca=0.15,cot=0.1`` and a budget, or ``oss=15000,alpaca=3000,cot=2000`` and none.

        Shares are read as exact decimals or fractions (``1/3``). Raises BadInput, naming the flag, where they make no
        mixture.
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
                raise BadInput(f"{flag}: {part.strip()!r} must name a source, and more than 0 of it")
            if name in given:
                raise BadInput(f"{flag}: names {name} twice")
            given[name] = share
        total = sum(given.values(), Fraction(0))
        if budget is None:
            if any(share.denominator > 1 for share in given.values()):
                raise BadInput(f"{flag}: without --budget these are numbers of rows, and must be whole")
            return cls({name: count / total for name, count in given.items()}, int(total))
        if total != 1:
            raise BadInput(f"{flag}: with --budget these are shares, and must sum to 1; they sum to {float(total):g}")
        return cls(given, budget)

    def places(self) -> np.ndarray:
        """int32 [budget]: which source (in the order of ``shares``) each place of the sequence belongs to."""
        period = int(np.lcm.reduce(np.array([share.denominator for share in self.shares.values()], object)))
        weights = [int(share * period) for share in self.shares.values()]
        taken = [0] * len(weights)
        sequence = []
        for size in range(1, min(period, self.budget) + 1):
            # Who is below its share of `size` rows, rounded up? Of these, the one with the largest weight a row.
            first, *others = (i for i, weight in enumerate(weights) if taken[i] * period < weight * size)
            for i in others:
                if weights[i] * (taken[first] + 1) > weights[first] * (taken[i] + 1):
                    first = i
            taken[first] += 1
            sequence.append(first)
        return np.resize(np.array(sequence, np.int32), self.budget)  # it repeats after a period

    def counts(self) -> dict[str, int]:
        """Rows of each source; they sum to the budget."""
        counts = np.bincount(self.places(), minlength=len(self.shares))
        return dict(zip(self.shares, counts.tolist(), strict=True))

    def choose(self, texts: Mapping[str, Sequence[str]], seed: int) -> list[tuple[str, int]]:
        """(source, number of the row) for every place of the mixture.

        Args:
          texts: source -> what each of its rows says, from the first to the last letter.
          seed: of the orders of the sources.

        Raises:
          BadInput: if a source is not there, or has fewer rows than are asked of it.
        """
        for name, asked in self.counts().items():
            if name not in texts:
                raise BadInput(f"--shares: there is no source {name}; --data has {', '.join(texts)}")
            if asked > len(texts[name]):
                has = f"{len(texts[name]):,} that may be used"
                raise BadInput(f"--shares: {asked:,} rows are asked of {name}, which has {has}")
        orders = [iter(shuffled(texts[name], seed).tolist()) for name in self.shares]
        names = list(self.shares)
        return [(names[place], next(orders[place])) for place in self.places().tolist()]


def shuffled(texts: Sequence[str], seed: int) -> np.ndarray:
    """int64 [N]: a random order of the texts, by a keyed hash of each; of equal ones, the first, second ... differ.

    A text that is added or taken away leaves the order of the others as it is.
    """
    key, seen = seed.to_bytes(8, "little"), Counter[str]()
    digests = bytearray()
    for text in texts:
        salt = seen[text].to_bytes(8, "little")
        seen[text] += 1
        digests += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key, salt=salt).digest()
    return np.argsort(np.frombuffer(bytes(digests), "<u8"), kind="stable")
