"""Thresholds and intervals against values computed by hand or by an independent formula."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from instrdiv.analysis import thresholds
from instrdiv.analysis.claims import Claim, read_claims, verdict, write_claims
from instrdiv.analysis.thresholds import by_setting, crossing, ratios, threshold, trend
from instrdiv.evaluation.statistics import exact_interval, mean_interval


def row(instructions, exact_match, seed=0, split="unseen", status="ok"):
    return {"instructions": instructions, "exact_match": exact_match, "seed": seed, "split": split, "slice": "has_op",
            "status": status, "member": f"{instructions}-{seed}"}  # fmt: skip


def table(curves, split="unseen"):
    """Rows from {seed: {I: exact match}}."""
    return [row(i, y, seed, split) for seed, curve in curves.items() for i, y in curve.items()]


class TestCrossing:
    def test_halfway_between_two_points_is_their_geometric_mean(self):
        found = crossing([100, 400], [0.0, 1.0])
        assert found.value == pytest.approx(200) and (found.below, found.above) == (100, 400)

    def test_interpolates_linearly_in_log(self):
        assert crossing([10, 100, 1000], [0.0, 0.4, 0.8]).value == pytest.approx(100 * 10**0.25)

    def test_a_dip_is_smoothed_away(self):
        """0.6 then 0.4 become 0.5 and 0.5: the curve first reaches one half at the first of them."""
        assert crossing([1, 10, 100, 1000], [0.0, 0.6, 0.4, 1.0]).value == pytest.approx(10)

    def test_order_does_not_matter(self):
        assert crossing([400, 100], [1.0, 0.0]) == crossing([100, 400], [0.0, 1.0])

    def test_outside_the_range_there_is_none(self):
        above, below = crossing([10, 100], [0.0, 0.3]), crossing([10, 100], [0.6, 0.9])
        assert math.isnan(above.value) and above.below == 100 and math.isnan(above.above)
        assert math.isnan(below.value) and below.above == 10 and math.isnan(below.below)

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
    def test_lies_inside_its_bracket(self, values):
        found = crossing([2**i for i in range(len(values))], values)
        assert math.isnan(found.value) or found.below <= found.value <= found.above


class TestThreshold:
    def test_is_a_geometric_mean_over_seeds(self):
        sharp = {25: 0.0, 100: 0.0, 400: 1.0}
        found = threshold(table({0: sharp, 1: sharp, 2: {25: 0.0, 100: 0.5, 400: 1.0}}))
        values = [200, 200, 100]
        logs = np.log(values)
        half = 4.302652729911275 * logs.std(ddof=1) / math.sqrt(3)  # t(0.975, 2)
        assert found.interval.mean == pytest.approx(np.exp(logs.mean()))
        assert (found.interval.low, found.interval.high) == pytest.approx(
            np.exp([logs.mean() - half, logs.mean() + half])
        )
        assert (found.below, found.above) == (25, 400)

    def test_seeds_outside_the_range_are_counted_not_averaged(self):
        found = threshold(table({0: {100: 0, 400: 1}, 1: {100: 0, 400: 0.3}}))
        assert found.outside == 1 and found.interval.mean == pytest.approx(200)
        assert "1 of 2 seeds" in found.text

    def test_seeds_that_lack_a_point_are_said_not_used(self):
        found = threshold(table({0: {400: 1.0}, 1: {100: 0, 400: 1}}))
        assert (found.outside, found.incomplete) == (0, 1) and found.interval.mean == pytest.approx(200)
        assert "1 seeds lack a point" in found.text and "outside" not in found.text
        assert "each of the 2 seeds lacks a point" in threshold(table({0: {100: 0}, 1: {400: 1}})).text

    def test_more_seeds_near_the_step_are_used(self):
        few = {16: 0.0, 128: 0.0, 512: 1.0, 4096: 1.0}
        found = threshold(table({0: few, 1: {128: 0.0, 512: 1.0}, 2: {16: 0.0, 512: 1.0}, 3: {512: 0.9, 4096: 1.0}}))
        assert found.per_seed.keys() == {0, 1, 3} and (found.outside, found.incomplete) == (1, 1)
        assert found.interval.mean == pytest.approx(256) and found.interval.count == 2
        assert "over 2 seeds" in found.text and found.values == (16, 128, 512, 4096)

    def test_no_threshold_is_said(self):
        assert "no threshold" in threshold(table({0: {100: 0, 400: 0.1}})).text

    def test_one_seed_has_no_interval(self):
        found = threshold(table({0: {100: 0, 400: 1}}))
        assert math.isnan(found.interval.low) and "interval" not in found.text


class TestIntervals:
    @pytest.mark.parametrize("successes, tests", [(0, 10), (10, 10), (3, 10), (480, 2000)])
    def test_the_exact_interval_covers_what_its_definition_says(self, successes, tests):
        from scipy import stats

        low, high = exact_interval(successes, tests)
        assert low <= successes / tests <= high
        if successes > 0:
            assert stats.binom.sf(successes - 1, tests, low) == pytest.approx(0.025, rel=1e-6)
        if successes < tests:
            assert stats.binom.cdf(successes, tests, high) == pytest.approx(0.025, rel=1e-6)

    def test_mean_interval_is_students(self):
        found = mean_interval([0.1, 0.2, 0.6])
        half = 4.302652729911275 * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
        assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))


class TestVerdict:
    def results(self, unseen, seen=1.0):
        rows = table({s: dict(unseen) for s in range(3)})
        return rows + table({s: {i: seen for i in unseen} for s in range(3)}, "seen")

    def test_a_step_is_reproduced(self):
        claims = thresholds.instruction_step_claims(self.results({10: 0.0, 100: 0.4, 1000: 0.99}))
        assert verdict(claims) == "reproduced"

    @pytest.mark.parametrize("unseen, seen", [({10: 0.3, 1000: 1.0}, 1.0), ({10: 0.0, 1000: 0.8}, 1.0),
                                              ({10: 0.0, 1000: 1.0}, 0.5)])  # fmt: skip
    def test_anything_less_is_not(self, unseen, seen):
        claims = thresholds.instruction_step_claims(self.results(unseen, seen))
        assert verdict(claims) == "not reproduced"

    def test_without_has_op_tests_nothing_is_reproduced(self):
        claims = thresholds.instruction_step_claims(table({0: {10: 0.0}}, "unseen"))
        assert verdict(claims) == "not reproduced" and "has-op" in claims[0].evidence

    def test_diverged_members_are_left_out(self):
        rows = [row(10, 0.0), row(10, 1.0, 1, status="diverged at step 3")]
        assert thresholds.by_value(thresholds.select(rows, "unseen", "has_op")) == {10: [0.0]}


def test_onset_is_the_first_report_past_one_half():
    rows = [{"step": 10 * i, "unseen_dev_exact_match": y} for i, y in enumerate([0.0, 0.5, 0.51, 0.4, 0.9])]
    assert thresholds.onset(rows) == 20 and thresholds.onset(rows[:2]) is None
    assert thresholds.onset([{"step": 1, "unseen_dev_exact_match": math.nan}]) is None


def test_the_logistic_overlay_finds_a_logistic():
    x = np.geomspace(10, 10_000, 12)
    y = 0.95 / (1 + np.exp(-(np.log(x) - np.log(300)) / 0.4))
    center, width, top = thresholds.logistic_fit(x, y)
    assert (center, width, top) == pytest.approx((300, 0.4, 0.95), rel=1e-3)


class TestComparisons:
    def thresholds(self, *values):
        """Thresholds of sharp curves, one per seed, at these values."""
        curves = [threshold(table({seed: {v / 2: 0.0, v * 2: 1.0}})) for seed, v in enumerate(values)]
        joined = {seed: found.per_seed[seed] for seed, found in enumerate(curves)}
        return dataclasses.replace(curves[0], per_seed=joined)

    def test_a_ratio_is_of_geometric_means(self):
        found = ratios({"a": self.thresholds(300, 1200)}, self.thresholds(100, 400, 50))
        assert found["a"].mean == pytest.approx(600 / (100 * 400 * 50) ** (1 / 3)) and found["a"].count == 2

    def test_one_comparison_is_the_pooled_t_interval(self):
        a, b = (200, 230, 190), (100, 90, 120, 105)
        x, y = np.log(a), np.log(b)
        found = ratios({0: self.thresholds(*a)}, self.thresholds(*b))[0]
        expected = stats.ttest_ind(x, y).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(np.exp([expected.low, expected.high]), rel=2e-3)

    def test_more_comparisons_make_wider_intervals_that_all_hold(self):
        """No wider than Bonferroni's, no narrower than those of one comparison, and reproducible."""
        draws = np.random.default_rng(1).normal(5, 0.2, (5, 3))
        control, *others = (self.thresholds(*np.exp(row)) for row in draws)
        found = ratios(dict(enumerate(others)), control)
        pooled = math.sqrt(draws.var(axis=1, ddof=1).mean() * 2 / 3)
        half = math.log(found[0].high / found[0].mean)
        assert stats.t.ppf(0.975, 10) * pooled < half < stats.t.ppf(1 - 0.025 / 4, 10) * pooled
        assert found == ratios(dict(enumerate(others)), control)

    def test_what_has_no_threshold_is_not_compared(self):
        none = threshold(table({0: {100: 0, 400: 0.2}}))
        some = threshold(table({0: {100: 0, 400: 1}, 1: {100: 0, 400: 0.2}}))
        assert some.outside == 1 and math.isnan(ratios({0: some}, self.thresholds(100, 100))[0].mean)
        found = ratios({"none": none, "one": self.thresholds(300)}, self.thresholds(100))
        assert math.isnan(found["none"].mean) and found["one"].mean == pytest.approx(3)
        assert math.isnan(found["one"].low) and math.isnan(ratios({0: self.thresholds(9)}, none)[0].mean)

    def test_a_comparison_says_how_many_there_were(self):
        found = {(w,): self.thresholds(w, 2 * w) for w in (10, 20, 40)}
        rows = thresholds.comparison(found, ["width"], (20,))
        assert [row["width"] for row in rows] == [10, 20, 40] and {row["comparisons"] for row in rows} == {2}
        assert [row["ratio"] for row in rows] == pytest.approx([0.5, math.nan, 2], nan_ok=True)

    @given(st.floats(-2, 2))
    def test_a_trend_is_the_exponent(self, exponent):
        levels = {level: self.thresholds(*(100 * level**exponent * 2**s for s in range(3))) for level in (1, 2, 8)}
        found = trend(levels)
        assert found.mean == pytest.approx(exponent, abs=1e-9) and found.low < found.mean < found.high

    def test_a_trend_is_the_textbooks_regression(self):
        draws = np.random.default_rng(0).normal(5, 0.3, (3, 3))
        levels = dict(zip((1, 2, 4), (self.thresholds(*np.exp(row)) for row in draws), strict=True))
        x, y = np.repeat(np.log([1, 2, 4]), 3), draws.ravel()
        design = np.stack([np.ones(9), x], 1)
        beta, (left,), *_ = np.linalg.lstsq(design, y)
        error = math.sqrt(left / 7 * np.linalg.inv(design.T @ design)[1, 1])
        for many in (1, 5):
            half = stats.t.ppf(1 - 0.025 / many, 7) * error
            found = trend(levels, many)
            assert (found.mean, found.low, found.high) == pytest.approx((beta[1], beta[1] - half, beta[1] + half))

    def test_a_trend_needs_two_levels_and_all_seeds_inside(self):
        none = threshold(table({0: {1: 0, 2: 0}}))
        inside = {level: self.thresholds(level, level) for level in (1, 2)}
        assert trend(inside).mean == pytest.approx(1) and math.isnan(trend(inside | {4: none}).mean)
        assert math.isnan(trend({1: none, 2: self.thresholds(1)}).mean)
        assert math.isnan(trend({1: self.thresholds(2), 2: self.thresholds(1)}).low)

    def test_by_setting_tells_settings_apart(self):
        rows = [r | {"width": w} for w in (64, 8) for r in table({0: {100: 0, 400: 1 - (w == 8)}})]
        found = by_setting(rows, ["width"])
        assert list(found) == [(8,), (64,)] and found[64,].interval.mean == pytest.approx(200)
        assert math.isnan(found[8,].interval.mean)


