"""What every launcher does: flags, preset, plan, run, picture, verdict; and one clear line where it cannot.

A launcher is a short file that describes a ``Figure`` and calls ``launch``. Every field of ``Setting`` is a flag
``--config.<field>``; the fields that the figure varies take a list.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from instrdiv import thresholds
from instrdiv.checkpoints import Schedule, quieten_orbax
from instrdiv.compile_cache import use_compile_cache
from instrdiv.interruption import Interrupted
from instrdiv.model import ATTENTION
from instrdiv.population import Group
from instrdiv.probing import forecast
from instrdiv.progress import telling
from instrdiv.report import write_report
from instrdiv.results import Row, at_the_end, read_cells, read_table
from instrdiv.run import plan, run
from instrdiv.saved import RunDirectory, SavedRun, devices_of
from instrdiv.settings import BadInput, Member, Setting
from instrdiv.suites import Condition, evaluate
from instrdiv.sweep import Options, Sweep

# Flags defined by the functions below belong, in --help, to the launcher that calls them.
flags.disclaim_key_flags()

FLAGS = flags.FLAGS

#: Exit status of a run that was asked to stop, and is saved (EX_TEMPFAIL: the same command again is the remedy).
STOPPED = 75


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of a figure.

    Attributes:
      base: the setting that the figure varies.
      values: field of the setting -> the values it takes; their product is trained.
      factors: name -> its levels, each a change of the base; for every level of those that ``--factor`` names, the
        product is trained. ``{}`` is the base itself.
      seeds: models a setting.
      seeds_at: number of instructions -> models a setting there, where that is more: near the step seeds differ most.
      dev_tests, tests: see ``Sweep``.
      judged: large enough to bear out, or contradict, what the papers say.
    """

    base: Setting
    values: Mapping[str, Sequence[Any]]
    factors: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    seeds_at: Mapping[int, int] = dataclasses.field(default_factory=dict)
    dev_tests: int = 256
    tests: int = 2_000
    judged: bool = True


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the papers, or of ours.

    Attributes:
      name: as in the tables.
      presets: by name.
      draw: (rows of results.csv, path without suffix) -> None; writes ``.png`` and ``.pdf``, and ``.csv`` where the
        picture shows numbers that results.csv does not have.
      claims: what the papers say, checked on the rows of results.csv; None where they say nothing.
      conditions: the settings of a run -> what its members are tested under when all are trained, besides.
    """

    name: str
    presets: Mapping[str, Preset]
    draw: Callable[[Sequence[Row], Path], None]
    claims: Callable[[Sequence[Row]], list[thresholds.Claim]] | None = None
    conditions: Callable[[Sequence[Setting]], list[Condition]] | None = None


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_cores(devices: int | None = None) -> None:
    """Makes the CPU cores this process may use visible to JAX as devices (each then trains its own members).

    Call it before anything else uses JAX. Measured on two cores: 1.7 times the rate of one device with two threads.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(usable_cores(), devices or 1))


