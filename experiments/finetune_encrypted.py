"""P1 (arXiv 2402.10891) section 5: a pretrained model learns to follow encrypted rules from populations of adapters.

    python -m experiments.finetune_encrypted --preset=laptop
    python -m experiments.finetune_encrypted --preset=paper --base=DIR --run_dir=runs/llama2

Each adapter (LoRA) is trained on I rules that are given through a cipher whose key is in the prompt; then it is asked
to follow rules it never saw. A training set is left whole, or half of it is dropped: half of every rule's examples, or
all examples of some rules and few of others.

preset   base                                                hardware        time
smoke    a decoder that learned nothing                      two CPU cores   half a minute
laptop   a small Llama, pretrained here on plain rewriting   two CPU cores   17 minutes (measured)
paper    Llama-2-7B: its checkpoint, which ``--base`` names  one H200        not run

``--base`` takes any checkpoint that docs/finetuning.md lists. At rank 512 an adapter takes 4.3 GB while it is
trained (on q_proj and v_proj): name some of the settings (``--config.instructions``, ``--config.kept``, ``--seeds``) at
a time.

Expected (the paper, figure 5): more rules generalise better; to drop half of the data evenly costs nothing, to drop it
unevenly does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh

from instrdiv import plots, thresholds
from instrdiv.checkpoints import Schedule
from instrdiv.directories import check_usable, locked
from instrdiv.finetuning.answering import answers, is_right
from instrdiv.finetuning.config import ModelConfig
from instrdiv.finetuning.encrypted import (
    KEPT,
    SPLITS,
    EncryptedSetting,
    is_no_op,
    plain_test_rows,
    rows_of_split,
    training_rows,
)
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
from instrdiv.finetuning.packing import Packed, pack, tokenise
from instrdiv.finetuning.pretraining import SmallBase
from instrdiv.finetuning.report import (
    IDENTITY,
    SAMPLE_COLUMNS,
    result_row,
    settings_of,
    write_report,
    write_results,
)
from instrdiv.finetuning.run import FineTuned, finetune
from instrdiv.finetuning.sources import Row as Text
from instrdiv.finetuning.templates import make_template
from instrdiv.finetuning.tokenizer import Tokenizer
from instrdiv.finetuning.training import AdapterMember, Recipe, check
from instrdiv.launcher import (
    NumberParser,
    define,
    define_preset_flag,
    define_setting_flags,
    print_claims,
    setting_flags,
    start,
)
from instrdiv.progress import telling
from instrdiv.results import Row, read_table, write_table
from instrdiv.settings import BadInput

FLAGS = flags.FLAGS
NAME = "finetune_encrypted"
#: Fields that take a list: what the figure varies.
SWEPT = ("instructions", "kept")
#: Answers of a member and split that samples.csv keeps.
SAMPLES = 20
#: Columns of base.csv: what the base does without an adapter, on ``plain`` rules and on ``unseen`` encrypted ones.
BASE_COLUMNS = ("split", "slice", "exact_match", "tests")


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of the experiment.

    Attributes:
      setting: what is the same for all members.
      instructions: numbers of rules; each is trained with every way of ``KEPT``.
      lora, learning_rate, recipe: of the members.
      small: the base that is trained first; None where ``--base`` has to name one.
      seeds, dev_tests, tests: as everywhere. ``unseen_dev`` is for tuning, and tested first.
      int8: hold the base in eight bits.
      judged: large enough to bear out, or contradict, what the paper says.
    """

    setting: EncryptedSetting
    instructions: tuple[int, ...]
    lora: Lora
    learning_rate: float
    recipe: Recipe
    small: SmallBase | None
    seeds: int = 3
    dev_tests: int = 256
    tests: int = 1_000
    int8: bool = False
    judged: bool = True


_LETTERS = EncryptedSetting(examples=16_384, keys=2, alphabet_size=12, input_length=8, separator="none")
_RECIPE = Recipe(
    steps=800, batch_size=64, schedule="cosine", warmup_steps=50, final_rate=0.02, adam_b2=0.98, precision="float32",
    reports=20,
)  # fmt: skip

