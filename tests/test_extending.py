"""docs/extending.md works as it stands: what it shows is put into a copy of the repository, and run there.

Its ``diff`` blocks are applied and its ``python`` blocks written, in order; its ``sh`` blocks are the commands.
"""

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

from instrdiv.results import read_table
from tests.test_launchers import ENVIRONMENT, ROOT

GUIDE = ROOT / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", "").splitlines() if line.strip()
]


def put_in(root: Path) -> None:
    """What the guide shows, into a copy of the repository. Fails with the block that cannot be put in."""
    for number, (kind, text) in enumerate(BLOCKS, 1):
        name = re.match(r"(?:# |--- a/)(\S+)\n", text)
        block = f"docs/extending.md, block {number}"
        if kind == "diff":
            assert name, f"{block} does not say which file it changes"
            environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
            done = subprocess.run(
                ["git", "apply"], input=text, cwd=root, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block}, no longer applies to {name[1]}:\n{done.stderr}{text}"
        elif kind == "python":
            assert name, f"{block} does not begin with the name of its file"
            assert not (root / name[1]).exists(), f"{block}: {name[1]} is there already"
            (root / name[1]).write_text(text)


def run(root: Path, line: str) -> str:
    """Standard output of a command of the guide, run in ``root`` on the code that is there."""
    python, *arguments = shlex.split(line)
    assert python == "python"
    environment = ENVIRONMENT | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def command(*words: str) -> str:
    """The one command of the guide that has these words."""
    (line,) = [line for line in COMMANDS if set(words) <= set(line.split())]
    return line


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the repository with all that the guide shows."""
    root = tmp_path_factory.mktemp("extended") / "repository"
    for name in ("instrdiv", "experiments", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    put_in(root)
    return root


def test_every_block_and_every_command_is_used():
    """Nothing is shown that no test runs: blocks are of the four kinds, the last one what ``show_data`` prints."""
    assert [kind for kind, _ in BLOCKS if kind not in ("diff", "python")] == ["sh", "text", "sh"]
    assert GUIDE.read_text().count("```") == 2 * len(BLOCKS)
    modules = [re.search(r"-m (\S+)", line)[1] for line in COMMANDS]
    assert modules == ["experiments.show_data", "pytest", *["experiments.places"] * 2, "experiments.evaluate"]


def test_a_block_that_does_not_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", [("text", "\n"), BLOCKS[0]])
    with pytest.raises(AssertionError, match=r"block 2, no longer applies to instrdiv/rewriting/families\.py"):
        put_in(tmp_path)


FINGERPRINT = """
import dataclasses, json
from experiments.show_data import rows
from instrdiv.presets import BASES, SMOKE
from instrdiv.settings import Member
mixed = dataclasses.replace(SMOKE, no_op_fraction=0.5, near_miss_fraction=0.5, family="free+mirrored", k_max=2)
ids = [Member(setting, seed).id for setting in (*BASES.values(), mixed) for seed in range(2)]
print(json.dumps([ids, [rows(mixed, split, 64, seed=1, dev_tests=64) for split in ("train", "seen", "unseen")]]))
"""


def test_a_knob_whose_default_is_the_old_behaviour_changes_no_id_and_no_example(extended):
    before, after = (json.loads(run(root, f"python -c {shlex.quote(FINGERPRINT)}")) for root in (ROOT, extended))
    assert before == after
    ids, tables = before
    assert len(set(ids)) == 10 and {row["op"] for table in tables for row in table} == {"has_op", "near_miss", "no_op"}


def is_rotated(string: str) -> bool:
    block = string[:3]
    return string == block + block[1:] + block[0]


class TestShowData:
    def test_the_output_is_the_one_shown(self, extended):
        (shown,) = (text for kind, text in BLOCKS if kind == "text")
        assert run(extended, command("experiments.show_data")) == shown

    def test_the_family_and_the_knob_are_what_they_say(self, extended):
        """Against plain Python. With the same keys, the knob moves the pattern or leaves the example as it was."""
        line = f"{command('experiments.show_data')} --format=jsonl --num=400 --config.leading_fraction="
        none, half, every = (
            list(map(json.loads, run(extended, line + share).splitlines())) for share in ["0", "0.5", "1"]
        )
        for row in (*none, *half, *every):
            assert row["answer"] == row["input"].replace(row["pattern"], row["replacement"], 1)
            assert row["pattern"] in row["input"] and len(row["input"]) == 14
            assert is_rotated(row["pattern"]) and is_rotated(row["replacement"])
        assert all(row["input"].startswith(row["pattern"]) for row in every)
        moved = [(a, b, c) for a, b, c in zip(none, half, every, strict=True) if a != c]
        assert len(moved) > 300 and all(b in (a, c) for a, b, c in moved)
        share = sum(b == c for a, b, c in moved) / len(moved)
        assert abs(share - 0.5) < 5 * math.sqrt(0.25 / len(moved))

    def test_a_flag_without_effect_is_refused(self, extended):
        with pytest.raises(AssertionError, match=r"error: --config.leading_fraction=0.5: has no effect, nothing is pl"):
            run(extended, f"{command('experiments.show_data')} --config.no_op_fraction=1")


def test_the_tests_that_it_extends_pass(extended):
    assert re.search(r"\b10 passed", run(extended, command("pytest")))


def test_you_get_what_it_says(extended):
    said = " ".join(GUIDE.read_text().partition("**What you get**")[2].split())
    shown = run(extended, command("experiments.places", "--help"))
    assert "--config.leading_fraction:" in shown and re.search(r"--config\.family:[^-]*\brotated\b", shown)
    assert "`--config.leading_fraction` and the family `rotated` in `--help`" in said

    assert "4 members in 1 group(s)" in run(extended, command("experiments.places", "--preset=smoke"))
    run(extended, command("experiments.evaluate"))
    run_dir = extended / "runs" / "places"
    results = read_table(run_dir / "results.csv", ("leading_fraction", "family"))
    assert {row["leading_fraction"] for row in results} == {0, 1} and {row["family"] for row in results} == {"rotated"}
    for slice in ("anywhere/has_op", "family_tested=rotated_2/has_op"):
        tested = [row for row in results if row["slice"] == slice]
        assert f"`{slice}`" in said and len(tested) == 4 and all(row["tests"] == 128 for row in tested)
    for name in ("results.csv", "figure.png", "figure.pdf", "report.html"):
        assert f"`{name}`" in said and (run_dir / name).stat().st_size > 1_000
    assert "leading_fraction" in (run_dir / "report.html").read_text()
