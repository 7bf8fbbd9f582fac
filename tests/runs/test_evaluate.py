"""Suites: which rules and inputs they test, read back from text, and that their numbers are those of the answers."""

import collections
import copy
import dataclasses
import itertools

import numpy as np
import pytest

from experiments.evaluate import shown
from instrdiv.config.layout import Options
from instrdiv.config.pools import RulePools
from instrdiv.config.presets import Setting
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.decoding import GroupDecoder
from instrdiv.evaluation.exact_match import Evaluator
from instrdiv.evaluation.tally import decode_split, slices_of
from instrdiv.evaluation.test_sets import held_out_rules, make_test_set
from instrdiv.runs.evaluate import evaluate
from instrdiv.runs.run import run
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.checkpoints import Schedule
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.tables import read_cells
from instrdiv.tasks.conditions import Condition, Subject
from instrdiv.tasks.counts import rule_counts
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.mistakes import MISTAKES
from instrdiv.tasks.strings.rewriting import SLICES
from instrdiv.tasks.strings.suites import SUITES, unseen_pattern
from tests.commands import command
from tests.worlds import members, tiny, trainer

#: Six letters and rotary positions, so that every suite applies and some answers are right.
WORLD = {"alphabet_size": 6, "input_length": 6, "positions": "rotary", "width": 32, "layers": 2, "learning_rate": 1e-2,
         "no_op_fraction": 0.2, "examples": 512, "batch_size": 16, "epochs": 16.0, "reports": 2}  # fmt: skip
DEV_TESTS, TESTS = 8, 16
ONE_DEVICE = Options(devices=1, members_per_vmap=1)


def those_to_test(subject, rules):
    return subject.setting.testable(subject.trained, rules)[: subject.tests]


def suites(*names):
    return {name: SUITES[name] for name in names}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    population = tuple(Member(tiny(**WORLD, instructions=12 + 12 * seed), seed) for seed in range(2))
    sweep, schedule = Sweep("suite", population, DEV_TESTS, TESTS), Schedule(steps=256)
    run(sweep, path, Options(devices=1), progress=False, keep_params=False, schedule=schedule)
    return SavedRun(path)


@pytest.fixture(scope="module")
def everything(saved):
    """All suites, with every answer."""
    return evaluate(saved, SUITES, samples=TESTS, options=ONE_DEVICE)


def texts(table, letters):
    return [table.text(row, Alphabet(letters)) for row in range(len(table))]


def subject_of(member, condition, tests):
    return Subject(member, condition.setting(member), RulePools([member]).of(member), DEV_TESTS, tests)


def trained_by(member):
    """What a member was trained on, as text: patterns, replacements, rules."""
    s = member.setting
    counts = rule_counts(s.instructions, s.examples, s.tail_shape, s.tail_reading, member.seed)
    rules = texts(RulePools([member]).of(member), s.alphabet_size)
    rules = [rule for rule, count in zip(rules, counts, strict=True) if count]
    return {p for p, _ in rules}, {r for _, r in rules}, set(rules)