PRESETS = {
    "smoke": Preset(
        setting=dataclasses.replace(_LETTERS, examples=64),
        instructions=(4, 16),
        lora=Lora(4, 8.0),
        learning_rate=6e-3,
        recipe=dataclasses.replace(_RECIPE, steps=4, batch_size=8, warmup_steps=1, reports=2),
        small=SmallBase(
            layers=1, width=16, heads=2, mlp_width=32, instructions=64, examples=256,
            recipe=dataclasses.replace(_RECIPE, steps=4, batch_size=8, warmup_steps=1, reports=2),
        ),
        seeds=1,
        dev_tests=8,
        tests=16,
        judged=False,
    ),
    "laptop": Preset(
        setting=_LETTERS,
        instructions=(64, 256, 1024, 4096),
        lora=Lora(16, 32.0),
        learning_rate=8e-3,
        recipe=dataclasses.replace(_RECIPE, microbatch_size=8),  # what fits into a core's cache
        small=SmallBase(
            layers=3, width=64, heads=4, mlp_width=128, instructions=8_192, examples=51_200,
            recipe=dataclasses.replace(_RECIPE, weight_decay=0.1),
        ),
    ),
    "paper": Preset(
        setting=EncryptedSetting(),
        instructions=(100, 300, 1_000, 3_000, 9_000),
        lora=Lora(512, 1024.0, ("q_proj", "v_proj")),
        learning_rate=1e-5,
        recipe=Recipe(steps=2_000, batch_size=64, microbatch_size=8, remat=True, precision="bfloat16"),
        small=None,
        tests=5_000,
        int8=True,
    ),
}  # fmt: skip


def main() -> None:
    preset = PRESETS[FLAGS.preset]
    run_dir = Path(FLAGS.run_dir or f"runs/{NAME}-{FLAGS.preset}")
    members, recipe = make_members(preset)
    for member in members:
        encrypted(member).validate()
    recipe.validate()
    if preset.small is None and not FLAGS.base:
        raise BadInput(f"--preset={FLAGS.preset}: needs --base=DIR, the directory of a checkpoint (docs/finetuning.md)")
    mesh, int8 = mesh_of_flags(), int8_of_flags(preset.int8)
    check_usable(run_dir)
    print(f"{NAME}, preset {FLAGS.preset}, {run_dir}", flush=True)
    with telling() as say:
        base = Base.of_flags(run_dir, preset.small, encrypted(members[0]), mesh, say)
        config, tokenizer = base.config, base.tokenizer
        say("making the data")
        data = pack_all(members, tokenizer)
        check(config, members, data, recipe, mesh)
        print(plan(config, members, recipe, data[0].tokens.shape[1], int8), flush=True)
        weights = base.weights(recipe, mesh, int8, say)
        if FLAGS.dry_run:
            print(forecast(config, weights, members, data, recipe, mesh, say))
            return
    tuned = finetune(config, weights, members, data, recipe, mesh, run_dir, NAME, str(base.path),
                     overwrite=FLAGS.overwrite, schedule=Schedule(FLAGS.checkpoint_minutes))  # fmt: skip
    tests = FLAGS.tests or preset.tests
    if not is_tested(run_dir, members, recipe, tests):
        with locked(run_dir), telling() as say:
            tables = test(config, weights, tokenizer, tuned, recipe, mesh, tests, preset.dev_tests, say)
            write_table(run_dir / "base.csv", tables.base, BASE_COLUMNS)
            write_table(run_dir / "samples.csv", tables.samples, SAMPLE_COLUMNS)
            write_results(run_dir / "results.csv", tables.results)  # last: with it, all is there
    results, of_base = read_table(run_dir / "results.csv", IDENTITY), read_table(run_dir / "base.csv", BASE_COLUMNS)
    draw(results, of_base, run_dir / "figure")
    found = judge(results, preset)
    thresholds.write_claims(run_dir / "claims.csv", found)
    report = write_report(run_dir, found)
    print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'results.csv'}")


