"""A task read from a file of JSON lines, against the file itself."""

import dataclasses
import itertools
import json
import random
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import evaluate, export, jsonl_instructions, show_data
from instrdiv.analysis import thresholds
from instrdiv.config.groups import make_groups
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member
from instrdiv.config.sizes import SMOKE
from instrdiv.launch.figure import launch
from instrdiv.reports.pages import labeled_thresholds
from instrdiv.reports.report import write_report
from instrdiv.runs.run import run
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.tables import read_cells, read_table
from instrdiv.tasks.instructions import TooFew, take, take_tests
from instrdiv.tasks.jsonl import JsonLines, read_corpus
from instrdiv.tasks.strings.rewriting import Rewriting
from instrdiv.tasks.task import Task
from instrdiv.training.population import stack_group

#: All kinds of characters: single-byte and multi-byte, those that denote special tokens, and Python's line ends.
ODD = 'ab_#$é日𝄞\u2028\x85\x0c\n\r\t"\\\ue000 ,0'


def write(path, rows, end="\n", encoding="utf-8"):
    names = ("instruction", "input", "answer")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + end for row in rows]
    path.write_bytes("".join(lines).encode(encoding))
    return str(path)


def random_rows(seed, instructions=12, most=7):
    """Rows of instructions with one to ``most`` rows each, including duplicates and one input with two answers."""
    rng = random.Random(seed)

    def text(longest, shortest=0):
        return "".join(rng.choices(ODD, k=rng.randint(shortest, longest)))

    rows = []
    names = {text(6, 1) + str(i) for i in range(instructions)}
    for number, name in enumerate(sorted(names)):
        rows += [(name, text(4), text(5)) for _ in range(1 + number % most)]
    rows += [(name, "", "") for name in sorted(names)[:3]] + rng.choices(rows, k=5)
    repeated = rows[-1]
    rows.append((repeated[0], repeated[1], repeated[2] + "!"))  # one input with two answers
    rng.shuffle(rows)
    return rows


def setting_of_file(path, **changes):
    return SMOKE.with_task(JsonLines(data=path), **({"instructions": 4, "examples": 96, "batch_size": 8} | changes))


def shown(setting, split, count, seed=0, dev_tests=4):
    rows = show_data.rows(setting, split, count, seed, dev_tests)
    return [(row["instruction"], row["input"], row["answer"]) for row in rows]


def texts_of(setting, table):
    characters = setting.characters[3:]
    return ["".join(characters[t] for t in row[:n]) for row, n in zip(table.text, table.text_length, strict=True)]


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request, tmp_path_factory):
    """Rows of a file, a setting, and the rows of each split that it trains and tests on."""
    number, rows = request.param, random_rows(request.param, instructions=24)
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    setting = setting_of_file(path, instructions=8 + number, held_out_share=0.3, test_rows=0.4)
    counts = {"train": setting.examples, "seen": 400, "unseen_dev": 4, "unseen": 10}
    return rows, setting, {split: shown(setting, split, count, number) for split, count in counts.items()}


