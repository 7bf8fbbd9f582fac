"""The launcher shared by all figures: flags, preset, plan, run, picture, verdict; a one-line message on failure.

A launcher is a short file that defines a ``Figure`` and calls ``launch``. Every field of its setting is a flag
``--config.<field>``; the fields that the figure varies take a list.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from instrdiv.analysis.claims import Claim, write_claims
from instrdiv.config.groups import Group
from instrdiv.config.layout import ATTENTION, Options
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.rows import at_the_end
from instrdiv.launch.flags import (
    STOPPED,
    ListParser,
    NumberParser,
    define,
    define_preset_flag,
    define_run_flags,
    define_setting_flags,
    enum_parser,
    refuse_idle_flags,
    run_dir_of,
    setting_flags,
    start,
)
from instrdiv.launch.presets import Preset
from instrdiv.launch.verdicts import judge
from instrdiv.reports.report import write_report
from instrdiv.runs.evaluate import evaluate
from instrdiv.runs.probing import forecast
from instrdiv.runs.run import plan, run
from instrdiv.runs.saved import RunDirectory, SavedRun
from instrdiv.runtime.checkpoints import Schedule
from instrdiv.runtime.devices import use_cpu_cores
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.progress import telling
from instrdiv.runtime.tables import Row, read_cells, read_table
from instrdiv.tasks.conditions import Condition

__all__ = ["STOPPED", "Figure", "Preset", "launch", "make_sweep"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, from the papers or our own.

    Attributes:
      name: as in the tables.
      presets: presets by name.
      draw: (rows of results.csv, path without suffix) -> None; writes ``.png`` and ``.pdf``, and ``.csv`` if the
        picture shows numbers that are not in results.csv.
      claims: checks the papers' claims on the rows of results.csv; None if they make none.
      conditions: settings of a run -> additional conditions under which its members are tested after training.
    """

    name: str
    presets: Mapping[str, Preset]
    draw: Callable[[Sequence[Row], Path], None]
    claims: Callable[[Sequence[Row]], list[Claim]] | None = None
    conditions: Callable[[Sequence[Any]], list[Condition]] | None = None


def launch(figure: Figure, argv: Sequence[str] | None = None) -> int:
    """The main function of a launcher.

    Parses ``argv`` and returns the exit status; without ``argv``, parses the flags of this process and exits with the
    status.
    """

    def main(values: FlagValues) -> None:
        _launch(figure, values)

    return start(main, lambda values: define_flags(figure, values), about(figure), argv, f"{figure.name}.py")


def about(figure: Any) -> str | None:
    """The docstring of the launcher that defines a figure."""
    script = sys.modules["__main__"]
    made_here = any(value is figure for value in vars(script).values())
    return (script if made_here else sys.modules[figure.draw.__module__]).__doc__


def define_flags(figure: Figure, values: FlagValues) -> None:
    swept = {name for preset in figure.presets.values() for name in preset.values}
    define_preset_flag(values, figure.presets)
    define_setting_flags(values, type(next(iter(figure.presets.values())).base), swept)
    define_run_flags(values, figure.name, "models")
    factors = list(dict.fromkeys(name for preset in figure.presets.values() for name in preset.factors))
    if factors:
        parser = ListParser(enum_parser(factors))
        define(values, parser, "factor", "factors to vary (default: all of the preset's)")
    whole = NumberParser(int, low=1)
    define(values, whole, "dev_tests", "number of held-out instructions to test at each report (default: the preset's)")
    define(values, whole, "tests", "number of held-out instructions to test at the end (default: the preset's)")
    help = "members vectorized together (default: 1 on CPU, otherwise the fastest of those tried)"
    define(values, whole, "members_per_vmap", help)
    define(values, enum_parser(ATTENTION), "attention", "how attention is computed (default: plain)")
    help = "also keep a checkpoint about every N steps (default: none)"
    define(values, whole, "checkpoint_steps", help)


