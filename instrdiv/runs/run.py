"""A complete run: train the groups of a sweep, test their members, write the tables; resume an earlier launch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instrdiv.analysis import plots, thresholds
from instrdiv.config.groups import Group, make_groups
from instrdiv.config.layout import Layout, Options
from instrdiv.config.pools import RulePools
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.exact_match import Evaluator, piece_size
from instrdiv.evaluation.rows import identity, result_row, status_of, varying
from instrdiv.evaluation.tally import decode_split
from instrdiv.evaluation.test_sets import held_out_rules, make_test_set
from instrdiv.runs import tensorboard
from instrdiv.runs.planning import Plan, make_plan
from instrdiv.runs.probing import choose_block
from instrdiv.runs.saved import Cohort, RunDirectory, SavedRun, number_groups, other_rules
from instrdiv.runs.tensorboard import TensorBoard
from instrdiv.runtime.checkpoints import Schedule, does_not_fit
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.interruption import StopRequest
from instrdiv.runtime.memory import peak_device_bytes, peak_host_bytes
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.progress import Reporter
from instrdiv.runtime.tables import Row, read_table, shortest
from instrdiv.tasks.task import Task
from instrdiv.training.chunks import ChunkLoop, Saving, Work
from instrdiv.training.members import StepMetrics, Trainer


@dataclasses.dataclass
class Run:
    """The outcome of a run.

    Attributes:
      results, metrics, timings: rows of the three tables.
      params: member id -> its parameters (numpy trees); empty unless requested.
      headline: the slice on which thresholds are computed.
      saved: its run directory; None if it has none.
    """

    results: list[Row]
    metrics: list[Row]
    timings: list[Row]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    headline: str = Task.headline
    saved: SavedRun | None = None

    def threshold(self, x: str = "instructions") -> thresholds.Threshold:
        """I50 on the headline's unseen examples. Raises BadInput if members differ in more than ``x`` and seed."""
        self._check_varies_only(x)
        return thresholds.threshold(thresholds.select(self.results, "unseen", self.headline), x)

    def plot(self, path_stem: Path | str | None = None, **options: Any):
        """Draw figure 2a; see ``plots.instruction_curve``. Raises BadInput as ``threshold`` does."""
        self._check_varies_only("instructions")
        options = {"slice": self.headline} | options
        return plots.instruction_curve(self.results, None if path_stem is None else Path(path_stem), **options)

    def _check_varies_only(self, x: str) -> None:
        others = [name for name in varying(self.results) if name != x]
        if others:
            raise BadInput(f"the members differ in {', '.join(others)}, not only in {x}, so one curve would mix "
                           "them; thresholds.by_setting gives one threshold per setting")  # fmt: skip


def plan(sweep: Sweep, options: Options | None = None) -> Plan:
    """Validates a sweep and estimates its cost, without building a table or compiling anything."""
    sweep.validate()
    options = options or Options()
    layout = options.resolve(sweep.members)
    planned = make_plan(make_groups(sweep.members), layout, sweep.dev_tests, sweep.tests)
    return dataclasses.replace(planned, block_is_guess=options.leaves_block_to_probe)


