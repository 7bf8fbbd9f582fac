"""P2 (arXiv 2410.04717) tables 1 to 3: which mixture should a model be fine-tuned on?

    python -m experiments.finetune_mixtures --base=DIR --data=oss=oss.jsonl,alpaca=alpaca.json,cot=cot.jsonl \\
        --template=magicoder --mixtures=oss=20000 --mixtures=oss=15000,alpaca=3000,cot=2000 --run_dir=runs/code
    python -m experiments.finetune_mixtures --preset=smoke

One adapter (LoRA) a mixture and seed, all trained together over one frozen base. The data are cleaned, some rows of
every source are held out, and every mixture is taken from the rest, exact to the row; with the same seed, more rows of
a source contain fewer. The table has, for every member and source, the loss on the held-out responses.

preset   base and data                                       hardware        time
smoke    its own: a tiny decoder, two kinds of rewriting     two CPU cores   half a minute
paper    a checkpoint and files that you name                one GPU         not run

From the paper: learning rate 1e-5, batch 4, 3 epochs, 768 tokens, eight bits. Not given, and chosen here: rank 64,
alpha 128, all linear layers, three seeds, 256 held-out rows a source. A row holds several examples, which cannot see
each other; with ``--unpacked``, one, as (we think) the paper's. Members share their steps: those of the member with the
most packed rows, times ``--epochs``; others go through their rows more often, and the table says how often.

The paper tests programs and answers (HumanEval, MBPP, MMLU, ...). That is for other tools: ``adapters/<member>/`` is
what PEFT reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags

from instrdiv.checkpoints import Schedule
from instrdiv.directories import check_usable, locked
from instrdiv.finetuning.cleaning import DUPLICATES, Dropped, clean, whole
from instrdiv.finetuning.diversity_report import write_cleaning
from instrdiv.finetuning.encrypted import EncryptedSetting, plain_rows, training_rows
from instrdiv.finetuning.held_out import held_out_losses, hold_out
from instrdiv.finetuning.launching import (
    Base,
    define_adapter_flags,
    forecast,
    int8_of_flags,
    lora_of_flags,
    mesh_of_flags,
    plan,
)
from instrdiv.finetuning.lora import Lora
from instrdiv.finetuning.mixture_report import (
    BASE_COLUMNS,
    IDENTITY,
    PACKING_COLUMNS,
    ROW_COLUMNS,
    draw,
    read_results,
    write_report,
    write_results,
)
from instrdiv.finetuning.mixtures import Mixture
from instrdiv.finetuning.packing import Example, Packed, Report, pack, tokenise
from instrdiv.finetuning.pretraining import SmallBase
from instrdiv.finetuning.run import FineTuned, data_digest, finetune
from instrdiv.finetuning.sources import SCHEMAS, read_rows, read_sources
from instrdiv.finetuning.sources import Row as Text
from instrdiv.finetuning.templates import NAMED, make_template
from instrdiv.finetuning.training import AdapterMember, Recipe, check
from instrdiv.launcher import (
    ListParser,
    NameParser,
    NumberParser,
    define,
    define_preset_flag,
    define_switch,
    setting_flags,
    start,
)
from instrdiv.progress import telling
from instrdiv.results import Row, write_table
from instrdiv.settings import BadInput

FLAGS = flags.FLAGS
NAME = "finetune_mixtures"


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of the experiment.

    Attributes:
      lora, learning_rate, recipe: of the members; its steps follow from ``epochs``.
      template, max_length: how a row becomes tokens.
      epochs: passes of the member with the most packed rows.
      held_out: rows of a source.
      mixtures: as the flag has them; () where the user has to name some.
      small: a base, and what it is trained on first; None where ``--base`` has to name one.
      setting: of the preset's own data: plain and encrypted rewriting; None where ``--data`` has to name some.
      int8: hold the base in eight bits.
    """

    lora: Lora
    learning_rate: float
    recipe: Recipe
    template: str
    max_length: int
    epochs: float
    held_out: int
    mixtures: tuple[str, ...] = ()
    small: SmallBase | None = None
    setting: EncryptedSetting | None = None
    seeds: int = 3
    int8: bool = False


