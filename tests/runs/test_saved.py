"""Run directories: resuming, cohorts, what is refused, and reading checkpoints back."""

import dataclasses
import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from instrdiv.config.layout import Options
from instrdiv.config.pools import RulePools
from instrdiv.config.sweep import Sweep
from instrdiv.runs.run import run
from instrdiv.runs.saved import RunDirectory, SavedRun
from instrdiv.runtime.checkpoints import Checkpoints, Schedule
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.interruption import Interrupted, StopRequest
from instrdiv.runtime.tables import merge_table, read_cells, read_table
from tests.worlds import TINY, tiny

TABLES = ("results.csv", "metrics.csv", "resemblance.csv")
EVERY_CHUNK = {"options": Options(devices=2), "progress": False, "keep_params": False}


def sweep(instructions=(4, 16), seeds=2, **changes):
    return Sweep.grid(tiny(**changes), seeds=seeds, dev_tests=16, tests=24, instructions=list(instructions))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted, all of its checkpoints kept."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    run(sweep(), path, schedule=Schedule(steps=1), **EVERY_CHUNK)
    return path


class StopAfter:
    """A clock that asks the process to stop when it is read for the n-th time, as a user's signal would."""

    def __init__(self, readings):
        self.left = readings

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.0


@pytest.mark.parametrize("readings", [2, 3])
def test_a_signal_saves_and_the_same_call_resumes_byte_equal(whole, tmp_path, readings, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"Checkpoint saved at group g0, step \d+ of 16. Rerun the same command"):
        run(sweep(), tmp_path / "run", schedule=Schedule(clock=StopAfter(readings)), **EVERY_CHUNK)
    assert signal.getsignal(signal.SIGTERM) is before
    saved = SavedRun(tmp_path / "run")
    (step,) = saved.steps(saved.groups[0])
    assert 0 < step < 16 and "SIGTERM received: finishing the current chunk" in capsys.readouterr().err
    run(sweep(), tmp_path / "run", **EVERY_CHUNK)
    assert f"resuming from step {step}" in capsys.readouterr().err
    for name in TABLES:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    elapsed = [row["elapsed_seconds"] for row in read_table(tmp_path / "run" / "timings.csv")]
    assert elapsed == sorted(elapsed) and len(elapsed) == TINY.chunks
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert len(provenance["earlier_launches"]) == 1