def run(
    sweep: Sweep,
    run_dir: Path | str | None = None,
    options: Options | None = None,
    progress: bool = True,
    overwrite: bool = False,
    keep_params: bool = True,
    schedule: Schedule | None = None,
    there: SavedRun | None = None,
) -> Run:
    """Trains and tests a sweep.

    Args:
      sweep: the members and their tests.
      run_dir: directory for tables and checkpoints (see ``docs/architecture.md``); None keeps everything in memory. If
        it contains this same run, the run is loaded if finished and resumed otherwise. Members that it lacks are
        trained as a separate cohort.
      options: layout on the machine. Unset options are taken from an earlier launch in the same directory; on the first
        launch, on an accelerator, a probe of about a minute chooses ``members_per_vmap``.
      progress: show a progress bar (or plain lines).
      overwrite: start from scratch in a directory that contains another run.
      keep_params: copy the trained parameters to the host.
      schedule: when to write checkpoints, in addition to the one at the end; every two minutes by default.
      there: the run in ``run_dir``, if it is already open.

    Raises:
      BadInput: a one-line message for the user; raised before anything compiles, unless the disk fills up.
      Interrupted: SIGINT or SIGTERM was received; everything is saved. (Only with a ``run_dir``.)
    """
    sweep.validate()
    options = options or Options()
    if run_dir is None:
        cohorts = [Cohort(sweep.members, options.resolve(sweep.members))]
    else:
        path = Path(run_dir)
        there = None if overwrite else there or SavedRun.at(path)
        cohorts = RunDirectory.check(path, sweep, options, overwrite, there)
        if there and len(there.cohorts) == len(cohorts) and there.is_finished():
            if progress:
                Reporter(0).note(f"{path}: already finished; loading its results")
            return _read_back(there, keep_params)
    pools = RulePools(sweep.members)
    for source in {member.setting.source for member in sweep.members}:
        held_out_rules(source, sweep.dev_tests, sweep.tests)  # fails early, before anything is written, if too few
    schedule = schedule or Schedule()

    def lay_out(cohort: Cohort) -> Cohort:
        return _with_measured_block(cohort, options, pools, progress) if options.leaves_block_to_probe else cohort

    with contextlib.ExitStack() as stack:
        if run_dir is None:
            groups = number_groups([lay_out(cohort) for cohort in cohorts])
            reporter = stack.enter_context(_reporter(groups, progress))
            return _Launch(sweep, pools, reporter, schedule).train(groups, keep_params)
        directory = stack.enter_context(RunDirectory.begin(path, sweep, options, overwrite, lay_out))
        done = directory.done()
        groups = [(group, layout) for group, layout in number_groups(directory.cohorts) if group.name not in done]
        directory.check_layouts(groups)
        started = time.monotonic()
        rules = {member.id: pools.of(member).digest for member in sweep.members}
        directory.write_provenance(rule_digests=rules)
        reporter = stack.enter_context(_reporter(groups, progress))
        launch = _Launch(sweep, pools, reporter, schedule, directory)
        launch.stop = stack.enter_context(StopRequest(reporter.note, overwrite))
        if tensorboard.available():
            launch.curves = stack.enter_context(TensorBoard(directory.path / "tensorboard", directory.sweep.members))
            launch.curves.write([row for row in directory.read_metrics() if row["group"] in done])
        params = launch.train(groups, keep_params).params
        launch.stop_if_asked("the end of the last group")
        reporter.working("measuring how similar held-out and trained instructions are")
        directory.write_resemblance(resemblance_rows(directory.sweep, pools))
        directory.write_provenance(
            rule_digests=rules,
            wall_seconds=round(time.monotonic() - started, 1),
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=peak_device_bytes(),
        )
        return _read_back(directory, keep_params, params)


def _with_measured_block(cohort: Cohort, options: Options, pools: RulePools, progress: bool) -> Cohort:
    with _reporter([], progress) as reporter:
        choice = choose_block(cohort.members, options, pools, reporter.working)
        reporter.note(choice.text)
    return Cohort(cohort.members, choice.layout, choice.rates)


def _reporter(groups: Sequence[tuple[Group, Layout]], progress: bool) -> Reporter:
    return Reporter(sum(len(g.members) * g.config.steps * g.config.batch_size for g, _ in groups), enabled=progress)


@dataclasses.dataclass
class _Launch:
    """State shared by the groups of one launch; without a directory, nothing is written."""

    sweep: Sweep
    pools: RulePools
    reporter: Reporter
    schedule: Schedule
    directory: RunDirectory | None = None
    stop: StopRequest | None = None
    curves: TensorBoard | None = None

    def train(self, groups: Sequence[tuple[Group, Layout]], keep_params: bool) -> Run:
        """Trains and tests the groups one after another."""
        outcome = Run([], [], [], headline=self.sweep.task.headline)
        for group, layout in groups:
            self.stop_if_asked(f"the start of group {group.name}")
            with _GroupRun(self, group, layout) as runner:
                runner.train()
                runner.test()
            outcome.metrics += runner.metrics
            outcome.timings += runner.timings
            outcome.results += runner.results
            if keep_params:
                outcome.params |= runner.member_params()
        return outcome

    def stop_if_asked(self, where: str) -> None:
        """Raises Interrupted if a stop was requested. Call only when everything up to ``where`` is on disk."""
        if self.stop:
            self.stop.leave_if_asked(where)


