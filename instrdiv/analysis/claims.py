"""Claims of the papers about a figure: whether a results table supports them, and the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from instrdiv.runtime.tables import (
    read_table,
    write_table,
)

#: Columns of claims.csv: the papers' claims about a figure, and whether its table supports them.
CLAIM_COLUMNS = ("claim", "holds", "evidence")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a paper, and whether our table supports it."""

    text: str
    holds: bool
    evidence: str


def verdict(claims: Sequence[Claim]) -> str:
    """``reproduced`` if every claim holds, ``not reproduced`` otherwise."""
    return "reproduced" if claims and all(claim.holds for claim in claims) else "not reproduced"


def write_claims(path: Path, claims: Sequence[Claim] | None) -> None:
    """Writes claims as a table; None (not judged) removes an existing table."""
    if claims is None:
        path.unlink(missing_ok=True)
    else:
        rows = ({"claim": c.text, "holds": int(c.holds), "evidence": c.evidence} for c in claims)
        write_table(path, rows, CLAIM_COLUMNS)


def read_claims(path: Path) -> list[Claim] | None:
    """The claims of a run; None if it was not judged."""
    if not path.exists():
        return None
    rows = read_table(path, CLAIM_COLUMNS, text=("claim", "evidence"))
    return [Claim(row["claim"], bool(row["holds"]), row["evidence"]) for row in rows]
