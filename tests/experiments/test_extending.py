"""docs/extending.md works as it stands: what it shows is put into a copy of the repository, and run there.

Its ``diff`` blocks are applied and its ``python`` blocks written, in order; its ``sh`` blocks are the commands. All of
them but pytest's run in one process, which is told here what else to run, too.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.show_data import rows
from instrdiv.config.presets import BASES, SMOKE
from instrdiv.config.settings import Member
from instrdiv.runtime.tables import read_table
from instrdiv.tasks.strings.rewriting import Rewriting
from instrdiv.tasks.task import Task
from tests.commands import ENVIRONMENT, ROOT

pytestmark = pytest.mark.thorough

GUIDE = ROOT / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", "").splitlines() if line.strip()
]
SORTING, CHECK = "experiments/sorting.py", "tests/experiments/test_sorting.py"


def named(text: str) -> str | None:
    """The file that a block is, or changes."""
    name = re.match(r"(?:# |--- a/)(\S+)\n", text)
    return name and name[1]


def put_in(root: Path) -> None:
    """What the guide shows, into a copy of the repository. Fails with the block that cannot be put in."""
    for number, (kind, text) in enumerate(BLOCKS, 1):
        block, name = f"docs/extending.md, block {number}", named(text)
        if kind == "diff":
            assert name, f"{block} does not say which file it changes"
            environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
            done = subprocess.run(
                ["git", "apply"], input=text, cwd=root, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block}, no longer applies to {name}:\n{done.stderr}{text}"
        elif kind == "python":
            assert name, f"{block} does not begin with the name of its file"
            assert not (root / name).exists(), f"{block}: {name} is there already"
            (root / name).write_text(text)


def command(*words: str) -> str:
    """The one command of the guide that has these words."""
    (line,) = [line for line in COMMANDS if set(words) <= set(line.split())]
    return line


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the repository with all that the guide shows, and a file of JSON lines such as it shows."""
    root = tmp_path_factory.mktemp("extended") / "repository"
    for name in ("instrdiv", "experiments", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    put_in(root)
    words = ["stone", "cloud", "river", "tree", "hill", "sand", "rain", "leaf", "wind", "snow"]
    lines = [{"instruction": f"Add {end} to the word.", "input": word, "answer": word + end}
             for end in map("{:02}".format, range(30)) for word in words]  # fmt: skip
    (root / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


#: Runs command lines, one after another in one process, each as the module that ``python -m`` runs, and writes what
#: came of each: [exit status, standard output, standard error]. A line that begins with "stop" gets a SIGTERM while its
#: second chunk is trained; one that begins with "python -c" is code.
RUNNER = """
import contextlib, json, os, runpy, shlex, signal, sys, tempfile, traceback
from instrdiv.runtime.devices import use_cpu_cores
from instrdiv.tasks.task import TASKS
from instrdiv.training.members import Trainer

use_cpu_cores(2)
advance, done = Trainer.advance, {}


def stop(trainer):
    if trainer.step:
        Trainer.advance = advance
        os.kill(os.getpid(), signal.SIGTERM)
    return advance(trainer)


for line in json.load(sys.stdin):
    words = shlex.split(line.removeprefix("stop "))
    Trainer.advance = stop if line.startswith("stop ") else advance
    if "--member=ID" in words:
        with open("runs/sorting/config.json") as config:
            member = json.load(config)["cohorts"][0]["members"][0]["id"]
        words[words.index("--member=ID")] = f"--member={member}"
    sys.argv, status = words[2:], 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if words[1] == "-c":
                    exec(words[2], {})
                else:
                    runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                status = ended.code or 0
            except BaseException:
                status = 1
                traceback.print_exc()
        texts = [file.seek(0) or file.read() for file in (out, err)]
    TASKS.pop("sorting", None)  # the command that defined it is over
    for name in [name for name in sys.modules if name.endswith("sorting.py")]:
        del sys.modules[name]
    done[line] = [status, *texts]
with open("done.json", "w") as file:
    json.dump(done, file)
"""


def fingerprint() -> list:
    """Ids and examples of settings of string rewriting; its source runs on the code that the guide extends, too."""
    mixed = dataclasses.replace(SMOKE, no_op_fraction=0.5, near_miss_fraction=0.5, family="free+mirrored", k_max=2)
    ids = [Member(setting, seed).id for setting in (*BASES.values(), mixed) for seed in range(2)]
    return [ids, [rows(mixed, split, 64, seed=1, dev_tests=64) for split in ("train", "seen", "unseen")]]


FINGERPRINT = f"""
import dataclasses, json
from experiments.show_data import rows
from instrdiv.config.presets import BASES, SMOKE
from instrdiv.config.settings import Member
{inspect.getsource(fingerprint)}
print(json.dumps(fingerprint()))
"""

#: The guide's check, on its task and on one that sorts by the alphabet.
CHECKED = f"""
import pathlib, runpy, types, sys
good = pathlib.Path("{SORTING}").read_text()
for source in (good, good.replace("jnp.sort(place[input])", "place[jnp.sort(input)]")):
    module = sys.modules["experiments.sorting"] = types.ModuleType("experiments.sorting")
    exec(source, module.__dict__)
    tests = [test for name, test in runpy.run_path("{CHECK}").items() if name.startswith("test_")]
    failed = 0
    for test in tests:
        try:
            test()
        except AssertionError:
            failed += 1
    print(len(tests), failed)
"""

SHOW, ROTATED = (command("experiments.show_data", word) for word in
                 (f"--task={SORTING}", "--config.family=rotated"))  # fmt: skip
PYTEST = [line for line in COMMANDS if "pytest" in line.split()]
RUN = command("experiments.sorting", "--run_dir=runs/sorting")
STOPPED = RUN.replace("runs/sorting", "runs/stopped")
SPLITS = {split: f"{SHOW.replace('--num=4', f'--num={count}')} --format=jsonl --split={split}"
          for split, count in (("train", 512), ("seen", 200), ("unseen_dev", 32), ("unseen", 64))}  # fmt: skip
SHARES = [f"{ROTATED} --format=jsonl --num=400 --config.leading_fraction={share}" for share in ("0", "0.5", "1")]
IDLE = f"{ROTATED} --config.no_op_fraction=1"
LOST = "python -m experiments.evaluate --run_dir=runs/sorting"
CODE = [f"python -c {shlex.quote(code)}" for code in (FINGERPRINT, CHECKED)]


@pytest.fixture(scope="module")
def done(extended) -> dict[str, list]:
    """Line -> its exit status, standard output and standard error."""
    lines = [line for line in COMMANDS if line not in PYTEST]
    lines += [f"stop {STOPPED}", STOPPED, LOST, *SPLITS.values(), *SHARES, IDLE, *CODE]
    environment = ENVIRONMENT | {"PYTHONPATH": str(extended)}
    runner = subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps(lines), cwd=extended, env=environment,
                            capture_output=True, text=True, timeout=900)  # fmt: skip
    assert runner.returncode == 0, runner.stderr
    return json.loads((extended / "done.json").read_text())


def said(done: dict[str, list], line: str) -> str:
    """Standard output of a command that must not fail."""
    status, out, err = done[line]
    assert status == 0, f"{line}\n{out}{err}"
    return out


def said_rows(done: dict[str, list], line: str) -> list[dict]:
    return list(map(json.loads, said(done, line).splitlines()))


def test_every_block_and_every_command_is_used():
    """Nothing is shown that no test runs, and no block is lost to a fence that is not closed."""
    kinds = [kind for kind, _ in BLOCKS if kind not in ("diff", "python")]
    assert kinds == ["sh", "text", "sh", "json", "sh", "sh", "text", "sh"]
    assert [named(text) for kind, text in BLOCKS if kind == "python"] == [SORTING, CHECK, "experiments/places.py"]
    assert GUIDE.read_text().count("```") == 2 * len(BLOCKS)
    modules = [re.search(r"-m (\S+)", line)[1].removeprefix("experiments.") for line in COMMANDS]
    assert modules == [
        *("show_data", "sorting", "sorting", "evaluate", "export", "pytest"),
        *("show_data", "jsonl_instructions"),
        *("show_data", "pytest", "places", "places", "evaluate"),
    ]


def test_a_block_that_does_not_fit_is_named(tmp_path, monkeypatch):
    families = next(block for block in BLOCKS if block[0] == "diff")
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", [("text", "\n"), families])
    with pytest.raises(AssertionError, match=r"block 2, no longer applies to instrdiv/tasks/strings/families\.py"):
        put_in(tmp_path)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in PYTEST])