_SMALL = Recipe(steps=4, batch_size=8, schedule="cosine", adam_b2=0.98, precision="float32", reports=2)

PRESETS = {
    "smoke": Preset(
        lora=Lora(4, 8.0),
        learning_rate=5e-3,
        recipe=_SMALL,
        template="plain",
        max_length=64,
        epochs=2,
        held_out=16,
        mixtures=("plain=64", "plain=48,encrypted=16"),
        small=SmallBase(layers=1, width=16, heads=2, mlp_width=32, instructions=64, examples=256, recipe=_SMALL),
        setting=EncryptedSetting(
            instructions=16, examples=128, keys=2, alphabet_size=12, input_length=8, separator="none"
        ),
        seeds=2,
    ),
    "paper": Preset(
        lora=Lora(64, 128.0),
        learning_rate=1e-5,
        recipe=Recipe(batch_size=4, microbatch_size=1, remat=True, precision="bfloat16"),
        template="alpaca",
        max_length=768,
        epochs=3,
        held_out=256,
        int8=True,
    ),
}


def main() -> None:
    preset = preset_of_flags()
    run_dir = Path(FLAGS.run_dir or f"runs/{NAME}-{FLAGS.preset}")
    mixtures = [Mixture.parse(text, FLAGS.budget, "--mixtures") for text in FLAGS.mixtures or preset.mixtures]
    preset.recipe.validate()
    mesh, int8 = mesh_of_flags(), int8_of_flags(preset.int8)
    check_usable(run_dir)
    print(f"{NAME}, preset {FLAGS.preset}, {run_dir}", flush=True)
    with telling() as say:
        base = Base.of_flags(run_dir, preset.small, preset.setting or EncryptedSetting(), mesh, say)
        data = make_data(preset, mixtures, base, say)
        members, recipe = make_members(preset, mixtures, data)
        check(base.config, members, data.packed, recipe, mesh)
        print(data.text(recipe), flush=True)
        print(plan(base.config, members, recipe, preset.max_length, int8), flush=True)
        weights = base.weights(recipe, mesh, int8, say)
        if FLAGS.dry_run:
            print(forecast(base.config, weights, members, data.packed, recipe, mesh, say))
            return
        tested = is_tested(run_dir, members, recipe, data)
        of_base: list[Row] = []
        if not tested:  # asked first: a base that is bad at everything was given another template, or another tokenizer
            say("the base on held-out rows")
            (losses,), tokens = held_out_losses(base.config, weights, data.held_out, recipe, mesh)
            names, digest = data.held_out.source_names, data_digest(data.held_out)
            for name, loss, count in zip(names, losses.tolist(), tokens.tolist(), strict=True):
                of_base.append(dict(zip(BASE_COLUMNS, (name, loss, count, digest), strict=True)))
            print(f"held-out loss of the base, nats a token: {_listed(of_base)}", flush=True)
    tuned = finetune(base.config, weights, members, data.packed, recipe, mesh, run_dir, NAME, str(base.path),
                     overwrite=FLAGS.overwrite, schedule=Schedule(FLAGS.checkpoint_minutes))  # fmt: skip
    if not tested:
        with locked(run_dir), telling() as say:
            say("the adapters on held-out rows")
            losses, _ = held_out_losses(
                base.config, weights, data.held_out, recipe, mesh, *tuned.population(base.config)
            )
            data.write(run_dir, members, recipe)
            write_table(run_dir / "base.csv", of_base, BASE_COLUMNS)
            write_results(run_dir / "results.csv", result_rows(tuned, losses.tolist(), of_base, recipe, data))  # last
    results, of_base = read_results(run_dir)
    draw(results, of_base, run_dir / "figure")
    report = write_report(run_dir, NAME)
    print("verdict: none, held-out loss is not what the paper reports")
    print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'results.csv'}")


