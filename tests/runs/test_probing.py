"""Forecasts: which groups are probed, what is scaled from them, and how little is run. (Real ones: test_launchers.)

And blocks: which sizes are tried, which one is chosen, and where that is written down.
"""

import json
from unittest.mock import MagicMock

import jax
import pytest

from instrdiv.config.groups import make_groups
from instrdiv.config.layout import Layout, Options
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.runs import probing
from instrdiv.runs.planning import flops_per_example
from instrdiv.runs.probing import choose_block, forecast
from instrdiv.runs.run import plan, run
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.errors import BadInput
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
        assert done.text.startswith("from a short probe: 61 s in total")

    @pytest.mark.parametrize("layers, probed, other", [([1, 2], 1, 0), ([2, 1], 0, 1)])
    def test_are_scaled_from_the_largest_where_there_is_none(self, monkeypatch, layers, probed, other):
        monkeypatch.setattr(probing, "_ENOUGH_SECONDS", 0)
        both, said = sweep(layers=layers), []
        done = forecast(both, OPTIONS, said.append)
        assert said == [f"probing group g{probed} (1 of at most 2)"] and (done.probed, done.groups) == (1, 2)
        assert done.text.startswith("from a short probe of 1 of 2 groups (the others scaled by FLOPs): ")
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


class TestBlock:
    """Which block is chosen, of those that are tried; rates are made up but where it says so."""

    @pytest.fixture
    def rates(self, monkeypatch):
        """Made-up rates by size; a size that has none is too large."""
        rates: dict[int, float] = {}

        def rate(group, layout, pools, scale):
            if layout.members_per_vmap not in rates:
                raise probing._TooLarge("9 GB, but a device has 8 GB")
            return rates[layout.members_per_vmap]

        monkeypatch.setattr(probing, "_block_rate", rate)
        return rates

    @pytest.mark.parametrize(
        "members, options, sizes",
        [
            (48, Options(1), [1, 2, 4, 8, 16, 24, 48]),  # not 32: of two blocks of 32 a third would be idle
            (33, Options(1), [1, 2, 4, 7, 11, 17, 33]),
            (33, Options(4, data_parallel=2), [1, 2, 4, 6, 9, 17]),
            (3, Options(), [1]),  # on four devices
        ],
    )
    def test_sizes_double_and_leave_few_members_idle(self, members, options, sizes):
        assert probing._block_sizes(members, options) == sizes

    @pytest.mark.parametrize(
        "made_up, best, tried",
        [
            ({1: 100, 2: 200, 3: 190, 6: 999}, 2, 3),  # slower than before: the rest is not tried
            ({1: 100, 2: 200, 3: 203, 6: 204}, 2, 4),  # hardly faster: the smaller needs less memory
            ({1: 100, 2: 200, 3: 300, 6: 400}, 6, 4),
            ({1: 100, 2: 200}, 2, 2),
        ],
    )
    def test_the_fastest_is_chosen(self, rates, made_up, best, tried):
        rates.update(made_up)
        both, said = sweep(instructions=[4, 16]), []
        choice = choose_block(both.members, Options(1), RulePools(both.members), said.append)
        assert (choice.layout, list(choice.rates)) == (Layout(1, 1, best, "plain"), [1, 2, 3, 6][:tried])
        assert said[1] == "probing group g0: 2 member(s) at a time"
        assert choice.text.startswith(f"members_per_vmap={best} chosen by a probe: examples/s 100 with 1, 200 with 2")
        assert choice.text.endswith("; 3 member(s) need 9 GB, but a device has 8 GB") == (3 not in made_up)

    def test_one_at_a_time_that_does_not_fit_is_refused(self, rates):
        with pytest.raises(
            BadInput, match=r"--members_per_vmap=1: 1 member\(s\) need 9 GB, but a device has 8 GB; lower --config.b"
        ):
            choose_block(sweep().members, Options(1), RulePools(sweep().members))

    def test_the_rate_is_that_of_all_members(self, monkeypatch):
        """A real program, on two devices; the clock is made up."""

        def time(work):
            first, second = work(), work()  # the state is donated, and handed on
            assert first.loss.shape == (4,) and (first.loss != second.loss).any()
            return 9.0, 0.5

        monkeypatch.setattr(probing, "_time", time)
        three = sweep()
        choice = choose_block(three.members, Options(2), RulePools(three.members))
        assert choice.rates == {size: 3 * TINY.chunk_steps * TINY.batch_size / 0.5 for size in (1, 2)}
        assert choice.layout == Layout(2, 1, 1, "plain")

    @pytest.mark.parametrize("failure", ["account", "attempt"])
    def test_a_block_that_does_not_fit_ends_the_search(self, monkeypatch, failure):
        monkeypatch.setattr(probing, "_compile_at_full_shape", lambda group, pools, mesh, size, steps: size)
        monkeypatch.setattr(probing, "program_bytes", lambda size: 5_000_000_000 * size)
        monkeypatch.setattr(probing, "_device_bytes", lambda: 8_000_000_000 if failure == "account" else None)
        runs = []

        def time(work):
            runs.append(work)
            if len(runs) == 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 GB")
            return 0.0, 1.0

        monkeypatch.setattr(probing, "_time", time)
        choice = choose_block(sweep().members, Options(1), RulePools(sweep().members))
        assert list(choice.rates) == [1] and len(runs) == (1 if failure == "account" else 2)
        assert choice.too_large == (
            "2 member(s) need 10 GB, but a device has 8 GB"
            if failure == "account"
            else "2 member(s) need more memory than is available"
        )


