"""Looks at the data that a setting makes: rules, inputs, answers.

    python -m experiments.show_data --preset=laptop --config.instructions=64 --num=10 --format=text

Any ``--config.<field>`` of the launchers works. The training set is shown in the order of its first epoch.
"""

import dataclasses
import json
import signal

import jax
import numpy as np
from absl import flags

from instrdiv.evaluation import SPLITS, make_test_set, sample_test, seen_rules, stream_of_split
from instrdiv.launcher import (
    FLAGS,
    NumberParser,
    define_preset_flag,
    define_setting_flags,
    refuse_idle_flags,
    setting_flags,
    start,
)
from instrdiv.population import ExampleOrder, RulePools, make_groups, stack_group, training_example
from instrdiv.presets import BASES, DEV_TESTS
from instrdiv.rewriting.examples import Rules
from instrdiv.settings import BadInput, Member, Setting, alphabet_of


def rows(setting: Setting, split: str, count: int, seed: int, dev_tests: int) -> list[dict]:
    """Examples as ``pattern, replacement, input, answer, op, rule_id, split``.

    ``rule_id`` is the rule's place in the seed's pool (``train``, ``seen``) or among the held-out rules; the first
    ``dev_tests`` of those are ``unseen_dev``, the next ones ``unseen``.
    Raises BadInput for a setting that cannot be sampled.
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
        batch = jax.jit(jax.vmap(lambda i: training_example(group.shape, tables, data, i)))(index)
        rule_ids = np.searchsorted(np.asarray(data.cumulative_counts), index, side="right")
    else:
        tests = make_test_set(split, [member], pools, dev_tests, tests=count)
        stream = stream_of_split(split, setting.split_seed)
        make = jax.jit(jax.vmap(lambda rule, i: sample_test(group.shape, data, rule, stream, i)))
        batch = make(Rules.from_table(tests.rules[0][:count]), np.arange(count))
        first = {"unseen_dev": 0, "unseen": dev_tests}
        seen = split.startswith("seen")
        rule_ids = seen_rules(member, count, split == "seen_by_share") if seen else first[split] + np.arange(count)
    alphabet, result = alphabet_of(setting), []
    columns = map(np.asarray, (batch.tokens, batch.occurrences, batch.near_miss))
    for rule_id, tokens, occurrences, near_miss in zip(rule_ids, *columns, strict=True):
        text = alphabet.decode_tokens(tokens).strip("_").removesuffix("$")
        pattern, replacement, string, answer = text.split("#")
        op = "has_op" if occurrences else "near_miss" if near_miss else "no_op"
        result.append({"pattern": pattern, "replacement": replacement, "input": string, "answer": answer, "op": op,
                       "rule_id": int(rule_id), "split": split})  # fmt: skip
    return result


def as_text(shown: list[dict]) -> str:
    """A table for people."""
    names = list(shown[0])
    table = [names] + [[str(row[name]) for name in names] for row in shown]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def main() -> None:
    if hasattr(signal, "SIGPIPE"):  # so that `| head` ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    setting = dataclasses.replace(BASES[FLAGS.preset], **setting_flags())
    refuse_idle_flags([setting])
    shown = rows(setting, FLAGS.split, FLAGS.num, FLAGS.seed, DEV_TESTS[FLAGS.preset])
    print(as_text(shown) if FLAGS.format == "text" else "\n".join(map(json.dumps, shown)))


if __name__ == "__main__":
    define_preset_flag(BASES)
    define_setting_flags()
    flags.DEFINE_enum(
        "split", "train", ["train", *SPLITS], "training set, or the rules of a test split with fresh inputs"
    )
    flags.DEFINE_enum("format", "text", ["text", "jsonl"], "how it is written")
    flags.DEFINE(NumberParser(int, low=1), "num", 10, "how many examples")
    flags.DEFINE(NumberParser(int, low=0, high=2**31 - 1), "seed", 0, "whose rules and inputs")
    start(main)