class TestRules:
    SETTINGS = (
        {},
        {"held_out": "pattern", "tail_shape": 0.05},
        {"held_out": "replacement", "alphabet_size": 4, "instructions": 30},
        {"held_out": "rule", "pattern_length_min": 1, "replacement_length_min": 0},
        {"family": "repeated+mirrored", "k_min": 2, "k_max": 2, "pattern_length": 4, "instructions": 20},
    )

    @pytest.mark.parametrize("changes", SETTINGS, ids=range(len(SETTINGS)))
    def test_no_condition_tests_a_trained_rule_and_each_keeps_what_it_says(self, changes):
        letters = changes.get("alphabet_size", 6)
        for seed in range(2):
            member = Member(tiny(**WORLD | {"instructions": 16} | changes), seed)
            patterns, replacements, rules = trained_by(member)
            tested = {}
            for suite, condition in ((s, c) for s in SUITES for c in SUITES[s](member.setting)):
                subject = subject_of(member, condition, tests=50)
                tested[condition.name] = texts(those_to_test(subject, condition.rules(subject)), letters)
                these = tested[condition.name]
                assert not set(these) & rules and len(set(these)) == len(these) <= 50, condition.name
                assert all(pattern != replacement for pattern, replacement in these), suite
            assert all(p not in patterns and r in replacements for p, r in tested["held_out=pattern"])
            assert all(p in patterns and r not in replacements for p, r in tested["held_out=replacement"])
            assert all(p in patterns and r in replacements for p, r in tested["held_out=rule"])
            possible = {(p, r) for p, r in itertools.product(patterns, replacements) if p != r} - rules
            assert len(tested["held_out=rule"]) == min(50, len(possible))
            assert tested["held_out"] == tested["rule_blanked"] == tested["rules_shuffled"] != []
            assert not set(tested["held_out"]) & set(texts(held_out_rules(
                member.setting.source, DEV_TESTS, 1)["unseen_dev"], letters))  # fmt: skip

    def test_held_out_rules_are_those_of_the_run_and_shared(self):
        tables = []
        for seed in range(2):
            member = Member(tiny(**WORLD, instructions=12 + seed), seed)
            condition = SUITES["held_out"](member.setting)[0]
            tables.append(those_to_test(s := subject_of(member, condition, TESTS), condition.rules(s)).digest)
        assert {held_out_rules(member.setting.source, DEV_TESTS, TESTS)["unseen"].digest} == set(tables)

    def test_families_have_their_form_and_all_there_is_of_it(self):
        """Brute force over a small world: the rules of a family are all pairs of its held-out strings."""
        member = Member(tiny(**WORLD | {"pattern_length": 4, "alphabet_size": 4}, instructions=16), 0)
        forms = {
            "repeated_2": lambda a, b: a + a + b + b,
            "periodic_2": lambda a, b: a + b + a + b,
            "mirrored_2": lambda a, b: a + b + b + a,
            "repeated_4": lambda a, b: a * 4,
        }
        conditions = {c.name.partition("=")[2]: c for c in SUITES["families"](member.setting)}
        assert set(conditions) == {"free"} | set(forms)
        for name, form in forms.items():
            subject = subject_of(member, conditions[name], tests=1000)
            found = texts(those_to_test(subject, conditions[name].rules(subject)), 4)
            strings = {form(a, b) for a, b in itertools.product("abcd", repeat=2)}
            side = {string for rule in found for string in rule}
            assert side < strings, "some strings are held out, some are not"
            assert set(found) == {(p, r) for p, r in itertools.product(side, repeat=2) if p != r}
            pools = [set(texts(conditions[name].setting(member).source.pool(seed, 6), 4)) for seed in range(9)]
            assert not side & {string for pool in pools for rule in pool for string in rule}

    def test_a_family_without_held_out_rules_has_none(self):
        member = Member(tiny(**WORLD | {"pattern_length": 3, "alphabet_size": 2}, instructions=4), 0)
        condition = next(c for c in SUITES["families"](member.setting) if c.name == "family_tested=repeated_3")
        subject = subject_of(member, condition, TESTS)
        assert len(condition.rules(subject)) == 0


class TestConditions:
    def test_occurrences_are_as_many_as_fit(self):
        names = [c.name for c in SUITES["occurrences"](tiny(input_length=21, input_length_min=20))]
        assert names == [f"occurrences_tested={n}" for n in (1, 2, 3, 5, 10)]

    def test_lengths_need_positions_that_know_them(self):
        lengths = [c.changes["input_length"] for c in SUITES["lengths"](tiny(**WORLD))]
        assert lengths == [3, 4, 6, 7, 9, 12]
        assert SUITES["lengths"](tiny(positions="none"))
        with pytest.raises(BadInput, match="positions=rotary"):
            SUITES["lengths"](tiny())


