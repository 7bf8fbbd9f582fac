"""Checkpoints: written whole, read with care, deleted late."""

import errno
import itertools
import json
import math
import random
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.runtime.checkpoints import Checkpoints, Damaged, Schedule, _digest, _digests, named_leaves
from instrdiv.runtime.errors import BadInput

RECORD = {"metrics": [{"loss": 0.1, "tests": math.nan}], "rules": {"m1": "ab"}}


def state(seed=0):
    """Three members, in the types and ranks that a state has."""
    a, b = jax.random.split(jax.random.key(seed))
    kernel = jax.random.normal(a, (3, 17, 9))
    return {
        "params": {"kernel": kernel, "scale": jax.random.normal(b, (3, 5))},
        "count": jnp.arange(3, dtype=jnp.int32),
    }


@pytest.fixture
def lines():
    return []


@pytest.fixture
def checkpoints(tmp_path, lines):
    made = Checkpoints(tmp_path / "g0", lines.append)
    yield made
    made.close()


def save(checkpoints, *steps, keep=()):
    for step in steps:
        checkpoints.save(step, state(step), RECORD, keep=step in keep)
    checkpoints.wait()


def assert_is(checkpoint, step):
    assert checkpoint.step == step and str(checkpoint.record) == str(RECORD)
    expected = named_leaves(state(step))
    assert set(checkpoint.arrays) == set(expected) == {"params.kernel", "params.scale", "count"}
    for name, leaf in expected.items():
        assert checkpoint.arrays[name].dtype == leaf.dtype
        np.testing.assert_array_equal(checkpoint.arrays[name], leaf)


def test_what_is_read_is_what_was_saved(checkpoints, tmp_path, lines):
    assert checkpoints.latest() is None and checkpoints.steps() == []
    save(checkpoints, 5)
    assert_is(checkpoints.read(5), 5)
    assert_is(Checkpoints(tmp_path / "g0").latest(), 5)
    assert not lines


def test_the_last_two_stay_and_those_to_be_kept(checkpoints, tmp_path):
    save(checkpoints, 1, 2, 3, 4, 5, 6, keep=(2, 4))
    assert checkpoints.steps() == [2, 4, 5, 6]
    again = Checkpoints(tmp_path / "g0")  # another launch knows which those are
    assert_is(again.latest(), 6)
    save(again, 7, 8, keep=())
    assert again.steps() == [2, 4, 7, 8]


def test_a_save_that_is_under_way_is_not_waited_for(checkpoints):
    checkpoints.save(1, state(1), RECORD)
    checkpoints.settle()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_saving_a_step_twice_is_an_error_not_a_silent_nothing(checkpoints):
    save(checkpoints, 3)
    with pytest.raises(BadInput, match=r"step 3 cannot be written .*; the last intact one is step 3"):
        checkpoints.save(3, state(3), RECORD)


def places(path):
    """(file, offset) of every byte of a checkpoint."""
    return [(file, i) for file in sorted(path.rglob("*")) if file.is_file() for i in range(file.stat().st_size)]


def test_flips_and_truncations_are_detected_or_harmless(tmp_path, lines):
    """At 50 places: either the very state and record are read, or the one before is used, and a line says so."""
    original = tmp_path / "original"
    save(Checkpoints(original), 1, 2)
    everywhere = places(original / "2")
    of_arrays = [place for place in everywhere if place[0].parent.name == "d"]
    chance, detected = random.Random(0), 0
    for number, where in itertools.product(range(25), ("anywhere", "arrays")):
        damaged = tmp_path / f"{where}{number}"
        shutil.copytree(original, damaged)
        file, offset = chance.choice(everywhere if where == "anywhere" else of_arrays)
        file = damaged / file.relative_to(original)
        content = bytearray(file.read_bytes())
        if number % 5 == 0:
            content = content[:offset]
        else:
            content[offset] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        checkpoints = Checkpoints(damaged, lines.append)
        found = checkpoints.latest()
        if lines:
            detected += 1
            assert_is(found, 1)
            assert "2 is damaged" in lines[0] and len(lines) == 1 and (damaged / "2.damaged").is_dir()
            save(checkpoints, 2)  # trained again
            assert_is(checkpoints.latest(), 2)
        else:
            assert_is(found, 2)
        checkpoints.close()
        lines.clear()
    assert detected >= 20