def launch(figure: Figure) -> None:
    """The main function of a launcher."""
    swept = {name for preset in figure.presets.values() for name in preset.values}
    define_preset_flag(figure.presets)
    define_setting_flags(swept)
    factors = list(dict.fromkeys(name for preset in figure.presets.values() for name in preset.factors))
    if factors:
        define(ListParser(_enum(factors)), "factor", "what is varied (default: all that the preset has)")
    whole = NumberParser(int, low=1)
    define(whole, "seeds", "models a setting (default: the preset's)")
    define(whole, "dev_tests", "held-out rules that are tested at every report (default: the preset's)")
    define(whole, "tests", "held-out rules that are tested at the end (default: the preset's)")
    define(NumberParser(int, low=1, high=256), "devices", "devices to use (default: all, on CPU one a core)")
    define(whole, "data_parallel", "devices that share one member's batch", default=1)
    define(whole, "members_per_vmap", "members that are vectorised together (default: 1 on CPU, else by a probe)")
    define(_enum(ATTENTION), "attention", "how attention is computed (default: plain)")
    define(NameParser(), "run_dir", "where tables and pictures go (default: runs/<figure>-<preset>)")
    define_switch("dry_run", "say what it would take, and stop")
    define_switch("overwrite", "start anew in a directory that holds another run")
    minutes = NumberParser(float, low=0)
    define(minutes, "checkpoint_minutes", "a checkpoint to go on from, every so many minutes; inf: none", default=2)
    define(whole, "checkpoint_steps", "a checkpoint to keep, about every so many steps, besides (default: none)")

    def main() -> None:
        run_dir = Path(FLAGS.run_dir or Path("runs") / f"{figure.name}-{FLAGS.preset}")
        use_cpu_cores(max(FLAGS.devices or 0, devices_of(run_dir)))
        sweep = make_sweep(figure, figure.presets[FLAGS.preset])
        options = Options(FLAGS.devices, FLAGS.data_parallel, FLAGS.members_per_vmap, FLAGS.attention)
        conditions = figure.conditions([m.setting for m in sweep.members]) if figure.conditions else []
        print(f"{figure.name}, preset {FLAGS.preset}, {run_dir}", flush=True)
        if FLAGS.dry_run:
            print(plan(sweep, options).text, flush=True)
            with telling() as say:
                expected = forecast(sweep, options, say, len(conditions))
            print(expected.text)
            return
        for condition, member in itertools.product(conditions, sweep.members):
            condition.setting(member)  # can all be tested as the figure wants it? asked before anything is trained
        RunDirectory.check(run_dir, sweep, options, FLAGS.overwrite)
        if FLAGS.overwrite or not devices_of(run_dir):
            print(plan(sweep, options).text, flush=True)
        schedule = Schedule(FLAGS.checkpoint_minutes, FLAGS.checkpoint_steps)
        run(sweep, run_dir, options, overwrite=FLAGS.overwrite, keep_params=False, schedule=schedule)
        _test(figure.name, conditions, run_dir, options)
        results = at_the_end(read_table(run_dir / "results.csv"))
        figure.draw(results, run_dir / "figure")
        claims = _judge(figure, results)
        thresholds.write_claims(run_dir / "claims.csv", claims)
        report = write_report(run_dir, claims)
        print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'results.csv'}")

    start(main)


def make_sweep(figure: Figure, preset: Preset) -> Sweep:
    """The sweep that a preset and the flags ask for."""
    given = setting_flags()
    fixed = {name: value for name, value in given.items() if name not in preset.values}
    lists = {name: given.get(name, values) for name, values in preset.values.items()}
    for name, values in lists.items():
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise BadInput(f"--config.{name}={','.join(map(str, values))}: names {twice[0]} twice")
    base = dataclasses.replace(preset.base, **fixed)
    changes: Sequence[Mapping[str, Any]] = [{}]
    if preset.factors:
        chosen = FLAGS.factor or list(preset.factors)
        lacking = [name for name in chosen if name not in preset.factors]
        if lacking:
            raise BadInput(f"--factor={lacking[0]}: the preset {FLAGS.preset} has {', '.join(preset.factors)}")
        changes = [level for name in chosen for level in preset.factors[name]]
        clash = sorted({name for level in changes for name in level} & given.keys())
        if clash:
            raise BadInput(
                f"--config.{clash[0]}: a factor varies it; leave it out, or name other factors with --factor"
            )
    settings = [
        dataclasses.replace(base, **change, **dict(zip(lists, values, strict=True)))
        for change in changes
        for values in itertools.product(*lists.values())
    ]
    settings = list(dict.fromkeys(settings))  # the base is a level of every factor
    refuse_idle_flags(settings)

    def seeds(setting: Setting) -> range:
        return range(FLAGS.seeds or max(preset.seeds, preset.seeds_at.get(setting.instructions, 0)))

    members = tuple(Member(setting, seed) for setting in settings for seed in seeds(setting))
    return Sweep(figure.name, members, FLAGS.dev_tests or preset.dev_tests, FLAGS.tests or preset.tests)


