"""What every launcher of fine-tuning does: flags, preset, base, data, plan, run, tests, picture, verdict.

Such a launcher is a short file that describes a ``FineTuningFigure`` and calls ``launch_finetuning``: what its members
are and which data they get, how they are tested, the picture, and what the papers claim. Every field of its setting, of
the recipe and of the adapters is a flag ``--config.<field>``.
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
    """A preset, with what the flags say.

    Attributes:
      preset, flags: themselves; a figure may have flags of its own.
      settings: every combination of those that the preset varies.
      tuning: with the flags.
      seeds, tests: with the flags.
    """

    preset: Preset
    flags: FlagValues
    settings: Sequence[Any]
    tuning: Tuning
    seeds: int
    tests: int

    @classmethod
    def of_flags(cls, figure: FineTuningFigure, values: FlagValues) -> Asked:
        """Raises BadInput where preset and flags do not go together."""
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
        """A member; ``setting`` are its columns in tables."""
        return AdapterMember(self.tuning.lora, self.tuning.learning_rate, seed, setting)


class Tests(Protocol):
    """How members are tested (see ``runs/adapter_tests.py``)."""

    def are_done(self, run_dir: Path, members: Sequence[AdapterMember], step: int) -> bool: ...

    def ask_base(self, job: Job, say: Say) -> Any: ...

    def ask_members(self, job: Job, tuned: FineTuned, of_base: Any, say: Say) -> dict[str, Table]: ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is trained, and how it is tested.

    Attributes:
      members, data: and the packed rows of each.
      recipe: that they share.
      tests: see there.
      text: what people are told of the data.
    """

    members: Sequence[AdapterMember]
    data: Sequence[Packed]
    recipe: Recipe
    tests: Tests
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a launch is to do, before its base is there.

    Attributes:
      make: (tokenizer of the base, say) -> what is trained.
      rewriting: the world of the small base, where the preset has one.
    """

    make: Callable[[Tokenizer, Say], Trained]
    rewriting: EncryptedSetting = dataclasses.field(default_factory=EncryptedSetting)


@dataclasses.dataclass(frozen=True)
class FineTuningFigure:
    """A figure about adapters over a frozen base.

    Attributes:
      name: as in the tables.
      presets: by name; each has its ``tuning``.
      study: what was asked for -> what to do. Raises BadInput for an impossible request before a base is trained.
      draw: (rows of results.csv, those of base.csv, path without suffix) -> None; writes ``.png`` and ``.pdf``.
      claims: what the papers say, checked on the rows of results.csv; None where nothing can be checked, and
        ``unjudged`` says why.
      read: run directory -> rows of results.csv and of base.csv.
      report: (run directory, claims) -> path of the page that it writes.
      has_tests: ``--tests`` says how many there are.
      aliases: fields of the setting that have a flag ``--<field>``, too.
      define_flags: defines flags of the figure's own.
      default: the preset.
    """

    name: str
    presets: Mapping[str, Preset]
    study: Callable[[Asked], Study]
    draw: Callable[[Sequence[Row], Sequence[Row], Path], Any]
    claims: Callable[[Sequence[Row]], list[Claim]] | None = None
    unjudged: str = "the papers do not say"
    read: Callable[[Path], tuple[list[Row], list[Row]]] = read_answers
    report: Callable[[Path, Sequence[Claim] | None], Path] = write_adapter_report
    has_tests: bool = True
    aliases: Collection[str] = ()
    define_flags: Callable[[FlagValues], None] = lambda values: None
    default: str = "laptop"


def launch_finetuning(figure: FineTuningFigure, argv: Sequence[str] | None = None) -> int:
    """The main function of a launcher of fine-tuning; ``argv`` as for ``launch``."""

    def main(values: FlagValues) -> None:
        _launch(figure, values)

    return start(main, lambda values: define_flags(figure, values), about(figure), argv, f"{figure.name}.py")


def define_flags(figure: FineTuningFigure, values: FlagValues) -> None:
    """Those of the figure, of its setting, of recipe and adapters, of base, devices and run directory."""
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
        define(values, whole, "tests", "held-out rules that are tested at the end (default: the preset's)")
    help = "directory of the checkpoint that is adapted (default: the preset trains a small one)"
    define(values, NameParser(), "base", help)
    define(values, whole, "tensor_parallel", "devices that share every matrix of the base", 1)
    define_switch(values, "fsdp", "spread the base over all devices; each layer is gathered when it is used")
    define_switch(values, "int8", "hold the base's layers in eight bits (default: the preset's)", default=None)
    figure.define_flags(values)


def _launch(figure: FineTuningFigure, values: FlagValues) -> None:
    run_dir = run_dir_of(values, figure.name)
    asked = Asked.of_flags(figure, values)
    study, int8 = figure.study(asked), asked.tuning.int8
    asked.tuning.recipe.validate()
    if not (asked.tuning.small or values.base):
        needed = "needs --base=DIR, the directory of a checkpoint (docs/finetuning.md)"
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
    """The model that is adapted.

    Attributes:
      path: of its checkpoint.
      config, tokenizer: of the model.
      is_there: False in a dry run that would train it first: its weights are random ones then, which are as fast.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    is_there: bool = True

    @classmethod
    def of(cls, asked: Asked, run_dir: Path, rewriting: EncryptedSetting, mesh: Mesh, say: Say) -> _Base:
        """The checkpoint that ``--base`` names; else a preset's small one, which is trained beside the run directory.

        Raises BadInput where there is no such checkpoint, or it is not supported.
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
        """It, with its weights on the mesh, in the recipe's precision, or their layers in eight bits."""
        if not self.is_there:
            return Model(self.config, random_weights(self.config, seed=0))
        say(f"reading {self.path}")
        weights = read_weights(self.path, self.config, recipe.precision, mesh=mesh, fsdp=fsdp, int8=int8)
        return Model(self.config, weights)
