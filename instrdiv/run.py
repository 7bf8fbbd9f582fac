"""A whole run: plan a sweep, train its groups, test its members, write the tables."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instrdiv import plots, thresholds
from instrdiv.evaluation import SLICES, Evaluator, held_out_rules, make_test_set
from instrdiv.planning import Plan, make_plan
from instrdiv.population import Group, RulePools, make_groups, make_mesh
from instrdiv.progress import Reporter
from instrdiv.results import (
    METRIC_COLUMNS,
    RESULT_COLUMNS,
    TIMING_COLUMNS,
    Row,
    plain,
    provenance,
    read_table,
    write_json,
    write_table,
)
from instrdiv.rewriting.rules import resemblance
from instrdiv.settings import DEFAULT_ROW, BadInput, Member, Setting
from instrdiv.training import StepMetrics, Trainer


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a run trains and how it is tested.

    Attributes:
      figure: name, for tables and titles.
      members: all settings and seeds.
      dev_tests: held-out rules (one test each) of ``unseen_dev``, used at every report.
      tests: held-out rules of ``unseen``, used once; as many tests are made of trained rules (``seen``).
    """

    figure: str
    members: tuple[Member, ...]
    dev_tests: int = 256
    tests: int = 2_000

    @classmethod
    def grid(cls, base: Setting | None = None, seeds: int = 3, figure: str = "sweep", dev_tests: int = 256,
             tests: int = 2_000, **values: Iterable[Any]) -> Sweep:  # fmt: skip
        """Every combination of the values given for fields of ``Setting``, with every seed.

        >>> len(Sweep.grid(Setting(examples=4096), seeds=3, instructions=[16, 256, 4096]).members)
        9
        """
        settings = [base or Setting()]
        for name, choices in values.items():
            choices = list(choices)
            settings = [dataclasses.replace(setting, **{name: choice}) for setting in settings for choice in choices]
        members = tuple(Member(setting, seed) for setting in settings for seed in range(seeds))
        return cls(figure, members, dev_tests, tests)

    def validate(self) -> None:
        """Raises BadInput for what cannot be run. Cheap."""
        if not self.members:
            raise BadInput("a sweep needs at least one member: give at least one setting and one seed")
        for name in ("dev_tests", "tests"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name}={getattr(self, name)}: must be at least 1")
        for setting in dict.fromkeys(member.setting for member in self.members):
            setting.validate()
        for member in self.members:
            if not 0 <= member.seed < 2**31:
                raise BadInput(f"a seed is a whole number from 0 to 2^31 - 1, got {member.seed}")
        ids = [member.id for member in self.members]
        if len(set(ids)) < len(ids):
            raise BadInput("a sweep names the same setting twice: every value of a swept field must be different")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is laid out on the machine. None means: choose, and write the choice to config.json.

    Attributes:
      devices: how many devices are used.
      data_parallel: devices that share one member's batch; divides ``devices``.
      members_per_vmap: members vectorised together; the others follow one after another.
    """

    devices: int | None = None
    data_parallel: int = 1
    members_per_vmap: int | None = None

    def resolve(self, sweep: Sweep) -> Options:
        """The choices made: all devices that the largest group can keep busy; on CPU one member at a time.

        Raises BadInput where what was asked for does not fit.
        """
        for name in ("devices", "data_parallel", "members_per_vmap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name}={value}: must be at least 1")
        available = jax.device_count()
        if self.devices is not None and self.devices > available:
            raise BadInput(f"--devices={self.devices}: this machine has {available} ({jax.default_backend()})")
        if self.data_parallel > (self.devices or available) or (self.devices or 0) % self.data_parallel:
            whole = f"--devices={self.devices}" if self.devices else f"the {available} devices of this machine"
            raise BadInput(f"--data_parallel={self.data_parallel}: must divide {whole}")
        for batch in {member.setting.batch_size for member in sweep.members}:
            if batch % self.data_parallel:
                raise BadInput(f"--data_parallel={self.data_parallel}: must divide --config.batch_size={batch}")

        largest = max(len(group.members) for group in make_groups(sweep.members))
        rows = (self.devices or available) // self.data_parallel
        per_vmap = self.members_per_vmap
        if per_vmap is None:
            # On CPU one member already fills a core. Elsewhere small members leave the device idle: blocks of at most
            # eight are a guess until measured, of equal size so that few members are idle.
            most = 1 if jax.default_backend() == "cpu" else 8
            blocks = math.ceil(largest / (rows * most))
            per_vmap = math.ceil(largest / (rows * blocks))
        if self.devices is None:
            rows = min(rows, math.ceil(largest / per_vmap))
        return Options(rows * self.data_parallel, self.data_parallel, per_vmap)


@dataclasses.dataclass
class Run:
    """What a run leaves behind.

    Attributes:
      results, metrics, timings: rows of the three tables.
      params: of every member, by its id (numpy trees); empty where they were not kept, or the run was read back.
    """

    results: list[Row]
    metrics: list[Row]
    timings: list[Row]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def threshold(self, x: str = "instructions") -> thresholds.Threshold:
        """I50 on unseen has-op examples."""
        return thresholds.threshold(thresholds.select(self.results, "unseen", "has_op"), x)

    def plot(self, path_stem: Path | str | None = None, **options: Any):
        """The picture of figure 2a; see ``plots.instruction_curve``."""
        return plots.instruction_curve(self.results, None if path_stem is None else Path(path_stem), **options)


def plan(sweep: Sweep, options: Options | None = None) -> Plan:
    """Validates a sweep and says what it will take, without building a table or compiling anything."""
    sweep.validate()
    return make_plan(make_groups(sweep.members), (options or Options()).resolve(sweep), sweep.dev_tests, sweep.tests)


def run(
    sweep: Sweep,
    run_dir: Path | str | None = None,
    options: Options | None = None,
    progress: bool = True,
    overwrite: bool = False,
    keep_params: bool = True,
) -> Run:
    """Trains and tests a sweep.

    Args:
      sweep: the members and their tests.
      run_dir: where tables go (see ``docs/architecture.md``); None keeps everything in memory. A directory that holds
        this very run, finished, is read back; unfinished, it is started again.
      options: layout on the machine. What it leaves open is taken from an earlier launch in the same directory.
      progress: show a bar (or plain lines).
      overwrite: start anew in a directory that holds another run.
      keep_params: copy the trained parameters to the host.

    Raises:
      BadInput: before anything compiles, with one line for the user.
    """
    sweep.validate()
    options = options or Options()
    directory = None if run_dir is None else RunDirectory(Path(run_dir), sweep, options, overwrite)
    if directory and directory.finished:
        return directory.read()
    options = (directory.options if directory else options).resolve(sweep)
    pools = RulePools(sweep.members)
    for source in {member.setting.rule_source for member in sweep.members}:
        held_out_rules(source, sweep.dev_tests, sweep.tests)  # large enough? asked before anything is written
    if directory:
        directory.begin(options)

    groups = make_groups(sweep.members)
    examples = sum(len(g.members) * g.config.steps * g.config.batch_size for g in groups)
    outcome = Run([], [], [])
    started = time.monotonic()
    with Reporter(examples, enabled=progress) as reporter:
        for group in groups:
            runner = _GroupRun(sweep, group, pools, options, reporter, outcome, started)
            runner.train(directory.write_metrics if directory else None)
            runner.test()
            if keep_params:
                outcome.params |= runner.member_params()
    if directory:
        directory.finish(outcome, pools, time.monotonic() - started)
    return outcome


class _GroupRun:
    """Trains and tests one group, adding its rows to the outcome."""

    def __init__(self, sweep: Sweep, group: Group, pools: RulePools, options: Options, reporter: Reporter,
                 outcome: Run, started: float):  # fmt: skip
        self.sweep, self.group, self.pools, self.reporter = sweep, group, pools, reporter
        self.outcome, self.started = outcome, started
        assert options.devices and options.members_per_vmap
        mesh = make_mesh(options.devices, options.data_parallel)
        self.trainer = Trainer(group, pools, mesh, options.members_per_vmap)
        self.evaluator = Evaluator(self.trainer, piece_size(sweep, options.data_parallel))

    def _test_pieces(self, split: str) -> Iterator[tuple]:
        tests = make_test_set(split, self.group.members, self.pools, self.sweep.dev_tests, self.sweep.tests)
        return self.evaluator.pieces(tests)

    def train(self, on_metrics: Callable[[Sequence[Row]], None] | None) -> None:
        """Chunk after chunk; the results of one are read while the next one runs."""
        config = self.group.config
        self.reporter.working(f"group {self.group.name}: compiling for {len(self.group.members)} members")
        dev = list(self._test_pieces("unseen_dev"))
        pending, clock = None, time.monotonic()
        for chunk in range(config.chunks + 1):
            running = None
            if chunk < config.chunks:
                metrics = self.trainer.advance()
                counts = self.evaluator.count(dev)
                # A copy: the state itself is donated to the next chunk.
                diverged = self.trainer.state.diverged_at + 0
                running = (self.trainer.step, metrics, counts, diverged)
            if pending:
                step, *values = pending
                metrics, counts, diverged = jax.device_get(values)
                now = time.monotonic()
                self._report(step, metrics, counts, diverged, now - clock, first=chunk == 1)
                clock = now
                if on_metrics:
                    on_metrics(self.outcome.metrics)
            pending = running

    def _report(self, step: int, metrics: StepMetrics, counts: np.ndarray, diverged, seconds: float, first: bool):
        config, group = self.group.config, self.group
        exact_match = []
        column = list(SLICES).index("has_op")
        for row, member in enumerate(group.members):
            right, tests = (int(count) for count in counts[row, column])
            exact_match.append(right / tests if tests else float("nan"))
            self.outcome.metrics.append(
                self._identity(member, step)
                | {
                    "loss": _shortest(metrics.loss[row]),
                    "gradient_norm": _shortest(metrics.gradient_norm[row]),
                    "train_exact_match": _shortest(metrics.exact_match[row]),
                    "unseen_dev_exact_match": exact_match[-1],
                    "unseen_dev_tests": tests,
                    "status": _status(diverged[row]),
                }
            )
        examples = len(group.members) * config.chunk_steps * config.batch_size
        self.outcome.timings.append(
            {
                "group": group.name,
                "step": step,
                "compiled": int(first),
                "seconds": seconds,
                "examples_per_second": float("nan") if first else examples / seconds,
                "tokens_per_second": float("nan") if first else examples / seconds * group.shape.sequence,
                "elapsed_seconds": time.monotonic() - self.started,
            }
        )
        where = f"group {group.name}, step {step} of {config.steps}"
        self.reporter.report(examples, None if first else seconds, group.shape.sequence, exact_match, where)

    def test(self) -> None:
        """Adds the rows of results.csv: every member, split and slice that has tests."""
        diverged = np.asarray(self.trainer.state.diverged_at)
        for split in ("unseen_dev", "unseen", "seen"):
            self.reporter.working(f"group {self.group.name}: testing {split}")
            counts = np.asarray(self.evaluator.count(self._test_pieces(split)))
            for row, member in enumerate(self.group.members):
                for column, slice in enumerate(SLICES):
                    right, tests = (int(count) for count in counts[row, column])
                    if tests:
                        self.outcome.results.append(self._result(member, split, slice, right, tests, diverged[row]))

    def _result(self, member: Member, split: str, slice: str, right: int, tests: int, diverged) -> Row:
        low, high = thresholds.exact_interval(right, tests)
        setting = member.setting
        return (
            self._identity(member, self.trainer.step)
            | setting.as_row()
            | {
                "split": split,
                "slice": slice,
                "exact_match": right / tests,
                "tests": tests,
                "status": _status(diverged),
                "examples_per_rule": setting.examples / setting.instructions,
                "exact_match_low": round(low, 6),
                "exact_match_high": round(high, 6),
            }
        )

    def _identity(self, member: Member, step: int) -> Row:
        return {
            "figure": self.sweep.figure,
            "group": self.group.name,
            "member": member.id,
            "seed": member.seed,
            "step": step,
            "examples_seen": step * self.group.config.batch_size,
        }

    def member_params(self) -> dict[str, Any]:
        """Trained parameters by member id, as numpy trees."""
        params = jax.device_get(self.trainer.state.params)
        return {m.id: jax.tree.map(lambda leaf: leaf[row], params) for row, m in enumerate(self.group.members)}  # noqa: B023


class RunDirectory:
    """The files of a run. Nothing is written before ``begin``; results appear whole, at the end.

    Raises BadInput, when made, where the directory cannot be used for this run.
    """

    def __init__(self, path: Path, sweep: Sweep, options: Options, overwrite: bool = False):
        self.path, self.sweep, self.options = path, sweep, options
        self.finished = False
        try:
            _check_writable(path)
            if path.exists() and any(path.iterdir()):
                if not (path / "config.json").exists():
                    raise BadInput(f"--run_dir={path}: is not empty and holds no run; choose another directory")
                if not overwrite:
                    self._check_same_run()
                    self.finished = (path / "results.csv").exists()
        except (OSError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"--run_dir={path}: cannot be used ({error}); name another directory") from None

    def _config(self, options: Options) -> dict[str, Any]:
        """What config.json says: everything needed to run it again."""
        members = [{"id": m.id, "seed": m.seed, **m.setting.as_row()} for m in self.sweep.members]
        config = {"figure": self.sweep.figure, "dev_tests": self.sweep.dev_tests, "tests": self.sweep.tests}
        return plain(config | dataclasses.asdict(options) | {"members": members})

    def _check_same_run(self) -> None:
        """Raises BadInput where the directory holds another run; takes over the layout that it was launched with."""
        try:
            there = json.loads((self.path / "config.json").read_text())
            differ = _differences(there, self._config(self.options))
            kept = {name: there[name] for name in dataclasses.asdict(self.options)}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            config = self.path / "config.json"
            raise BadInput(f"{config} cannot be read: {error!r}; --overwrite starts anew") from None
        if differ:
            raise BadInput(f"--run_dir={self.path}: holds another run, which differs in {', '.join(differ)}; "
                           "choose another directory, or --overwrite to start anew")  # fmt: skip
        self.options = Options(**kept)

    def begin(self, options: Options) -> None:
        """Makes the directory and says in config.json what is being run, and how it is laid out."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("results.csv", "metrics.csv", "timings.csv", "resemblance.csv", "provenance.json", "figure.png",
                     "figure.pdf", "config.json"):  # fmt: skip
            (self.path / name).unlink(missing_ok=True)
        write_json(self.path / "config.json", self._config(options))

    def write_metrics(self, rows: Sequence[Row]) -> None:
        write_table(self.path / "metrics.csv", rows, METRIC_COLUMNS)

    def finish(self, outcome: Run, pools: RulePools, seconds: float) -> None:
        """Writes everything but the picture; results.csv last, since it marks the run as finished."""
        rows = resemblance_rows(self.sweep, pools)
        write_table(self.path / "resemblance.csv", rows, tuple(rows[0]))
        write_table(self.path / "timings.csv", outcome.timings, TIMING_COLUMNS)
        digests = {member.id: pools.of(member).digest for member in self.sweep.members}
        write_json(self.path / "provenance.json", provenance(wall_seconds=round(seconds, 1), rule_digests=digests))
        write_table(self.path / "results.csv", outcome.results, RESULT_COLUMNS)

    def read(self) -> Run:
        """The tables of a finished run."""
        results, metrics, timings = (
            read_table(self.path / f"{name}.csv") for name in ("results", "metrics", "timings")
        )
        return Run(results, metrics, timings)


