"""The launcher shared by all fine-tuning figures: flags, preset, base, data, plan, run, tests, picture, verdict.

A fine-tuning launcher is a short file that defines a ``FineTuningFigure`` (its members, their data and tests, the
picture, and the papers' claims) and calls ``launch_finetuning``. Every field of its setting, of the recipe and of the
adapters is a flag ``--config.<field>``.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from absl.flags import FlagValues
from jax.sharding import Mesh

from instrdiv.analysis.claims import Claim, write_claims
from instrdiv.data.packing import Packed
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.launch.figure import about
from instrdiv.launch.flags import (
    NameParser,
    NumberParser,
    define,
    define_preset_flag,
    define_run_flags,
    define_setting_flags,
    define_switch,
    run_dir_of,
    setting_flags,
    start,
)
from instrdiv.launch.presets import Preset, Tuning
from instrdiv.launch.verdicts import judge
from instrdiv.models.llama import Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.lora import Lora
from instrdiv.models.weights import read_weights
from instrdiv.reports.adapter_report import write_adapter_report
from instrdiv.runs.adapter_planning import adapter_forecast, adapter_plan
from instrdiv.runs.adapter_tests import read_answers
from instrdiv.runs.finetune import FineTuned, finetune
from instrdiv.runtime.checkpoints import Schedule
from instrdiv.runtime.devices import use_cpu_cores
from instrdiv.runtime.directories import check_usable, clear_errors, locked
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.progress import telling
from instrdiv.runtime.tables import Row, Table, write_table_files
from instrdiv.tasks.encrypted import EncryptedSetting
from instrdiv.training.adapter_trainer import Job, check
from instrdiv.training.pretraining import make_base, make_tokenizer, random_weights
from instrdiv.training.recipe import AdapterMember, Recipe

__all__ = ["Asked", "FineTuningFigure", "Preset", "Study", "Trained", "Tuning", "launch_finetuning"]

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A preset combined with the flags.

    Attributes:
      preset, flags: as given; a figure may define additional flags.
      settings: every combination of the values that the preset varies.
      tuning, seeds, tests: the preset's, with the flags applied.
    """

    preset: Preset
    flags: FlagValues
    settings: Sequence[Any]
    tuning: Tuning
    seeds: int
    tests: int

    @classmethod
    def of_flags(cls, figure: FineTuningFigure, values: FlagValues) -> Asked:
        """Combines a figure's preset with the flags. Raises BadInput if they are incompatible."""
        preset = figure.presets[values.preset]
        assert preset.tuning
        settings = preset.settings(setting_flags(values, type(preset.base)))
        tuning = dataclasses.replace(
            preset.tuning,
            lora=dataclasses.replace(preset.tuning.lora, **setting_flags(values, Lora)),
            recipe=dataclasses.replace(preset.tuning.recipe, **setting_flags(values, Recipe)),
            int8=preset.tuning.int8 if values.int8 is None else values.int8,
            **setting_flags(values, AdapterMember),
        )
        tests = (values.tests if figure.has_tests else None) or preset.tests
        return cls(preset, values, settings, tuning, values.seeds or preset.seeds, tests)

    def member(self, setting: Mapping[str, Any], seed: int) -> AdapterMember:
        """A member; ``setting`` holds its columns in the tables."""
        return AdapterMember(self.tuning.lora, self.tuning.learning_rate, seed, setting)


