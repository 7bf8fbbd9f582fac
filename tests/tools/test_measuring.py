"""Turns: the order of samples, what they count, and the handling of contenders that fail."""

import itertools
import math

import pytest

from tools import measuring
from tools.measuring import Contender, NotRun, Outcome, Ready, Sample, ratio, take_turns


@pytest.fixture
def clock(monkeypatch):
    """A fake clock that advances only by ``clock.now +=``."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: Clock.now)
    return Clock


def contender(clock, log, name="a", seconds=0.5, first=0.0, fails_at=None, **ready):
    """Takes ``seconds`` per call, ``first`` more on the first one; logs its calls, and raises at call ``fails_at``."""
    count = itertools.count(1)

    def call():
        number = next(count)
        log.append(name)
        if number == fails_at:
            raise MemoryError("out of memory\nand a long story")
        clock.now += seconds + (first if number == 1 else 0.0)

    return Contender(name, "ours", name, 4, 1, lambda: Ready(call, lambda: None, examples=12, **ready))


def prepared(*args, **kwargs):
    outcome = Outcome(contender(*args, **kwargs))
    outcome.prepare(seconds=2.0)
    return outcome


def test_a_sample_is_as_many_calls_as_take_the_time(clock):
    log = []
    outcome = prepared(clock, log, seconds=0.5, first=7.0)
    assert (outcome.status, outcome.calls, outcome.compile_seconds) == ("ok", 4, 7.0)
    log.clear()
    outcome.sample(0, 0)
    (sample,) = outcome.samples
    assert len(log) == 4 and (sample.seconds, sample.examples) == (2.0, 48)
    assert outcome.rate == 24.0


def test_short_calls_are_timed_many_at_once_and_long_ones_once(clock):
    assert prepared(clock, [], seconds=0.01).calls == 200
    log = []
    assert prepared(clock, log, seconds=30.0).calls == 1 and len(log) == 2


def test_a_program_compiled_apart_tells_its_own_time_and_memory(clock):
    outcome = prepared(clock, [], compile_seconds=3.0, peak_bytes=lambda: 17)
    assert (outcome.compile_seconds, outcome.peak_bytes) == (3.0, 17)


def test_every_round_begins_with_another_contender(clock):
    outcomes = [prepared(clock, [], name) for name in "abc"]
    turns = []
    take_turns(outcomes, 4, before=lambda round, place, outcome: turns.append((round, place, outcome.contender.kind)))
    order = ["".join(kind for r, _, kind in turns if r == round) for round in range(4)]
    assert order == ["abc", "bca", "cab", "abc"]
    assert all([sample.round for sample in outcome.samples] == [0, 1, 2, 3] for outcome in outcomes)


def test_what_cannot_be_set_up_says_why_and_is_not_sampled(clock):
    def missing():
        raise NotRun("missing: pip install torch")

    def broken():
        raise RuntimeError("")

    outcomes = [Outcome(Contender("x", "peers", "x", 1, 1, set_up)) for set_up in (missing, broken)]
    for outcome in outcomes:
        outcome.prepare(1.0)
    take_turns([*outcomes, prepared(clock, [])], 2)
    assert [outcome.status for outcome in outcomes] == ["missing: pip install torch", "failed: RuntimeError: "]
    assert all(not outcome.samples and math.isnan(outcome.rate) for outcome in outcomes)


def test_one_that_fails_in_a_round_keeps_its_samples_and_the_others_continue(clock):
    failing = prepared(clock, [], seconds=2.0, fails_at=4)  # the third call is its first sample
    other = prepared(clock, [], "other")
    take_turns([failing, other], 3)
    assert failing.status == "failed: MemoryError: out of memory"
    assert (len(failing.samples), len(other.samples)) == (1, 3)


def test_a_turn_that_does_not_fit_into_the_time_left_is_not_begun(clock):
    slow, quick = prepared(clock, [], "slow", seconds=8.0), prepared(clock, [], "quick", seconds=2.0)
    end = clock.now + 17
    take_turns([slow, quick], 5, time_left=lambda: end - clock.now)
    assert (len(slow.samples), len(quick.samples)) == (1, 4)  # 8 + 2, then 2 + 2 + 2


def test_a_ratio_compares_within_rounds():
    """Both are half as fast in the second round, which cancels in the ratio; a round that only one has is ignored."""

    def outcome(*seconds):
        samples = [Sample(round, 0, s, 10, 0.0) for round, s in enumerate(seconds)]
        return Outcome(Contender("", "", "", 1, 1, lambda: None), samples=samples)

    assert ratio(outcome(1, 2, 1), outcome(3, 6)) == 3.0
    assert math.isnan(ratio(outcome(1), outcome()))


def test_other_processes_are_the_whole_machine_without_the_idle_and_without_this_one(clock, monkeypatch, tmp_path):
    """/proc/stat counts user, nice, system, idle, iowait, irq, softirq and steal time, in ticks."""
    statistics = iter(
        ["cpu  100 20 30 900 900 1 2 7 50 50\ncpu0 9 9", "cpu  300 20 30 999 999 1 2 107 90 90\ncpu0 9 9"]
    )
    monkeypatch.setattr(measuring.Path, "read_text", lambda path: next(statistics))
    monkeypatch.setattr(measuring.os, "sysconf", lambda name: 100)
    used = iter([1.0, 2.5])
    monkeypatch.setattr(measuring.time, "process_time", lambda: next(used))
    outcome = prepared(clock, [])
    outcome.sample(0, 0)
    assert outcome.samples[0].other_cores == pytest.approx((3.0 - 1.5) / 2.0)


def test_without_such_statistics_the_other_processes_are_unknown(monkeypatch):
    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(measuring.Path, "read_text", absent)
    assert math.isnan(measuring._other_seconds())
