"""The launchers of the figures: presets that can be planned, pictures and claims from tables whose truth is known."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.all import FIGURES
from instrdiv.analysis import plots
from instrdiv.config.groups import make_groups
from instrdiv.config.layout import Options
from instrdiv.launch import figure as launcher
from instrdiv.launch import verdicts
from instrdiv.runs.run import plan
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.tables import Row, read_table
from instrdiv.tasks.counts import effective_number

MODULES = {name: importlib.import_module(f"experiments.{name}") for name in FIGURES}


@pytest.fixture
def flags(monkeypatch):
    """The flags of a launcher, and the fields of a setting that were given as flags (``given``)."""
    flags = SimpleNamespace(preset="laptop", seeds=None, dev_tests=None, tests=None, factor=None, given={})
    monkeypatch.setattr(launcher, "setting_flags", lambda flags, of: flags.given)
    monkeypatch.setattr(verdicts, "changes_a_setting", lambda flags: bool(flags.given))
    return flags


def sweep_of(flags, name, preset="laptop"):
    flags.preset = preset
    figure = MODULES[name].FIGURE
    return launcher.make_sweep(figure, figure.presets[preset], flags)


def step(instructions, threshold, top=0.97):
    """A curve with its I50 close to ``threshold``."""
    return top / (1 + (threshold / max(instructions, 1)) ** 8)


def table(sweep, world, splits=("unseen", "unseen_dev", "seen"), slices=("has_op", "all", "no_op")) -> list[Row]:
    """Rows as a run would leave them, if members did as ``world(member, split, slice)`` says."""
    same = {"figure": sweep.figure, "step": 1, "examples_seen": 99, "tests": 50, "status": "ok"}
    return [
        member.setting.as_row()
        | {"member": member.id, "seed": member.seed, "split": split, "slice": slice} | same
        | {"exact_match": world(member, split, slice)}
        for member in sweep.members
        for split in splits
        for slice in slices
    ]  # fmt: skip


def draw(name, rows, tmp_path) -> list[Row]:
    """Draws a figure; the rows of its figure.csv."""
    MODULES[name].FIGURE.draw(rows, tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size > 20_000 and (tmp_path / "figure.pdf").exists()
    return read_table(tmp_path / "figure.csv") if (tmp_path / "figure.csv").exists() else []


def broken(name, rows) -> list[str]:
    """The claims that do not hold."""
    return [claim.text for claim in MODULES[name].FIGURE.claims(rows) if not claim.holds]


def lines(axes):
    """The y values of the drawn curves."""
    return [list(container.lines[0].get_ydata()) for container in axes.containers]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that a draw makes."""
    figures, original = [], plots.finish

    def finish(figure, *rest):
        figures.append(figure)
        original(figure, *rest)

    monkeypatch.setattr(plots, "finish", finish)
    return figures


class TestPresets:
    @pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu", "paper"])
    @pytest.mark.parametrize("name", FIGURES)
    def test_can_be_planned_and_are_named_like_their_module(self, flags, name, preset):
        figure = MODULES[name].FIGURE
        sweep = sweep_of(flags, name, preset)
        assert sweep.figure == figure.name == name
        planned = plan(sweep, Options(devices=1))
        assert sum(group.members for group in planned.groups) == len(sweep.members)
        seeds = {member.seed for member in sweep.members}
        assert len(seeds) >= 3 or preset == "smoke"
        for condition in figure.conditions([m.setting for m in sweep.members]) if figure.conditions else []:
            for member in sweep.members:
                condition.setting(member).validate()

    def test_the_papers_settings_are_the_papers(self, flags):
        def values(name, field):
            return {getattr(member.setting, field) for member in sweep_of(flags, name, "paper").members}

        assert values("fig2b_no_ops", "no_op_fraction") == {0.1, 0.2, 0.3, 0.4, 0.5}
        assert values("fig2b_no_ops", "instructions") == {100, 200, 300, 400, 500, 1000, 10_000, 100_000}
        assert values("fig3_long_tail", "tail_shape") == {math.inf, 2, 1, 0.5, 0.2, 0.1, 0.07, 0.03}
        assert values("fig3_long_tail", "instructions") == {1000, 10_000, 100_000}
        singles = {(1,), (5,), (10,), (15,), (20,)}
        assert values("table1_occurrences", "occurrences") == singles | {(1, 5, 10, 15, 20)}
        assert values("table1_occurrences", "instructions") == {200, 500, 1000, 2000}
        for name in FIGURES:
            assert values(name, "examples") >= {1_000_000} and values(name, "epochs") >= {50.0}

    def test_one_launch_of_all_factors_has_every_base_member_once(self, flags):
        sweep = sweep_of(flags, "threshold_scaling")
        preset = MODULES["threshold_scaling"].PRESETS["laptop"]
        levels = sum(len(levels) for levels in preset.factors.values())
        settings = levels - (len(preset.factors) - 1)
        assert len({m.id for m in sweep.members}) == len(sweep.members) == settings * 5 * 3
        assert len(make_groups(sweep.members)) == settings - 2  # the two other rates share the base's program


