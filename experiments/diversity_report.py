"""How many different instructions is a data set? Effective numbers, duplicates, contamination, and a map of it.

    python -m experiments.diversity_report --data=mine.jsonl --run_dir=runs/mine
    python -m experiments.diversity_report --data=oss=oss.jsonl,alpaca=alpaca.json,cot=cot.json \\
        --against=humaneval.jsonl --against_field=prompt --duplicates=near \\
        --shares=oss=0.75,alpaca=0.15,cot=0.10 --budget=20000 --run_dir=runs/mix
    python -m experiments.diversity_report --example --run_dir=runs/diversity_example

The first looks at a file as it is. The second removes duplicates and rows that repeat evaluation prompts, takes a
mixture of the rest, exact to the row (*Only-IF*, arXiv 2410.04717, table 1), and compares its sources (figure 1). The
third needs no data: our own rewrite rules at I = 4, 64 and 4,096. What the numbers mean, and their limits:
docs/diversity.md.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.show_data import as_text
from experiments.show_data import rows as rewriting_rows
from instrdiv.finetuning import diversity
from instrdiv.finetuning.cleaning import DUPLICATES, clean, whole
from instrdiv.finetuning.diversity_report import (
    FILES,
    MIXTURE_COLUMNS,
    draw,
    write_cleaning,
    write_report,
    write_tables,
)
from instrdiv.finetuning.embedding import Embedder
from instrdiv.finetuning.mixtures import Mixture
from instrdiv.finetuning.sources import SCHEMAS, Row, read_rows, read_sources
from instrdiv.launcher import FLAGS, ListParser, NameParser, NumberParser, define_switch, start
from instrdiv.presets import LAPTOP
from instrdiv.progress import telling
from instrdiv.results import Row as TableRow
from instrdiv.results import provenance, write_json, write_table
from instrdiv.settings import BadInput

#: What of a row is measured.
TEXTS = {
    "instruction": lambda row: row.instruction,
    "prompt": lambda row: row.prompt,
    "response": lambda row: row.response,
    "row": whole,
}
#: Different rules of the example.
EXAMPLE = (4, 64, 4096)


def summary(scores: Sequence[TableRow]) -> str:
    """The numbers as a table for people."""
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


def example() -> dict[str, list[Row]]:
    """Our own training sets at several numbers of rules, of the same size: the instruction is the rule."""
    return {
        f"I = {count:,}": [
            Row(
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
    """What a file was when it was read; empty for what is no file."""
    if not Path(location).is_file():
        return ""
    with open(location, "rb") as file:
        return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def check_flags(run_dir: Path) -> None:
    """Raises BadInput for flags that do not go together, and for a directory that cannot be used."""
    if (FLAGS.data is None) != FLAGS.example:
        raise BadInput("--data=FILE,…: name the files to look at, or ask for --example and give none")
    for name, needed in (("budget", "shares"), ("against_field", "against")):
        if FLAGS[name].value and not FLAGS[needed].value:
            raise BadInput(f"--{name}={FLAGS[name].value}: has no effect without --{needed}")
    if run_dir.exists() and not run_dir.is_dir():
        raise BadInput(f"--run_dir={run_dir}: is a file")
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / "diversity.csv").exists():
            raise BadInput(f"--run_dir={run_dir}: holds something else; name a directory that is empty or not there")
        if not FLAGS.overwrite:
            raise BadInput(f"--run_dir={run_dir}: holds a report; name another directory, or give --overwrite")


def main() -> None:
    run_dir = Path(FLAGS.run_dir)
    check_flags(run_dir)
    embedder = Embedder.parse(FLAGS.embedder)
    mixture = Mixture.parse(FLAGS.shares, FLAGS.budget) if FLAGS.shares else None
    empty: list[str] | None = [] if FLAGS.drop_empty else None
    with telling() as say:
        say("reading")
        sources = example() if FLAGS.example else read_sources(FLAGS.data, FLAGS.schema, empty)
        fields = f"instruction={FLAGS.against_field},response={FLAGS.against_field}" if FLAGS.against_field else None
        evaluation = [row for location in FLAGS.against or () for row in read_rows(location, fields)]
        kept, dropped = clean(sources, evaluation, FLAGS.duplicates, say)
        used = kept
        if mixture:
            chosen = mixture.choose({name: [whole(row) for row in rows] for name, rows in kept.items()}, FLAGS.seed)
            used = {name: [kept[name][row] for source, row in chosen if source == name] for name in mixture.shares}
        for name, rows in used.items():
            if not rows:
                raise BadInput(f"--data: nothing is left of {name} without duplicates and contamination")
        texts = {name: [TEXTS[FLAGS.text](row) for row in rows] for name, rows in used.items()}
        found = diversity.measure(texts, embedder, FLAGS.same, FLAGS.sample, FLAGS.map, FLAGS.seed, say)
    run_dir.mkdir(parents=True, exist_ok=True)
    for left in (*FILES, "report.html"):  # of the report that is overwritten
        (run_dir / left).unlink(missing_ok=True)
    asked = {
        "data": {name: f"{len(rows):,} rows" for name, rows in sources.items()},
        "mixture": mixture and {name: f"{len(rows):,} rows" for name, rows in used.items()},
        "measured": f"the {FLAGS.text} of a row" if FLAGS.text != "row" else "all of a row",
        "embedder": embedder.name,
        "duplicates dropped": FLAGS.duplicates,
        "not to be in it": FLAGS.against and f"{len(evaluation):,} prompts of {', '.join(FLAGS.against)}",
        "rows that ask or answer nothing": empty and f"{len(empty):,}, left out",
        "seed": FLAGS.seed,
    }
    files = {part: digest(part.partition("=")[2] or part) for part in (*(FLAGS.data or ()), *(FLAGS.against or ()))}
    write_json(
        run_dir / "provenance.json",
        provenance(asked={name: fact for name, fact in asked.items() if fact is not None}, files=files),
    )
    if evaluation or FLAGS.duplicates != "none":
        write_cleaning(run_dir, kept, dropped)
    if mixture:
        places = ({"place": i, "source": name, "where": kept[name][row].where} for i, (name, row) in enumerate(chosen))
        write_table(run_dir / "mixture.csv", places, MIXTURE_COLUMNS)
    write_tables(run_dir, found, used)
    draw(run_dir, FLAGS.text, FLAGS.map)
    report = write_report(run_dir)
    print(summary(found.scores))
    print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'diversity.csv'}")


if __name__ == "__main__":
    locations = ListParser(NameParser())
    whole_number = NumberParser(int, low=1)
    schemas = f"{', '.join(SCHEMAS)}, or fields of your own such as instruction=question,response=answer"
    flags.DEFINE(locations, "data", None, "FILE or NAME=FILE: .jsonl, .json, .parquet, a directory, or hub:owner/name")
    flags.DEFINE(NameParser(), "schema", None, f"what their fields mean (default: by the fields): {schemas}")
    flags.DEFINE(NameParser(), "shares", None, "a mixture of them: NAME=SHARE with --budget, or NAME=ROWS, …")
    flags.DEFINE(whole_number, "budget", None, "rows of the mixture")
    flags.DEFINE(locations, "against", None, "files with evaluation prompts that must not be in the data")
    flags.DEFINE(NameParser(), "against_field", None, "the field with the prompt (default: by the fields)")
    flags.DEFINE_enum("duplicates", "none", DUPLICATES, "which are dropped: none, exact ones, near ones, too")
    define_switch("drop_empty", "leave out rows that ask or answer nothing, and say how many")
    flags.DEFINE_enum("text", "instruction", list(TEXTS), "what of a row is measured")
    flags.DEFINE(
        NameParser(), "embedder", "hashed", "hashed, sentence-transformers:DIRECTORY, or MODULE:FUNCTION of your own"
    )
    flags.DEFINE(
        NumberParser(float, low=0.01, high=1), "same", None, "cosine of one instruction (default: the embedder's)"
    )
    flags.DEFINE(NumberParser(int, low=2, high=10_000), "sample", 2_000, "texts a draw, at most")
    flags.DEFINE_enum("map", "tsne", diversity.MAPS, "how the map is made")
    flags.DEFINE(NumberParser(int, low=0, high=2**31 - 1), "seed", 0, "of the mixture, the draws and the map")
    flags.DEFINE(NameParser(), "run_dir", "runs/diversity", "where tables, picture and report go")
    define_switch("example", "instead of --data: our own rewrite rules at three numbers of different ones")
    define_switch("overwrite", "replace the report that is there")
    start(main)