def start(main: Callable[[], None]) -> None:
    """Parses flags and runs ``main``; a user's mistake is one line on standard error and exit status 2."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return FLAGS(argv)
        except flags.Error as error:
            _fail(f"{' '.join(str(error).split())} (--help lists the flags)")
        except SystemExit:  # after --help; absl would call that a failure
            sys.exit(0)

    def guarded(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                raise BadInput(f"unexpected argument {argv[1]!r}; flags start with -- (--help lists them)")
            use_compile_cache()
            main()
        except BadInput as error:
            _fail(str(error))
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(STOPPED)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except OSError as error:  # a full disk, say
            _fail(f"{error.filename or 'a file'}: {error.strerror or error}")

    quieten_orbax()
    app.run(guarded, flags_parser=parse)


def define_preset_flag(names: Mapping[str, Any] | Sequence[str], default: str = "laptop") -> None:
    flags.DEFINE_enum("preset", default, list(names), "how large a world, a model and a budget")


def define_setting_flags(swept: set[str] | frozenset[str] = frozenset(), of: type = Setting) -> None:
    """One flag ``--config.<field>`` a field of the dataclass ``of``; those in ``swept`` take a list."""
    types_of = typing.get_type_hints(of)
    for field in sorted(dataclasses.fields(of), key=lambda field: field.name):
        parser = _parser_for(types_of[field.name], field.metadata["choices"])
        text = field.metadata["help"]
        if field.name in swept:
            if isinstance(parser, ListParser):  # commas are between the lists now
                parser = ListParser(parser.item, separators="+")
            parser, text = ListParser(parser), f"{text}; a list: what this figure varies"
        default = "" if "(default: " in text else " (default: the preset's)"
        define(parser, f"config.{field.name}", text + default)


def setting_flags(of: type = Setting) -> dict[str, Any]:
    """The fields of the dataclass ``of`` that were given as flags."""
    names = [field.name for field in dataclasses.fields(of)]
    return {name: value for name in names if (value := FLAGS[f"config.{name}"].value) is not None}


def refuse_idle_flags(settings: Sequence[Setting]) -> None:
    """Raises BadInput for a flag that was given and changes nothing in any of the settings that come of it."""
    no_ops = any(setting.no_op_fraction > 0 for setting in settings)
    orders = any(set(setting.family.split("+")) != {"free"} for setting in settings)
    for name, neutral, used, why in (
        ("near_miss_fraction", 0, no_ops, "there are no no-ops; raise --config.no_op_fraction"),
        ("k_min", 1, orders, "the family free has order 1 only; choose another --config.family"),
        ("k_max", 1, orders, "the family free has order 1 only; choose another --config.family"),
    ):
        value = max(getattr(setting, name) for setting in settings)
        if name in setting_flags() and value > neutral and not used:
            raise BadInput(f"--config.{name}={value}: has no effect, {why}")


def _parser_for(kind: Any, choices: Sequence[str] | None) -> flags.ArgumentParser:
    if choices:
        return _enum(choices)
    if isinstance(kind, types.UnionType):  # int | None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return _BoolParser()
    if typing.get_origin(kind) is tuple:
        return ListParser(NumberParser(typing.get_args(kind)[0]), separators=",+")
    return flags.ArgumentParser() if kind is str else NumberParser(kind)


class NumberParser(flags.ArgumentParser):
    """A whole number or a number, within bounds."""

    def __init__(self, kind: type[int] | type[float], low: float = -math.inf, high: float = math.inf):
        self.kind, self.low, self.high = kind, low, high
        self.syntactic_help = "a whole number" if kind is int else "a number"

    def parse(self, argument):
        try:
            value = self.kind(argument)
        except ValueError:
            raise ValueError(f"must be {self.syntactic_help}") from None
        if math.isnan(value):
            raise ValueError("must be a finite number")
        if not self.low <= value <= self.high:
            bounds = f"at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
            raise ValueError(f"must be {self.syntactic_help}, {bounds}")
        return value


class ListParser(flags.ArgumentParser):
    """A list; within a list, that of an inner parser is joined by '+', as in the tables: ``1,5,1+5``."""

    def __init__(self, item: flags.ArgumentParser, separators: str = ","):
        self.item, self.separators = item, separators
        names = {",": "comma", "+": "plus", ",+": "comma- or plus"}
        self.syntactic_help = f"a {names[separators]}-separated list, each {item.syntactic_help or 'a string'}"

    def parse(self, argument):
        parts = re.split(f"[{self.separators}]", argument) if isinstance(argument, str) else argument
        return tuple(self.item.parse(part.strip() if isinstance(part, str) else part) for part in parts)


class NameParser(flags.ArgumentParser):
    """A string that says something."""

    def parse(self, argument):
        if not argument:
            raise ValueError("must not be empty")
        return argument


class _BoolParser(flags.ArgumentParser):
    syntactic_help = "true or false"

    def parse(self, argument):
        value = {"true": True, "1": True, "false": False, "0": False}.get(str(argument).lower())
        if value is None:
            raise ValueError("must be true or false")
        return value


def define(parser: flags.ArgumentParser, name: str, help: str, default: Any = None) -> None:
    flags.DEFINE(parser, name, default, help, serializer=flags.ArgumentSerializer())


def define_switch(name: str, help: str, default: bool | None = False) -> None:
    """A flag that is on where it is named, off as ``--no<name>``; absl's own reports a mistake as a tuple."""
    flags.DEFINE_flag(flags.Flag(_BoolParser(), None, name, default, help, boolean=True))