class TestBlockOfARun:
    @pytest.fixture(autouse=True)
    def accelerator(self, monkeypatch):
        """As if this were one: a block that nobody named is probed for. Every probe is counted."""
        self.probed = []

        def rate(group, layout, pools, scale):
            self.probed.append((len(group.members), layout.members_per_vmap))
            return 100.0 * layout.members_per_vmap

        monkeypatch.setattr(probing, "_block_rate", rate)
        monkeypatch.setattr(Options, "leaves_block_to_probe", property(lambda options: not options.members_per_vmap))

    @pytest.mark.thorough
    def test_is_recorded_at_the_first_launch_and_kept(self, tmp_path, capsys):
        run(sweep(), tmp_path, Options(1), progress=False, keep_params=False)
        assert self.probed == [(3, 1), (3, 2), (3, 3)]
        assert (
            "members_per_vmap=3 chosen by a probe: examples/s 100 with 1, 200 with 2, 300 with 3"
            in capsys.readouterr().err
        )
        text = (tmp_path / "config.json").read_text()
        (cohort,) = json.loads(text)["cohorts"]
        assert cohort["members_per_vmap"] == 3 and cohort["block_rates"] == {"1": 100.0, "2": 200.0, "3": 300.0}
        for name in ("results.csv", "metrics.csv"):
            (tmp_path / name).unlink()  # unfinished
        run(sweep(), tmp_path, Options(1), progress=False, keep_params=False)
        assert len(self.probed) == 3 and (tmp_path / "config.json").read_text() == text
        more = Sweep.grid(TINY, seeds=4, dev_tests=16, tests=24)
        run(more, tmp_path, Options(1), progress=False, keep_params=False)
        assert self.probed[3:] == [(1, 1)], "the new member alone"
        assert SavedRun(tmp_path).cohorts[0].block_rates == {1: 100.0, 2: 200.0, 3: 300.0}

    def test_that_was_named_is_not_probed_for(self, tmp_path):
        run(sweep(), tmp_path, Options(1, members_per_vmap=2), progress=False, keep_params=False)
        assert not self.probed and "block_rates" not in (tmp_path / "config.json").read_text()

    def test_is_a_guess_in_a_plan(self):
        assert "1 member(s) per vmap (a guess; the first launch chooses by a probe)" in plan(sweep()).text
        assert "guess;" not in plan(sweep(), Options(members_per_vmap=1)).text
        assert not self.probed


def test_on_cpu_nothing_is_probed_for():
    assert not Options().leaves_block_to_probe and Options().resolve(sweep().members).members_per_vmap == 1