class Tests(Protocol):
    """How members are tested (see ``runs/adapter_tests.py``)."""

    def are_done(self, run_dir: Path, members: Sequence[AdapterMember], step: int) -> bool: ...

    def ask_base(self, job: Job, say: Say) -> Any: ...

    def ask_members(self, job: Job, tuned: FineTuned, of_base: Any, say: Say) -> dict[str, Table]: ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """What to train, and how to test it.

    Attributes:
      members, data: the members, and the packed rows of each.
      recipe: shared by all members.
      tests: see ``Tests``.
      text: summary of the data to print.
    """

    members: Sequence[AdapterMember]
    data: Sequence[Packed]
    recipe: Recipe
    tests: Tests
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a launch will do, defined before its base is loaded.

    Attributes:
      make: (tokenizer of the base, say) -> what to train.
      rewriting: the rewriting setting of the small base, if the preset has one.
    """

    make: Callable[[Tokenizer, Say], Trained]
    rewriting: EncryptedSetting = dataclasses.field(default_factory=EncryptedSetting)


@dataclasses.dataclass(frozen=True)
class FineTuningFigure:
    """A figure about adapters over a frozen base.

    Attributes:
      name: as in the tables.
      presets: presets by name; each has its ``tuning``.
      study: request -> study. Raises BadInput for an impossible request, before a base is trained.
      draw: (rows of results.csv, rows of base.csv, path without suffix) -> None; writes ``.png`` and ``.pdf``.
      claims: checks the papers' claims on the rows of results.csv; None if nothing can be checked.
      unjudged: why nothing can be checked, if ``claims`` is None.
      read: run directory -> rows of results.csv and of base.csv.
      report: (run directory, claims) -> path of the report that it writes.
      has_tests: whether the flag ``--tests`` sets the number of tests.
      aliases: fields of the setting that also have a flag ``--<field>``.
      define_flags: defines additional flags of the figure.
      default: the default preset.
    """

    name: str
    presets: Mapping[str, Preset]
    study: Callable[[Asked], Study]
    draw: Callable[[Sequence[Row], Sequence[Row], Path], Any]
    claims: Callable[[Sequence[Row]], list[Claim]] | None = None
    unjudged: str = "the papers make no claim to check"
    read: Callable[[Path], tuple[list[Row], list[Row]]] = read_answers
    report: Callable[[Path, Sequence[Claim] | None], Path] = write_adapter_report
    has_tests: bool = True
    aliases: Collection[str] = ()
    define_flags: Callable[[FlagValues], None] = lambda values: None
    default: str = "laptop"


def launch_finetuning(figure: FineTuningFigure, argv: Sequence[str] | None = None) -> int:
    """The main function of a fine-tuning launcher; ``argv`` as for ``launch``."""

    def main(values: FlagValues) -> None:
        _launch(figure, values)

    return start(main, lambda values: define_flags(figure, values), about(figure), argv, f"{figure.name}.py")


def define_flags(figure: FineTuningFigure, values: FlagValues) -> None:
    """Defines the flags of the figure, setting, recipe, adapters, base, devices and run directory."""
    presets = figure.presets.values()
    define_preset_flag(values, figure.presets, figure.default)
    swept = {name for preset in presets for name in preset.values}
    define_setting_flags(values, type(next(iter(presets)).base), swept, aliases=figure.aliases)
    define_setting_flags(values, Recipe)
    define_setting_flags(values, Lora, aliases=("rank", "alpha", "targets"))
    rate = ("learning_rate",)
    define_setting_flags(values, AdapterMember, aliases=rate, names=rate)
    define_run_flags(values, figure.name, "adapters")
    whole = NumberParser(int, low=1)
    if figure.has_tests:
        define(values, whole, "tests", "number of held-out instructions to test at the end (default: the preset's)")
    help = "checkpoint directory of the base to adapt (default: the small one that the preset trains, if it does)"
    define(values, NameParser(), "base", help)
    define(values, whole, "tensor_parallel", "devices over which each matrix of the base is split", 1)
    define_switch(values, "fsdp", "shard the base over all devices, gathering each layer when it is used")
    define_switch(values, "int8", "store the base's layers in int8 (default: the preset's)", default=None)
    figure.define_flags(values)


def _launch(figure: FineTuningFigure, values: FlagValues) -> None:
    run_dir = run_dir_of(values, figure.name)
    asked = Asked.of_flags(figure, values)
    study, int8 = figure.study(asked), asked.tuning.int8
    asked.tuning.recipe.validate()
    if not (asked.tuning.small or values.base):
        needed = "needs --base=DIR, a checkpoint directory (see docs/finetuning.md)"
        raise BadInput(f"--preset={values.preset}: {needed}")
    use_cpu_cores(values.devices)
    mesh = make_mesh(values.devices or jax.device_count(), values.data_parallel, values.tensor_parallel)
    check_usable(run_dir)
    print(f"{figure.name}, preset {values.preset}, {run_dir}", flush=True)
    with telling() as say:
        base = _Base.of(asked, run_dir, study.rewriting, mesh, say)
        trained = study.make(base.tokenizer, say)
        members, data, recipe, tests = trained.members, trained.data, trained.recipe, trained.tests
        check(base.config, members, data, recipe, mesh)
        if trained.text:
            print(trained.text, flush=True)
        print(adapter_plan(base.config, members, recipe, data[0].tokens.shape[1], int8), flush=True)
        job = Job(base.model(recipe, mesh, int8, values.fsdp, say), members, data, recipe, mesh)
        if values.dry_run:
            print(adapter_forecast(job, say))
            return
        done = not values.overwrite and tests.are_done(run_dir, members, recipe.steps)
        of_base = None if done else tests.ask_base(job, say)
    schedule = Schedule(values.checkpoint_minutes)
    tuned = finetune(job.model, members, data, recipe, mesh, run_dir, figure.name, str(base.path),
                     overwrite=values.overwrite, schedule=schedule)  # fmt: skip
    if not done:
        with locked(run_dir), telling() as say:
            tables = tests.ask_members(job, tuned, of_base, say)
            with clear_errors(run_dir):
                write_table_files(run_dir, tables)
    results, rows_of_base = figure.read(run_dir)
    figure.draw(results, rows_of_base, run_dir / "figure")
    found = judge(figure.claims, results, asked.preset, values, "adapter", figure.unjudged)
    write_claims(run_dir / "claims.csv", found)
    report = figure.report(run_dir, found)
    print(f"report: {report}   picture: {run_dir / 'figure.png'}   table: {run_dir / 'results.csv'}")


@dataclasses.dataclass(frozen=True)
class _Base:
    """The base model to adapt.

    Attributes:
      path: of its checkpoint.
      config, tokenizer: of the model.
      is_there: False in a dry run that would train it first; random weights, which are just as fast, replace it then.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    is_there: bool = True

    @classmethod
    def of(cls, asked: Asked, run_dir: Path, rewriting: EncryptedSetting, mesh: Mesh, say: Say) -> _Base:
        """The checkpoint named by ``--base``; otherwise the preset's small one, trained next to the run directory.

        Raises BadInput if there is no such checkpoint, or it is not supported.
        """
        if asked.flags.base:
            path = Path(asked.flags.base)
            return cls(path, ModelConfig.from_json(path), Tokenizer.load(path))
        small = asked.tuning.small
        assert small
        path = run_dir.with_name(f"{run_dir.name}-base")
        if asked.flags.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = make_tokenizer(Path(folder), rewriting)
            return cls(path, small.config(tokenizer.vocab_size, tokenizer.end_ids[0]), tokenizer, is_there=False)
        make_base(path, rewriting, small, mesh, say)
        return cls(path, ModelConfig.from_json(path), Tokenizer.load(path))

    def model(self, recipe: Recipe, mesh: Mesh, int8: bool, fsdp: bool, say: Say) -> Model:
        """The model with its weights on the mesh, in the recipe's precision, or with its layers in int8."""
        if not self.is_there:
            return Model(self.config, random_weights(self.config, seed=0))
        say(f"reading {self.path}")
        weights = read_weights(self.path, self.config, recipe.precision, mesh=mesh, fsdp=fsdp, int8=int8)
        return Model(self.config, weights)