def test_claims_are_read_as_they_were_written(tmp_path):
    claims = [Claim("1", True, "nan, I = 3"), Claim("it, too", False, "")]
    write_claims(tmp_path / "claims.csv", claims)
    assert read_claims(tmp_path / "claims.csv") == claims
    write_claims(tmp_path / "claims.csv", None)
    assert read_claims(tmp_path / "claims.csv") is None and not list(tmp_path.iterdir())


class TestResidual:
    def test_is_what_one_seed_is_from_the_curve_of_the_other(self):
        """Two seeds with the same x: each one's curve is the reference of the other where it is increasing."""
        found = thresholds.residual([1, 2, 4] * 2, [0.0, 0.5, 1.0, 0.1, 0.5, 0.8], [0, 0, 0, 1, 1, 1])
        assert found == pytest.approx(math.sqrt((0.1**2 + 0 + 0.2**2) / 3))

    def test_the_curve_rises(self):
        """As the curve for seed 0, seed 1's falling points become their mean, 0.5; and vice versa."""
        found = thresholds.residual([1, 2] * 2, [0.5, 0.5, 0.8, 0.2], [0, 0, 1, 1])
        assert found == pytest.approx(math.sqrt((0 + 0 + 0.3**2 + 0.3**2) / 4))

    def test_between_its_points_it_is_linear_in_log_x(self):
        found = thresholds.residual([3, 15, 7], [0.0, 1.0, 0.6], [0, 0, 1])
        errors = [0.6 - 0.5, 0.6 - 0.0, 1.0 - 0.6]  # for seed 0, the other's curve has one point
        assert found == pytest.approx(math.sqrt(sum(e * e for e in errors) / 3))

    def test_meaningless_jitter_wins_nothing(self):
        draws = np.random.default_rng(0)
        x, seeds = np.repeat([10.0, 100.0, 1000.0], 15), np.tile(range(3), 15)
        y = np.log10(x) / 3 + draws.normal(0, 0.08, 45)
        jittered = [thresholds.residual(x * draws.uniform(0.99, 1.01, 45), y, seeds) for _ in range(40)]
        assert np.mean(np.array(jittered) < thresholds.residual(x, y, seeds)) < 0.2

    def test_one_seed_has_none(self):
        assert math.isnan(thresholds.residual([1, 2], [0.0, 1.0], [0, 0]))
