"""P1 (arXiv 2402.10891) section 5: a pretrained model learns to follow encrypted rules from populations of adapters.

    python -m experiments.finetune_encrypted --preset=laptop
    python -m experiments.finetune_encrypted --preset=paper --base=DIR --run_dir=runs/llama2

Each LoRA adapter is trained on I rules, encrypted with a cipher whose key is in the prompt, and tested on rules it has
never seen. The training set is kept whole, or half of it is dropped: evenly (half of each rule's examples) or unevenly
(keeping all examples of some rules and few of others).

preset   base                                                hardware        time
smoke    a barely trained tiny decoder                       two CPU cores   half a minute
laptop   a small Llama, pretrained here on plain rewriting   two CPU cores   17 minutes (measured)
paper    Llama-2-7B, a checkpoint given by ``--base``        one H200        not run

``--base`` takes any checkpoint listed in docs/finetuning.md. At rank 512 (on q_proj and v_proj), an adapter takes 4.3
GB during training, so run a few settings at a time (``--config.instructions``, ``--config.kept``, ``--seeds``).

Expected (figure 5 of the paper): more rules generalize better; dropping half of the data evenly costs nothing, dropping
it unevenly hurts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instrdiv.analysis import plots, thresholds
from instrdiv.analysis.claims import Claim
from instrdiv.data.packing import Packed, pack, tokenize
from instrdiv.data.templates import make_template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.evaluation.statistics import Interval, mean_interval
from instrdiv.launch.finetuning import Asked, FineTuningFigure, Preset, Study, Trained, Tuning, launch_finetuning
from instrdiv.models.lora import Lora
from instrdiv.reports.adapter_report import settings_of
from instrdiv.runs.adapter_tests import AnswerTests
from instrdiv.runtime.tables import Row
from instrdiv.tasks.encrypted import (
    ENCRYPTED_SPLITS,
    KEPT,
    EncryptedSetting,
    is_no_op,
    plain_test_rows,
    rows_of_split,
    training_rows,
)
from instrdiv.training.pretraining import SmallBase
from instrdiv.training.recipe import AdapterMember, Recipe

NAME = "finetune_encrypted"

_LETTERS = EncryptedSetting(examples=16_384, keys=2, alphabet_size=12, input_length=8, separator="none")
_RECIPE = Recipe(
    steps=800, batch_size=64, schedule="cosine", warmup_steps=50, final_rate=0.02, adam_b2=0.98, precision="float32",
    reports=20,
)  # fmt: skip

PRESETS = {
    "smoke": Preset(
        dataclasses.replace(_LETTERS, examples=64),
        {"instructions": (4, 16), "kept": KEPT},
        seeds=1,
        dev_tests=8,
        tests=16,
        judged=False,
        tuning=Tuning(
            Lora(4, 8.0), 6e-3, dataclasses.replace(_RECIPE, steps=4, batch_size=8, warmup_steps=1, reports=2),
            SmallBase(
                layers=1, width=16, heads=2, mlp_width=32, instructions=64, examples=256,
                recipe=dataclasses.replace(_RECIPE, steps=4, batch_size=8, warmup_steps=1, reports=2),
            ),
        ),
    ),
    "laptop": Preset(
        _LETTERS,
        {"instructions": (64, 256, 1024, 4096), "kept": KEPT},
        tests=1_000,
        tuning=Tuning(
            Lora(16, 32.0), 8e-3, dataclasses.replace(_RECIPE, microbatch_size=8),  # fits into a core's cache
            SmallBase(
                layers=3, width=64, heads=4, mlp_width=128, instructions=8_192, examples=51_200,
                recipe=dataclasses.replace(_RECIPE, weight_decay=0.1),
            ),
        ),
    ),
    "paper": Preset(
        EncryptedSetting(),
        {"instructions": (100, 300, 1_000, 3_000, 9_000), "kept": KEPT},
        tests=5_000,
        tuning=Tuning(
            Lora(512, 1024.0, ("q_proj", "v_proj")), 1e-5,
            Recipe(steps=2_000, batch_size=64, microbatch_size=8, remat=True, precision="bfloat16"),
            int8=True,
        ),
    ),
}  # fmt: skip


def study(asked: Asked) -> Study:
    """One member per setting and seed."""
    members = [asked.member(setting.as_row(), seed) for setting in asked.settings for seed in range(asked.seeds)]
    for member in members:
        encrypted(member).validate()

    def make(tokenizer: Tokenizer, say) -> Trained:
        say("making the data")
        data = pack_all(members, tokenizer)
        return Trained(members, data, asked.tuning.recipe, tests(asked, tokenizer))

    return Study(make, rewriting=encrypted(members[0]))


def encrypted(member: AdapterMember) -> EncryptedSetting:
    """The setting of a member's training data."""
    return EncryptedSetting(**member.setting)


def pack_all(members: Sequence[AdapterMember], tokenizer: Tokenizer) -> list[Packed]:
    """Each member's training set, one example per row, padded to the longest example of all members."""
    template = make_template("plain", tokenizer)
    examples = [list(tokenize(training_rows(encrypted(m), m.seed), template, tokenizer)) for m in members]
    longest = max(len(example.tokens) for of_member in examples for example in of_member)
    return [pack(of_member, longest, tokenizer.pad_id, several=False)[0] for of_member in examples]