def _enum(choices: Sequence[str]) -> flags.ArgumentParser:
    enum = flags.EnumParser(list(choices))
    enum.syntactic_help = f"one of {', '.join(choices)}"
    return enum


def _test(name: str, conditions: list[Condition], run_dir: Path, options: Options) -> None:
    """Tests the members of a finished run under a figure's conditions, those of a group unless that was done."""
    saved = SavedRun(run_dir)
    rows = read_cells(run_dir / "results.csv")
    tested = {(r["member"], r["step"], r["slice"].partition("/")[0]) for r in rows if "/" in r["slice"]}

    def wanted(group: Group) -> set[tuple[str, str, str]]:
        step = str(group.config.steps)
        return {(member.id, step, condition.name) for member in group.members for condition in conditions}

    untested = [group for group in saved.groups if not wanted(group) <= tested]
    if not untested:  # a run that is read back needs no lock for this
        return
    with saved.locked(), telling() as say:
        for group in untested:
            ids = [member.id for member in group.members]
            outcome = evaluate(saved, {name: lambda setting: conditions}, ids, options=options, say=say)
            saved.write_results(outcome.results, outcome.errors)
            for line in outcome.left_out:
                say(f"left out: {line}")


def _judge(figure: Figure, results: Sequence[Row]) -> list[thresholds.Claim] | None:
    """Prints what became of the papers' claims, and returns them; None where the run cannot bear them out."""
    if figure.claims is None:
        print("verdict: none, the papers do not say")
        return None
    preset = figure.presets[FLAGS.preset]
    if not preset.judged:
        print(f"verdict: none, the preset {FLAGS.preset} is too small to show anything")
        return None
    fewer = (FLAGS.seeds or preset.seeds) < preset.seeds or (FLAGS.tests or preset.tests) < preset.tests
    if setting_flags() or fewer:
        print("verdict: none, the claims are about the preset's own settings, seeds and tests")
        return None
    lost = {row["member"] for row in results if row["status"] != "ok"}
    if lost:  # the claims are about means: without its stragglers, a setting would look better than it is
        claims = [thresholds.Claim("every model trained to its end", False, f"{len(lost)} diverged")]
    else:
        claims = figure.claims(results)
    print_claims(claims)
    return claims


def print_claims(claims: Sequence[thresholds.Claim]) -> None:
    """What holds, what does not, and the verdict."""
    for claim in claims:
        print(f"  [{'x' if claim.holds else ' '}] {claim.text}: {claim.evidence}")
    print(f"verdict: {thresholds.verdict(claims)}")


def _fail(message: str) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