def make_members(preset: Preset) -> tuple[list[AdapterMember], Recipe]:
    """The members that preset and flags ask for, and how they are trained."""
    given = setting_flags(EncryptedSetting)
    counts, kept = given.pop("instructions", preset.instructions), given.pop("kept", KEPT)
    for name, values in (("instructions", counts), ("kept", kept)):
        if len(set(values)) < len(values):
            raise BadInput(f"--config.{name}={','.join(map(str, values))}: names a value twice")
    lora = lora_of_flags(preset.lora)
    rate = preset.learning_rate if FLAGS.learning_rate is None else FLAGS.learning_rate
    members = []
    for count, way, seed in itertools.product(counts, kept, range(FLAGS.seeds or preset.seeds)):
        setting = dataclasses.replace(preset.setting, **given, instructions=count, kept=way)
        members.append(AdapterMember(lora, rate, seed, setting.as_row()))
    return members, dataclasses.replace(preset.recipe, **setting_flags(Recipe))


def encrypted(member: AdapterMember) -> EncryptedSetting:
    """What a member is trained on."""
    return EncryptedSetting(**member.setting)


def pack_all(members: Sequence[AdapterMember], tokenizer: Tokenizer) -> list[Packed]:
    """Every member's training set, an example a row, all as long as the longest example."""
    template = make_template("plain", tokenizer)
    examples = [list(tokenise(training_rows(encrypted(m), m.seed), template, tokenizer)) for m in members]
    longest = max(len(example.tokens) for of_member in examples for example in of_member)
    return [pack(of_member, longest, tokenizer.pad_id, several=False)[0] for of_member in examples]


def is_tested(run_dir: Path, members: Sequence[AdapterMember], recipe: Recipe, tests: int) -> bool:
    """Whether results.csv has these members at their end, with so many tests."""
    if not (run_dir / "results.csv").exists():
        return False
    rows = read_table(run_dir / "results.csv", IDENTITY)
    found = {(r["member"], r["step"], r["tests"]) for r in rows if (r["split"], r["slice"]) == ("unseen", "all")}
    return found == {(member.id, recipe.steps, tests) for member in members}


@dataclasses.dataclass(frozen=True)
class Tables:
    """What is found by testing; rows of results.csv, base.csv and samples.csv."""

    results: list[Row]
    base: list[Row]
    samples: list[Row]


def test(
    config: ModelConfig, weights: Any, tokenizer: Tokenizer, tuned: FineTuned, recipe: Recipe, mesh: Mesh, tests: int,
    dev_tests: int, say: Callable[[str], None],
) -> Tables:  # fmt: skip
    """Asks every member all splits, and the base, which knows no cipher, plain rules and encrypted ones."""
    tables = Tables([], [], [])
    template = make_template("plain", tokenizer)
    status = {row["member"]: row["status"] for row in tuned.metrics}
    adapters, scale = tuned.population(config)

    def ask(texts: Sequence[Sequence[Text]], adapters: Any = None, scale: Any = None) -> list[list[str]]:
        longest = max(len(tokenizer.encode(text.response)) for text in texts[0]) + 1  # and the end
        return answers(config, weights, tokenizer, template, texts, longest, mesh, adapters, scale, recipe.precision)

    for split in SPLITS:
        say(f"testing {split}")
        count = dev_tests if split == "unseen_dev" else tests
        made: dict[tuple, list[Text]] = {}  # all members share the unseen rules
        for member in tuned.members:
            if (key := _tests_of(member, split)) not in made:
                made[key] = rows_of_split(encrypted(member), split, count, dev_tests, member.seed)
        texts = [made[_tests_of(member, split)] for member in tuned.members]
        for member, asked, given in zip(tuned.members, texts, ask(texts, adapters, scale), strict=True):
            for slice, (right, total) in score(asked, given).items():
                row = result_row(
                    NAME, member, recipe.steps, recipe.batch_size, split, slice, right, total, status[member.id]
                )
                tables.results.append(row)
            tables.samples.extend(_samples(member.id, member.seed, recipe.steps, split, asked, given))
    say("testing the base")
    setting = encrypted(tuned.members[0])
    for split, asked in (("plain", plain_test_rows(setting, tests, dev_tests)),
                         ("unseen", rows_of_split(setting, "unseen", tests, dev_tests, 0))):  # fmt: skip
        (given,) = ask([asked])
        for slice, (right, total) in score(asked, given).items():
            tables.base.append({"split": split, "slice": slice, "exact_match": right / total, "tests": total})
        tables.samples.extend(_samples("base", 0, 0, split, asked, given))
    return tables