def _launch(figure: Figure, values: FlagValues) -> None:
    preset, run_dir = figure.presets[values.preset], run_dir_of(values, figure.name)
    there = None if values.overwrite else SavedRun.at(run_dir)
    use_cpu_cores(max(values.devices or 0, there.devices if there else 0))
    sweep = make_sweep(figure, preset, values)
    options = Options(values.devices, values.data_parallel, values.members_per_vmap, values.attention)
    conditions = figure.conditions([m.setting for m in sweep.members]) if figure.conditions else []
    print(f"{figure.name}, preset {values.preset}, {run_dir}", flush=True)
    if values.dry_run:
        print(plan(sweep, options).text, flush=True)
        with telling() as say:
            expected = forecast(sweep, options, say, len(conditions))
        print(expected.text)
        return
    for condition, member in itertools.product(conditions, sweep.members):
        condition.setting(member)  # fails early, before training, if a member cannot be tested this way
    RunDirectory.check(run_dir, sweep, options, values.overwrite, there)
    if there is None:
        print(plan(sweep, options).text, flush=True)
    schedule = Schedule(values.checkpoint_minutes, values.checkpoint_steps)
    trained = run(
        sweep, run_dir, options, overwrite=values.overwrite, keep_params=False, schedule=schedule, there=there
    )
    assert trained.saved
    _test(figure.name, conditions, trained.saved, options)
    results = at_the_end(read_table(run_dir / "results.csv"))
    figure.draw(results, run_dir / "figure")
    claims = judge(figure.claims, results, preset, values)
    write_claims(run_dir / "claims.csv", claims)
    report = write_report(trained.saved, claims)
    print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'results.csv'}")


def make_sweep(figure: Figure, preset: Preset, values: FlagValues) -> Sweep:
    """The sweep specified by a preset and the flags."""
    given = setting_flags(values, type(preset.base))
    changes: Sequence[Mapping[str, Any]] = [{}]
    if preset.factors:
        chosen = values.factor or list(preset.factors)
        lacking = [name for name in chosen if name not in preset.factors]
        if lacking:
            raise BadInput(f"--factor={lacking[0]}: the preset {values.preset} has {', '.join(preset.factors)}")
        changes = [level for name in chosen for level in preset.factors[name]]
        clash = sorted({name for level in changes for name in level} & given.keys())
        if clash:
            raise BadInput(f"--config.{clash[0]}: a factor varies it; omit it, or choose other factors with --factor")
    settings = preset.settings(given, changes)
    refuse_idle_flags(settings, given)

    def seeds(setting: Any) -> range:
        return range(values.seeds or max(preset.seeds, preset.seeds_at.get(setting.instructions, 0)))

    members = tuple(Member(setting, seed) for setting in settings for seed in seeds(setting))
    return Sweep(figure.name, members, values.dev_tests or preset.dev_tests, values.tests or preset.tests)


def _test(name: str, conditions: list[Condition], saved: SavedRun, options: Options) -> None:
    """Tests the members of a finished run under a figure's conditions, skipping groups that were already tested."""
    rows = read_cells(saved.path / "results.csv")
    tested = {(r["member"], r["step"], r["slice"].partition("/")[0]) for r in rows if "/" in r["slice"]}

    def wanted(group: Group) -> set[tuple[str, str, str]]:
        step = str(group.config.steps)
        return {(member.id, step, condition.name) for member in group.members for condition in conditions}

    untested = [group for group in saved.groups if not wanted(group) <= tested]
    if not untested:  # loading a finished run needs no lock
        return
    with saved.locked(), telling() as say:
        for group in untested:
            ids = [member.id for member in group.members]
            outcome = evaluate(saved, {name: lambda setting: conditions}, ids, options=options, say=say)
            saved.write_results(outcome.results, outcome.errors)
            for line in outcome.left_out:
                say(f"left out: {line}")
