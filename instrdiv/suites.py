"""Suites: trained members, decoded on tests that their run did not ask for.

A suite is a list of *conditions*. A condition says how test examples are made (which rules, and what differs from the
member's own setting) and what the prompt shows. Its rows have the split ``unseen`` and a slice such as
``occurrences_tested=5/has_op``, so they never meet the run's own rows. But for the suite ``no_op``, all tests are
has-op. Test i of a condition has the same key for all members that share a ``split_seed``, and the same held-out rule
for all that share a rule source; no condition ever tests a rule that the member was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.decoding import Answers, GroupDecoder, Prompts
from instrdiv.errors import ERRORS, classify
from instrdiv.evaluation import (
    SLICES,
    identity,
    make_test_set,
    result_row,
    seen_rules,
    stream_of_split,
)
from instrdiv.population import (
    SUITE_STREAM,
    TEST_STREAM,
    Group,
    RulePools,
    build_rules,
    common_shape,
    make_mesh,
    stack_knobs,
    stream_key,
)
from instrdiv.results import Row, status_of
from instrdiv.rewriting.alphabet import END
from instrdiv.rewriting.examples import Rules, TaskShape
from instrdiv.rewriting.families import FAMILIES
from instrdiv.rewriting.rules import RuleSource, RuleTable, same_strings, seen_in
from instrdiv.saved import SavedRun
from instrdiv.settings import BadInput, Member, Setting, alphabet_of
from instrdiv.sweep import Options, Sweep
from instrdiv.training import Trainer

_ENUMERATE_BELOW = 1 << 16  # up to so many pairs of trained strings are all tried


@dataclasses.dataclass(frozen=True)
class Subject:
    """A member to be tested under one condition.

    Attributes:
      member: as it was trained.
      setting: as it is tested.
      pool: the rules it was given.
      dev_tests, tests: how many held-out rules were used for tuning, and how many tests are wanted.
    """

    member: Member
    setting: Setting
    pool: RuleTable
    dev_tests: int
    tests: int

    @functools.cached_property
    def trained(self) -> RuleTable:
        """The rules it was trained on: those of its pool that have an example."""
        return self.pool[np.flatnonzero(self.member.rule_counts())]


@dataclasses.dataclass(frozen=True)
class Condition:
    """How tests are made.

    Attributes:
      name: the slices of its rows begin with it.
      rules: the rules it tests, one test a rule; as many as there are, up to ``tests``.
      changes: fields of the setting in which the tests differ from the training.
      prompt: what stands for the rule in the prompt: the ``rule`` itself, another test's (``shuffled``), or padding
        (``blanked``). Where shuffled, only tests count whose two rules give different answers.
      slices: of ``evaluation.SLICES``.
    """

    name: str
    rules: Callable[[Subject], RuleTable]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = "rule"
    slices: tuple[str, ...] = ("has_op",)

    def setting(self, member: Member) -> Setting:
        """The setting that tests of this member are made with. Raises BadInput where there can be none."""
        setting = dataclasses.replace(member.setting, **({"no_op_fraction": 0.0} | dict(self.changes)))
        setting.validate()
        return setting


def held_out(subject: Subject) -> RuleTable:
    """Held-out rules of the tested setting; the run's own ``unseen`` rules where that has the member's rule source."""
    source = subject.setting.rule_source
    skip = subject.dev_tests if source == subject.member.setting.rule_source else 0
    return _held_out(source, skip, subject.tests)


@functools.lru_cache(maxsize=64)
def _held_out(source: RuleSource, skip: int, tests: int) -> RuleTable:
    """The held-out rules after the first ``skip``: ``tests`` of them, or as many as there are."""
    capacity = source.capacity(held_out=True)
    size = skip + tests if capacity is None else min(skip + tests, capacity)
    return build_rules(source, size, seed=None)[skip:] if size > skip else _no_rules(source)


def unseen_pattern(subject: Subject) -> RuleTable:
    """Patterns that were never trained, with trained replacements."""
    rules = held_out(subject)
    rules = RuleTable(rules.patterns, _some_trained(subject, len(rules)).replacements)
    return rules[~seen_in(subject.trained.patterns, rules.patterns)]


def unseen_replacement(subject: Subject) -> RuleTable:
    """Trained patterns, with replacements that were never trained."""
    rules = held_out(subject)
    rules = RuleTable(_some_trained(subject, len(rules)).patterns, rules.replacements)
    return rules[~seen_in(subject.trained.replacements, rules.replacements)]


def unseen_pair(subject: Subject) -> RuleTable:
    """Trained patterns with trained replacements, in pairs that were never trained (see ``untrained``)."""
    trained, seed = subject.trained, subject.member.seed
    pairs = len(trained) ** 2
    count = pairs if pairs <= max(_ENUMERATE_BELOW, 8 * subject.tests) else 2 * subject.tests
    words = np.random.Philox(key=np.array([seed, 0x70616972], np.uint64)).random_raw(count)
    # All pairs in a random order, or some at random.
    chosen = np.argsort(words, kind="stable") if count == pairs else (words % np.uint64(pairs)).astype(np.int64)
    pattern, replacement = np.divmod(chosen, len(trained))
    return RuleTable(trained.patterns[pattern], trained.replacements[replacement])


def untrained(subject: Subject, rules: RuleTable) -> RuleTable:
    """Those of the rules that can be tested: distinct ones, never trained, that change what they apply to."""

    def pairs(table: RuleTable) -> np.ndarray:
        return np.concatenate([table.patterns, table.replacements], axis=1)

    rules = rules[~same_strings(rules) & ~seen_in(pairs(subject.trained), pairs(rules))]
    _, first = np.unique(pairs(rules), axis=0, return_index=True)
    return rules[np.sort(first)][: subject.tests]


def _some_trained(subject: Subject, count: int) -> RuleTable:
    """Trained rules, each equally often."""
    return subject.pool[seen_rules(subject.member, count)]


def _no_rules(source: RuleSource) -> RuleTable:
    widths = (source.pattern.length_max, source.replacement.length_max)
    return RuleTable(*(np.zeros((0, width), np.uint8) for width in widths))


#: The conditions that a member of this setting can be tested under. BadInput where it can be under none.
Suite = Callable[[Setting], list[Condition]]


def _suite_held_out(setting: Setting) -> list[Condition]:
    return [
        Condition("held_out", held_out),
        Condition("held_out=pattern", unseen_pattern),
        Condition("held_out=replacement", unseen_replacement),
        Condition("held_out=rule", unseen_pair),
        Condition("rule_blanked", held_out, prompt="blanked"),
        Condition("rules_shuffled", held_out, prompt="shuffled"),
    ]


def _suite_no_op(setting: Setting) -> list[Condition]:
    half = {"no_op_fraction": 0.5, "near_miss_fraction": 0.5}
    return [Condition("no_op", held_out, half, slices=("has_op", "no_op", "near_miss"))]


def _suite_occurrences(setting: Setting) -> list[Condition]:
    room = setting.shortest_input // setting.pattern_length
    return [
        Condition(f"occurrences_tested={count}", held_out, {"occurrences": (count,)})
        for count in (1, 2, 3, 5, 10, 15, 20)
        if count <= room
    ]


def _suite_families(setting: Setting) -> list[Condition]:
    conditions = []
    for family in FAMILIES:
        orders = [1] if family == "free" else range(2, setting.pattern_length + 1)
        for order in orders:
            if family not in ("free", "repeated") and order == setting.pattern_length == setting.longest_replacement:
                continue  # one letter throughout: the rules of repeated_k again
            name = "free" if family == "free" else f"{family}_{order}"
            changes = {"family": family, "k_min": order, "k_max": order}
            condition = Condition(f"family_tested={name}", held_out, changes)
            try:
                condition.setting(Member(setting, 0))
            except BadInput:  # no length of both strings has this order
                continue
            conditions.append(condition)
    return conditions


def _suite_lengths(setting: Setting) -> list[Condition]:
    if setting.positions == "learned":
        raise BadInput("learned positions know no length but the trained one: train with "
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


@dataclasses.dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
      results, errors, samples: rows of the tables.
      left_out: lines that say what could not be tested, and why.
    """

    results: list[Row] = dataclasses.field(default_factory=list)
    errors: list[Row] = dataclasses.field(default_factory=list)
    samples: list[Row] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