def _tests_of(member: AdapterMember, split: str) -> tuple:
    """Members that share this share their tests."""
    return (member.seed, *member.setting.values()) if split == "seen" else ()


def score(asked: Sequence[Text], given: Sequence[str]) -> dict[str, tuple[int, int]]:
    """slice -> how many answers are right, of how many; slices without tests are left out."""
    right = np.array([is_right(text, answer) for text, answer in zip(asked, given, strict=True)])
    no_op = np.array([is_no_op(text) for text in asked])
    slices = {"all": np.ones_like(no_op), "has_op": ~no_op, "no_op": no_op}
    return {name: (int(right[of].sum()), int(of.sum())) for name, of in slices.items() if of.any()}


def _samples(member: str, seed: int, step: int, split: str, asked: Sequence[Text], given: Sequence[str]) -> list[Row]:
    """The first answers, as rows of samples.csv."""
    return [
        {"figure": NAME, "member": member, "seed": seed, "step": step, "split": split, "prompt": text.instruction,
         "right_answer": text.response, "answer": answer, "right": int(is_right(text, answer))}
        for text, answer in list(zip(asked, given, strict=True))[:SAMPLES]
    ]  # fmt: skip


def draw(results: Sequence[Row], base: Sequence[Row], path_stem: Path) -> None:
    """Exact match on unseen encrypted rules against the number of rules, for every way the data were dropped."""
    figure = plots.new_figure(9.5, 5.4, "Following encrypted rules that were never trained on")
    axes = figure.add_subplot()
    plots.count_axis(
        axes, {row["instructions"] for row in results}, "number of different rules the adapter was trained on, I"
    )
    plots.match_axis(axes, "exact match (has-op)")
    seen = [row for row in thresholds.select(results, "seen", "has_op") if row["kept"] == "all"]
    if seen:
        plots.curve(
            axes, thresholds.by_value(seen), plots.BAND, "rules it was trained on (all data)", style=":", light=True
        )
    for kept, (label, color, marker, aside) in _WAYS.items():
        rows = [row for row in thresholds.select(results, "unseen", "has_op") if row["kept"] == kept]
        if rows:
            # Side by side: a nudge too small to be read as another number of rules.
            beside = {count * aside: values for count, values in thresholds.by_value(rows).items()}
            plots.curve(axes, beside, color, label, marker)
    for split, label, style in (
        ("plain", "the base, on plain unseen rules", "--"),
        ("unseen", "the base, on encrypted ones", "-."),
    ):
        value = next((row["exact_match"] for row in base if (row["split"], row["slice"]) == (split, "has_op")), None)
        if value is not None:
            axes.axhline(value, color="black", lw=0.9, ls=style, zorder=1, label=f"{label}: {value:.2f}")
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _, same = settings_of(results)
    diverged = len({row["member"] for row in results if row["status"] != "ok"})
    seeds = len({row["seed"] for row in results})
    tested = thresholds.select(results, "unseen", "has_op")[0]["tests"]
    plots.save(
        figure,
        f"{seeds} seeds a setting; {tested:,} unseen has-op tests a model; dots: models; line and bars: mean and 95 % "
        f"t-interval over seeds.\n{same['examples']:,} examples before any are dropped, "
        f"{results[0]['examples_seen']:,} seen. Cipher: {same['cipher']}, {same['keys']} keys, {same['alphabet_size']} "
        f"letters. LoRA of rank {same['rank']}." + (f" {diverged} diverged (left out)." if diverged else ""),
        path_stem,
    )