def test_where_none_is_whole_it_is_said_and_nothing_is_deleted(tmp_path, lines):
    save(Checkpoints(tmp_path / "g0"), 1, 2)
    for step in "12":
        shutil.rmtree(tmp_path / "g0" / step / "state")
    checkpoints = Checkpoints(tmp_path / "g0", lines.append)
    assert checkpoints.latest() is None and len(lines) == 3 and "from the beginning" in lines[-1]
    assert {p.name for p in (tmp_path / "g0").iterdir()} == {"1.damaged", "2.damaged"}


def test_a_changed_row_of_the_record_is_damage(tmp_path):
    checkpoints = Checkpoints(tmp_path / "g0")
    save(checkpoints, 1)
    path = tmp_path / "g0" / "1" / "record" / "metadata"
    sealed = json.loads(path.read_text())
    sealed["text"] = sealed["text"].replace("0.1", "0.2")
    path.write_text(json.dumps(sealed))
    with pytest.raises(Damaged, match="record has changed"):
        checkpoints.read(1)


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), ValueError("x: Permission denied [y]")]
)
def test_what_the_machine_keeps_from_being_read_is_not_damage(tmp_path, error, monkeypatch, lines):
    checkpoints = Checkpoints(tmp_path / "g0", lines.append)
    save(checkpoints, 1, 2)

    def refuse(*arguments, **named):
        raise error

    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(BadInput, match=r"2: cannot be read now \((Too many open files|Permission denied)\)"):
        checkpoints.latest()
    assert checkpoints.steps() == [1, 2] and not lines


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "g0")
    save(checkpoints, 1)
    shutil.copytree(tmp_path / "g0" / "1", tmp_path / "g0" / "2.orbax-checkpoint-tmp")
    assert_is(checkpoints.latest(), 1)
    assert {p.name for p in (tmp_path / "g0").iterdir()} == {"1"}


FULL = """
import resource, sys
from instrdiv.runtime.checkpoints import quieten_orbax
quieten_orbax()  # as the commands do
from tests.runtime.test_checkpoints import Checkpoints, BadInput, save, state, RECORD
checkpoints = Checkpoints(__import__("pathlib").Path(sys.argv[1]))
save(checkpoints, 1, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
try:
    save(checkpoints, 3)
    save(checkpoints, 4)
except BadInput as error:
    print(error)
print(checkpoints.steps())
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system cannot limit the size of files")
def test_a_write_that_fails_is_one_line_and_deletes_nothing(tmp_path):
    """A limit on the size of files stands for a full disk: what fails is a real write."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path / "g0"], capture_output=True, text=True)
    error, steps = done.stdout.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert "the checkpoint of step 3 cannot be written" in error and "the last intact one is step 2" in error
    assert steps == "[1, 2]"
    assert_is(Checkpoints(tmp_path / "g0").latest(), 2)


class TestDigest:
    @pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32])
    def test_host_and_device_agree_and_every_member_has_its_own(self, dtype):
        array = np.random.default_rng(0).integers(0, 2**31, (3, 7, 5)).astype(dtype)
        on_device = np.asarray(_digests({"a": jnp.asarray(array)})["a"])
        assert on_device.dtype == np.uint32 and on_device.tolist() == _digest(np, array).tolist()
        assert len(set(on_device.tolist())) == 3

    def test_any_bit_counts_and_so_does_any_exchange(self):
        array = np.random.default_rng(1).normal(size=(1, 40)).astype(np.float32)
        for word, bit in itertools.product(range(40), range(32)):
            changed = array.copy()
            changed.view(np.uint32)[0, word] ^= np.uint32(1 << bit)
            assert _digest(np, changed) != _digest(np, array)
        for a, b in itertools.combinations(range(40), 2):
            changed = array.copy()
            changed[0, [a, b]] = changed[0, [b, a]]
            assert _digest(np, changed) != _digest(np, array)


class TestSchedule:
    def test_by_minutes(self):
        now = [0.0]
        schedule = Schedule(minutes=2, clock=lambda: now[0])
        due = []
        for step in range(10, 110, 10):
            now[0] += 50
            if schedule.is_due(step, 10):
                due.append(step)
                schedule.saved()
        assert due == [30, 60, 90]

    def test_by_steps_at_the_first_chunk_end_past_each_multiple(self):
        schedule = Schedule(minutes=math.inf, steps=25)
        assert [step for step in range(10, 110, 10) if schedule.is_due(step, 10)] == [30, 50, 80, 100]
        assert not Schedule(minutes=math.inf).is_due(10, 10)