def evaluate(
    saved: SavedRun,
    suites: Mapping[str, Suite],
    members: Sequence[str] | None = None,
    step: int | None = None,
    tests: int | None = None,
    options: Options | None = None,
    samples: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Tests saved members.

    Args:
      saved: the run.
      suites: by name, as in ``SUITES``.
      members: ids; all by default.
      step: a saved one; each group's last by default.
      tests: tests a condition, as far as there are rules; those of the run by default.
      options: layout on the machine.
      samples: answers to return, a member and slice.
      say: is told what is being done.

    Raises BadInput for a member or a step that is not there, and where nothing can be tested.
    """
    chosen = _choose(saved, members)
    for group, _ in chosen:
        if step is not None and step not in saved.steps(group):
            listed = ", ".join(map(str, saved.steps(group))) or "none"
            raise BadInput(f"--step={step}: is not saved for group {group.name}; saved are {listed}")
    subjects = [group.members[row] for group, rows in chosen for row in rows]
    layout = (options or Options()).resolve(subjects)
    pools = RulePools(subjects)
    outcome = Evaluation()
    reasons: dict[str, None] = {}
    for group, rows in chosen:
        tester = _GroupTester(saved, group, rows, pools, step, tests or saved.sweep.tests, layout, samples, say)
        for name, suite in suites.items():
            conditions: dict[str, dict[int, Condition]] = {}
            for row in rows:
                try:
                    for condition in suite(group.members[row].setting):
                        condition.setting(group.members[row])
                        conditions.setdefault(condition.name, {})[row] = condition
                except BadInput as reason:
                    reasons[f"--suite={name}: {reason}"] = None
            tester.test(conditions, outcome, say)
    if not outcome.results:
        raise BadInput("; ".join([*reasons, *outcome.left_out]) or "nothing to test")
    outcome.left_out[:0] = reasons
    return outcome


def _choose(saved: SavedRun, members: Sequence[str] | None) -> list[tuple[Group, list[int]]]:
    """The groups with chosen members, and which rows those are."""
    known = [member.id for member in saved.sweep.members]
    unknown = [name for name in members or () if name not in known]
    if unknown:
        listed = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        raise BadInput(f"--members={unknown[0]}: is no member of {saved.path}; its members are {listed}")
    chosen = []
    for group in saved.groups:
        rows = [row for row, member in enumerate(group.members) if members is None or member.id in members]
        if rows:
            chosen.append((group, rows))
    return chosen


class _GroupTester:
    """Tests members of one group, condition after condition; tests of one shape share a compiled program."""

    def __init__(self, saved: SavedRun, group: Group, rows: Sequence[int], pools: RulePools, step: int | None,
                 tests: int, layout: Options, samples: int, say: Callable[[str], None]):  # fmt: skip
        self.sweep, self.group, self.pools, self.tests = saved.sweep, group, pools, tests
        self.samples, self.layout = samples, layout
        self.step, self.params, self.diverged_at = saved.params(group, step, say)
        self.decoder = functools.cache(self._make_decoder)

    def _make_decoder(self, shape: TaskShape) -> GroupDecoder:
        assert self.layout.devices and self.layout.members_per_vmap
        mesh = make_mesh(self.layout.devices, self.layout.data_parallel)
        size = -(-min(1024, self.tests) // self.layout.data_parallel) * self.layout.data_parallel
        return GroupDecoder(self.group, shape, mesh, self.layout.members_per_vmap, size)

    def test(
        self, conditions: Mapping[str, Mapping[int, Condition]], outcome: Evaluation, say: Callable[[str], None]
    ) -> None:
        """Adds the rows of these conditions: name -> row of the group -> condition."""
        members = self.group.members
        settings = {(n, row): c.setting(members[row]) for n, of_row in conditions.items() for row, c in of_row.items()}
        shape = common_shape([self.group.shape, *(setting.task_shape for setting in settings.values())])
        for number, (name, of_row) in enumerate(conditions.items(), 1):
            say(f"group {self.group.name}, step {self.step}: {name} ({number} of {len(conditions)})")
            rules = {}
            for row, condition in of_row.items():
                subject = Subject(
                    members[row], settings[name, row], self.pools.of(members[row]), self.sweep.dev_tests, self.tests
                )
                rules[row] = untrained(subject, condition.rules(subject))
            none = [members[row].id for row in of_row if len(rules[row]) == 0]
            if none:
                outcome.left_out.append(f"{name} has no rules to test for {', '.join(none)}")
            rows = [row for row in of_row if len(rules[row])]
            if rows:
                condition = of_row[rows[0]]
                prompts = self._prompts(condition, [settings[name, row] for row in rows], [rules[r] for r in rows])
                params = jax.tree.map(lambda leaf, rows=rows: leaf[rows], self.params)
                answers = self.decoder(shape).answers(params, prompts)
                counts, samples = tally(answers, condition, self.samples, self.group)
                self._add(outcome, name, condition, rows, counts, samples)

    def _prompts(self, condition: Condition, settings: Sequence[Setting], rules: Sequence[RuleTable]) -> Prompts:
        number = zlib.crc32(condition.name.encode())
        seeds = jnp.array([setting.split_seed for setting in settings], jnp.uint32)
        keys = jax.vmap(lambda seed: jax.random.fold_in(stream_key(SUITE_STREAM, seed), number))(seeds)
        shown = rules
        if condition.prompt == "shuffled":
            shown = [table[np.roll(np.arange(len(table)), -1)] for table in rules]
        return Prompts(stack_knobs(settings), keys, rules, shown, blanked=condition.prompt == "blanked")

    def _add(self, outcome: Evaluation, name: str, condition: Condition, rows: Sequence[int], counts, samples) -> None:
        for place, row in enumerate(rows):
            member = self.group.members[row]
            who = identity(self.sweep.figure, self.group, member, self.step)
            status = status_of(self.diverged_at[row])
            for column, slice in enumerate(condition.slices):
                tests, right, *_ = map(int, counts[place, column])
                if not tests:
                    outcome.left_out.append(f"{name}/{slice} has no test for {member.id}")
                    continue
                outcome.results.append(result_row(who, member, "unseen", f"{name}/{slice}", right, tests, status))
                outcome.errors += error_rows(who, "unseen", f"{name}/{slice}", counts[place, column])
                outcome.samples += [
                    who | {"split": "unseen", "slice": f"{name}/{slice}"} | sample for sample in samples[place, column]
                ]


def split_prompts(sweep: Sweep, group: Group, pools: RulePools, split: str) -> Prompts:
    """The tests of a split, as ``evaluation`` makes them, to be decoded."""
    rules = make_test_set(split, group.members, pools, sweep.dev_tests, sweep.tests).rules
    streams = jnp.array([stream_of_split(split, m.setting.split_seed) for m in group.members], jnp.uint32)
    keys = jax.vmap(lambda stream: stream_key(TEST_STREAM, stream))(streams)
    return Prompts(stack_knobs([member.setting for member in group.members]), keys, rules, rules)


def decode_split(
    sweep: Sweep, trainer: Trainer, pools: RulePools, split: str, piece: int, samples: int = 8
) -> tuple[list[Row], list[Row]]:
    """Rows of errors.csv and samples.csv for the has-op tests of a split, of every member in training.

    The tests are those of ``evaluation``. ``piece`` is the number of tests a call of the compiled program, a multiple
    of the mesh's data axis; ``samples`` the number of answers to return, a member.
    """
    group = trainer.group
    prompts = split_prompts(sweep, group, pools, split)
    decoder = GroupDecoder(group, group.shape, trainer.mesh, trainer.members_per_vmap, piece)
    condition = Condition(split, held_out)
    counts, shown = tally(decoder.answers(trainer.state.params, prompts), condition, samples, group)
    errors, sampled = [], []
    for row, member in enumerate(group.members):
        who = identity(sweep.figure, group, member, trainer.step)
        if counts[row, 0, 0]:
            errors += error_rows(who, split, "has_op", counts[row, 0])
        sampled += [who | {"split": split, "slice": "has_op"} | sample for sample in shown[row, 0]]
    return errors, sampled


def tally(
    answers: Iterable[Answers], condition: Condition, samples: int, group: Group
) -> tuple[np.ndarray, dict[tuple[int, int], list[Row]]]:
    """Counts answers by slice and error, piece by piece.

    Returns:
      int [M, slices, 2 + errors]: tests, right answers, wrong ones of each class; and (member, slice) -> the first
      ``samples`` answers, as ``pattern, replacement, asked, input, answer, decoded, error``.
    """
    counts: Any = 0
    shown: dict[tuple[int, int], list[Row]] = {}
    for piece in answers:
        members, tests = piece.index.shape
        flat = jax.tree.map(lambda leaf, n=members * tests: leaf.reshape(n, *leaf.shape[2:]), piece)
        kinds = classify(flat.rules, flat.text, flat.length, flat.right, flat.decoded).reshape(members, tests)
        counted = (piece.index >= 0) & (piece.differs | (condition.prompt != "shuffled"))
        belongs = np.stack([SLICES[slice](piece, None) & counted for slice in condition.slices], axis=1)
        of_kind = [(belongs & (kinds == kind)[:, None]).sum(-1) for kind in range(-1, len(ERRORS))]
        counts = counts + np.stack([belongs.sum(-1), *of_kind], axis=-1)
        for row, column in np.ndindex(belongs.shape[:2]):
            there = shown.setdefault((row, column), [])
            for test in np.flatnonzero(belongs[row, column])[: samples - len(there)]:
                answer = jax.tree.map(lambda leaf, at=(row, test): leaf[at], piece)
                there.append(_sample(answer, kinds[row, test], condition, group))
    return counts, shown


def _sample(answer: Answers, kind: int, condition: Condition, group: Group) -> Row:
    """One answered test, as text; ``asked`` says what the prompt showed where that is not the rule."""
    alphabet = alphabet_of(group.config)

    def spelled(rule: Rules) -> tuple[str, str]:
        return (
            alphabet.decode(rule.patterns[: rule.pattern_lengths]),
            alphabet.decode(rule.replacements[: rule.replacement_lengths]),
        )

    def before_end(tokens: np.ndarray) -> str:
        ends = np.flatnonzero(tokens == END)
        return alphabet.decode_tokens(tokens[: ends[0]] if len(ends) else tokens)

    pattern, replacement = spelled(answer.rules)
    asked = {"rule": "", "blanked": "no rule", "shuffled": " -> ".join(spelled(answer.shown))}
    return {
        "pattern": pattern,
        "replacement": replacement,
        "asked": asked[condition.prompt],
        "input": alphabet.decode(answer.text[: answer.length]),
        "answer": before_end(answer.right),
        "decoded": before_end(answer.decoded),
        "error": "" if kind < 0 else ERRORS[kind],
    }


def error_rows(who: Row, split: str, slice: str, counts: np.ndarray) -> list[Row]:
    """The rows of errors.csv of one member and slice; ``counts`` is a row of ``tally``."""
    tests, _, *wrong = map(int, counts)
    return [
        who | {"split": split, "slice": slice, "error": error, "count": count, "tests": tests}
        for error, count in zip(ERRORS, wrong, strict=True)
    ]