def preset_of_flags() -> Preset:
    """The preset, with what the flags say. Raises BadInput for flags that are missing or do not go together."""
    preset = PRESETS[FLAGS.preset]
    for name, there, what in (
        ("base", preset.small, "DIR, the directory of a checkpoint"),
        ("data", preset.setting, "NAME=FILE,…, the sources"),
        ("mixtures", preset.mixtures and not FLAGS.data, "SOURCE=ROWS,…, once for each mixture"),
    ):
        if not there and not FLAGS[name].value:
            raise BadInput(f"--{name}: must be given, --{name}={what}; --preset=smoke needs nothing")
    recipe = setting_flags(Recipe)
    if "steps" in recipe and FLAGS.epochs:
        raise BadInput(f"--epochs={FLAGS.epochs:g}: give this or --config.steps={recipe['steps']}, not both")
    for name, needed in (("against_field", "against"), ("schema", "data")):
        if FLAGS[name].value and not FLAGS[needed].value:
            raise BadInput(f"--{name}={FLAGS[name].value}: has no effect without --{needed}")
    names = ("learning_rate", "template", "max_length", "epochs", "held_out", "seeds")
    given = {name: value for name in names if (value := FLAGS[name].value) is not None}
    lora = lora_of_flags(preset.lora)
    return dataclasses.replace(preset, **given, lora=lora, recipe=dataclasses.replace(preset.recipe, **recipe))


@dataclasses.dataclass(frozen=True)
class Data:
    """What the members are trained on, and asked in the end.

    Attributes:
      chosen: the rows of every member, by (mixture, seed), in the order of the members.
      packed, reports: what became of them, likewise.
      held_out_rows, held_out: of all sources, as rows and packed.
      kept, dropped: by cleaning.
      empty: places of rows that ask or answer nothing.
    """

    chosen: dict[tuple[str, int], list[Text]]
    packed: list[Packed]
    reports: list[Report]
    held_out_rows: list[Text]
    held_out: Packed
    kept: dict[str, list[Text]]
    dropped: list[Dropped]
    empty: list[str]

    def epochs(self, recipe: Recipe) -> list[float]:
        """How often each member goes through its rows."""
        return [recipe.steps * recipe.batch_size / len(packed.tokens) for packed in self.packed]

    def text(self, recipe: Recipe) -> str:
        """For people: what was dropped, and a line a mixture (its first seed's)."""
        sources = ", ".join(f"{name} {len(rows):,}" for name, rows in self.kept.items())
        lines = [f"rows that are kept: {sources}; {len(self.dropped):,} dropped"]
        if self.empty:
            lines.append(f"left out, for they ask or answer nothing: {len(self.empty):,}, the first {self.empty[0]}")
        shown = set()
        for (mixture, _), report, epochs in zip(self.chosen, self.reports, self.epochs(recipe), strict=True):
            if mixture not in shown:
                shown.add(mixture)
                of_all = report.table[-1]
                lines.append(
                    f"{mixture}: {of_all['examples']:,} examples, {of_all['tokens']:,} tokens; {of_all['truncated']:,} "
                    f"cut at {report.length:,}, {of_all['dropped']:,} dropped with no response left; "
                    f"{report.rows:,} packed rows, {report.efficiency:.1%} filled, {epochs:.2f} epochs"
                )
        return "\n".join(lines)

    def write(self, run_dir: Path, members: Sequence[AdapterMember], recipe: Recipe) -> None:
        """Writes cleaning.csv, dropped.csv, packing.csv, held_out.csv and rows/<member>.csv."""
        write_cleaning(run_dir, self.kept, self.dropped)
        rows = []
        for member, report, epochs in zip(members, self.reports, self.epochs(recipe), strict=True):
            who = {"member": member.id, "seed": member.seed, "mixture": member.setting["mixture"]}
            rows += [who | {"packed_rows": report.rows, "epochs": epochs} | line for line in report.table]
        write_table(run_dir / "packing.csv", rows, PACKING_COLUMNS)
        _write_rows(run_dir / "held_out.csv", self.held_out_rows)
        shutil.rmtree(run_dir / "rows", ignore_errors=True)  # those of a run that was overwritten
        (run_dir / "rows").mkdir()
        for member, chosen in zip(members, self.chosen.values(), strict=True):
            _write_rows(run_dir / "rows" / f"{member.id}.csv", chosen)