def test_a_run_resumes_from_any_of_its_checkpoints(whole, tmp_path):
    """Later ones and the tables of results are gone; what is trained and tested again is the same."""
    saved = SavedRun(whole)
    steps = saved.steps(saved.groups[0])
    assert steps == [4, 8, 12, 16]
    for step in steps:
        again = tmp_path / str(step)
        shutil.copytree(whole, again)
        (again / "results.csv").unlink()
        for later in steps[steps.index(step) + 1 :]:
            shutil.rmtree(again / "checkpoints" / "g0" / str(later))
        run(sweep(), again, **EVERY_CHUNK)
        for name in TABLES:
            assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.csv").unlink()
    for file in (tmp_path / "run/checkpoints/g0/16/state").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[:-40])
    run(sweep(), tmp_path / "run", **EVERY_CHUNK)
    said = capsys.readouterr().err
    assert "checkpoints/g0/16 is damaged" in said and "resuming from step 12" in said
    for name in TABLES:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_more_members_are_a_cohort_of_their_own(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    before = read_cells(path / "results.csv")
    run(sweep(instructions=(4, 8, 16), seeds=3), path, **EVERY_CHUNK)
    after, saved = read_cells(path / "results.csv"), SavedRun(path)
    assert after[: len(before)] == before
    assert [(g.name, len(g.members)) for g in saved.groups] == [("g0", 4), ("g1", 5)]
    assert len({row["member"] for row in after}) == len(saved.sweep.members) == 9
    assert [len(cohort.members) for cohort in saved.cohorts] == [4, 5]
    assert len(read_cells(path / "metrics.csv")) == 9 * TINY.chunks
    assert len(read_cells(path / "resemblance.csv")) == 9
    # One device works through members one by one, so that the new ones are what they would be elsewhere.
    alone = tmp_path / "alone"
    new = tuple(member for member in saved.sweep.members if member not in saved.cohorts[0].members)
    run(dataclasses.replace(sweep(), members=new), alone, **EVERY_CHUNK)
    scores = [[(r["member"], r["split"], r["slice"], r["exact_match"]) for r in read_cells(p / "results.csv")]
              for p in (path, alone)]  # fmt: skip
    assert scores[0][len(before) :] == scores[1]
    # The same command again reads it back; the smaller sweep is now another run.
    assert len(run(sweep(instructions=(4, 8, 16), seeds=3), path, **EVERY_CHUNK).results) == len(after)
    with pytest.raises(BadInput, match=r"instructions: 4,16,8 saved, 4,16 requested; seed: 0,1,2 saved, 0,1"):
        run(sweep(), path, **EVERY_CHUNK)


def test_rows_of_others_survive_a_run_that_is_resumed(whole, tmp_path):
    """Such as those of an evaluation."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    rows = read_cells(path / "results.csv")
    other = rows[0] | {"slice": "occurrences_tested=2/all", "exact_match": "0.5"}
    merge_table(path / "results.csv", [other], tuple(other), ("member", "step", "split", "slice"))
    run(sweep(seeds=3), path, **EVERY_CHUNK)
    assert other in read_cells(path / "results.csv")


def test_two_launches_cannot_share_a_directory(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with SavedRun(tmp_path / "run").locked(), pytest.raises(BadInput, match=f"is in use by process {os.getpid()} on"):
        run(sweep(seeds=3), tmp_path / "run", **EVERY_CHUNK)
    run(sweep(seeds=3), tmp_path / "run", **EVERY_CHUNK)


def test_other_rules_than_those_trained_on_are_refused(whole, tmp_path, monkeypatch):
    """As another version of the sampler would make."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "results.csv").unlink()
    monkeypatch.setattr("instrdiv.tasks.strings.rules.RuleTable.digest", "another")
    with pytest.raises(BadInput, match="was trained on different instructions"):
        run(sweep(), path, **EVERY_CHUNK)


def test_a_checkpoint_that_does_not_fit_is_refused(whole, tmp_path, monkeypatch):
    """As another version of the model would make."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "results.csv").unlink()
    read = Checkpoints.read

    def changed(self, step):
        checkpoint = read(self, step)
        name = "params.params.embedding"
        return dataclasses.replace(checkpoint, arrays=checkpoint.arrays | {name: checkpoint.arrays[name][:, 1:]})

    monkeypatch.setattr(Checkpoints, "read", changed)
    with pytest.raises(BadInput, match=r"checkpoint of step 16 does not match this run: params.params.embedding is"):
        run(sweep(), path, **EVERY_CHUNK)


def edited(whole, path, **layout):
    """A copy of a run whose config.json lays out its cohort otherwise."""
    shutil.copytree(whole, path)
    config = json.loads((path / "config.json").read_text())
    config["cohorts"][0] |= layout
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_an_edited_layout_is_followed(whole, tmp_path):
    """Another number of devices: idle members come or go, and rows stay those of the members."""
    path = edited(whole, tmp_path / "run", devices=3)
    (path / "results.csv").unlink()
    for step in ("16", "12"):
        shutil.rmtree(path / "checkpoints" / "g0" / step)
    run(sweep(), path, Options(), progress=False, keep_params=False)
    ours, theirs = (read_table(p / "metrics.csv") for p in (path, whole))
    assert [r["member"] for r in ours] == [r["member"] for r in theirs]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], atol=1e-4)


def test_a_run_older_than_a_way_to_compute_attention_is_resumed(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    config = json.loads((path / "config.json").read_text())
    assert config["cohorts"][0].pop("attention") == "plain"
    (path / "config.json").write_text(json.dumps(config))
    run(sweep(), path, **EVERY_CHUNK)
    assert (path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_members_that_come_later_are_computed_as_those_that_are_there(whole, tmp_path, monkeypatch):
    path = edited(whole, tmp_path / "run", attention="cudnn")
    monkeypatch.setattr(Options, "_check_attention", lambda *args: None)
    *_, cohort = RunDirectory.check(path, sweep(seeds=3), Options(), overwrite=False)
    assert cohort.layout.attention == "cudnn" and len(cohort.members) == 2
    with pytest.raises(BadInput, match=r"attention: cudnn saved, plain requested"):
        RunDirectory.check(path, sweep(), Options(attention="plain"), overwrite=False)


def test_a_run_on_a_kernel_that_this_machine_lacks_is_one_line(whole, tmp_path):
    path = edited(whole, tmp_path / "run", attention="cudnn")
    (path / "results.csv").unlink()
    with pytest.raises(BadInput, match="--attention=cudnn: needs an NVIDIA GPU; the backend is cpu"):
        run(sweep(), path, Options(), progress=False)


def test_fewer_devices_than_the_run_was_laid_out_on_are_one_line(whole, tmp_path):
    path = edited(whole, tmp_path / "run", devices=64)
    (path / "results.csv").unlink()
    assert SavedRun(path).devices == 64 and SavedRun.at(tmp_path) is None
    with pytest.raises(
        BadInput, match=r"config.json: the saved layout of group g0 does not fit .*--devices=64: this machine"
    ):
        run(sweep(), path, progress=False, keep_params=False)


def test_a_launch_that_came_and_went_between_check_and_lock_is_seen(whole, tmp_path, monkeypatch):
    """Another launch adds members and ends while this one builds its rules: nothing of it is forgotten."""
    path, module = tmp_path / "run", sys.modules["instrdiv.runs.run"]
    shutil.copytree(whole, path)

    class Meanwhile(RulePools):
        def __init__(self, members):
            super().__init__(members)
            monkeypatch.setattr(module, "RulePools", RulePools)
            run(sweep(seeds=3), path, **EVERY_CHUNK)

    monkeypatch.setattr(module, "RulePools", Meanwhile)
    with pytest.raises(BadInput, match=r"already contains a different run \(seed: 0,1,2 saved, 0,1,3 requested\)"):
        members = (*sweep().members, dataclasses.replace(sweep().members[0], seed=3))
        run(dataclasses.replace(sweep(), members=members), path, **EVERY_CHUNK)
    assert len(SavedRun(path).sweep.members) == 6
    assert run(sweep(seeds=3), path, **EVERY_CHUNK).results


def test_checkpoints_of_other_members_are_refused(whole, tmp_path):
    """Such as a directory that was copied by hand has: same rules, same shapes, another rate."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "results.csv").unlink()
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"learning_rate": 0.002', '"learning_rate": 0.005'))
    with pytest.raises(BadInput, match=r"g0: contains checkpoints of different members"):
        run(sweep(learning_rate=5e-3), path, **EVERY_CHUNK)


def test_after_overwrite_the_message_says_how_to_resume(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(Interrupted, match=r"Rerun the same command without --overwrite to resume"):
        run(sweep(), tmp_path / "run", overwrite=True, schedule=Schedule(clock=StopAfter(2)), **EVERY_CHUNK)


def test_overwrite_leaves_nothing_of_the_old_run(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    run(sweep(instructions=(8,), seeds=1), path, overwrite=True, **EVERY_CHUNK)
    saved = SavedRun(path)
    assert len(saved.sweep.members) == 1 and saved.steps(saved.groups[0]) == [16]
    assert len({row["member"] for row in read_cells(path / "results.csv")}) == 1


class TestParams:
    def test_any_step_is_what_training_had_there(self, whole):
        saved = SavedRun(whole)
        (group,) = saved.groups
        assert [member.id for member in group.members] == [member.id for member in sweep().members]
        last, params, diverged = saved.params(group)
        trained = run(sweep(), None, Options(devices=2), progress=False).params
        assert last == 16 and diverged.tolist() == [-1] * 4
        for row, member in enumerate(group.members):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[row], b), params, trained[member.id])  # noqa: B023
        step, early, _ = saved.params(group, 4)
        assert step == 4 and not np.array_equal(early["params"]["head"], params["params"]["head"])

    def test_what_is_not_there_is_said(self, whole, tmp_path):
        saved = SavedRun(whole)
        with pytest.raises(BadInput, match=r"--step=5: .* has no such checkpoint; saved steps: 4, 8, 12, 16"):
            saved.params(saved.groups[0], 5)
        with pytest.raises(BadInput, match="holds no run"):
            SavedRun(tmp_path)

    def test_the_one_before_a_damaged_one(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run")
        saved = SavedRun(tmp_path / "run")
        shutil.rmtree(tmp_path / "run/checkpoints/g0/16/state")
        assert saved.params(saved.groups[0])[0] == 12
        with pytest.raises(BadInput, match=r"16: the checkpoint is damaged"):
            saved.params(saved.groups[0], 16)
        assert Checkpoints(tmp_path / "run/checkpoints/g0").steps() == [4, 8, 12, 16]  # reading sets nothing aside
        lines = []
        assert saved.params(saved.groups[0], say=lines.append)[0] == 12 and "using step 12 instead" in lines[0]
        with pytest.raises(BadInput, match="damaged"):  # not older parameters beside the tables of the last step
            run(sweep(), tmp_path / "run", Options(devices=2), progress=False)


def test_a_second_signal_acts_at_once(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    lines = []
    with pytest.raises(KeyboardInterrupt), StopRequest(lines.append) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and len(lines) == 1
        signal.raise_signal(signal.SIGINT)