class TestFlags:
    def test_more_seeds_where_the_preset_says_unless_seeds_are_given(self, flags):
        counts = {m.setting.instructions: 0 for m in sweep_of(flags, "fig2b_no_ops").members}
        for member in sweep_of(flags, "fig2b_no_ops").members:
            counts[member.setting.instructions] += 1
        assert counts == {64: 15, 128: 15, 256: 15, 512: 15, 4096: 9}
        flags.seeds = 2
        assert len(sweep_of(flags, "fig2b_no_ops").members) == 2 * 3 * 5

    def test_one_factor_and_a_changed_base(self, flags):
        flags.factor, flags.given = ["width"], {"layers": 1, "instructions": (4, 8)}
        sweep = sweep_of(flags, "threshold_scaling")
        assert {(m.setting.width, m.setting.layers) for m in sweep.members} == {(32, 1), (64, 1), (96, 1)}
        assert {m.setting.instructions for m in sweep.members} == {4, 8}

    def test_what_a_factor_varies_is_not_changed_besides(self, flags):
        flags.factor, flags.given = ["depth"], {"layers": 6}
        with pytest.raises(BadInput, match=r"^--config\.layers: a factor varies it"):
            sweep_of(flags, "threshold_scaling")

    def test_a_factor_that_the_preset_lacks_is_named(self, flags):
        flags.factor = ["depth"]
        with pytest.raises(BadInput, match=r"^--factor=depth: the preset smoke has width, rate$"):
            sweep_of(flags, "threshold_scaling", "smoke")

    def test_lists_of_lists(self):
        counts = launcher.ListParser(launcher.NumberParser(int), separators=",+")
        assert counts.parse("1,5") == counts.parse("1+5") == (1, 5)
        assert launcher.ListParser(counts).parse("1,5,1+5") == ((1,), (5,), (1, 5))


class TestFig2b:
    NAME = "fig2b_no_ops"

    def rows(self, flags, top=lambda share: 0.97):
        def world(member, split, slice):
            share = member.setting.no_op_fraction
            if split == "seen" or "no_op" in slice:
                return 0.98
            match = step(member.setting.instructions, 180 * (1 + share / 5 + member.seed / 50), top(share))
            return match if slice == "has_op" else (1 - share) * match + share

        slices = ("has_op", "all", "no_op", "no_op/has_op", "no_op/near_miss")
        return table(sweep_of(flags, self.NAME), world, slices=slices)

    def test_thresholds_and_ratios_are_those_of_the_world(self, flags, tmp_path):
        found = draw(self.NAME, self.rows(flags), tmp_path)
        assert [row["no_op_fraction"] for row in found] == [0.1, 0.3, 0.5]
        thresholds = [row["i50"] for row in found]
        assert thresholds == sorted(thresholds) and found[2]["ratio"] == pytest.approx(thresholds[2] / thresholds[0])
        assert found[0]["comparisons"] == 2 and all(row["below"] == 128 for row in found)

    def test_every_claim_can_fail(self, flags):
        assert broken(self.NAME, self.rows(flags)) == []
        (share,) = broken(self.NAME, self.rows(flags, top=lambda share: 1 - 0.3 * share))
        assert share.startswith("beyond the step the share hardly matters")
        (many,) = broken(
            self.NAME, self.rows(flags, top=lambda share: 0.85 - 0.15 * (share == 0.5) + 0.06 * (share < 0.5))
        )[:1]
        assert many.startswith("50% no-ops: many instructions generalize")

    def test_every_panel_has_its_slice(self, flags, drawn, tmp_path):
        value = {"has_op": 0.1, "all": 0.2, "no_op": 0.3, "no_op/near_miss": 0.4, "no_op/has_op": 0.5}
        sweep = sweep_of(flags, self.NAME)
        draw(self.NAME, table(sweep, lambda member, split, slice: value[slice], slices=list(value)), tmp_path)
        panels = [lines(axes) for axes in drawn[0].axes]
        assert panels == [[pytest.approx([level] * 5)] * 3 for level in (0.1, 0.2, 0.3, 0.4)]


