"""The fine-tuning tables: their columns, and how their rows are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from instrdiv.data.schemas import TextRow
from instrdiv.evaluation.answers import is_right
from instrdiv.evaluation.rows import tested_row
from instrdiv.runtime.tables import Row, Table
from instrdiv.training.recipe import AdapterMember

#: Columns of results.csv when answers are scored, before and after the columns of the members' settings.
IDENTITY = ("figure", "member", "seed", "step", "examples_seen", "split", "slice", "exact_match", "tests", "status")
INTERVAL = ("exact_match_low", "exact_match_high")
#: Columns of base.csv in that case: results of the base without an adapter.
BASE_COLUMNS = ("split", "slice", "exact_match", "tests")
#: Columns of samples.csv in that case: some of the answers.
ANSWER_COLUMNS = ("figure", "member", "seed", "step", "split", "prompt", "right_answer", "answer", "right")
#: Number of answers per member and split in samples.csv.
ANSWERS_KEPT = 20

#: Columns of results.csv when held-out losses are measured, before the columns of the members' settings: ``loss`` is
#: the mean over a source's response tokens, in nats; ``less_than_base`` is how much lower it is than the base's.
LOSS_IDENTITY = (
    *("figure", "member", "seed", "step", "examples_seen", "epochs", "source", "loss", "less_than_base", "tokens"),
    "status",
)
#: Columns of base.csv in that case; ``data`` changes whenever the held-out rows do.
BASE_LOSS_COLUMNS = ("source", "loss", "tokens", "data")


def with_settings(rows: Sequence[Row], identity: Sequence[str], interval: Sequence[str] = ()) -> Table:
    """Rows of results.csv as a table; all columns not in ``identity`` or ``interval`` are settings."""
    return Table((*identity, *settings_in(rows, identity, interval), *interval), rows)


def settings_in(rows: Sequence[Row], identity: Sequence[str], interval: Sequence[str] = ()) -> list[str]:
    """The columns of results.csv that are settings of the members."""
    return [name for name in rows[0] if name not in (*identity, *interval)]


def score(
    asked: Sequence[TextRow], given: Sequence[str], slices: Mapping[str, Callable[[TextRow], bool]]
) -> dict[str, tuple[int, int]]:
    """slice -> (number of right answers, number of tests); slices without tests are omitted.

    ``slices``: name -> predicate for whether a test belongs to it; the slice ``all``, with every test, is added.
    """
    right = np.array([is_right(text, answer) for text, answer in zip(asked, given, strict=True)])
    found = {"all": (int(right.sum()), len(right))}
    for name, holds in slices.items():
        of = np.array([holds(text) for text in asked])
        found[name] = (int(right[of].sum()), int(of.sum()))
    return {name: counts for name, counts in found.items() if counts[1]}


def answer_rows(
    figure: str, member: AdapterMember, step: int, batch_size: int, split: str,
    scores: Mapping[str, tuple[int, int]], status: str,
) -> list[Row]:  # fmt: skip
    """Rows of results.csv for one member and split."""
    seen = step * batch_size
    who = {"figure": figure, "member": member.id, "seed": member.seed, "step": step, "examples_seen": seen}
    return [
        tested_row(who, member.as_row(), split, slice, right, tests, status) for slice, (right, tests) in scores.items()
    ]


def sample_rows(
    figure: str, member: str, seed: int, step: int, split: str, asked: Sequence[TextRow], given: Sequence[str]
) -> list[Row]:
    """The first ``ANSWERS_KEPT`` answers, as rows of samples.csv."""
    return [
        {"figure": figure, "member": member, "seed": seed, "step": step, "split": split, "prompt": text.instruction,
         "right_answer": text.response, "answer": answer, "right": int(is_right(text, answer))}
        for text, answer in list(zip(asked, given, strict=True))[:ANSWERS_KEPT]
    ]  # fmt: skip