class TestRows:
    """The rows that a model is trained and tested on, decoded from its tokens, match the file."""

    def test_every_row_is_one_of_the_files(self, world):
        rows, _, splits = world
        for split, made in splits.items():
            assert set(made) <= set(rows), split
        assert any(ord(c) > 0xFFFF for row in splits["train"] for part in row for c in part)

    def test_held_out_instructions_are_never_trained(self, world):
        _, setting, splits = world
        instructions = {split: {row[0] for row in made} for split, made in splits.items()}
        assert len(instructions["train"]) == setting.instructions
        assert instructions["seen"] <= instructions["train"]
        for one, other in itertools.combinations(("train", "unseen_dev", "unseen"), 2):
            assert not instructions[one] & instructions[other]

    def test_seen_has_inputs_of_its_own(self, world):
        rows, _, splits = world
        inputs = defaultdict(set)
        for instruction, text, _ in rows:
            inputs[instruction].add(text)
        trained = {(instruction, text) for instruction, text, _ in splits["train"]}
        tested = {(instruction, text) for instruction, text, _ in splits["seen"]}
        assert all((i, x) not in trained for i, x in tested if len(inputs[i]) > 1)

    def test_rows_of_an_instruction_are_trained_equally_often(self, world):
        rows, setting, splits = world
        counts = Counter(splits["train"])
        by_instruction = defaultdict(list)
        for row, count in counts.items():
            by_instruction[row[0]].append(count)
        totals = sorted(sum(of_rows) for of_rows in by_instruction.values())
        assert sum(totals) == setting.examples and totals[-1] - totals[0] <= 1
        for instruction, of_rows in by_instruction.items():
            assert max(of_rows) - min(of_rows) <= 1
            inputs = {x for i, x, _ in rows if i == instruction}
            trained = {x for i, x, _ in counts if i == instruction}
            kept_back = len(inputs) - len(trained)
            assert kept_back == (0 if len(inputs) < 2 else min(max(1, round(0.4 * len(inputs))), len(inputs) - 1))
            assert {r for r in counts if r[0] == instruction} == {
                row for row in set(rows) if row[0] == instruction and row[1] in trained
            }

    def test_every_row_that_is_kept_back_has_its_turn(self, world):
        rows, _, splits = world
        trained = set(splits["train"])
        kept = {row for row in rows if row[0] in {t[0] for t in trained} and row not in trained}
        assert len(kept) > len({row[0] for row in kept})
        counts = Counter(row for row in splits["seen"] if row in kept)
        assert set(counts) == kept, "8 instructions with 2 such rows each must not cycle through them in step"


