"""P2 (arXiv 2410.04717) tables 1 to 3: which mixture should a model be fine-tuned on?

    python -m experiments.finetune_mixtures --base=DIR --data=oss=oss.jsonl,alpaca=alpaca.json,cot=cot.jsonl \\
        --template=magicoder --mixtures=oss=20000 --mixtures=oss=15000,alpaca=3000,cot=2000 --run_dir=runs/code
    python -m experiments.finetune_mixtures --preset=smoke

One LoRA adapter per mixture and seed, all trained together over one frozen base. The data are cleaned, some rows of
each source are held out, and each mixture is sampled from the rest with exact row counts; with the same seed, a smaller
sample of a source is a subset of a larger one. The table has the loss on the held-out responses per member and source.

preset   base and data                                       hardware        time
smoke    built in: a tiny decoder, two rewriting tasks       two CPU cores   half a minute
paper    a checkpoint and files that you name                one GPU         not run

The paper preset has from the paper: learning rate 1e-5, batch size 4, 3 epochs, 768 tokens, int8. Chosen here, where
the paper is silent: rank 64, alpha 128, all linear layers, three seeds, 256 held-out rows per source. A packed row
holds several examples, which cannot attend to each other; with ``--unpacked`` it holds one, which we think is what the
paper did. All members take the same number of steps: as many as ``--epochs`` passes take the member with the most
packed rows. Members with fewer rows make more passes; ``results.csv`` and ``packing.csv`` give their number.

The paper evaluates on benchmarks (HumanEval, MBPP, MMLU, ...). Use other tools for these: PEFT can load
``adapters/<member>/``.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from absl.flags import FlagValues

from instrdiv.data.mixing import MixingSetting, mix
from instrdiv.data.mixtures import Mixture
from instrdiv.data.schemas import TextRow as Text
from instrdiv.data.sources import read_rows, read_sources
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.launch.finetuning import Asked, FineTuningFigure, Preset, Study, Trained, Tuning, launch_finetuning
from instrdiv.launch.flags import (
    ListParser,
    NameParser,
    NumberParser,
    define,
    define_against_flags,
    define_many,
    define_row_flags,
    define_switch,
)
from instrdiv.models.lora import Lora
from instrdiv.reports.mixture_report import draw, write_mixture_report
from instrdiv.runs.adapter_tests import HeldOutTests, read_losses
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.encrypted import EncryptedSetting, plain_rows, training_rows
from instrdiv.training.pretraining import SmallBase
from instrdiv.training.recipe import Recipe

NAME = "finetune_mixtures"

_SMALL = Recipe(steps=4, batch_size=8, schedule="cosine", adam_b2=0.98, precision="float32", reports=2)

PRESETS = {
    "smoke": Preset(
        MixingSetting("plain", max_length=64, epochs=2, held_out=16),
        seeds=2,
        tuning=Tuning(
            Lora(4, 8.0),
            5e-3,
            _SMALL,
            SmallBase(layers=1, width=16, heads=2, mlp_width=32, instructions=64, examples=256, recipe=_SMALL),
        ),
    ),
    "paper": Preset(
        MixingSetting("alpaca", max_length=768, epochs=3, held_out=256),
        tuning=Tuning(
            Lora(64, 128.0),
            1e-5,
            Recipe(batch_size=4, microbatch_size=1, remat=True, precision="bfloat16"),
            int8=True,
        ),
    ),
}
#: Presets that need no data files: the setting of their plain and encrypted rewriting, and their default mixtures.
OWN_DATA = {
    "smoke": EncryptedSetting(
        instructions=16, examples=128, keys=2, alphabet_size=12, input_length=8, separator="none"
    ),
}
OWN_MIXTURES = {"smoke": ("plain=64", "plain=48,encrypted=16")}


def study(asked: Asked) -> Study:
    """One member per mixture and seed. Raises BadInput for missing or incompatible flags."""
    values, (setting,), own = asked.flags, asked.settings, OWN_DATA.get(asked.flags.preset)
    mixtures = values.mixtures or (() if values.data else OWN_MIXTURES.get(values.preset, ()))
    for name, there, what in (
        ("base", asked.tuning.small or values.base, "DIR, a checkpoint directory"),
        ("data", own or values.data, "NAME=FILE,…, the data sources"),
        ("mixtures", mixtures, "SOURCE=ROWS,…, once for each mixture"),
    ):
        if not there:
            raise BadInput(f"--{name}: must be given, --{name}={what}; --preset=smoke needs none of these")
    steps, epochs = values["config.steps"].value, values.epochs or values["config.epochs"].value
    if steps and epochs:
        raise BadInput(f"--epochs={epochs:g}: give this or --config.steps={steps}, not both")
    for name, needed in (("against_field", "against"), ("schema", "data")):
        if values[name].value and not values[needed].value:
            raise BadInput(f"--{name}={values[name].value}: has no effect without --{needed}")
    taken = [Mixture.parse(text, values.budget, "--mixtures") for text in mixtures]

    def make(tokenizer: Tokenizer, say) -> Trained:
        say("reading the data")
        empty: list[str] | None = [] if values.drop_empty else None
        sources = read_sources(values.data, values.schema, empty) if values.data else own_sources(own)
        fields = f"instruction={values.against_field},response={values.against_field}" if values.against_field else None
        evaluation = [row for location in values.against or () for row in read_rows(location, fields)]
        data = mix(sources, taken, asked.seeds, setting, tokenizer, evaluation, not values.unpacked, empty or (), say)
        members = [asked.member(row | columns(asked), seed) for row, seed in data.settings()]
        recipe = asked.tuning.recipe
        if not steps:
            most = max(len(packed.tokens) for packed in data.packed)
            recipe = dataclasses.replace(recipe, steps=math.ceil(setting.epochs * most / recipe.batch_size))
        text = data.text(recipe.steps * recipe.batch_size)
        return Trained(members, data.packed, recipe, HeldOutTests(NAME, data), text)

    return Study(make, own or EncryptedSetting())


def columns(asked: Asked) -> dict:
    """Columns of the tables that describe how the data were made."""
    values, setting = asked.flags, asked.settings[0]
    return {
        "template": setting.template,
        "max_length": setting.max_length,
        "examples_a_row": "one" if values.unpacked else "several",
        "duplicates": setting.duplicates,
        "against": "+".join(Path(location).name for location in values.against or ()) or "none",
        "held_out": setting.held_out,
    }


def own_sources(setting: EncryptedSetting | None) -> dict[str, list[Text]]:
    """Rows of plain and of encrypted rewriting, used when no data files are given."""
    assert setting is not None
    rows = {"plain": plain_rows(setting, seed=0, count=setting.examples), "encrypted": training_rows(setting, seed=0)}
    return {name: [dataclasses.replace(row, source=name) for row in of_source] for name, of_source in rows.items()}


def define_flags(values: FlagValues) -> None:
    help = "FILE or SOURCE=FILE, where FILE is .jsonl, .json, .parquet, a directory, or hub:owner/name"
    define(values, ListParser(NameParser()), "data", help)
    define_row_flags(values)
    help = "SOURCE=ROWS,…, or SOURCE=SHARE,… with --budget; one flag per mixture"
    define_many(values, NameParser(), "mixtures", help)
    define(values, NumberParser(int, low=1), "budget", "total rows of each mixture, if --mixtures gives shares")
    define_against_flags(values)
    define_switch(values, "unpacked", "put one padded example in a row, instead of as many as fit")


FINETUNING = FineTuningFigure(
    NAME,
    PRESETS,
    study,
    draw,
    unjudged="held-out loss is not what the paper reports",
    read=read_losses,
    report=lambda run_dir, claims: write_mixture_report(run_dir),
    has_tests=False,
    aliases=[field.name for field in dataclasses.fields(MixingSetting)],
    define_flags=define_flags,
    default="paper",
)

if __name__ == "__main__":
    launch_finetuning(FINETUNING)