def make_data(preset: Preset, mixtures: Sequence[Mixture], base: Base, say: Callable[[str], None]) -> Data:
    """Reads, cleans, holds out, mixes, tokenises and packs. Raises BadInput, in one line, where that cannot be."""
    say("reading the data")
    empty: list[str] | None = [] if FLAGS.drop_empty else None
    sources = read_sources(FLAGS.data, FLAGS.schema, empty) if FLAGS.data else own_sources(preset)
    labels = [",".join(f"{name}={count}" for name, count in _counts(m, sources).items()) for m in mixtures]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise BadInput(f"--mixtures={twice}: is named twice")
    fields = f"instruction={FLAGS.against_field},response={FLAGS.against_field}" if FLAGS.against_field else None
    evaluation = [row for location in FLAGS.against or () for row in read_rows(location, fields)]
    kept, dropped = clean(sources, evaluation, FLAGS.duplicates, say)
    training, held_out = hold_out(kept, preset.held_out)
    for mixture, label in zip(mixtures, labels, strict=True):
        for name, asked in _counts(mixture, sources).items():
            if asked > len(training[name]):
                raise BadInput(
                    f"--mixtures={label}: {asked:,} rows are asked of {name}, which has {len(training[name]):,} left "
                    f"of {len(sources[name]):,}, once cleaned and without the {preset.held_out:,} held out"
                )
    template = make_template(preset.template, base.tokenizer)
    texts = {name: [whole(row) for row in rows] for name, rows in training.items()}
    places: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for (mixture, label), seed in itertools.product(zip(mixtures, labels, strict=True), range(preset.seeds)):
        places[label, seed] = mixture.choose(texts, seed)
    say("tokenising")
    used = sorted(set(itertools.chain(*places.values())))
    tokenised = tokenise([training[name][row] for name, row in used], template, base.tokenizer)
    examples: dict[tuple[str, int], Example] = dict(zip(used, tokenised, strict=True))
    pad = base.tokenizer.pad_id
    made = [
        pack([examples[place] for place in of_member], preset.max_length, pad, several=not FLAGS.unpacked)
        for of_member in places.values()
    ]
    held_out_rows = list(itertools.chain(*held_out.values()))
    held_out_packed, _ = pack(tokenise(held_out_rows, template, base.tokenizer), preset.max_length, pad)
    for name in held_out:
        if name not in held_out_packed.source_names:
            raise BadInput(
                f"--max_length={preset.max_length}: no response of a held-out row of {name} begins within it"
            )
    return Data(
        chosen={key: [training[name][row] for name, row in of_member] for key, of_member in places.items()},
        packed=[packed for packed, _ in made],
        reports=[report for _, report in made],
        held_out_rows=held_out_rows,
        held_out=held_out_packed,
        kept=kept,
        dropped=dropped,
        empty=empty or [],
    )


def own_sources(preset: Preset) -> dict[str, list[Text]]:
    """Plain and encrypted rewriting, for where no data are at hand."""
    assert preset.setting is not None
    rows = {
        "plain": plain_rows(preset.setting, seed=0, count=preset.setting.examples),
        "encrypted": training_rows(preset.setting, seed=0),
    }
    return {name: [dataclasses.replace(row, source=name) for row in of_source] for name, of_source in rows.items()}


def make_members(preset: Preset, mixtures: Sequence[Mixture], data: Data) -> tuple[list[AdapterMember], Recipe]:
    """A member a mixture and seed, and their recipe with its steps."""
    settings = {
        "template": preset.template,
        "max_length": preset.max_length,
        "examples_a_row": "one" if FLAGS.unpacked else "several",
        "duplicates": FLAGS.duplicates,
        "against": "+".join(Path(location).name for location in FLAGS.against or ()) or "none",
        "held_out": preset.held_out,
    }
    members = []
    for label, seed in data.chosen:
        counts = {name: int(count) for name, _, count in (part.rpartition("=") for part in label.split(","))}
        by_source = {f"rows_{name}": counts.get(name, 0) for name in data.kept}
        setting = {"mixture": label, "rows": sum(counts.values()), **by_source, **settings}
        members.append(AdapterMember(preset.lora, preset.learning_rate, seed, setting))
    recipe = preset.recipe
    if FLAGS["config.steps"].value is None:
        most = max(len(packed.tokens) for packed in data.packed)
        recipe = dataclasses.replace(recipe, steps=math.ceil(preset.epochs * most / recipe.batch_size))
    return members, recipe


