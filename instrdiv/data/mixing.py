"""From sources to training sets: clean, hold out rows, draw mixtures from the rest, tokenize and pack."""

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

#: Columns of packing.csv, one row per member and source (or ``all``): the member's packed rows and epochs, and counts
#: of its examples.
PACKING_COLUMNS = ("member", "seed", "mixture", "packed_rows", "epochs", *REPORT_COLUMNS)
#: Columns of held_out.csv and rows/<member>.csv, which list rows.
ROW_COLUMNS = ("place", "source", "where")

_TEMPLATES = f"{', '.join(NAMED)}, chat (the checkpoint's own), or a Jinja file"


@dataclasses.dataclass(frozen=True)
class MixingSetting:
    """How sources become training sets. The fields are flags, ``--config.<field>``."""

    template: str = field("alpaca", f"prompt template: {_TEMPLATES}")
    max_length: int = field(768, "maximum tokens per row; longer examples are truncated", bound=at_least(2))
    epochs: float = field(
        3.0, "epochs for the member with the most packed rows; sets the number of steps", bound=between(1e-9, 1e6)
    )
    held_out: int = field(256, "rows per source that are held out of all mixtures", bound=at_least(1))
    duplicates: str = field(
        "exact",
        "which duplicates to drop, so that no held-out row is trained on: exact ones, or near ones too",
        DUPLICATES[1:],
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class MixedData:
    """The training and test data of the members.

    Attributes:
      chosen: the rows of every member, by (mixture, seed), in the order of the members.
      packed, reports: the packed rows and the packing report of every member, in the same order.
      held_out_rows, held_out: the held-out rows of all sources, as rows and packed.
      kept, dropped: the results of cleaning.
      empty: locations of skipped empty rows.
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
        """For every member: its mixture, as table columns, and its seed."""
        found = []
        for label, seed in self.chosen:
            counts = {name: int(count) for name, _, count in (part.rpartition("=") for part in label.split(","))}
            by_source = {f"rows_{name}": counts.get(name, 0) for name in self.kept}
            found.append(({"mixture": label, "rows": sum(counts.values()), **by_source}, seed))
        return found

    def epochs(self, seen: int) -> list[float]:
        """Epochs per member, if it sees ``seen`` packed rows."""
        return [seen / len(packed.tokens) for packed in self.packed]

    def text(self, seen: int) -> str:
        """A summary: what was dropped, and one line per mixture (for its first seed), if members see ``seen`` rows."""
        sources = ", ".join(f"{name} {len(rows):,}" for name, rows in self.kept.items())
        lines = [f"rows kept: {sources}; {len(self.dropped):,} dropped"]
        if self.empty:
            lines.append(f"Skipped {len(self.empty):,} empty rows (first: {self.empty[0]}).")
        shown = set()
        for (mixture, _), report, epochs in zip(self.chosen, self.reports, self.epochs(seen), strict=True):
            if mixture not in shown:
                shown.add(mixture)
                of_all = report.table[-1]
                lines.append(
                    f"{mixture}: {of_all['examples']:,} examples, {of_all['tokens']:,} tokens; {of_all['truncated']:,} "
                    f"truncated at {report.length:,}, {of_all['dropped']:,} dropped because no response was left; "
                    f"{report.rows:,} packed rows, {report.efficiency:.1%} full, {epochs:.2f} epochs"
                )
        return "\n".join(lines)

    def tables(self, members: Sequence[tuple[str, int]], seen: int) -> dict[str, Table]:
        """cleaning.csv, dropped.csv, packing.csv, held_out.csv and rows/<member>.csv.

        Args:
          members: (id, seed) of each member.
          seen: number of packed rows that each member saw.
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
      mixtures: the mixtures to draw, each with every seed.
      seeds: number of seeds, starting at 0.
      setting: ``epochs`` is not used here.
      tokenizer: the model's tokenizer.
      evaluation: rows whose prompts must not be trained on.
      several: whether examples may share a packed row.
      empty: locations of skipped empty rows, for the report.
      say: called with status messages.

    Raises BadInput, in one line, if the sources cannot provide this.
    """
    labels = [",".join(f"{name}={count}" for name, count in _counts(m, sources).items()) for m in mixtures]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise BadInput(f"--mixtures={twice}: is given twice")
    kept, dropped = clean(sources, evaluation, setting.duplicates, say)
    training, held_out = hold_out(kept, setting.held_out)
    for mixture, label in zip(mixtures, labels, strict=True):
        for name, asked in _counts(mixture, sources).items():
            if asked > len(training[name]):
                raise BadInput(
                    f"--mixtures={label}: needs {asked:,} rows from {name}, which has {len(training[name]):,} of "
                    f"{len(sources[name]):,} left after cleaning and holding out {setting.held_out:,}"
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
                f"--max_length={setting.max_length}: truncates the whole response of every held-out row of {name}"
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
    """Rows of each source. Raises BadInput if a source is missing, or if there are too few rows in total."""
    for name in mixture.shares:
        if name not in sources:
            raise BadInput(f"--mixtures: there is no source {name}; --data has {', '.join(sources)}")
    there = sum(len(sources[name]) for name in mixture.shares)
    if mixture.budget > there:
        raise BadInput(
            f"--mixtures: needs {mixture.budget:,} rows from {', '.join(mixture.shares)}, with {there:,} in all"
        )
    return mixture.counts()


def _listed(rows: Sequence[TextRow]) -> Table:
    return Table(ROW_COLUMNS, [{"place": i, "source": row.source, "where": row.where} for i, row in enumerate(rows)])