def by_slice(rows):
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[row["slice"]].append(row)
    return grouped


class TestEvaluation:
    def test_every_answer_is_right_by_its_text_and_each_slice_holds_what_it_says(self, everything):
        for name, rows in by_slice(everything.samples).items():
            condition, _, slice = name.partition("/")
            kind, _, value = condition.partition("=")
            for row in rows:
                pattern, text = row["pattern"], row["input"]
                assert row["answer"] == text.replace(pattern, row["replacement"], 1)
                assert (row["error"] == "") == (row["decoded"] == row["answer"])
                assert (pattern in text) == (slice == "has_op")
                assert len(text) == (int(value) if kind == "input_length_tested" else 6)
                if kind == "occurrences_tested":
                    assert len(text.split(pattern)) > int(value)
                if slice == "near_miss":
                    windows = [text[i : i + 2] for i in range(5)]
                    assert min(sum(a != b for a, b in zip(w, pattern, strict=True)) for w in windows) == 1

    def test_numbers_are_those_of_the_answers(self, everything):
        answers = collections.defaultdict(list)
        for row in everything.samples:
            answers[row["member"], row["slice"]].append(row["error"])
        errors = {(r["member"], r["slice"], r["error"]): (r["count"], r["tests"]) for r in everything.errors}
        assert len(errors) == len(everything.errors) == 4 * len(everything.results)
        for row in everything.results:
            found = answers[row["member"], row["slice"]]
            assert row["tests"] == len(found) and row["exact_match"] == found.count("") / len(found)
            for error in MISTAKES:
                assert errors[row["member"], row["slice"], error] == (found.count(error), len(found))
        classes = {row["error"] for row in everything.samples}
        assert len(classes) >= 4 and "" in classes, "the model must be right now and then, and wrong in several ways"

    def test_every_condition_has_its_rows(self, saved, everything):
        member = saved.sweep.members[0]
        conditions = [condition for suite in SUITES.values() for condition in suite(member.setting)]
        expected = [f"{c.name}/{name}" for c in conditions for name in slices_of(c, type(member.setting))]
        found = [row["slice"] for row in everything.results if row["member"] == member.id]
        missing = [name for name in expected if name not in found]
        assert found == [name for name in expected if name in found] and len(found) > len(expected) - 4
        assert all(any(name.partition("/")[0] in line for line in everything.left_out) for name in missing)
        assert {row["split"] for row in everything.results} == {"unseen"}

    def test_shuffled_rules_ask_for_another_answer(self, saved, everything):
        """Each test's prompt shows the rule of the next one; those where both give one answer do not count."""
        rules = texts(held_out_rules(saved.sweep.members[0].setting.source, DEV_TESTS, TESTS)["unseen"], 6)
        next_rule = dict(zip(rules, [*rules[1:], rules[0]], strict=True))
        rows = by_slice(everything.samples)["rules_shuffled/has_op"]
        for row in rows:
            other = next_rule[row["pattern"], row["replacement"]]
            assert row["input"].replace(*other, 1) != row["answer"] and row["asked"] == " -> ".join(other)
        assert {row["asked"] for row in by_slice(everything.samples)["rule_blanked/has_op"]} == {"no rule"}
        assert {row["asked"] for row in by_slice(everything.samples)["held_out/has_op"]} == {""}
        right = {name: np.mean([not row["error"] for row in by_slice(everything.samples)[f"{name}/has_op"]])
                 for name in ("held_out", "rules_shuffled")}  # fmt: skip
        assert right["rules_shuffled"] <= right["held_out"]

    def test_prompts_show_what_the_condition_says(self, saved, monkeypatch):
        asked = []

        class Recording(GroupDecoder):
            def answers(self, params, prompts):
                asked.append(prompts)
                return super().answers(params, prompts)

        monkeypatch.setattr("instrdiv.runs.evaluate.GroupDecoder", Recording)
        evaluate(saved, suites("held_out"), [saved.sweep.members[0].id], tests=4, options=ONE_DEVICE)
        *plain, blanked, shuffled = asked
        assert len(plain) == 4 and not any(prompts.blanked for prompts in (*plain, shuffled)) and blanked.blanked
        for prompts in (*plain, blanked):
            assert texts(prompts.shown[0], 6) == texts(prompts.rules[0], 6)
        rules = texts(shuffled.rules[0], 6)
        assert texts(shuffled.shown[0], 6) == [*rules[1:], rules[0]]

    def test_slices_of_what_was_trained_are_counted(self, saved):
        condition = Condition("related", unseen_pattern, slices=("all", "replacement_seen", "pattern_seen"))
        found = evaluate(saved, {"related": lambda setting: [condition]}, options=ONE_DEVICE)
        tests = collections.defaultdict(list)
        for row in found.results:
            tests[row["slice"]].append(row["tests"])
        assert tests["related/all"] == tests["related/replacement_seen"] and len(tests["related/all"]) == 2
        assert "related/pattern_seen" not in tests and len(found.left_out) == 2

    def test_members_share_rules_and_inputs(self, saved, everything):
        for name, rows in by_slice(everything.samples).items():
            if not name.startswith("held_out="):  # those depend on what a member was trained on
                shown = [[(r["pattern"], r["input"]) for r in rows if r["member"] == m.id] for m in saved.sweep.members]
                assert shown[0] == shown[1]

    def test_one_member_at_an_earlier_step(self, saved, everything):
        """Alone, a member answers as among others; an earlier checkpoint answers otherwise."""
        member = saved.sweep.members[1]
        alone = evaluate(saved, suites("no_op", "held_out"), [member.id], samples=TESTS, options=ONE_DEVICE)
        names = set(by_slice(alone.results))
        among = [r for r in everything.results if r["member"] == member.id and r["slice"] in names]
        assert sorted(alone.results, key=lambda r: r["slice"]) == sorted(among, key=lambda r: r["slice"])
        assert {row["step"] for row in among} == {512}
        earlier = evaluate(saved, suites("no_op"), [member.id], step=256, samples=TESTS, options=ONE_DEVICE)
        assert {row["step"] for row in earlier.results + earlier.samples} == {256}
        now = [row for row in alone.samples if row["slice"].startswith("no_op")]
        assert [row["input"] for row in earlier.samples] == [row["input"] for row in now]
        assert [row["decoded"] for row in earlier.samples] != [row["decoded"] for row in now]

    def test_fewer_tests_are_the_first_ones(self, saved, everything):
        few = evaluate(saved, suites("occurrences"), tests=5, samples=5, options=ONE_DEVICE)
        for name, rows in by_slice(few.samples).items():
            whole = by_slice(everything.samples)[name]
            assert rows == [*whole[:5], *whole[TESTS : TESTS + 5]]