def test_every_command_works(done, line):
    said(done, line)


class TestTask:
    def test_it_is_one_file_of_at_most_120_lines(self, extended):
        assert len((extended / SORTING).read_text().splitlines()) <= 120
        assert all("sorting" not in text for kind, text in BLOCKS if kind == "diff")

    def test_the_output_is_the_one_shown(self, done):
        assert said(done, SHOW) == next(text for kind, text in BLOCKS if kind == "text")

    def test_examples_agree_with_sorted(self, done):
        for split, line in SPLITS.items():
            shown = said_rows(done, line)
            assert len(shown) >= 32 and list(shown[0]) == ["order", "input", "answer", "rule_id", "split"]
            for row in shown:
                assert sorted(row["order"]) == list("abcdef") and set(row["input"]) <= set("abcdef")
                assert row["answer"] == "".join(sorted(row["input"], key=row["order"].index))
                assert row["split"] == split and len(row["input"]) == 6
        trained = said_rows(done, SPLITS["train"])
        repeats = sum(row["input"][0] == row["input"][1] for row in trained) / len(trained)
        assert abs(repeats - (0.5 + 0.5 / 6)) < 5 * math.sqrt(0.25 / len(trained))

    def test_held_out_orders_are_never_trained(self, done):
        orders = {split: {row["order"] for row in said_rows(done, line)} for split, line in SPLITS.items()}
        assert [len(orders[split]) for split in ("train", "unseen_dev", "unseen")] == [64, 32, 64]
        assert orders["seen"] == orders["train"]
        assert not orders["unseen"] & orders["unseen_dev"]
        assert not orders["train"] & (orders["unseen"] | orders["unseen_dev"])

    def test_the_check_of_the_guide_passes_and_finds_a_wrong_answer(self, done):
        """Its command is pytest's, on the file that is shown; here its functions are called, which is faster."""
        assert CHECK in PYTEST[0].split()
        assert said(done, CODE[1]).splitlines() == ["2 0", "2 1"]

    def test_it_plans(self, done):
        assert "2 members in 1 group(s)" in said(done, command("experiments.sorting", "--dry_run"))

    def test_its_tables_have_its_own_columns(self, extended):
        """And none of string rewriting's: both have an ``input_length``, and what all tasks have."""
        run_dir = extended / "runs" / "sorting"
        own = {"letters", "input_length", "repeat_fraction"}
        others = {f.name for f in dataclasses.fields(Rewriting)} - {f.name for f in dataclasses.fields(Task)} - own
        results = read_table(run_dir / "results.csv", tuple(own))
        assert own <= set(results[0]) and len(others) > 10 and not others & set(results[0])
        assert {row["split"] for row in results} == {"seen", "unseen_dev", "unseen"}
        assert {row["slice"] for row in results if "/" not in row["slice"]} == {"all", "repeat", "no_repeat"}
        assert json.loads((run_dir / "config.json").read_text())["task"] == "sorting"

    def test_it_is_decoded_evaluated_and_reported(self, extended, done):
        run_dir = extended / "runs" / "sorting"
        for row in read_table(run_dir / "samples.csv", text=("order", "input", "answer", "decoded")):
            assert row["answer"] == "".join(sorted(row["input"], key=row["order"].index))
            assert (row["decoded"] == row["answer"]) == (not row["error"])
        slices = {row["slice"] for row in read_table(run_dir / "results.csv")}
        assert {"held_out/all", "rule_blanked/all", "rules_shuffled/all"} <= slices
        assert said(done, command("experiments.evaluate", "--show=2")).count("decoded ") == 6
        report = (run_dir / "report.html").read_text()
        assert "repeat_fraction" in report
        assert not any(word in report for word in ("pattern", "has-op", "has_op", "no_op"))
        for name in ("figure.png", "figure.pdf"):
            assert (run_dir / name).stat().st_size > 1_000

    def test_it_is_exported(self, extended):
        config = json.loads((extended / "exported" / "config.json").read_text())
        assert config["vocab_size"] == 3 + 6 and (extended / "exported" / "model.safetensors").exists()
        assert "sorting" in (extended / "exported" / "README.md").read_text()

    def test_a_run_that_is_stopped_resumes_to_the_same_bytes(self, extended, done):
        status, _, err = done[f"stop {STOPPED}"]
        assert status == 75, err
        step = int(re.search(r"group g0, step (\d+) of 32", err.splitlines()[-1])[1])
        said(done, STOPPED)
        assert 0 < step < 32 and f"from step {step}" in done[STOPPED][2]
        whole, stopped = (extended / "runs" / name / "metrics.csv" for name in ("sorting", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes()
        whole, stopped = (read_table(path.with_name("results.csv")) for path in (whole, stopped))
        assert stopped == [row for row in whole if "/" not in row["slice"]]

    def test_without_its_file_the_run_says_what_is_missing(self, done):
        status, _, err = done[LOST]
        assert status == 2 and "uses the task sorting" in err and "--task=FILE.py" in err


class TestJsonLines:
    def test_the_rows_shown_are_rows(self):
        (shown,) = (text for kind, text in BLOCKS if kind == "json")
        for row in map(json.loads, shown.splitlines()):
            assert list(row) == ["instruction", "input", "answer"] and all(row.values())

    def test_a_file_of_such_rows_runs_to_its_report(self, extended, done):
        first = said(done, command("experiments.show_data", "--config.data=my.jsonl")).splitlines()[0]
        assert first.split() == ["instruction", "input", "answer", "rule_id", "split"]
        results = read_table(extended / "runs" / "jsonl" / "results.csv")
        assert {row["instructions"] for row in results} == {4, 16}
        assert (extended / "runs" / "jsonl" / "report.html").exists()


def test_a_knob_whose_default_is_the_old_behavior_changes_no_id_and_no_example(done):
    before, after = json.loads(json.dumps(fingerprint())), json.loads(said(done, CODE[0]))
    assert before == after
    ids, tables = before
    assert len(set(ids)) == 10 and {row["op"] for table in tables for row in table} == {"has_op", "near_miss", "no_op"}


def is_rotated(string: str) -> bool:
    block = string[:3]
    return string == block + block[1:] + block[0]


class TestRotatedRules:
    def test_the_output_is_the_one_shown(self, done):
        assert said(done, ROTATED) == [text for kind, text in BLOCKS if kind == "text"][1]

    def test_the_family_and_the_knob_are_what_they_say(self, done):
        """Against plain Python. With the same keys, the knob moves the pattern or leaves the example as it was."""
        none, half, every = (said_rows(done, line) for line in SHARES)
        for row in (*none, *half, *every):
            assert row["answer"] == row["input"].replace(row["pattern"], row["replacement"], 1)
            assert row["pattern"] in row["input"] and len(row["input"]) == 14
            assert is_rotated(row["pattern"]) and is_rotated(row["replacement"])
        assert all(row["input"].startswith(row["pattern"]) for row in every)
        moved = [(a, b, c) for a, b, c in zip(none, half, every, strict=True) if a != c]
        assert len(moved) > 300 and all(b in (a, c) for a, b, c in moved)
        share = sum(b == c for a, b, c in moved) / len(moved)
        assert abs(share - 0.5) < 5 * math.sqrt(0.25 / len(moved))

    def test_a_flag_without_effect_is_refused(self, done):
        status, _, err = done[IDLE]
        assert status == 2 and err.startswith("error: --config.leading_fraction=0.5: has no effect, nothing is pl")

    def test_the_tests_that_it_extends_pass(self, extended):
        environment = ENVIRONMENT | {"PYTHONPATH": str(extended)}
        arguments = [sys.executable, *shlex.split(PYTEST[1])[1:]]
        tests = subprocess.run(arguments, cwd=extended, env=environment, capture_output=True, text=True, timeout=900)
        assert tests.returncode == 0 and re.search(r"\b10 passed", tests.stdout), tests.stdout

    def test_you_get_what_it_says(self, extended, done):
        promised = " ".join(GUIDE.read_text().partition("**What you get**")[2].split())
        shown = said(done, command("experiments.places", "--help"))
        assert "--config.leading_fraction:" in shown and re.search(r"--config\.family:[^-]*\brotated\b", shown)
        assert "`--config.leading_fraction` and the family `rotated` in `--help`" in promised

        assert "4 members in 1 group(s)" in said(done, command("experiments.places", "--preset=smoke"))
        run_dir = extended / "runs" / "places"
        results = read_table(run_dir / "results.csv", ("leading_fraction", "family"))
        assert {row["leading_fraction"] for row in results} == {0, 1}
        assert {row["family"] for row in results} == {"rotated"}
        for slice in ("anywhere/has_op", "family_tested=rotated_2/has_op"):
            tested = [row for row in results if row["slice"] == slice]
            assert f"`{slice}`" in promised and len(tested) == 4 and all(row["tests"] == 128 for row in tested)
        for name in ("results.csv", "figure.png", "figure.pdf", "report.html"):
            assert f"`{name}`" in promised and (run_dir / name).stat().st_size > 1_000
        assert "leading_fraction" in (run_dir / "report.html").read_text()