def tests(asked: Asked, tokenizer: Tokenizer) -> AnswerTests:
    """The tests: all splits for each member; plain and encrypted rules for the base, which knows no cipher."""
    dev_tests, first = asked.preset.dev_tests, asked.settings[0]

    def of_member(member: AdapterMember, split: str) -> list:
        count = dev_tests if split == "unseen_dev" else asked.tests
        return rows_of_split(encrypted(member), split, count, dev_tests, member.seed)

    return AnswerTests(
        figure=NAME,
        splits=ENCRYPTED_SPLITS,
        tests=asked.tests,
        of_member=of_member,
        key=lambda member, split: (member.seed, *member.setting.values()) if split == "seen" else (),
        of_base=lambda: {
            "plain": plain_test_rows(first, asked.tests, dev_tests),
            "unseen": rows_of_split(first, "unseen", asked.tests, dev_tests, 0),
        },
        slices={"has_op": lambda text: not is_no_op(text), "no_op": is_no_op},
        tokenizer=tokenizer,
        template=make_template("plain", tokenizer),
    )


def draw(results: Sequence[Row], base: Sequence[Row], path_stem: Path) -> None:
    """Draws exact match on unseen encrypted rules against the number of rules, for each way of dropping data."""
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
            # Shift the curves slightly apart, too little to be mistaken for another number of rules.
            beside = {count * aside: values for count, values in thresholds.by_value(rows).items()}
            plots.curve(axes, beside, color, label, marker)
    for split, label, style in (
        ("plain", "the base, on unseen plain rules", "--"),
        ("unseen", "the base, on unseen encrypted rules", "-."),
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
        f"{seeds} seeds per setting; {tested:,} unseen has-op tests per model; dots: models; line and bars: mean and "
        f"95 % t-interval over seeds.\n{same['examples']:,} examples before any are dropped, "
        f"{results[0]['examples_seen']:,} seen. Cipher: {same['cipher']}, {same['keys']} keys, {same['alphabet_size']} "
        f"letters. LoRA rank {same['rank']}." + (f" {diverged} diverged (left out)." if diverged else ""),
        path_stem,
    )


#: Ways of dropping data -> label, color, marker, and the factor by which the points are shifted along the I axis.
_WAYS = {
    "all": ("all examples", plots.UNSEEN, "o", 0.88),
    "half_even": ("half of them, dropped evenly", plots.SEEN, "s", 1.0),
    "half_uneven": ("half of them, dropped unevenly", "#7a3fb8", "^", 1.13),
}


def claims(results: Sequence[Row], low: float = 0.1) -> list[Claim]:
    """P1, section 5: few rules do not generalize, more do; dropping half evenly costs nothing, unevenly it hurts.

    Ways of dropping are compared at the numbers of rules where any of them exceeds ``low``: the differences there are
    averaged for each seed, and the interval is over seeds.
    """
    unseen = thresholds.select(results, "unseen", "has_op")
    counts = sorted({row["instructions"] for row in unseen})

    def rows(kept: str, count: int) -> list[Row]:
        return [row for row in unseen if (row["kept"], row["instructions"]) == (kept, count)]

    means = {count: thresholds.mean_of(rows("all", count)) for count in counts}
    match = {(row["kept"], row["instructions"], row["seed"]): row["exact_match"] for row in unseen}
    seeds = sorted({row["seed"] for row in unseen})
    gain = mean_interval([match["all", counts[-1], s] - match["all", counts[0], s] for s in seeds])
    evidence = ", ".join(f"I = {count:,}: {mean:.3f}" for count, mean in means.items())
    found = [
        Claim(f"few rules do not generalize (below {low})", means[counts[0]] < low, evidence),
        Claim(
            "more rules generalize better (the most against the fewest; interval clear of 0)",
            gain.low > 0,
            f"{gain.text('+.3f')}; {evidence}",
        ),
    ]
    able = [count for count in counts if max(thresholds.mean_of(rows(kept, count)) for kept in KEPT) > low]

    def differences(kept: str, other: str) -> Interval:
        return mean_interval(
            [float(np.mean([match[kept, count, seed] - match[other, count, seed] for count in able])) for seed in seeds]
        )

    where = f"over I = {', '.join(f'{count:,}' for count in able)}, {len(seeds)} seeds"
    even, uneven = differences("half_even", "all"), differences("half_uneven", "half_even")
    text = "dropping half of the data evenly costs nothing (on the mean, less than 0.05)"
    found.append(Claim(text, even.mean > -0.05, f"{even.text('+.3f')} {where}"))
    text = "dropping it unevenly costs more than dropping it evenly (interval clear of 0)"
    found.append(Claim(text, uneven.high < 0, f"{uneven.text('+.3f')} {where}"))
    return found


FINETUNING = FineTuningFigure(NAME, PRESETS, study, draw, claims)

if __name__ == "__main__":
    launch_finetuning(FINETUNING)
