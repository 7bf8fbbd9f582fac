"""The loop over chunks: when what is reported and saved, with a trainer that only counts."""

import math
import types

import jax.numpy as jnp
import pytest

from instrdiv.runtime.interruption import Interrupted, StopRequest
from instrdiv.training import chunks
from instrdiv.training.chunks import ChunkLoop, Saving, Work


class Counting:
    """Advances by up to two steps; every one of them takes five seconds of a made-up clock, when it is waited for."""

    def __init__(self, steps, events, step=0):
        self.steps, self.events, self.step, self.state = steps, events, step, None

    def advance(self):
        self.step = min(self.step + 2, self.steps)
        self.events.append(f"advance to {self.step}")
        return jnp.int32(self.step)


class Saves:
    """Checkpoints that only say what they are asked for."""

    def __init__(self, events):
        self.events = events

    def settle(self):
        pass

    def wait(self):
        self.events.append("wait")

    def save(self, step, state, record, keep):
        self.events.append(f"save {step} {record}{' keep' if keep else ''}")


class EverySix:
    def is_due(self, step, chunk_steps):
        return step == 6

    def is_kept(self, step, chunk_steps):
        return step == 6

    def saved(self):
        pass


@pytest.fixture
def events(monkeypatch):
    """What happens, in order; the clock stands still but where the test moves it."""
    events = []
    monkeypatch.setattr(chunks, "time", types.SimpleNamespace(monotonic=lambda: 5.0 * len(events)))
    return events


def loop(events, steps, step=0, saving=None):
    timings = []

    def report(step, results, seconds):
        assert results == step == timings[-1]["step"]
        events.append(f"report {step}{' compiled' if seconds is None else ''}")

    work = Work("g7", steps, chunk_steps=2, examples=10, tokens=3)
    return ChunkLoop(work, Counting(steps, events, step), timings, lambda metrics: metrics, report, saving), timings


def test_a_chunk_is_reported_while_the_next_one_runs(events):
    """Except for those that are compiled: the first, and the last, which is shorter."""
    one, timings = loop(events, 7)
    one.run()
    assert events == [
        *("advance to 2", "report 2 compiled", "advance to 4", "advance to 6", "report 4", "advance to 7"),
        *("report 6", "report 7 compiled"),
    ]
    assert [row["compiled"] for row in timings] == [1, 0, 0, 1]
    assert [math.isnan(row["examples_per_second"]) for row in timings] == [True, False, False, True]
    second = timings[1]
    assert second["examples_per_second"] == 2 * 10 / second["seconds"]
    assert second["tokens_per_second"] == 3 * second["examples_per_second"]
    assert timings[-1]["elapsed_seconds"] == sum(row["seconds"] for row in timings)


def test_what_is_saved_has_been_reported(events):
    one, timings = loop(events, 8, step=2, saving=Saving(Saves(events), EverySix(), lambda: len(timings)))
    one.run()
    assert events == [
        *("advance to 4", "report 4 compiled", "advance to 6", "report 6", "save 6 2 keep"),
        *("advance to 8", "report 8", "save 8 3", "wait"),
    ]
    assert timings[1]["checkpoint_seconds"] > 0 == timings[0]["checkpoint_seconds"]


def test_who_asks_to_stop_is_saved_first(events):
    stop = StopRequest(print)
    one, _ = loop(events, 8, saving=Saving(Saves(events), EverySix(), dict, stop))
    stop.requested = True
    with pytest.raises(Interrupted, match=r"Checkpoint saved at group g7, step 2 of 8\. Rerun the same command"):
        one.run()
    assert events == ["advance to 2", "report 2 compiled", "save 2 {}", "wait"]


def test_nothing_is_done_at_the_end(events):
    loop(events, 8, step=8)[0].run()
    assert not events
