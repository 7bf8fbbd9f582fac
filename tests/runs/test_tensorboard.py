"""What TensorBoard reads back is what metrics.csv says, whole, once, and under a readable name."""

import dataclasses
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.runs import tensorboard
from instrdiv.runs.tensorboard import CURVES, TensorBoard, member_names
from instrdiv.runtime.errors import BadInput
from tests.worlds import TINY, tiny

MEMBERS = Sweep.grid(TINY, seeds=2, instructions=[4, 16]).members


def metrics(steps, members=MEMBERS):
    """Rows as a run makes them; every number is different."""
    return [
        {"member": member.id, "seed": member.seed, "step": step}
        | {name: 100 * step + 10 * row + column + 1 / 3 for column, name in enumerate(CURVES)}
        for step in steps
        for row, member in enumerate(members)
    ]


def read(directory, members=MEMBERS):
    """{(member, curve, step): values} as TensorBoard sees them."""
    found = {}
    for member in members:
        (folder,) = directory.glob(f"* {member.id}")
        events = EventAccumulator(str(folder)).Reload()
        assert set(events.Tags()["scalars"]) == set(CURVES)
        for name in CURVES:
            for event in events.Scalars(name):
                found.setdefault((member.id, name, event.step), []).append(event.value)
    return found


def expected(rows):
    return {(row["member"], name, row["step"]): [float(np.float32(row[name]))] for row in rows for name in CURVES}


def write(directory, *parts, members=MEMBERS):
    with TensorBoard(directory, members) as board:
        for rows in parts:
            board.write(rows)


def test_events_are_the_rows(tmp_path):
    write(tmp_path, metrics([8, 16]))
    assert read(tmp_path) == expected(metrics([8, 16]))


def test_each_report_can_be_read_at_once(tmp_path):
    with TensorBoard(tmp_path, MEMBERS) as board:
        for step in (1, 2, 3):
            board.write(metrics([step]))
            assert read(tmp_path) == expected(metrics(range(1, step + 1)))


def test_a_resumed_run_replaces_the_directory(tmp_path):
    """The interrupted run reached step 3; it resumes from a checkpoint at step 2, and another sweep's curves go."""
    other = [Member(tiny(width=32), 7)]
    for members in (other, MEMBERS):
        write(tmp_path, metrics([1, 2, 3], members), members=members)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "events.out.tfevents.1").write_text("of somebody else")
    write(tmp_path, metrics([1, 2]), metrics([4]))
    assert read(tmp_path) == expected(metrics([1, 2, 4]))
    assert len(list(tmp_path.iterdir())) == len(MEMBERS) + 1 and len(list((tmp_path / "notes").iterdir())) == 1


def test_a_diverged_member_has_no_number(tmp_path):
    rows = metrics([1, 2])
    rows[-1] |= {"loss": math.nan}
    write(tmp_path, rows)
    found = read(tmp_path)
    assert math.isnan(found[MEMBERS[-1].id, "loss", 2][0]) and not math.isnan(found[MEMBERS[-1].id, "loss", 1][0])


class TestNames:
    def test_say_what_varies(self):
        assert member_names(MEMBERS)[1] == f"instructions=4 seed=1 {MEMBERS[1].id}"
        assert member_names(MEMBERS[:1]) == [f"seed=0 {MEMBERS[0].id}"]

    def test_are_different_safe_and_short_whatever_varies(self):
        a = tiny(family="repeated+mirrored", k_max=2, occurrences=(1, 1, 1), tail_shape=0.5, learning_rate=3e-4)
        changes = {"dropout": 1e-3, "epochs": 7.5, "init": "gpt2", "norm": "layernorm", "precision": "bfloat16"}
        b = dataclasses.replace(TINY, held_out="pattern", tail_reading="index", schedule="constant", **changes)
        names = member_names([Member(a, 0), Member(b, 0), Member(b, 1)])
        assert len(set(names)) == 3 and all(len(name) < 255 for name in names)
        assert all(character.isascii() and character not in '/\\:*?"<>|,' for name in names for character in name)


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "available", lambda: False)
    with pytest.raises(BadInput, match=r"pip install 'instrdiv\[tensorboard\]'"):
        TensorBoard(tmp_path / "events", MEMBERS)
    assert not (tmp_path / "events").exists()


def test_a_directory_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "events").write_text("")
    with pytest.raises(BadInput, match="cannot be written for TensorBoard"):
        TensorBoard(tmp_path / "events", MEMBERS)
