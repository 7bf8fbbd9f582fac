"""Forecasts: which groups are probed, what is scaled from them, and how little is run. (Real ones: test_launchers.)"""

from unittest.mock import MagicMock

import pytest

from instrdiv import probing
from instrdiv.planning import flops_per_example
from instrdiv.population import make_groups
from instrdiv.probing import forecast
from instrdiv.run import plan
from instrdiv.settings import Member
from instrdiv.sweep import Options, Sweep
from tests.worlds import TINY, tiny

OPTIONS = Options(devices=2)
FOUND = {
    "g0": probing._GroupForecast(1.0, 20.0, 3.0, device_bytes=1_000_000, probe_bytes=1000),
    "g1": probing._GroupForecast(2.0, 30.0, 5.0, device_bytes=8_000_000, probe_bytes=2000),
}


def sweep(**values):
    return Sweep.grid(TINY, seeds=3, dev_tests=16, tests=24, **values)


class TestGroups:
    @pytest.fixture(autouse=True)
    def found(self, monkeypatch):
        monkeypatch.setattr(probing, "_probe", lambda group, *rest: FOUND[group.name])

    def test_are_all_probed_where_there_is_time(self):
        done = forecast(sweep(layers=[1, 2]), OPTIONS)
        assert (done.compile_seconds, done.training_seconds, done.test_seconds) == (3.0, 50.0, 8.0)
        assert (done.device_bytes, done.probed, done.groups) == (8_000_000, 2, 2)
        assert done.text.startswith("from a short probe: 61 s in all")

    @pytest.mark.parametrize("layers, probed, other", [([1, 2], 1, 0), ([2, 1], 0, 1)])
    def test_are_scaled_from_the_largest_where_there_is_none(self, monkeypatch, layers, probed, other):
        monkeypatch.setattr(probing, "_ENOUGH_SECONDS", 0)
        both, said = sweep(layers=layers), []
        done = forecast(both, OPTIONS, said.append)
        assert said == [f"probing group g{probed} (1 of at most 2)"] and (done.probed, done.groups) == (1, 2)
        assert done.text.startswith("from a short probe of 1 of 2 groups (the others by their FLOPs): ")
        groups, found = make_groups(both.members), FOUND[f"g{probed}"]
        share = 1 + flops_per_example(groups[other]) / flops_per_example(groups[probed])
        assert 1.3 < share < 1.9
        assert done.compile_seconds == 2 * found.compile_seconds
        assert done.training_seconds == pytest.approx(share * found.training_seconds)
        assert done.test_seconds == pytest.approx(share * found.test_seconds)

    def test_that_need_most_memory_need_not_be_those_with_most_arithmetic(self, monkeypatch):
        """Its estimate errs as that of the one that was probed."""
        monkeypatch.setattr(probing, "_ENOUGH_SECONDS", 0)
        both = Sweep("", tuple(Member(tiny(batch_size=b, epochs=e), 0) for b, e in ((8, 16.0), (64, 8.0))))
        long, wide = plan(both, OPTIONS).groups
        assert long.compute_flops > wide.compute_flops and long.device_bytes < wide.device_bytes
        expected = FOUND["g0"].device_bytes * wide.device_bytes / long.device_bytes
        assert forecast(both, OPTIONS).device_bytes == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("part", [1, 4])
def test_a_part_of_the_batch_stands_for_all_of_it(monkeypatch, part):
    """Where a part takes that part of a second, three members on two devices take twice as long as one."""
    monkeypatch.setattr(probing, "_as_many", lambda of, seconds, multiple: of // part)
    monkeypatch.setattr(probing, "_time", lambda work: (0.0, 1 / part))
    monkeypatch.setattr(probing, "chunk_program", lambda *args: MagicMock())
    monkeypatch.setattr(probing, "program_bytes", lambda program: 1)
    done = forecast(sweep(), OPTIONS)
    assert done.training_seconds == 2 * TINY.chunks  # the probe times a chunk
    # A piece each: unseen_dev at every report and at the end, unseen and seen; and unseen again, decoded.
    assert done.test_seconds == 2 * (TINY.chunks + 1 + 2 + 1)
    assert forecast(sweep(), OPTIONS, conditions=5).test_seconds == done.test_seconds + 2 * 5


@pytest.mark.parametrize(
    "of, share, multiple, taken", [(512, 0.001, 1, 512), (512, 0.01, 1, 100), (512, 0.01, 8, 96), (8, 3, 2, 2)]
)
def test_no_more_is_tried_than_there_is_time_for(of, share, multiple, taken):
    assert probing._as_many(of, share * probing._SECONDS, multiple) == taken