def is_tested(run_dir: Path, members: Sequence[AdapterMember], recipe: Recipe, data: Data) -> bool:
    """Whether the tables have these members at their end, on these held-out rows."""
    if FLAGS.overwrite or not (run_dir / "results.csv").exists():
        return False
    results, base = read_results(run_dir)
    wanted = {(member.id, recipe.steps, name) for member in members for name in data.held_out.source_names}
    return wanted == {(row["member"], row["step"], row["source"]) for row in results} and {
        str(row["data"]) for row in base
    } == {data_digest(data.held_out)}


def result_rows(
    tuned: FineTuned, losses: Sequence[Sequence[float]], base: Sequence[Row], recipe: Recipe, data: Data
) -> list[Row]:
    """Rows of results.csv."""
    status = {row["member"]: row["status"] for row in tuned.metrics}
    rows = []
    for member, of_member, epochs in zip(tuned.members, losses, data.epochs(recipe), strict=True):
        for of_base, loss in zip(base, of_member, strict=True):
            less, seen = of_base["loss"] - loss, recipe.steps * recipe.batch_size
            cells = (NAME, member.id, member.seed, recipe.steps, seen, epochs, of_base["source"], loss, less,
                     of_base["tokens"], status[member.id])  # fmt: skip
            rows.append(dict(zip(IDENTITY, cells, strict=True)) | member.as_row())
    return rows


def _counts(mixture: Mixture, sources: Mapping[str, Sequence[Text]]) -> dict[str, int]:
    """Rows of each source; BadInput where one is not there, or there are fewer in all."""
    for name in mixture.shares:
        if name not in sources:
            raise BadInput(f"--mixtures: there is no source {name}; --data has {', '.join(sources)}")
    there = sum(len(sources[name]) for name in mixture.shares)
    if mixture.budget > there:
        raise BadInput(f"--mixtures: {mixture.budget:,} rows are asked of {', '.join(mixture.shares)}: {there:,} rows")
    return mixture.counts()


def _listed(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['source']} {row['loss']:.4f} ({row['tokens']:,} tokens)" for row in rows)


def _write_rows(path: Path, rows: Sequence[Text]) -> None:
    listed = ({"place": i, "source": row.source, "where": row.where} for i, row in enumerate(rows))
    write_table(path, listed, ROW_COLUMNS)


def define_flags() -> None:
    define_preset_flag(PRESETS, default="paper")
    define_adapter_flags(NAME)
    locations, whole_number = ListParser(NameParser()), NumberParser(int, low=1)
    schemas = f"{', '.join(SCHEMAS)}, or fields of your own such as instruction=question,response=answer"
    templates = f"{', '.join(NAMED)}, chat (the checkpoint's own), or a Jinja file"
    define(locations, "data", "FILE or NAME=FILE: .jsonl, .json, .parquet, a directory, or hub:owner/name")
    define(NameParser(), "schema", f"what their fields mean (default: by the fields): {schemas}")
    define_switch("drop_empty", "leave out rows that ask or answer nothing, and say how many")
    flags.DEFINE_multi(NameParser(), flags.ArgumentSerializer(), "mixtures", None,
                       "SOURCE=ROWS,…, or SOURCE=SHARE,… with --budget; once for each mixture")  # fmt: skip
    define(whole_number, "budget", "rows of every mixture, where these are given as shares")
    define(locations, "against", "files with evaluation prompts that must not be in the data")
    define(NameParser(), "against_field", "the field with the prompt (default: by the fields)")
    what = "rows that are dropped: those that equal others, or nearly do, too; or what is held out would be trained on"
    flags.DEFINE_enum("duplicates", "exact", DUPLICATES[1:], what)
    define(whole_number, "held_out", "rows of every source that are kept out of all mixtures (default: the preset's)")
    define(NameParser(), "template", f"how a row becomes text: {templates} (default: the preset's)")
    define(NumberParser(int, low=2), "max_length", "tokens of a row, at which examples are cut (default: the preset's)")
    define_switch("unpacked", "one example a row, padded, in place of as many as fit")
    define(NumberParser(float, low=1e-9, high=1e6), "epochs",
           "passes of the member with the most packed rows; decides the steps (default: the preset's)")  # fmt: skip


if __name__ == "__main__":
    define_flags()
    start(main)