class TestLauncher:
    def test_rows_replace_those_of_an_earlier_evaluation_and_leave_the_others(self, saved):
        """A launch for all members adds rows, one for a single member replaces some of them, in their place."""
        flags = [f"--run_dir={saved.path}", "--suite=occurrences", "--devices=1"]
        own = (saved.path / "results.csv").read_text()
        first = command("experiments.evaluate", *flags, "--show=2")
        assert first.returncode == 0, first.stderr
        assert "occurrences_tested=3/has_op" in first.stdout and "decoded" in first.stdout
        assert "group g0, step 512: occurrences_tested=1 (1 of 3)" in first.stderr
        before = [read_cells(saved.path / name) for name in ("results.csv", "errors.csv")]
        assert (saved.path / "results.csv").read_text().startswith(own)
        assert len(read_cells(saved.path / "results.csv")) == len(own.splitlines()) + 5
        member = saved.sweep.members[0].id
        assert command("experiments.evaluate", *flags, f"--members={member}", "--tests=4").returncode == 0
        for name, old, count in zip(("results.csv", "errors.csv"), before, (3, 12), strict=True):
            changed = [a for a, b in zip(read_cells(saved.path / name), old, strict=True) if a != b]
            assert [(row["member"], row["tests"]) for row in changed] == [(member, "4")] * count

    def test_mistakes(self, saved, tmp_path):
        for flags, part in (
            ([f"--run_dir={saved.path}", "--suite=everything"], "held_out"),
            ([f"--run_dir={tmp_path / 'none'}"], "holds no run"),
            ([], "--run_dir=DIR"),
        ):
            done = command("experiments.evaluate", *flags)
            lines = done.stderr.splitlines()
            assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0]

    def test_what_differs_is_marked(self):
        row = {"slice": "held_out/has_op", "member": "m1", "pattern": "iss", "replacement": "art", "asked": "",
               "input": "missis", "answer": "martis", "decoded": "marris", "error": "wrong replacement"}  # fmt: skip
        lines = shown(Setting, [row], 1).splitlines()
        assert lines[0] == "held_out/has_op" and lines[4].endswith("wrong replacement")
        assert [lines[4][i] for i, mark in enumerate(lines[5]) if mark == "^"] == ["r"]
        assert shown(Setting, [row | {"decoded": "martis", "error": ""}], 1).splitlines()[4:] == [
            "    decoded  martis  right"
        ]
        assert shown(Setting, [row | {"decoded": "mart"}], 1).splitlines()[5].endswith("    ^^")