def resemblance_rows(sweep: Sweep, pools: RulePools) -> list[Row]:
    """How much the ``unseen`` rules look like each member's trained ones; a row a member."""
    largest = max(member.setting.instructions for member in sweep.members)
    compared = max(16, min(256, 10_000_000 // largest))  # letter by letter, the same ones for all members
    rows = []
    for member in sweep.members:
        held_out = held_out_rules(member.setting.rule_source, sweep.dev_tests, sweep.tests)["unseen"]
        report = resemblance(pools.of(member), held_out, compared)
        rows.append({"member": member.id, "seed": member.seed, "instructions": member.setting.instructions, **report})
    return rows


def piece_size(sweep: Sweep, data_parallel: int) -> int:
    """Tests a call of the compiled evaluation: all of ``unseen_dev`` where that is 128 to 1024; a multiple of the
    data axis."""
    size = min(1024, max(sweep.dev_tests, min(sweep.tests, 128)))
    return -(-size // data_parallel) * data_parallel


def _check_writable(path: Path) -> None:
    """Raises BadInput or OSError unless files can be made in ``path``, or ``path`` be made; leaves nothing behind."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BadInput(f"--run_dir={path}: {nearest} is a file; name a directory")
    # A name as long as the longest one that will be made.
    probe = nearest / f".instrdiv-{time.monotonic_ns()}".ljust(max(len(part) for part in path.parts), "-")
    try:
        probe.mkdir()
    except OSError as error:
        raise BadInput(f"--run_dir={path}: {nearest} is not writable ({error.strerror}); name another") from None
    probe.rmdir()


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Names of the fields in which two configurations differ; a layout that was left open (None) differs in nothing.

    A field that the older one lacks had the value that is now the default.
    """
    names = [name for name in here if name != "members" and here[name] not in (None, there[name])]
    ours, theirs = here["members"], there["members"]
    if len(ours) != len(theirs):
        return [*names, f"members ({len(theirs)} there, {len(ours)} asked for)"]
    default = plain(DEFAULT_ROW)
    pairs = list(zip(theirs, ours, strict=True))
    fields = [name for name in ours[0] if name != "id"]
    return names + [n for n in fields if any(old.get(n, default.get(n)) != new[n] for old, new in pairs)]


def _status(diverged_at) -> str:
    return "ok" if diverged_at < 0 else f"diverged at step {int(diverged_at)}"


def _shortest(value: Any) -> float:
    """The float whose repr has only the digits that a float32 has."""
    return float(str(value))
