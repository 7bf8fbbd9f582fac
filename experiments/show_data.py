"""Prints examples of the data that a setting generates: rules, inputs, answers.

    python -m experiments.show_data --preset=laptop --config.instructions=64 --num=10 --format=text

All ``--config.<field>`` flags of the launchers work. The training set is shown in the order of its first epoch. For
another task, pass the launcher that trains it: ``--task=experiments/jsonl_instructions.py``.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import signal
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl.flags import FlagValues

from instrdiv.config.groups import make_groups
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member, TaskSetting
from instrdiv.config.sizes import DEV_TESTS
from instrdiv.evaluation.test_sets import SPLITS, make_test_set, sample_test, stream_of_split
from instrdiv.launch.flags import (
    NumberParser,
    define,
    define_enum,
    define_preset_flag,
    define_setting_flags,
    define_task_flag,
    refuse_idle_flags,
    setting_flags,
    start,
)
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.known import load_file
from instrdiv.training.order import ExampleOrder
from instrdiv.training.population import stack_group, training_example


def rows(setting: TaskSetting, split: str, count: int, seed: int, dev_tests: int) -> list[dict]:
    """Examples as dicts of the prompt parts, the answer, the example's facts, ``rule_id`` and ``split``.

    In string rewriting: ``pattern, replacement, input, answer, op, rule_id, split``. ``rule_id`` is the rule's index in
    the seed's pool (``train``, ``seen``) or among the held-out rules, of which the first ``dev_tests`` are
    ``unseen_dev`` and the next ones ``unseen``. Raises BadInput for a setting that cannot be sampled.
    """
    setting.validate()
    most = {"train": setting.examples, "unseen_dev": dev_tests}.get(split, count)
    if count > most:
        raise BadInput(f"--num={count}: --split={split} has {most} examples")
    member = Member(setting, seed)
    (group,), pools = make_groups([member]), RulePools([member])
    tables, data = jax.tree.map(jax.numpy.asarray, stack_group(group, pools, 1))
    data = jax.tree.map(lambda leaf: leaf[0], data)
    if split == "train":
        index = ExampleOrder(setting.examples, count).batches(0, 1)[0]
        batch = jax.jit(jax.vmap(lambda i: training_example(group, tables, data, i)))(index)
        rule_ids = np.searchsorted(np.asarray(data.cumulative_counts), index, side="right")
    else:
        tests = make_test_set(split, [member], pools, dev_tests, tests=count)
        stream = stream_of_split(split, setting.split_seed)
        make = jax.jit(jax.vmap(lambda rule, i: sample_test(group, data, rule, stream, i)))
        batch = make(tests.rules[0][:count].arrays(), np.arange(count))
        first = {"unseen_dev": 0, "unseen": dev_tests}
        seen = split.startswith("seen")
        rule_ids = member.seen_rules(count, split == "seen_by_share") if seen else first[split] + np.arange(count)
    batch = jax.device_get(batch)
    made = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(count)]
    return [
        setting.words(example.tokens) | setting.fact_words(example.facts) | {"rule_id": int(rule_id), "split": split}
        for rule_id, example in zip(rule_ids, made, strict=True)
    ]


def as_text(shown: list[dict]) -> str:
    """Formats rows as an aligned text table."""
    names = list(shown[0])
    table = [names] + [[str(row[name]) for name in names] for row in shown]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def bases(argv: Sequence[str]) -> Mapping[str, tuple[TaskSetting, int]]:
    """The presets: name -> (setting, number of ``unseen_dev`` rules).

    Taken from the launcher given by ``--task`` in the flags, otherwise from string rewriting.
    """
    named = []
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag in ("--task", "-task"):
            named.append(value if equals else following)
    if not named:
        of_rewriting = importlib.import_module("instrdiv.config.presets").BASES
        return {name: (base, DEV_TESTS[name]) for name, base in of_rewriting.items()}
    module = load_file(named[-1])
    if not hasattr(module, "FIGURE"):
        raise BadInput(f"--task={named[-1]}: defines no FIGURE; name a launcher")
    return {name: (preset.base, preset.dev_tests) for name, preset in module.FIGURE.presets.items()}


def main(values: FlagValues, presets: Mapping[str, tuple[TaskSetting, int]]) -> None:
    base, dev_tests = presets[values.preset]
    given = setting_flags(values, type(base))
    setting = dataclasses.replace(base, **given)
    refuse_idle_flags([setting], given)
    shown = rows(setting, values.split, values.num, values.seed, dev_tests)
    print(as_text(shown) if values.format == "text" else "\n".join(map(json.dumps, shown)))


def define_flags(values: FlagValues, presets: Mapping[str, tuple[TaskSetting, int]]) -> None:
    define_preset_flag(values, presets)
    define_setting_flags(values, type(next(iter(presets.values()))[0]))
    define_task_flag(values)
    define_enum(
        values, "split", ["train", *SPLITS], "the training set, or the rules of a test split with fresh inputs", "train"
    )
    define_enum(values, "format", ["text", "jsonl"], "output format", "text")
    define(values, NumberParser(int, low=1), "num", "number of examples", 10)
    define(values, NumberParser(int, low=0, high=2**31 - 1), "seed", "the seed whose rules and inputs are shown", 0)


def launch(argv: Sequence[str] | None = None) -> int:
    """Runs this command in this process, with the flags in ``argv`` or, by default, those of the command line."""

    @functools.cache
    def presets() -> Mapping[str, tuple[TaskSetting, int]]:
        return bases(sys.argv[1:] if argv is None else argv)

    def run(values: FlagValues) -> None:
        main(values, presets())

    return start(run, lambda values: define_flags(values, presets()), __doc__, argv, "show_data.py")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # exit quietly when piped into `head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    launch()