class TestFig3:
    NAME = "fig3_long_tail"

    def rows(self, flags, number):
        def world(member, split, slice):
            return 0.98 if split.startswith("seen") else step(number(member.rule_counts()), 190)

        return table(sweep_of(flags, self.NAME), world, ("unseen", "unseen_dev", "seen", "seen_by_share"), ("has_op",))

    @pytest.mark.parametrize("measure", ["effective number (entropy)", "rules with at least 4 examples"])
    def test_the_measure_that_the_world_goes_by_explains_it_best(self, flags, tmp_path, measure):
        found = draw(self.NAME, self.rows(flags, MODULES[self.NAME].MEASURES[measure]), tmp_path)
        residuals = {row["measure"]: row["residual"] for row in found}
        assert residuals[measure] == min(residuals.values()) < 0.06 and found[0]["compared"] == len(residuals)
        assert sum(residual < 2 * residuals[measure] for residual in residuals.values()) < 4

    def test_the_count_that_is_drawn_is_chosen_on_unseen_dev(self, flags):
        by_eight, by_one = (self.rows(flags, lambda counts, n=n: (counts >= n).sum()) for n in (8, 1))
        mixed = [row for row in by_eight if row["split"] == "unseen_dev"]
        mixed += [row for row in by_one if row["split"] == "unseen"]
        assert MODULES[self.NAME].at_least(mixed) == "rules with at least 8 examples"

    def test_counts_are_those_that_were_trained(self, flags):
        sweep = sweep_of(flags, self.NAME)
        for member in sweep.members[::7]:
            row = member.setting.as_row() | {"seed": member.seed}
            np.testing.assert_array_equal(MODULES[self.NAME].counts_of(row), member.rule_counts())

    def test_every_claim_can_fail(self, flags):
        rows = self.rows(flags, effective_number)
        assert broken(self.NAME, rows) == []
        (collapse,) = broken(self.NAME, self.rows(flags, len))
        assert collapse.startswith("and collapse where the tail is longest")

        def spoilt(instructions, tail_shape):
            cell = {"instructions": instructions, "tail_shape": tail_shape}
            return [row | {"exact_match": 0.5} if cell.items() <= row.items() else row for row in rows]

        (many,) = broken(self.NAME, spoilt(8192, 0.1))
        (few,) = broken(self.NAME, spoilt(512, math.inf))
        assert many.startswith("many rules hold at every shape") and few.startswith("few rules generalize where")

    def test_seen_rules_are_drawn_both_ways(self, flags, drawn, tmp_path):
        value = {"unseen": 0.1, "unseen_dev": 0.1, "seen": 0.2, "seen_by_share": 0.3}
        sweep = sweep_of(flags, self.NAME)
        draw(self.NAME, table(sweep, lambda member, split, slice: value[split], value, ("has_op",)), tmp_path)
        curves = lines(drawn[0].axes[1])
        assert sorted(curve[0] for curve in curves) == pytest.approx([0.1] * 3 + [0.2] * 3 + [0.3] * 3)


class TestTable1:
    NAME = "table1_occurrences"

    def rows(self, flags, mixture=0.95):
        """Members do what they were trained on; the mixture is as good as said."""
        sweep = sweep_of(flags, self.NAME)
        conditions = MODULES[self.NAME].conditions([m.setting for m in sweep.members])

        def world(member, split, slice):
            trained, tested = (
                member.setting.occurrences,
                tuple(map(int, slice.partition("=")[2].partition("/")[0].split("+"))),
            )
            if member.setting.instructions < 100:
                return 0.0
            return mixture if len(trained) > 1 else 0.9 * len(set(trained) & set(tested)) / len(tested)

        names = [f"{condition.name}/{slice}" for condition in conditions for slice in condition.slices or ("has_op",)]
        return table(sweep, world, ("unseen",), names)

    def test_the_matrix(self, flags, tmp_path, monkeypatch):
        maps = []
        monkeypatch.setattr(plots, "heat_map", lambda axes, *arguments: maps.append(arguments))
        draw(self.NAME, self.rows(flags), tmp_path)
        assert len(maps) == 3
        few, *rest = maps
        assert few[0].max() == 0 and few[1:] == (["1", "2", "3", "mixture"],) * 2
        expected = np.zeros((4, 4))
        np.fill_diagonal(expected, 0.9)
        expected[:, 3], expected[3] = 0.3, 0.95
        for values, *_ in rest:
            np.testing.assert_allclose(values, expected)

    def test_every_claim_can_fail(self, flags):
        rows = self.rows(flags)
        assert broken(self.NAME, rows) == []
        assert (
            broken(self.NAME, self.rows(flags, mixture=0.25))
            == ["the mixture beats every single number of occurrences"] * 2
        )
        few = [row | {"exact_match": 0.2} if row["instructions"] == 64 else row for row in rows]
        assert len(broken(self.NAME, few)) == 1 and broken(self.NAME, few)[0].startswith("few rules never generalize")
        assert broken(self.NAME, [row | {"exact_match": 0.01} for row in rows]) == ["something generalizes"]

    def test_a_table_that_was_read_back_says_the_same(self, flags):
        """In a CSV the list (1,) is the number 1."""
        rows = [row | {"occurrences": int(o) if (o := row["occurrences"]).isdigit() else o} for row in self.rows(flags)]
        assert broken(self.NAME, rows) == []
        assert list(MODULES[self.NAME].tested_on(rows)) == ["1", "2", "3", "1+2+3"]


