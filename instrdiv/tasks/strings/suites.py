"""Suites of string rewriting: looser splits, no-ops, numbers of occurrences, other families, other lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.conditions import Condition, Subject, Suite, held_out
from instrdiv.tasks.strings.families import FAMILIES
from instrdiv.tasks.strings.rules import RuleTable, seen_in

_ENUMERATE_BELOW = 1 << 16  # up to this many pairs of trained strings are all tried


def unseen_pattern(subject: Subject) -> RuleTable:
    """Patterns that were never trained on, with trained replacements."""
    rules = held_out(subject)
    rules = RuleTable(rules.patterns, subject.some_trained(len(rules)).replacements)
    return rules[~seen_in(subject.trained.patterns, rules.patterns)]


def unseen_replacement(subject: Subject) -> RuleTable:
    """Trained patterns, with replacements that were never trained on."""
    rules = held_out(subject)
    rules = RuleTable(subject.some_trained(len(rules)).patterns, rules.replacements)
    return rules[~seen_in(subject.trained.replacements, rules.replacements)]


def unseen_pair(subject: Subject) -> RuleTable:
    """Trained patterns with trained replacements, in pairs that were never trained on (see ``Task.testable``)."""
    trained, seed = subject.trained, subject.member.seed
    pairs = len(trained) ** 2
    count = pairs if pairs <= max(_ENUMERATE_BELOW, 8 * subject.tests) else 2 * subject.tests
    words = np.random.Philox(key=np.array([seed, 0x70616972], np.uint64)).random_raw(count)
    # All pairs in random order, or a random sample.
    chosen = np.argsort(words, kind="stable") if count == pairs else (words % np.uint64(pairs)).astype(np.int64)
    pattern, replacement = np.divmod(chosen, len(trained))
    return RuleTable(trained.patterns[pattern], trained.replacements[replacement])


def _suite_held_out(setting: Any) -> list[Condition]:
    return [
        Condition("held_out", held_out),
        Condition("held_out=pattern", unseen_pattern),
        Condition("held_out=replacement", unseen_replacement),
        Condition("held_out=rule", unseen_pair),
        Condition("rule_blanked", held_out, prompt="blanked"),
        Condition("rules_shuffled", held_out, prompt="shuffled"),
    ]


def _suite_no_op(setting: Any) -> list[Condition]:
    half = {"no_op_fraction": 0.5, "near_miss_fraction": 0.5}
    return [Condition("no_op", held_out, half, slices=("has_op", "no_op", "near_miss"))]


def _suite_occurrences(setting: Any) -> list[Condition]:
    room = setting.shortest_input // setting.pattern_length
    return [
        Condition(f"occurrences_tested={count}", held_out, {"occurrences": (count,)})
        for count in (1, 2, 3, 5, 10, 15, 20)
        if count <= room
    ]


def _suite_families(setting: Any) -> list[Condition]:
    conditions = []
    for family in FAMILIES:
        orders = [1] if family == "free" else range(2, setting.pattern_length + 1)
        for order in orders:
            if family not in ("free", "repeated") and order == setting.pattern_length == setting.longest_replacement:
                continue  # a single repeated letter: the same rules as repeated_k
            name = "free" if family == "free" else f"{family}_{order}"
            changes = {"family": family, "k_min": order, "k_max": order}
            condition = Condition(f"family_tested={name}", held_out, changes)
            try:
                condition.applied_to(setting)
            except BadInput:  # no length of the patterns, or of the replacements, allows this order
                continue
            conditions.append(condition)
    return conditions


def _suite_lengths(setting: Any) -> list[Condition]:
    if setting.positions == "learned":
        raise BadInput("learned positions cover only the trained length: train with "
                       "--config.positions=rotary or --config.positions=none")  # fmt: skip
    lengths = dict.fromkeys(setting.input_length * quarters // 4 for quarters in (2, 3, 4, 5, 6, 8))
    return [
        Condition(
            f"input_length_tested={length}",
            held_out,
            {"input_length": length, "input_length_min": length, "occurrences": (1,)},
        )
        for length in lengths
        if length >= setting.pattern_length
    ]


#: The suites that ``experiments.evaluate`` knows.
SUITES: dict[str, Suite] = {
    "held_out": _suite_held_out,
    "no_op": _suite_no_op,
    "occurrences": _suite_occurrences,
    "families": _suite_families,
    "lengths": _suite_lengths,
}
