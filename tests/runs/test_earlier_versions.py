"""Runs of earlier versions are read back, tested, exported, shown and gone on with.

``tests/fixtures/fig2a`` was written by the version before tasks had a seam: its config.json names no task. Its command:

    python -m experiments.fig2a_instruction_count --preset=smoke --seeds=1 --config.width=16 --config.layers=1 \
        --tests=32 --dev_tests=16 --checkpoint_steps=16
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate, export, fig2a_instruction_count
from instrdiv.config.presets import Setting
from instrdiv.launch.figure import launch
from instrdiv.reports.report import write_report
from instrdiv.runs.run import run
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.tables import read_cells, read_table, write_table
from tests.tasks import letter_order

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fig2a"
FLAGS = ("--preset=smoke", "--seeds=1", "--config.width=16", "--config.layers=1", "--tests=32", "--dev_tests=16",
         "--checkpoint_steps=16")  # fmt: skip


@pytest.fixture
def here(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "run")
    return tmp_path / "run"


def assert_equal_tables(path, expected):
    """The same columns and rows in the same order; numbers that are no whole ones within 1e-5."""
    ours, theirs = read_table(path), read_table(expected)
    assert list(ours[0]) == list(theirs[0]) and len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if isinstance(value, float) and not math.isnan(value):
                assert one[name] == pytest.approx(value, abs=1e-5), (name, other)
            else:
                assert one[name] == value or (one[name] != one[name] and value != value), (name, other)


def test_the_fixture_is_what_it_is_said_to_be():
    config = json.loads((FIXTURE / "config.json").read_text())
    assert "task" not in config
    assert {int(path.name) for path in (FIXTURE / "checkpoints" / "g0").iterdir() if path.name.isdigit()} == {16, 32}


def test_it_is_read_back(here):
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    saved = SavedRun(here)
    assert saved.sweep.task is Setting and saved.is_finished() and saved.steps(saved.groups[0]) == [16, 32]
    config = json.loads((here / "config.json").read_text())
    for member, row in zip(saved.sweep.members, config["cohorts"][0]["members"], strict=True):
        assert member.id == row["id"], "ids are hashes of the settings: no new field may change them"
        assert {"id": member.id, "seed": member.seed} | member.setting.as_row() == row | {"tail_shape": math.inf}
    found = run(saved.sweep, here, progress=False)
    assert found.results == read_table(FIXTURE / "results.csv") and found.headline == "has_op"
    assert found.metrics == read_table(FIXTURE / "metrics.csv")
    assert {path: path.read_bytes() for path in before} == before
    for member in saved.sweep.members:
        assert np.isfinite(found.params[member.id]["params"]["embedding"]).all()


def test_the_same_command_reads_it_back_and_writes_its_report(here, capsys):
    tables = {name: (here / name).read_bytes() for name in ("results.csv", "metrics.csv", "config.json")}
    assert launch(fig2a_instruction_count.FIGURE, [*FLAGS, f"--run_dir={here}"]) == 0
    assert "already finished; loading its results" in capsys.readouterr().err
    assert {name: (here / name).read_bytes() for name in tables} == tables
    assert (here / "figure.png").exists()
    page = (here / "report.html").read_text()
    assert "verdict" in page and "has-op" in page


def test_a_run_of_another_task_is_another_run(here, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in here.iterdir()}
    assert launch(letter_order.FIGURE, ["--preset=smoke", f"--run_dir={here}"]) == 2
    error = capsys.readouterr().err
    assert "task: rewriting saved, letter_order requested" in error and error.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in here.iterdir()} == before


def test_it_is_shown_evaluated_and_exported(here, tmp_path, capsys):
    assert "has-op" in write_report(here).read_text()
    before = read_cells(here / "results.csv")
    assert evaluate.launch([f"--run_dir={here}", "--suite=held_out", "--show=1", "--step=16"]) == 0
    assert evaluate.launch([f"--run_dir={here}", "--suite=held_out", "--show=1"]) == 0
    assert "held_out/has_op" in capsys.readouterr().out
    after = read_cells(here / "results.csv")
    assert after[: len(before)] == before and list(after[0]) == list(before[0]) and len(after) > len(before)
    assert {row["step"] for row in after[len(before) :]} == {"16", "32"}
    assert "held_out" in write_report(here).read_text()
    member = SavedRun(here).sweep.members[1].id
    out = tmp_path / "exported"
    assert export.launch([f"--run_dir={here}", f"--member={member}", f"--out={out}"]) == 0
    assert (out / "model.safetensors").exists() and "task rewriting" in (out / "README.md").read_text()


def test_it_resumes_from_its_checkpoint_and_ends_as_it_did(here, capsys):
    """On the arithmetic of another machine or version of jax the last digits may differ."""
    for name in ("results.csv", "errors.csv", "samples.csv", "resemblance.csv"):
        (here / name).unlink()
    shutil.rmtree(here / "checkpoints" / "g0" / "32")
    for name in ("metrics.csv", "timings.csv"):
        rows = read_cells(here / name)
        kept = [row for row in rows if int(row["step"]) <= 16]
        assert 0 < len(kept) < len(rows)
        write_table(here / name, kept, tuple(rows[0]))
    assert launch(fig2a_instruction_count.FIGURE, [*FLAGS, f"--run_dir={here}"]) == 0
    assert "group g0: resuming from step 16" in capsys.readouterr().err
    for name in ("metrics.csv", "results.csv", "errors.csv", "resemblance.csv"):
        assert_equal_tables(here / name, FIXTURE / name)
    assert [row["member"] for row in read_cells(here / "samples.csv")] == [
        row["member"] for row in read_cells(FIXTURE / "samples.csv")
    ]
    assert SavedRun(here).steps(SavedRun(here).groups[0]) == [16, 32]