#: Ways of dropping data: label, colour, marker, and how far aside of the number of rules they are drawn.
_WAYS = {
    "all": ("all examples", plots.UNSEEN, "o", 0.88),
    "half_even": ("half of them, dropped evenly", plots.SEEN, "s", 1.0),
    "half_uneven": ("half of them, dropped unevenly", "#7a3fb8", "^", 1.13),
}


def claims(results: Sequence[Row], low: float = 0.1) -> list[thresholds.Claim]:
    """P1, section 5: few rules do not generalise, more do; dropping half evenly costs nothing, unevenly it does.

    Ways of dropping are compared where any of them passes ``low``: per seed, the mean of the differences at these
    numbers of rules; the interval is over seeds.
    """
    unseen = thresholds.select(results, "unseen", "has_op")
    counts = sorted({row["instructions"] for row in unseen})

    def rows(kept: str, count: int) -> list[Row]:
        return [row for row in unseen if (row["kept"], row["instructions"]) == (kept, count)]

    means = {count: thresholds.mean_of(rows("all", count)) for count in counts}
    match = {(row["kept"], row["instructions"], row["seed"]): row["exact_match"] for row in unseen}
    seeds = sorted({row["seed"] for row in unseen})
    gain = thresholds.mean_interval([match["all", counts[-1], s] - match["all", counts[0], s] for s in seeds])
    evidence = ", ".join(f"I = {count:,}: {mean:.3f}" for count, mean in means.items())
    found = [
        thresholds.Claim(f"few rules do not generalise (below {low})", means[counts[0]] < low, evidence),
        thresholds.Claim(
            "more rules generalise better (the most against the fewest; interval clear of 0)",
            gain.low > 0,
            f"{gain.text('+.3f')}; {evidence}",
        ),
    ]
    able = [count for count in counts if max(thresholds.mean_of(rows(kept, count)) for kept in KEPT) > low]

    def differences(kept: str, other: str) -> thresholds.Interval:
        return thresholds.mean_interval(
            [float(np.mean([match[kept, count, seed] - match[other, count, seed] for count in able])) for seed in seeds]
        )

    where = f"over I = {', '.join(f'{count:,}' for count in able)}, {len(seeds)} seeds"
    even, uneven = differences("half_even", "all"), differences("half_uneven", "half_even")
    text = "dropping half of the data evenly costs nothing (on the mean, less than 0.05)"
    found.append(thresholds.Claim(text, even.mean > -0.05, f"{even.text('+.3f')} {where}"))
    text = "dropping it unevenly costs more than dropping it evenly (interval clear of 0)"
    found.append(thresholds.Claim(text, uneven.high < 0, f"{uneven.text('+.3f')} {where}"))
    return found


def judge(results: Sequence[Row], preset: Preset) -> list[thresholds.Claim] | None:
    """Prints what became of the paper's claims, and returns them; None where the run cannot bear them out."""
    if not preset.judged:
        print(f"verdict: none, the preset {FLAGS.preset} is too small to show anything")
        return None
    changed = any(FLAGS[name].value is not None for name in ("rank", "alpha", "targets", "learning_rate"))
    fewer = (FLAGS.seeds or preset.seeds) < preset.seeds or (FLAGS.tests or preset.tests) < preset.tests
    if setting_flags(EncryptedSetting) or setting_flags(Recipe) or changed or fewer:
        print("verdict: none, the claims are about the preset's own settings, seeds and tests")
        return None
    lost = {row["member"] for row in results if row["status"] != "ok"}
    found = (
        [thresholds.Claim("every adapter trained to its end", False, f"{len(lost)} diverged")]
        if lost
        else claims(results)
    )
    print_claims(found)
    return found


def define_flags() -> None:
    define_preset_flag(PRESETS)
    define_setting_flags(set(SWEPT), EncryptedSetting)
    define_adapter_flags(NAME)
    define(NumberParser(int, low=1), "tests", "held-out rules that are tested at the end (default: the preset's)")


if __name__ == "__main__":
    define_flags()
    start(main)