class TestScaling:
    NAME = "threshold_scaling"

    def rows(self, flags):
        def world(member, split, slice):
            s = member.setting
            threshold = 190 * (s.width / 64) ** -0.5 * (1 if s.examples != 16_384 else (s.epochs / 3) ** -1)
            return step(s.instructions, threshold * (1 + 0.05 * member.seed))

        return table(sweep_of(flags, self.NAME), world, ("unseen",), ("has_op",))

    def test_factors_and_the_base_are_found_in_the_table_alone(self, flags, tmp_path):
        rows = self.rows(flags)
        levels, base = MODULES[self.NAME].by_level(rows)
        factors = MODULES[self.NAME].PRESETS["laptop"].factors
        assert {name: len(of_factor) for name, of_factor in levels.items()} == {n: len(v) for n, v in factors.items()}
        assert base["width"] == 64 and base["positions"] == "learned" and base["examples"] == 16_384
        found = draw(self.NAME, rows, tmp_path)
        assert len(found) == sum(map(len, factors.values())) and found[0]["comparisons"] == len(found) - len(factors)
        for row in found:
            if row["level"] == base[row["factor"]]:
                assert math.isnan(row["ratio"]) and row["i50"] == found[1]["i50"]
            elif row["factor"] in ("width", "epochs"):
                relative = row["level"] / base[row["factor"]]
                expected = relative ** {"width": -0.5, "epochs": -1.0}[row["factor"]]
                beyond = row["level"] == 1  # of the epochs
                assert math.isnan(row["ratio"]) == beyond and (
                    beyond or row["ratio"] == pytest.approx(expected, rel=0.12)
                )
            else:
                assert row["ratio"] == pytest.approx(1)
        exponents = {row["factor"]: row["exponent"] for row in found}
        assert exponents["width"] == pytest.approx(-0.5, abs=0.12) and abs(exponents["depth"]) < 1e-9
        assert math.isnan(exponents["epochs"])  # one epoch: beyond the range
        assert all(math.isnan(exponents[name]) for name in ("positions", "optimizer", "rate", "alphabet"))

    @pytest.mark.parametrize("factor", ["width", "optimizer", "examples"])
    def test_one_factor_alone(self, flags, factor):
        flags.factor = [factor]
        levels, base = MODULES[self.NAME].by_level(self.rows(flags))
        laptop = MODULES[self.NAME].PRESETS["laptop"].base
        assert list(levels) == [factor] and base[factor] == getattr(laptop, factor)

    def test_a_run_without_a_step_can_be_drawn(self, flags, tmp_path):
        flags.given = {"instructions": (4,)}
        assert draw(self.NAME, self.rows(flags), tmp_path) == []


@pytest.mark.parametrize("diverged", [1, None])
@pytest.mark.parametrize("name", FIGURES)
def test_pictures_of_one_seed_and_of_diverged_members(flags, tmp_path, name, diverged):
    """One of them, or all."""
    flags.seeds = 1
    figure = MODULES[name].FIGURE
    sweep = sweep_of(flags, name)
    conditions = figure.conditions([m.setting for m in sweep.members]) if figure.conditions else []
    slices = ["has_op", "all", "no_op", *(f"{c.name}/{s}" for c in conditions for s in c.slices)]
    rows = table(sweep, lambda member, *_: step(member.setting.instructions, 190), slices=slices)
    lost = {member.id for member in sweep.members[:diverged]}
    for row in rows:
        if row["member"] in lost:
            row["status"] = "diverged at step 3"
    draw(name, rows, tmp_path)


class TestVerdict:
    def judge(self, flags, rows):
        figure = MODULES["fig2b_no_ops"].FIGURE
        return verdicts.judge(figure.claims, rows, figure.presets[flags.preset], flags)

    def test_a_diverged_model_is_not_reproduced(self, flags):
        rows = TestFig2b().rows(flags)
        assert all(claim.holds for claim in self.judge(flags, rows))
        for row in rows:
            if row["no_op_fraction"] == 0.5:
                row["status"] = "diverged at step 3"
        (claim,) = self.judge(flags, rows)
        assert not claim.holds and claim.evidence == "23 diverged"

    @pytest.mark.parametrize("changes", [{"seeds": 1}, {"tests": 10}, {"given": {"width": 8}}, {"preset": "smoke"}])
    def test_fewer_seeds_or_other_settings_are_not_judged(self, flags, changes):
        rows = TestFig2b().rows(flags)
        vars(flags).update(changes)
        assert self.judge(flags, rows) is None