class TestMistakes:
    def test_each_is_one_clear_line(self, saved):
        with pytest.raises(BadInput, match=r"--members=nobody: is not a member of .* are m"):
            evaluate(saved, suites("held_out"), ["nobody"])
        with pytest.raises(BadInput, match=r"--step=7: group g0 has no such checkpoint; saved steps: 256, 512"):
            evaluate(saved, suites("held_out"), step=7)

    def test_a_suite_that_nobody_can_be_tested_with(self, saved):
        learned = copy.copy(saved)
        group = saved.groups[0]
        population = tuple(
            Member(dataclasses.replace(m.setting, positions="learned"), m.seed) for m in saved.sweep.members
        )
        learned.sweep = dataclasses.replace(saved.sweep, members=population)
        learned.groups = (dataclasses.replace(group, members=population),)
        with pytest.raises(BadInput, match=r"--suite=lengths: learned positions .*rotary"):
            evaluate(learned, suites("lengths"))
        rest = evaluate(saved, suites("lengths"), tests=4)
        assert rest.results and not rest.left_out


def test_a_split_in_training_is_decoded_as_it_is_scored():
    """Right answers by greedy decoding are those that the run's own evaluation counts; batches shared by devices."""
    population = members(2, **WORLD | {"reports": 1, "layers": 1})
    one, pools = trainer(population, devices=4, data_parallel=2), RulePools(population)
    one.advance()
    evaluator = Evaluator(one, 16)
    counts = np.asarray(evaluator.count(evaluator.pieces(make_test_set("seen", population, pools, 4, 40))))
    errors, samples = decode_split(Sweep("f", population, 4, 40), one, pools, "seen", piece=16, samples=3)
    column = list(SLICES).index("has_op")
    assert counts[:, column, 0].max() > 0
    for row, member in enumerate(population):
        right, tests = counts[row, column].tolist()
        mine = [r for r in errors if r["member"] == member.id]
        assert [r["error"] for r in mine] == list(MISTAKES) and {r["tests"] for r in mine} == {tests}
        assert sum(r["count"] for r in mine) == tests - right
        assert {(r["split"], r["slice"], r["step"]) for r in mine} == {("seen", "has_op", one.step)}
        assert sum(r["member"] == member.id for r in samples) == 3
