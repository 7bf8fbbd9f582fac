"""A complete fine-tuning run: train a population of adapters, write its tables and adapters; resume an earlier launch.

A run directory has ``config.json`` (base, recipe, members, digests of their data), ``provenance.json``, ``metrics.csv``
(a row per member and report), ``source_losses.csv`` (a row per member, report and source), ``timings.csv``,
``checkpoints/adapters/<step>/`` and, once training is finished, ``adapters/<member>/``, which PEFT can load. In these
tables, an *example* is a packed row. Repeating the call resumes the run, or loads it if it is finished; the mesh may be
different, which only changes rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instrdiv.data.packing import Packed
from instrdiv.evaluation.rows import status_of
from instrdiv.models import lora
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.lora import Adapter
from instrdiv.runtime.checkpoints import Checkpoints, Schedule, does_not_fit, named_leaves
from instrdiv.runtime.directories import another_run, begun, check_usable, clear_errors
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import plain
from instrdiv.runtime.interruption import StopRequest
from instrdiv.runtime.memory import peak_device_bytes, peak_host_bytes
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.progress import Reporter
from instrdiv.runtime.provenance import Provenance
from instrdiv.runtime.tables import Row, shortest, write_table
from instrdiv.training.adapter_trainer import AdapterTrainer, Job
from instrdiv.training.adapters import ChunkMetrics
from instrdiv.training.chunks import TIMING_COLUMNS, ChunkLoop, Saving, Work
from instrdiv.training.recipe import AdapterMember, Recipe

#: Columns of metrics.csv: one row per member and report. Loss and norm cover the steps since the last report.
ADAPTER_METRIC_COLUMNS = (
    *("figure", "member", "seed", "step", "examples_seen", "loss", "response_tokens", "gradient_norm", "status"),
)
#: Columns of source_losses.csv: what each source of a member's data contributed to its loss.
SOURCE_COLUMNS = ("figure", "member", "seed", "step", "source", "loss", "response_tokens")

#: The name of the group in tables and checkpoints; all members of a run train together as one group.
_GROUP = "adapters"
#: What is removed when a run is overwritten. Includes a launcher's files, so that none are mistaken for the new run's.
_FILES = (
    *("results.csv", "metrics.csv", "source_losses.csv", "timings.csv", "provenance.json", "base.csv", "samples.csv"),
    *("packing.csv", "cleaning.csv", "dropped.csv", "held_out.csv", "claims.csv"),
    *("figure.png", "figure.pdf", "figure.csv", "report.html"),
)
_FOLDERS = ("checkpoints", "adapters", "rows")


@dataclasses.dataclass
class FineTuned:
    """The outcome of a run.

    Attributes:
      members: the members, in training order.
      metrics, source_losses, timings: rows of the three tables.
      adapters: member id -> its adapter (numpy, at its own rank).
    """

    members: tuple[AdapterMember, ...]
    metrics: list[Row]
    source_losses: list[Row]
    timings: list[Row]
    adapters: dict[str, Adapter]

    def population(self, config: ModelConfig) -> Adapters:
        """All adapters stacked into one population (numpy), in the order of the members."""
        loras = [member.lora for member in self.members]
        stacked = lora.stack_adapters(config, loras, [self.adapters[member.id] for member in self.members])
        return Adapters(stacked, lora.scales(loras))


def finetune(
    model: Model,
    members: Sequence[AdapterMember],
    data: Sequence[Packed],
    recipe: Recipe,
    mesh: Mesh | None = None,
    run_dir: Path | str | None = None,
    figure: str = "finetuning",
    base: str | None = None,
    progress: bool = True,
    overwrite: bool = False,
    schedule: Schedule | None = None,
) -> FineTuned:
    """Trains a population of adapters over one frozen base.

    Args:
      model: the base.
      members, data: the adapters to train, and the packed rows of each.
      recipe: how to train them.
      mesh: the devices (``make_mesh``); one device by default.
      run_dir: directory for tables, checkpoints and adapters; None keeps everything in memory. If it contains this same
        run, the run is resumed.
      figure: name of the run, for the tables.
      base: name or path of the base, recorded in the adapters' files.
      progress: show a progress bar (or plain lines).
      overwrite: start from scratch in a directory that contains another run.
      schedule: when to write checkpoints, in addition to the one at the end; every two minutes by default.

    Raises:
      BadInput: a one-line message for the user; raised before anything compiles, unless the disk fills up.
      Interrupted: SIGINT or SIGTERM was received; everything is saved. (Only with a ``run_dir``.)
    """
    job = Job(model, tuple(members), tuple(data), recipe, mesh or make_mesh())
    job.check()
    reporter = Reporter(len(members) * recipe.steps * recipe.batch_size, enabled=progress)
    if run_dir is None:
        with reporter:
            return _Launch(job, figure, reporter).train()
    path, started = Path(run_dir), time.monotonic()
    check_usable(path)  # fails early, before anything is created
    said = _describe(job, figure, base)

    def describe() -> dict[str, Any]:
        return said if overwrite or not check_usable(path) else _same_run(path, said)

    with contextlib.ExitStack() as stack:
        stack.enter_context(begun(path, describe, _FILES, _FOLDERS, overwrite))
        stack.enter_context(reporter)
        stop = stack.enter_context(StopRequest(reporter.note, overwrite))
        checkpoints = stack.enter_context(Checkpoints(path / "checkpoints" / _GROUP, reporter.note))
        launch = _Launch(job, figure, reporter, path, checkpoints)
        if launch.trainer.step == recipe.steps and all((path / "adapters" / m.id).is_dir() for m in members):
            reporter.note(f"{path}: already finished; loading its results")
            return launch.train()
        provenance = Provenance(path)
        facts: dict[str, Any] = {"mesh": dict(job.mesh.shape)}
        provenance.write(**facts)
        done = launch.train(schedule or Schedule(), stop)
        with clear_errors(path):
            for member in members:
                folder = path / "adapters" / member.id
                lora.write_adapter(folder, model.config, member.lora, done.adapters[member.id], base)
        facts |= {"wall_seconds": round(time.monotonic() - started, 1)}
        provenance.write(**facts, peak_host_bytes=peak_host_bytes(), peak_device_bytes=peak_device_bytes())
        return done


class _Launch:
    """One launch, resuming from the last checkpoint; without a directory, nothing is written."""

    def __init__(
        self,
        job: Job,
        figure: str,
        reporter: Reporter,
        path: Path | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        self.members, self.recipe, self.figure, self.reporter = tuple(job.members), job.recipe, figure, reporter
        self.path, self.checkpoints = path, checkpoints
        self.metrics: list[Row] = []
        self.source_losses: list[Row] = []
        self.timings: list[Row] = []
        self._places = job.data[0].tokens.shape[1]
        restored = None
        checkpoint = checkpoints.latest() if checkpoints else None
        if checkpoint:
            record = checkpoint.record
            self.metrics, self.source_losses, self.timings = (
                record[name] for name in ("metrics", "sources", "timings")
            )
            reporter.resume(len(job.members) * checkpoint.step * job.recipe.batch_size)
            reporter.note(f"resuming from step {checkpoint.step}")
            restored = (checkpoint.step, checkpoint.arrays)
        try:
            self.trainer = AdapterTrainer(job, restored)
        except ValueError as error:
            if checkpoint is None or checkpoints is None or isinstance(error, BadInput):
                raise
            raise does_not_fit(checkpoints.path, checkpoint.step, error) from None

    def train(self, schedule: Schedule | None = None, stop: StopRequest | None = None) -> FineTuned:
        trainer, recipe = self.trainer, self.recipe
        saving = None
        if self.checkpoints and schedule:
            saving = Saving(self.checkpoints, schedule, self._record, stop)
        if trainer.step < recipe.steps:
            self.reporter.working(f"compiling for {len(self.members)} members")
        examples = len(self.members) * recipe.batch_size
        work = Work(_GROUP, recipe.steps, recipe.chunk_steps, examples, self._places)

        def measure(metrics: ChunkMetrics) -> tuple:
            # Copied, because the state itself is donated to the next chunk.
            return metrics, trainer.state.diverged_at + 0

        ChunkLoop(work, trainer, self.timings, measure, self._report, saving).run()
        self._write_tables()
        adapters = {member.id: trainer.adapter(row) for row, member in enumerate(self.members)}
        return FineTuned(self.members, self.metrics, self.source_losses, self.timings, adapters)

    def _record(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "sources": self.source_losses, "timings": self.timings}

    def _report(self, step: int, results: tuple[ChunkMetrics, np.ndarray], seconds: float | None) -> None:
        """Adds the rows of a chunk, which took ``seconds``."""
        metrics, diverged = results
        losses = []
        with np.errstate(invalid="ignore"):  # no mean for a source without tokens or a frozen member
            by_source = metrics.losses / metrics.tokens
            overall = metrics.losses.sum(-1, dtype=np.float32) / metrics.tokens.sum(-1)
        for row, member in enumerate(self.members):
            who = {"figure": self.figure, "member": member.id, "seed": member.seed, "step": step}
            losses.append(float(overall[row]))
            self.metrics.append(
                who
                | {
                    "examples_seen": step * self.recipe.batch_size,
                    "loss": shortest(np.float32(overall[row])),
                    "response_tokens": int(metrics.tokens[row].sum()),
                    "gradient_norm": shortest(metrics.gradient_norm[row]),
                    "status": status_of(diverged[row]),
                }
            )
            for column, source in enumerate(self.trainer.source_names):
                if metrics.tokens[row, column]:
                    loss, tokens = shortest(np.float32(by_source[row, column])), int(metrics.tokens[row, column])
                    self.source_losses.append(who | {"source": source, "loss": loss, "response_tokens": tokens})
            if diverged[row] >= 0:
                self.reporter.note_frozen(member.id, f"seed {member.seed}", status_of(diverged[row]))
        self._write_tables()
        before = self.timings[-2]["step"] if len(self.timings) > 1 else 0
        examples = len(self.members) * (step - before) * self.recipe.batch_size
        where = f"step {step} of {self.recipe.steps}"
        self.reporter.report(examples, seconds, self._places, losses, where, "loss")

    def _write_tables(self) -> None:
        if self.path:
            with clear_errors(self.path):
                write_table(self.path / "metrics.csv", self.metrics, ADAPTER_METRIC_COLUMNS)
                write_table(self.path / "source_losses.csv", self.source_losses, SOURCE_COLUMNS)
                write_table(self.path / "timings.csv", self.timings, TIMING_COLUMNS)


def _describe(job: Job, figure: str, base: str | None) -> dict[str, Any]:
    """The content of config.json: everything that determines what is trained."""
    config, weights = job.model.config, job.model.weights

    @functools.cache
    def digest(number: int) -> str:
        return data_digest(next(rows for rows in job.data if id(rows) == number))

    return plain(
        {
            "figure": figure,
            "base": {"name": base, "weights": weights_digest(weights), "config": dataclasses.asdict(config)},
            "recipe": dataclasses.asdict(job.recipe),
            "members": [
                {"id": member.id, "seed": member.seed, "data": digest(id(rows)), **member.as_row()}
                for member, rows in zip(job.members, job.data, strict=True)
            ],
        }
    )


def data_digest(rows: Packed) -> str:
    """A digest that changes whenever a packed data set does."""
    digest = hashlib.sha256(json.dumps(rows.source_names).encode())
    for name in ("tokens", "positions", "segments", "loss_mask", "sources"):
        array = np.ascontiguousarray(getattr(rows, name))
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]


def weights_digest(weights: Mapping[str, Any]) -> str:
    """A digest of all weights; the same on any mesh. Computed where the weights are stored."""
    words = {name: int(_digest(leaf)) for name, leaf in named_leaves(weights).items()}
    shapes = {name: f"{leaf.dtype} {leaf.shape}" for name, leaf in named_leaves(weights).items()}
    return hashlib.sha256(json.dumps([words, shapes], sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _digest(array: jax.Array) -> jax.Array:
    """uint32: the sum of the elements' bit patterns, weighted by odd numbers derived from their indices, mod 2^32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, length in enumerate(array.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return (words * (2 * place + 1)).sum(dtype=jnp.uint32)


def _same_run(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, if it is this run (the base may have moved). Raises BadInput naming what differs."""
    try:
        there = json.loads((path / "config.json").read_text())
        differ = list(_differences(there, said))
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path / 'config.json'} cannot be read ({error}); pass --overwrite to start from scratch"
        ) from None
    if differ:
        raise another_run(path, differ[:8])
    return there


def _differences(there: Any, asked: Any, name: str = "") -> Iterator[str]:
    """Yields the fields in which two descriptions differ, with both values."""
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        for field in dict.fromkeys([*there, *asked]):
            if field not in ("id", "name"):  # the id follows from the rest; the name is the base's current path
                yield from _differences(there.get(field), asked.get(field), f"{name}.{field}" if name else field)
    elif name == "members" and isinstance(there, list) and len(there) == len(asked):
        for number, pair in enumerate(zip(there, asked, strict=True)):
            yield from _differences(*pair, f"member {number}")
    elif name == "members":
        yield f"members: {len(there or [])} saved, {len(asked)} requested"
    elif there != asked:
        yield f"{name}: {there} saved, {asked} requested"
