"""Claims: what the papers say of a figure, whether a table bears it out, and the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from instrdiv.runtime.tables import (
    read_table,
    write_table,
)

#: Columns of claims.csv: what the papers say of a figure, and whether its table bears that out.
CLAIM_COLUMNS = ("claim", "holds", "evidence")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing a paper says, and whether our table bears it out."""

    text: str
    holds: bool
    evidence: str


def verdict(claims: Sequence[Claim]) -> str:
    """``reproduced`` where every claim holds, ``not reproduced`` otherwise."""
    return "reproduced" if claims and all(claim.holds for claim in claims) else "not reproduced"


def write_claims(path: Path, claims: Sequence[Claim] | None) -> None:
    """Writes claims as a table; None, where there is nothing to judge, leaves none."""
    if claims is None:
        path.unlink(missing_ok=True)
    else:
        rows = ({"claim": c.text, "holds": int(c.holds), "evidence": c.evidence} for c in claims)
        write_table(path, rows, CLAIM_COLUMNS)


def read_claims(path: Path) -> list[Claim] | None:
    """The claims of a run; None where it was not judged."""
    if not path.exists():
        return None
    rows = read_table(path, CLAIM_COLUMNS, text=("claim", "evidence"))
    return [Claim(row["claim"], bool(row["holds"]), row["evidence"]) for row in rows]
