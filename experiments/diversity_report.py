"""How many different instructions does a data set contain? Effective numbers, duplicates, contamination, and a map.

    python -m experiments.diversity_report --data=mine.jsonl --run_dir=runs/mine
    python -m experiments.diversity_report --data=oss=oss.jsonl,alpaca=alpaca.json,cot=cot.json \\
        --against=humaneval.jsonl --against_field=prompt --duplicates=near \\
        --shares=oss=0.75,alpaca=0.15,cot=0.10 --budget=20000 --run_dir=runs/mix
    python -m experiments.diversity_report --example --run_dir=runs/diversity_example

The first command analyzes a file as it is. The second drops duplicates and rows that repeat evaluation prompts, samples
a mixture with exact row counts from the rest (*Only-IF*, arXiv 2410.04717, table 1), and compares its sources (figure
1). The third needs no data: it uses our own rewrite rules at I = 4, 64 and 4,096. docs/diversity.md explains the
numbers and their limits.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from absl.flags import FlagValues

from experiments.show_data import as_text
from experiments.show_data import rows as rewriting_rows
from instrdiv.analysis import diversity
from instrdiv.config.presets import LAPTOP
from instrdiv.data.cleaning import DUPLICATES, clean, whole
from instrdiv.data.embedding import Embedder
from instrdiv.data.mixtures import Mixture
from instrdiv.data.schemas import TextRow
from instrdiv.data.sources import read_rows, read_sources
from instrdiv.launch.flags import (
    ListParser,
    NameParser,
    NumberParser,
    define,
    define_against_flags,
    define_enum,
    define_row_flags,
    define_switch,
    start,
)
from instrdiv.reports.diversity_report import (
    FILES,
    MIXTURE_COLUMNS,
    draw,
    write_cleaning,
    write_diversity_report,
    write_tables,
)
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import write_json
from instrdiv.runtime.progress import telling
from instrdiv.runtime.provenance import provenance
from instrdiv.runtime.tables import Row, write_table

#: Values of ``--text``: which part of each row is measured.
TEXTS = {
    "instruction": lambda row: row.instruction,
    "prompt": lambda row: row.prompt,
    "response": lambda row: row.response,
    "row": whole,
}
#: Numbers of different rules in ``--example``.
EXAMPLE = (4, 64, 4096)


def summary(scores: Sequence[Row]) -> str:
    """A text table of the scores."""
    return as_text(
        [
            {
                "source": row["source"],
                "texts": f"{row['texts']:,}",
                "distinct": f"{row['distinct']:,}",
                "near duplicates": f"{row['near_duplicates']:.1%}",
                "drawn": f"{row['drawn']:,}",
                "effective clusters": f"{row['clusters']:,.1f}",
                "Vendi score": f"{row['vendi']:,.1f}",
            }
            for row in scores
        ]
    )


def example() -> dict[str, list[TextRow]]:
    """Our own training sets of equal size, at several numbers of rules; the instruction is the rule."""
    return {
        f"I = {count:,}": [
            TextRow(
                f"{row['pattern']} -> {row['replacement']}",
                row["answer"],
                f"I = {count:,}",
                f"example {i}",
                row["input"],
            )
            for i, row in enumerate(
                rewriting_rows(dataclasses.replace(LAPTOP, instructions=count), "train", LAPTOP.examples, 0, 1)
            )
        ]
        for count in EXAMPLE
    }


def digest(location: str) -> str:
    """The SHA-256 digest of a file; empty if the location is not a file."""
    if not Path(location).is_file():
        return ""
    with open(location, "rb") as file:
        return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def check_flags(values: FlagValues, run_dir: Path) -> None:
    """Raises BadInput for incompatible flags and for a directory that cannot be used."""
    if (values.data is None) != values.example:
        raise BadInput("pass either --data=FILE,… (the files to analyze) or --example")
    for name, needed in (("budget", "shares"), ("against_field", "against")):
        if values[name].value and not values[needed].value:
            raise BadInput(f"--{name}={values[name].value}: has no effect without --{needed}")
    if run_dir.exists() and not run_dir.is_dir():
        raise BadInput(f"--run_dir={run_dir}: is a file, not a directory")
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / "diversity.csv").exists():
            raise BadInput(f"--run_dir={run_dir}: holds something else; name an empty or a new directory")
        if not values.overwrite:
            raise BadInput(f"--run_dir={run_dir}: already holds a report; name another directory or pass --overwrite")


def main(values: FlagValues) -> None:
    run_dir = Path(values.run_dir)
    check_flags(values, run_dir)
    embedder = Embedder.parse(values.embedder)
    mixture = Mixture.parse(values.shares, values.budget) if values.shares else None
    empty: list[str] | None = [] if values.drop_empty else None
    with telling() as say:
        say("reading")
        sources = example() if values.example else read_sources(values.data, values.schema, empty)
        fields = f"instruction={values.against_field},response={values.against_field}" if values.against_field else None
        evaluation = [row for location in values.against or () for row in read_rows(location, fields)]
        kept, dropped = clean(sources, evaluation, values.duplicates, say)
        used = kept
        if mixture:
            chosen = mixture.choose({name: [whole(row) for row in rows] for name, rows in kept.items()}, values.seed)
            used = {name: [kept[name][row] for source, row in chosen if source == name] for name in mixture.shares}
        for name, rows in used.items():
            if not rows:
                raise BadInput(f"--data: no rows of {name} are left after dropping duplicates and contamination")
        texts = {name: [TEXTS[values.text](row) for row in rows] for name, rows in used.items()}
        found = diversity.measure(texts, embedder, values.same, values.sample, values.map, values.seed, say)
    run_dir.mkdir(parents=True, exist_ok=True)
    for left in (*FILES, "report.html"):  # leftovers of the report being overwritten
        (run_dir / left).unlink(missing_ok=True)
    asked = {
        "data": {name: f"{len(rows):,} rows" for name, rows in sources.items()},
        "mixture": mixture and {name: f"{len(rows):,} rows" for name, rows in used.items()},
        "measured": f"the {values.text} of each row" if values.text != "row" else "the whole row",
        "embedder": embedder.name,
        "duplicates dropped": values.duplicates,
        "contamination checks": values.against and f"{len(evaluation):,} prompts of {', '.join(values.against)}",
        "empty rows skipped": empty and f"{len(empty):,}",
        "seed": values.seed,
    }
    files = {part: digest(part.partition("=")[2] or part) for part in (*(values.data or ()), *(values.against or ()))}
    write_json(
        run_dir / "provenance.json",
        provenance(asked={name: fact for name, fact in asked.items() if fact is not None}, files=files),
    )
    if evaluation or values.duplicates != "none":
        write_cleaning(run_dir, kept, dropped)
    if mixture:
        places = ({"place": i, "source": name, "where": kept[name][row].where} for i, (name, row) in enumerate(chosen))
        write_table(run_dir / "mixture.csv", places, MIXTURE_COLUMNS)
    write_tables(run_dir, found, used)
    draw(run_dir, values.text, values.map)
    report = write_diversity_report(run_dir)
    print(summary(found.scores))
    print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'diversity.csv'}")


def define_flags(values: FlagValues) -> None:
    whole_number = NumberParser(int, low=1)
    help = "FILE or NAME=FILE, where FILE is .jsonl, .json, .parquet, a directory, or hub:owner/name"
    define(values, ListParser(NameParser()), "data", help)
    define_row_flags(values)
    define(values, NameParser(), "shares", "a mixture to sample: NAME=SHARE,… with --budget, or NAME=ROWS,…")
    define(values, whole_number, "budget", "number of rows in the mixture")
    define_against_flags(values)
    define_enum(values, "duplicates", DUPLICATES, "which duplicates to drop (near: exact ones, too)", "none")
    define_enum(values, "text", list(TEXTS), "which part of each row to measure", "instruction")
    define(
        values,
        NameParser(),
        "embedder",
        "hashed, sentence-transformers:DIRECTORY, or your own MODULE:FUNCTION",
        "hashed",
    )
    define(
        values, NumberParser(float, low=0.01, high=1), "same", "cosine for one instruction (default: the embedder's)"
    )
    define(values, NumberParser(int, low=2, high=10_000), "sample", "maximum number of texts per draw", 2_000)
    define_enum(values, "map", diversity.MAPS, "layout of the map", "tsne")
    define(values, NumberParser(int, low=0, high=2**31 - 1), "seed", "seed of the mixture, the draws and the map", 0)
    define(values, NameParser(), "run_dir", "directory for the tables, the figure and the report", "runs/diversity")
    define_switch(values, "example", "instead of --data, analyze our own rewrite rules, at three numbers of rules")
    define_switch(values, "overwrite", "replace an existing report")


def launch(argv: Sequence[str] | None = None) -> int:
    """Runs this command in this process, with the flags in ``argv`` or, by default, those of the command line."""
    return start(main, define_flags, __doc__, argv, "diversity_report.py")


if __name__ == "__main__":
    launch()