def _read_back(saved: SavedRun, keep_params: bool, params: dict[str, Any] | None = None) -> Run:
    """Loads the tables of a finished run, and the parameters of members missing from ``params``."""
    results, metrics, timings = (read_table(saved.path / f"{name}.csv") for name in ("results", "metrics", "timings"))
    params = dict(params or {})
    if keep_params:
        for group in saved.groups:
            if not all(member.id in params for member in group.members):
                params |= _by_member(group, saved.params(group, group.config.steps)[1])
    return Run(results, metrics, timings, params, saved.sweep.task.headline, saved)


def _by_member(group: Group, params: Any) -> dict[str, Any]:
    return {m.id: jax.tree.map(lambda leaf: leaf[row], params) for row, m in enumerate(group.members)}  # noqa: B023


class _GroupRun:
    """Trains and tests one group; with a directory, resumes from its last checkpoint.

    Attributes:
      metrics, timings, results: the group's rows of the three tables, including those of earlier launches.
    """

    def __init__(self, launch: _Launch, group: Group, layout: Layout):
        self.launch, self.group = launch, group
        self.sweep, self.pools, self.reporter = launch.sweep, launch.pools, launch.reporter
        self.directory, self.curves = launch.directory, launch.curves
        self.metrics: list[Row] = []
        self.timings: list[Row] = []
        self.results: list[Row] = []
        self._rules = [self.pools.of(member).digest for member in group.members]
        self.checkpoints = self.directory.checkpoints(group, self.reporter.note) if self.directory else None
        mesh = make_mesh(layout.devices, layout.data_parallel)
        restored = self._restored()
        try:
            self.trainer = Trainer(group, self.pools, mesh, layout.members_per_vmap, restored)
        except ValueError as error:
            if restored is None or self.checkpoints is None:
                raise
            raise does_not_fit(self.checkpoints.path, restored[0], error) from None
        piece = piece_size(self.sweep.dev_tests, self.sweep.tests, layout.data_parallel)
        self.evaluator = Evaluator(self.trainer, piece)

    def __enter__(self) -> _GroupRun:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.checkpoints:
            self.checkpoints.__exit__(kind, error, traceback)

    def _restored(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Loads the last intact checkpoint and its table rows; returns its step and arrays, or None."""
        checkpoint = self.checkpoints.latest() if self.checkpoints else None
        if checkpoint is None or self.checkpoints is None:
            return None
        record = checkpoint.record
        if record["members"] != [member.id for member in self.group.members]:
            raise BadInput(
                f"{self.checkpoints.path}: contains checkpoints of different members; "
                "pass --overwrite to start from scratch"
            )
        if record["rules"] != self._rules:
            raise BadInput(f"{other_rules(self.checkpoints.path)}, or pass --overwrite to start from scratch")
        self.metrics, self.timings = record["metrics"], record["timings"]
        if self.curves:
            self.curves.write(self.metrics)
        done = checkpoint.step * self.group.config.batch_size * len(self.group.members)
        self.reporter.resume(done)
        self.reporter.note(f"group {self.group.name}: resuming from step {checkpoint.step}")
        return checkpoint.step, checkpoint.arrays

    def _test_pieces(self, split: str) -> Iterator[tuple]:
        tests = make_test_set(split, self.group.members, self.pools, self.sweep.dev_tests, self.sweep.tests)
        return self.evaluator.pieces(tests)

    def train(self) -> None:
        """Trains chunk by chunk, testing on unseen_dev after each one."""
        trainer, group, config = self.trainer, self.group, self.group.config
        if trainer.step == config.steps:
            return
        self.reporter.working(f"group {group.name}: compiling for {len(group.members)} members")
        dev = list(self._test_pieces("unseen_dev"))

        def measure(metrics: StepMetrics) -> tuple:
            # Copied, because the state itself is donated to the next chunk.
            return metrics, self.evaluator.count(dev), trainer.state.diverged_at + 0

        examples = len(group.members) * config.batch_size
        work = Work(group.name, config.steps, config.chunk_steps, examples, group.shape.sequence)
        loop = ChunkLoop(work, trainer, self.timings, measure, self._report, self._saving())
        # Compile before a chunk runs; otherwise compilation memory would add to the chunk's.
        jax.block_until_ready(self.evaluator.count(dev[:1]))
        loop.run()

    def _saving(self) -> Saving | None:
        def record() -> dict[str, Any]:
            members = [member.id for member in self.group.members]
            return {"members": members, "rules": self._rules, "metrics": self.metrics, "timings": self.timings}

        launch = self.launch
        return Saving(self.checkpoints, launch.schedule, record, launch.stop) if self.checkpoints else None

    def _report(self, step: int, results: tuple, seconds: float | None) -> None:
        """Adds the rows of a chunk, which took ``seconds``."""
        metrics, counts, diverged = results
        config, group = self.group.config, self.group
        exact_match = []
        column = list(group.task.slices).index(group.task.headline)
        for row, member in enumerate(group.members):
            right, tests = (int(count) for count in counts[row, column])
            exact_match.append(right / tests if tests else float("nan"))
            self.metrics.append(
                identity(self.sweep.figure, self.group, member, step)
                | {
                    "loss": shortest(metrics.loss[row]),
                    "gradient_norm": shortest(metrics.gradient_norm[row]),
                    "train_exact_match": shortest(metrics.exact_match[row]),
                    "unseen_dev_exact_match": exact_match[-1],
                    "unseen_dev_tests": tests,
                    "status": status_of(diverged[row]),
                }
            )
            if diverged[row] >= 0:
                who = f"I = {member.setting.instructions}, seed {member.seed}"
                self.reporter.note_frozen(member.id, who, status_of(diverged[row]))
        if self.directory:
            self.directory.write_progress(group, self.metrics, self.timings)
        if self.curves:
            self.curves.write(self.metrics[-len(group.members) :])
        examples = len(group.members) * config.chunk_steps * config.batch_size
        where = f"group {group.name}, step {step} of {config.steps}"
        self.reporter.report(examples, seconds, group.shape.sequence, exact_match, where)

    def test(self) -> None:
        """Makes the rows of results.csv: one per member, split and slice that has tests."""
        diverged = np.asarray(self.trainer.state.diverged_at)
        splits = ["unseen_dev", "unseen", "seen"]
        if any(math.isfinite(member.setting.tail_shape) for member in self.group.members):
            splits.append("seen_by_share")
        for split in splits:
            self._leave_if_asked()
            self.reporter.working(f"group {self.group.name}: testing {split}")
            counts = np.asarray(self.evaluator.count(self._test_pieces(split)))
            for row, member in enumerate(self.group.members):
                who = identity(self.sweep.figure, self.group, member, self.trainer.step)
                for column, slice in enumerate(self.group.task.slices):
                    right, tests = (int(count) for count in counts[row, column])
                    if tests:
                        status = status_of(diverged[row])
                        self.results.append(result_row(who, member, split, slice, right, tests, status))
        if self.directory:
            self._leave_if_asked()
            self.reporter.working(f"group {self.group.name}: decoding the answers on unseen")
            errors, samples = decode_split(self.sweep, self.trainer, self.pools, "unseen", self.evaluator.piece)
            self.directory.write_progress(self.group, self.metrics, self.timings)
            self.directory.write_results(self.results, errors, samples)

    def _leave_if_asked(self) -> None:
        """Raises Interrupted if a stop was requested; the last checkpoint already contains everything."""
        config = self.group.config
        self.launch.stop_if_asked(f"group {self.group.name}, step {config.steps} of {config.steps}")

    def member_params(self) -> dict[str, Any]:
        """Returns the trained parameters by member id, as numpy trees."""
        return _by_member(self.group, jax.device_get(self.trainer.state.params))


def resemblance_rows(sweep: Sweep, pools: RulePools) -> list[Row]:
    """Rows, one per member, on how closely the ``unseen`` instructions resemble its trained ones."""
    largest = max(member.setting.instructions for member in sweep.members)
    compared = max(16, min(256, 10_000_000 // largest))  # compared letter by letter; the same number for all members
    rows = []
    for member in sweep.members:
        held_out = held_out_rules(member.setting.source, sweep.dev_tests, sweep.tests)["unseen"]
        report = member.setting.resemblance(pools.of(member), held_out, compared)
        rows.append({"member": member.id, "seed": member.seed, "instructions": member.setting.instructions, **report})
    return rows