files = st.dictionaries(
    st.text("xyz_é", min_size=1, max_size=3),
    st.lists(st.tuples(st.text("ab#", max_size=2), st.text("ab$", max_size=2)), min_size=1, max_size=4),
    min_size=3,
    max_size=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("split")


class TestSplit:
    numbers = itertools.count()

    @given(files, st.floats(0.01, 0.99), st.integers(0, 2**20), st.integers(0, 2**31 - 1), st.randoms())
    @settings(max_examples=60, deadline=None)
    def test_whole_instructions_are_held_out_whatever_seed_and_size(self, folder, file, share, split, seed, rng):
        rows = [(name, *row) for name, of in file.items() for row in of]
        path = write(folder / f"{next(self.numbers)}.jsonl", rows)
        task = JsonLines(data=path, held_out_share=share, split_seed=split)
        source = task.source
        most = source.capacity(held_out=False)
        whole = texts_of(task, source.pool(seed, most))
        held_out = set(file) - set(whole)
        assert len(set(whole)) == most and 1 <= most == len(file) - len(held_out) and len(held_out) >= 2
        assert len(held_out) == min(max(2, round(share * len(file))), len(file) - 1)
        size = rng.randint(1, most)
        assert texts_of(task, source.pool(seed, size)) == whole[:size], "pools are nested"
        assert set(texts_of(task, source.pool(seed + 1, most))) == set(whole), "a seed determines only the order"

        there = {name: len(set(of)) for name, of in file.items()}
        dev, final = source.tests(1, 1)
        assert set(texts_of(task, dev)) | set(texts_of(task, final)) <= held_out
        for_tuning, for_the_end = self.everything(source, task, held_out, there)
        assert for_tuning and for_the_end and for_tuning | for_the_end == held_out
        assert not for_tuning & for_the_end
        assert texts_of(task, source.tests(1, 1)[1]) == texts_of(task, final)

    @staticmethod
    def everything(source, task, held_out, there):
        """The held-out instructions that each split can contain, found by requesting more and more tests."""
        found = []
        for side in (0, 1):
            seen = set()
            for count in range(1, sum(there[name] for name in held_out) + 1):
                try:
                    seen |= set(texts_of(task, source.tests(*((count, 1) if side == 0 else (1, count)))[side]))
                except TooFew:
                    break
            found.append(seen)
        return found

    def test_how_many_tests_are_asked_for_moves_no_instruction(self, tmp_path):
        """``--tests`` of ``experiments.evaluate`` may differ from the run's; unseen and unseen_dev stay disjoint."""
        rows = [(f"do {i}", text, text) for i in range(30) for text in ("a", "b", "c")]
        task = JsonLines(data=write(tmp_path / "rows.jsonl", rows), held_out_share=0.4)
        most = texts_of(task, task.source.tests(4, 24)[1])
        assert len(set(most)) == 8
        for dev_tests, tests in ((1, 1), (12, 3), (12, 24), (4, 9)):
            dev, final = (texts_of(task, table) for table in task.source.tests(dev_tests, tests))
            assert final == most[:tests] and not set(dev) & set(most)

    def test_a_split_is_the_same_for_ever(self, tmp_path):
        rows = [(f"do {i}", text, text) for i in range(10) for text in ("a", "b")]
        task = JsonLines(data=write(tmp_path / "rows.jsonl", rows))
        assert texts_of(task, task.source.pool(0, 4)) == GOLDEN["pool"]
        assert texts_of(task, task.source.tests(1, 1)[1]) == GOLDEN["unseen"]

    def test_members_share_shapes_though_instructions_differ_in_rows(self, tmp_path):
        """Pools of several seeds are stacked into one array, whichever instructions they contain."""
        rows = [(f"do {i}", str(j), "x") for i in range(9) for j in range(1 + i)]
        setting = setting_of_file(write(tmp_path / "rows.jsonl", rows), instructions=2)
        members = [Member(setting, seed) for seed in range(4)]
        pools = RulePools(members)
        most = {int(pools.of(member).rows.max()) for member in members}
        assert len(most) > 1, "these seeds should differ"
        (group,) = make_groups(members)
        tables, _ = stack_group(group, pools, 4)
        assert tables.pools["inputs"].shape == (4, 2, 9, 1) and "corpus" not in tables.pools

    def test_an_instruction_is_known_by_its_text(self, tmp_path):
        rows = [(f"do {i}", text, text) for i in range(10) for text in ("a", "b")]
        source = JsonLines(data=write(tmp_path / "rows.jsonl", rows)).source
        alike = JsonLines(data=write(tmp_path / "alike.jsonl", [("a" * n, "b", "c") for n in range(1, 9)])).source
        keys = alike.pool(0, 6).joined([alike.held_out(2)]).keys()
        assert len(np.unique(keys)) == 8, "a is the padding token, so only the lengths distinguish these"
        final = source.tests(1, 2)[1]
        assert len(JsonLines.testable(source.pool(0, 4), final)) == 2, "each row of an instruction is a separate test"
        assert len(JsonLines.testable(final, final)) == 0
        assert JsonLines.resemblance(source.pool(0, 4), final, 9)["instruction_seen"] == 0
        assert len(source.none()) == 0 and len(source.none().joined([final])) == 2


GOLDEN = {"pool": ["do 2", "do 6", "do 8", "do 1"], "unseen": ["do 3"]}


class TestFiles:
    ROWS = (("say_#$", "é_", "$日"), ("say_#$", "", "x"), ("b", "x", ""), ("c", "\u2028y\x85", "\n"))

    def test_every_row_is_read(self, tmp_path):
        for seed in range(5):
            rows = random_rows(seed)
            corpus = read_corpus(write(tmp_path / f"{seed}.jsonl", rows))
            assert [(i, x, a) for i, of in corpus.rows.items() for x, a in of] == list(
                dict.fromkeys(sorted(rows, key=lambda row: list(dict.fromkeys(r[0] for r in rows)).index(row[0])))
            )
            assert corpus.longest == tuple(max(len(row[part]) for row in rows) for part in range(3))
            letters = set("".join(part for row in rows for part in row))
            assert set(corpus.characters[3:]) == letters and len(set(corpus.characters)) == len(letters) + 3

    def test_special_characters_are_shown_otherwise_where_the_texts_have_them(self, tmp_path):
        plain = [("a", "b", "c"), ("b", "b", "c"), ("c", "b", "c")]
        assert read_corpus(write(tmp_path / "1", plain)).characters == "_#$abc"
        odd = read_corpus(write(tmp_path / "2", [*plain, ("a", "#", "\ue000")])).characters
        assert odd[0] == "_" and odd[2] == "$" and len(set(odd)) == len(odd) == 8 and odd.count("#") == 1
        assert odd.index("#") > 2

    def test_ends_of_lines_and_a_mark_of_their_order_make_no_difference(self, tmp_path):
        corpora = [
            read_corpus(write(tmp_path / "lf", self.ROWS)),
            read_corpus(write(tmp_path / "crlf", self.ROWS, end="\r\n")),
            read_corpus(write(tmp_path / "bom", self.ROWS, encoding="utf-8-sig")),
            read_corpus(write(tmp_path / "empty lines", self.ROWS, end="\n\n  \n")),
        ]
        assert all(corpus == corpora[0] for corpus in corpora)

    def test_a_file_that_changes_is_read_again_and_is_another_source(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", self.ROWS)
        task = JsonLines(data=path)
        before, source, table = read_corpus(path), task.source, task.source.pool(0, 1)
        assert read_corpus(path) is before
        write(tmp_path / "rows.jsonl", [*self.ROWS[:3], ("c", "\u2028y\x85", "\n!")])
        assert read_corpus(path) != before and task.source != source
        assert task.source.pool(0, 1).digest != table.digest, "whichever row changed"

    def test_sizes_are_those_of_the_file(self, tmp_path):
        task = JsonLines(data=write(tmp_path / "rows.jsonl", self.ROWS))
        shape = task.shape
        assert (shape.prompt, shape.answer, shape.ragged, shape.vocabulary) == (
            6 + 3 + 2,
            2,
            True,
            len(task.characters),
        )
        even = JsonLines(data=write(tmp_path / "even.jsonl", [(c, "xy", "z" * i) for i, c in enumerate("abc")])).shape
        assert (even.prompt, even.answer, even.ragged) == (5, 2, False)

    @pytest.mark.parametrize(
        "text, words",
        [
            (None, "cannot be read (No such file or directory)"),
            ("", "has 0 instructions; at least three"),
            ("a: b\n", "line 1 is not an object with instruction, input, answer (JSONDecodeError"),
            ('{"instruction": "a", "input": "b", "answer": "c"}\n\n{"instruction": "a", "input": "b"}\n',
             "line 3 is not an object with instruction, input, answer (KeyError: 'answer')"),
            ('["instruction", "input", "answer"]\n', "line 1 is not an object"),
            ('"text"\n', "line 1 is not an object"),
            ("7\n", "line 1 is not an object"),
            ('{"instruction": "a", "input": 7, "answer": "c"}\n', "line 1: instruction, input, answer must be strings"),
            ('{"instruction": "a", "input": "b", "answer": null}\n', "line 1: instruction, input, answer must be"),
            ('{"instruction": "", "input": "b", "answer": "c"}\n', "line 1: instruction, input, answer must be"),
            ('{"instruction": "\\ud800", "input": "b", "answer": "c"}\n', "line 1"),
            ('{"instruction": "a", "input": "b", "answer": "c"}\n' * 3, "has 1 instructions; at least three"),
            (b"\xff\xfe\x00", "cannot be read as text"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_one_line_that_says_where(self, tmp_path, text, words, capsys):
        path = tmp_path / "rows.jsonl"
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        flags = ["--preset=smoke", f"--config.data={path}", f"--run_dir={tmp_path / 'run'}"]
        assert launch(jsonl_instructions.FIGURE, flags) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --config.data={path}: ") and words in said and said.count("\n") == 1, said
        assert not (tmp_path / "run").exists()

    def test_more_than_the_file_has_is_one_line(self, tmp_path, capsys):
        path = write(tmp_path / "rows.jsonl", [(f"do {i}", text, text) for i in range(10) for text in "ab"])
        flags = ["--preset=smoke", f"--config.data={path}", f"--run_dir={tmp_path / 'run'}"]
        small = ["--config.instructions=4,8", "--tests=1", "--dev_tests=1"]
        for more, words in (
            (["--config.instructions=4,9", "--tests=1", "--dev_tests=1"],
             "9 training instructions were requested, but the file has only 8; lower --config.instructions"),
            (["--config.instructions=4,8", "--tests=3", "--dev_tests=1"],
             "3 held-out rows were requested, but this split has only"),
            ([*small, "--config.test_rows=1"], "--config.test_rows=1: must be between 0 and 1"),
            ([*small, "--config.held_out_share=0"], "--config.held_out_share=0: must be in"),
        ):  # fmt: skip
            assert launch(jsonl_instructions.FIGURE, [*flags, *more]) == 2
            said = capsys.readouterr().err
            assert said.startswith(("error: --config.", "error: flag --config.")), said
            assert words in said and said.count("\n") == 1, said
        assert launch(jsonl_instructions.FIGURE, ["--preset=smoke"]) == 2
        assert capsys.readouterr().err.startswith("error: --config.data: must name a JSON Lines file")
        assert not (tmp_path / "run").exists()
        source = JsonLines(data=path).source
        with pytest.raises(BadInput, match=r"^--config\.data=.*has only 8"):
            take(source, 9, 0)
        with pytest.raises(BadInput, match=r"lower --tests and --dev_tests, or provide more data$"):
            take_tests(source, 1, 9)


TINY = ["--preset=smoke", "--config.layers=1", "--config.width=16", "--config.instructions=3,6", "--seeds=2",
        "--tests=10", "--dev_tests=6", "--devices=1", "--config.examples=128", "--config.reports=2",
        "--checkpoint_steps=4", "--config.held_out_share=0.4"]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return random_rows(3, instructions=24, most=5)


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl")
    flags = [*TINY, f"--config.data={write(path / 'rows.jsonl', rows)}", f"--run_dir={path / 'run'}"]
    assert launch(jsonl_instructions.FIGURE, flags) == 0
    return path


class TestRun:
    """``experiments.jsonl_instructions`` on a small file with all kinds of odd characters."""

    @pytest.fixture
    def again(self, finished, tmp_path):
        """A copy of the run that a test may modify, and the flags to resume it."""
        shutil.copytree(finished / "run", tmp_path / "run")
        return tmp_path / "run", [*TINY, f"--config.data={finished / 'rows.jsonl'}", f"--run_dir={tmp_path / 'run'}"]

    def test_the_tables_are_about_the_file(self, finished, rows):
        here = finished / "run"
        results = read_cells(here / "results.csv")
        of_rewriting = {f.name for f in dataclasses.fields(Rewriting)} - {f.name for f in dataclasses.fields(Task)}
        assert not of_rewriting & set(results[0]) and {"data", "test_rows", "held_out_share"} <= set(results[0])
        assert {row["split"] for row in results} == {"unseen_dev", "unseen", "seen"}
        assert {(row["split"], row["tests"]) for row in results} == {
            *(("unseen_dev", "6"), ("unseen", "10"), ("seen", "10"))
        }
        samples = read_cells(here / "samples.csv")
        assert {(row["instruction"], row["input"], row["answer"]) for row in samples} <= set(rows) and samples
        assert json.loads((here / "config.json").read_text())["task"] == "jsonl"
        page = (here / "report.html").read_text()
        assert "rows.jsonl" in page and "pattern" not in page and "has-op" not in page

    def test_it_is_resumed_byte_for_byte(self, again):
        here, flags = again
        tables = {name: (here / name).read_bytes() for name in ("results.csv", "metrics.csv", "samples.csv")}
        steps = SavedRun(here).steps(SavedRun(here).groups[0])
        assert len(steps) > 1
        for name in ("results.csv", "samples.csv", "errors.csv", "report.html", "resemblance.csv"):
            (here / name).unlink()
        shutil.rmtree(here / "checkpoints" / "g0" / str(steps[-1]))
        assert launch(jsonl_instructions.FIGURE, flags) == 0
        assert {name: (here / name).read_bytes() for name in tables} == tables
        assert (here / "report.html").exists()

    def test_it_is_evaluated_and_exported(self, again, rows, tmp_path, capsys):
        here, _ = again
        assert evaluate.launch([f"--run_dir={here}", "--show=3", "--devices=1", "--tests=7"]) == 0
        said = capsys.readouterr().out
        assert "held_out/all" in said and "rule_blanked/all" in said and "decoded" in said
        tested = {row["slice"]: row["tests"] for row in read_cells(here / "results.csv") if "/" in row["slice"]}
        assert tested == {"held_out/all": "7", "rule_blanked/all": "7"}
        assert "rule_blanked" in write_report(here).read_text()
        member = SavedRun(here).sweep.members[0].id
        assert export.launch([f"--run_dir={here}", f"--member={member}", f"--out={tmp_path / 'out'}"]) == 0
        readme = (tmp_path / "out" / "README.md").read_text()
        assert "trained on the task jsonl" in readme.splitlines()[0]
        vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
        assert set(vocabulary) > {c for row in rows for part in row for c in part}

    def test_where_the_curve_crosses_one_half_there_is_a_threshold(self, finished):
        """Uses the run's own rows, with the exact match of a model that has learned the task."""
        results = read_table(finished / "run" / "results.csv")
        learned = [row | {"exact_match": 0.1 if row["instructions"] == 3 else 0.9} for row in results]
        ((label, found),) = labeled_thresholds(learned, ["instructions"], JsonLines.headline)
        assert label == "" and found.interval.mean == pytest.approx((3 * 6) ** 0.5) and found.outside == 0
        whole = run(SavedRun(finished / "run").sweep, finished / "run", progress=False, keep_params=False)
        whole.results = learned
        assert whole.threshold() == found == thresholds.threshold(thresholds.select(learned, "unseen", "all"))

    @pytest.mark.parametrize("what", ["a trained row", "a held-out row"])
    def test_a_file_that_changed_is_refused(self, finished, again, rows, what, capsys):
        """Neither resuming nor evaluating a run mixes two files."""
        here, flags = again
        trained = set(texts_of(*trained_of(here)))
        place = next(i for i, row in enumerate(rows) if (row[0] in trained) == (what == "a trained row"))
        changed = list(rows)
        changed[place] = (*rows[place][:2], "ab" if rows[place][2] != "ab" else "ba")
        original = (finished / "rows.jsonl").read_bytes()
        try:
            write(finished / "rows.jsonl", changed)
            (here / "resemblance.csv").unlink()
            results = (here / "results.csv").read_bytes()
            (here / "results.csv").unlink()
            assert launch(jsonl_instructions.FIGURE, flags) == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert (
                said.startswith("error: ") and "was trained on different instructions" in said and "--overwrite" in said
            )
            (here / "results.csv").write_bytes(results)
            assert evaluate.launch([f"--run_dir={here}", "--devices=1"]) == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("error: ") and "was trained on different instructions" in said
            assert (here / "results.csv").read_bytes() == results
        finally:
            (finished / "rows.jsonl").write_bytes(original)


def trained_of(here):
    saved = SavedRun(here)
    setting = saved.sweep.members[0].setting
    pools = RulePools(saved.sweep.members)
    tables = [pools.whole(member) for member in saved.sweep.members]
    return setting, tables[0].joined(tables[1:])


def test_places_beyond_the_rows_come_round(tmp_path):
    """``make_input`` against plain Python, for training and test indices."""
    rows = [("do", str(j), "x") for j in range(5)] + [("one", "a", "b"), ("two", "c", "d")]
    for split_seed in range(20):
        task = JsonLines(data=write(tmp_path / "rows.jsonl", rows), split_seed=split_seed, test_rows=0.4)
        table = task.source.pool(0, 1)
        if texts_of(task, table) == ["do"]:
            break
    (trained, there) = int(table.trained[0]), int(table.rows[0])
    assert (trained, there) == (3, 5)
    one = {name: np.asarray(array[0]) for name, array in table.arrays().items()}
    inputs = table.inputs[0, :, 0].tolist()
    for place in range(10):
        assert int(task.make_input(task.shape, {}, one, np.int32(place))[0][0]) == inputs[place % 3]
        test = task.test_key(None, np.int32(place))
        assert int(task.make_input(task.shape, {}, one, test)[0][0]) in inputs[3:]
    numbers = range(0, 800, 8)  # the test numbers that one of 8 instructions gets
    tests = Counter(int(task.make_input(task.shape, {}, one, task.test_key(None, np.int32(n)))[0][0]) for n in numbers)
    assert set(tests) == set(inputs[3:]) and min(tests.values()) > 30
    single = {"trained": np.int32(1), "rows": np.int32(1)} | {n: one[n] for n in one if n not in ("trained", "rows")}
    for place in (*range(4), *range(-4, 0)):
        assert int(task.make_input(task.shape, {}, single, np.int32(place))[0][0]) == inputs[0]
