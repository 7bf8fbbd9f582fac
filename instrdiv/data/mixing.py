"""Sources of rows to training sets: cleaned, some rows held out, mixtures of the rest taken, tokenized and packed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instrdiv.data.cleaning import DUPLICATES, Dropped, clean, cleaning_tables, whole
from instrdiv.data.held_out import hold_out
from instrdiv.data.mixtures import Mixture
from instrdiv.data.packing import REPORT_COLUMNS, Example, Packed, Report, pack, tokenize
from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import NAMED, make_template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import at_least, between, check_fields, field
from instrdiv.runtime.tables import Table

#: Columns of packing.csv, a row per member and source (or ``all``): how many packed rows the member has, how often it
#: went through them, and what became of its examples.
PACKING_COLUMNS = ("member", "seed", "mixture", "packed_rows", "epochs", *REPORT_COLUMNS)
#: Columns of the lists of rows: held_out.csv and rows/<member>.csv.
ROW_COLUMNS = ("place", "source", "where")

_TEMPLATES = f"{', '.join(NAMED)}, chat (the checkpoint's own), or a Jinja file"


@dataclasses.dataclass(frozen=True)
class MixingSetting:
    """How sources become training sets. The fields are flags, ``--config.<field>``."""

    template: str = field("alpaca", f"how a row becomes text: {_TEMPLATES}")
    max_length: int = field(768, "tokens of a row, at which examples are cut", bound=at_least(2))
    epochs: float = field(
        3.0, "passes of the member with the most packed rows; decides the steps", bound=between(1e-9, 1e6)
    )
    held_out: int = field(256, "rows of every source that are kept out of all mixtures", bound=at_least(1))
    duplicates: str = field(
        "exact",
        "rows that are dropped: those that equal others, or nearly do, too; or what is held out would be trained on",
        DUPLICATES[1:],
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class MixedData:
    """What the members are trained on and tested on.

    Attributes:
      chosen: the rows of every member, by (mixture, seed), in the order of the members.
      packed, reports: what became of them, likewise.
      held_out_rows, held_out: of all sources, as rows and packed.
      kept, dropped: by cleaning.
      empty: places of rows that ask or answer nothing.
    """

    chosen: Mapping[tuple[str, int], list[TextRow]]
    packed: list[Packed]
    reports: list[Report]
    held_out_rows: list[TextRow]
    held_out: Packed
    kept: Mapping[str, list[TextRow]]
    dropped: list[Dropped]
    empty: list[str]

    def settings(self) -> list[tuple[dict[str, Any], int]]:
        """Of every member: its mixture, as columns of the tables, and its seed."""
        found = []
        for label, seed in self.chosen:
            counts = {name: int(count) for name, _, count in (part.rpartition("=") for part in label.split(","))}
            by_source = {f"rows_{name}": counts.get(name, 0) for name in self.kept}
            found.append(({"mixture": label, "rows": sum(counts.values()), **by_source}, seed))
        return found

    def epochs(self, seen: int) -> list[float]:
        """How often each member goes through its packed rows, if it sees so many."""
        return [seen / len(packed.tokens) for packed in self.packed]

    def text(self, seen: int) -> str:
        """For people: what was dropped, and a line a mixture (its first seed's), if members see so many rows."""
        sources = ", ".join(f"{name} {len(rows):,}" for name, rows in self.kept.items())
        lines = [f"rows that are kept: {sources}; {len(self.dropped):,} dropped"]
        if self.empty:
            lines.append(f"left out, for they ask or answer nothing: {len(self.empty):,}, the first {self.empty[0]}")
        shown = set()
        for (mixture, _), report, epochs in zip(self.chosen, self.reports, self.epochs(seen), strict=True):
            if mixture not in shown:
                shown.add(mixture)
                of_all = report.table[-1]
                lines.append(
                    f"{mixture}: {of_all['examples']:,} examples, {of_all['tokens']:,} tokens; {of_all['truncated']:,} "
                    f"cut at {report.length:,}, {of_all['dropped']:,} dropped with no response left; "
                    f"{report.rows:,} packed rows, {report.efficiency:.1%} filled, {epochs:.2f} epochs"
                )
        return "\n".join(lines)

    def tables(self, members: Sequence[tuple[str, int]], seen: int) -> dict[str, Table]:
        """cleaning.csv, dropped.csv, packing.csv, held_out.csv and rows/<member>.csv.

        Args:
          members: id and seed of each.
          seen: packed rows that each saw.
        """
        packing, lists = [], {}
        everyone = zip(members, self.chosen.items(), self.reports, self.epochs(seen), strict=True)
        for (member, seed), ((mixture, _), rows), report, epochs in everyone:
            who = {"member": member, "seed": seed, "mixture": mixture, "packed_rows": report.rows, "epochs": epochs}
            packing += [who | line for line in report.table]
            lists[f"rows/{member}.csv"] = _listed(rows)
        return {
            **cleaning_tables(self.kept, self.dropped),
            "packing.csv": Table(PACKING_COLUMNS, packing),
            "held_out.csv": _listed(self.held_out_rows),
            **lists,
        }


def mix(
    sources: Mapping[str, Sequence[TextRow]],
    mixtures: Sequence[Mixture],
    seeds: int,
    setting: MixingSetting,
    tokenizer: Tokenizer,
    evaluation: Sequence[TextRow] = (),
    several: bool = True,
    empty: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> MixedData:
    """Cleans, holds out, mixes, tokenizes and packs.

    Args:
      sources: name -> rows.
      mixtures: what is taken of them; each with every seed.
      seeds: how many; they start at 0.
      setting: see there; ``epochs`` is not read.
      tokenizer: of the model.
      evaluation: rows whose prompts must not be trained on.
      several: examples may share a packed row.
      empty: places of rows that ask or answer nothing, for the report.
      say: is told what is being done.

    Raises BadInput, in one line, where that cannot be.
    """
    labels = [",".join(f"{name}={count}" for name, count in _counts(m, sources).items()) for m in mixtures]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise BadInput(f"--mixtures={twice}: is named twice")
    kept, dropped = clean(sources, evaluation, setting.duplicates, say)
    training, held_out = hold_out(kept, setting.held_out)
    for mixture, label in zip(mixtures, labels, strict=True):
        for name, asked in _counts(mixture, sources).items():
            if asked > len(training[name]):
                raise BadInput(
                    f"--mixtures={label}: {asked:,} rows are asked of {name}, which has {len(training[name]):,} left "
                    f"of {len(sources[name]):,}, once cleaned and without the {setting.held_out:,} held out"
                )
    template = make_template(setting.template, tokenizer)
    texts = {name: [whole(row) for row in rows] for name, rows in training.items()}
    places: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for (mixture, label), seed in itertools.product(zip(mixtures, labels, strict=True), range(seeds)):
        places[label, seed] = mixture.choose(texts, seed)
    say("tokenizing")
    used = sorted(set(itertools.chain(*places.values())))
    tokenized = tokenize([training[name][row] for name, row in used], template, tokenizer)
    examples: dict[tuple[str, int], Example] = dict(zip(used, tokenized, strict=True))
    made = [
        pack([examples[place] for place in of_member], setting.max_length, tokenizer.pad_id, several=several)
        for of_member in places.values()
    ]
    held_out_rows = list(itertools.chain(*held_out.values()))
    held_out_packed, _ = pack(tokenize(held_out_rows, template, tokenizer), setting.max_length, tokenizer.pad_id)
    for name in held_out:
        if name not in held_out_packed.source_names:
            raise BadInput(
                f"--max_length={setting.max_length}: no response of a held-out row of {name} begins within it"
            )
    return MixedData(
        chosen={key: [training[name][row] for name, row in of_member] for key, of_member in places.items()},
        packed=[packed for packed, _ in made],
        reports=[report for _, report in made],
        held_out_rows=held_out_rows,
        held_out=held_out_packed,
        kept=kept,
        dropped=dropped,
        empty=list(empty),
    )


def _counts(mixture: Mixture, sources: Mapping[str, Sequence[TextRow]]) -> dict[str, int]:
    """Rows of each source; BadInput where one is not there, or there are fewer in all."""
    for name in mixture.shares:
        if name not in sources:
            raise BadInput(f"--mixtures: there is no source {name}; --data has {', '.join(sources)}")
    there = sum(len(sources[name]) for name in mixture.shares)
    if mixture.budget > there:
        raise BadInput(f"--mixtures: {mixture.budget:,} rows are asked of {', '.join(mixture.shares)}: {there:,} rows")
    return mixture.counts()


def _listed(rows: Sequence[TextRow]) -> Table:
    return Table(ROW_COLUMNS, [{"place": i, "source": row.source, "where": row.where} for i, row in enumerate(rows)])
