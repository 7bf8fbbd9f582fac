"""Settings: what one member is trained on and how, as data.

A setting is one flat, frozen dataclass: the fields of its task, and those that all tasks share, by subject. The kind of
each field says what it costs to vary (``runtime/fields.py``): another table, another traced scalar, or, if it is
static, another compiled program. Members with equal static fields form a *group*.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from instrdiv.config.schedule import ScheduleFields
from instrdiv.runtime.fields import (
    STATIC,
    TABLE,
    TRACED,
    at_least,
    check_fields,
    convert_fields,
    field,
    from_zero_to_one,
    positive,
    refuse,
    size,
)
from instrdiv.tasks import counts
from instrdiv.tasks.task import TASKS, Task

S = TypeVar("S", bound="TaskSetting")

#: The task of a run whose config.json names none.
DEFAULT_TASK = "rewriting"


@dataclasses.dataclass(frozen=True)
class DataFields:
    """The number of instructions and examples."""

    instructions: int = field(1000, "number of different training instructions I", kind=TABLE, bound=at_least(1))
    tail_shape: float = field(
        math.inf,
        "power-law shape of the number of examples per instruction; larger is more even, inf is uniform",
        kind=TABLE,
        bound=positive,
        infinite=True,
    )
    tail_reading: str = field(
        "weights",
        "how tail_shape is read: instructions draw weights from the density, or their shares follow from their index",
        counts.TAIL_READINGS,
        kind=TABLE,
    )
    examples: int = field(
        1_000_000, "number of different training examples N, shared among the I instructions", kind=STATIC, bound=size
    )
    epochs: float = field(
        50.0,
        "passes over the training set; the learning-rate schedule ends with the last one",
        kind=STATIC,
        bound=positive,
    )
    batch_size: int = field(512, "examples per step", kind=STATIC, bound=size)


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """The decoder model."""

    layers: int = field(6, "number of layers", kind=STATIC, bound=at_least(1))
    width: int = field(256, "width of the residual stream", kind=STATIC, bound=at_least(1))
    heads: int = field(4, "attention heads per layer", kind=STATIC, bound=at_least(1))
    mlp_ratio: int = field(4, "MLP hidden width divided by the width", kind=STATIC, bound=at_least(1))
    positions: str = field("learned", "position encoding", ("learned", "rotary", "none"), kind=STATIC)
    activation: str = field("gelu", "MLP activation", ("gelu", "relu"), kind=STATIC)
    norm: str = field("layernorm", "normalization", ("layernorm", "rmsnorm"), kind=STATIC)
    biases: bool = field(True, "whether linear layers and norms have biases", kind=STATIC)
    tied_head: bool = field(True, "whether the output head shares the embedding weights", kind=STATIC)
    init: str = field("gpt2", "initial weights: N(0, 0.02), or N(0, 1/fan_in)", ("gpt2", "fan_in"), kind=STATIC)
    dropout: float = field(0.0, "dropout rate", kind=STATIC, bound=from_zero_to_one)
    precision: str = field("float32", "compute precision; parameters are float32", ("float32", "bfloat16"), kind=STATIC)


@dataclasses.dataclass(frozen=True)
class TrainingFields(ScheduleFields):
    """The optimizer."""

    optimizer: str = field("adamw", "optimizer", ("adamw", "muon"), kind=STATIC)
    learning_rate: float = field(
        1e-3, "peak learning rate (with muon: of the matrices it updates)", kind=TRACED, bound=at_least(0)
    )
    adam_learning_rate: float = field(
        2e-3, "muon only: peak learning rate of the parameters that Adam updates", kind=TRACED, bound=at_least(0)
    )
    weight_decay: float = field(
        0.1,
        "decoupled weight decay of the matrices: a step decays them by learning rate * this",
        kind=TRACED,
        bound=at_least(0),
    )


@dataclasses.dataclass(frozen=True)
class TaskSetting(DataFields, ModelFields, TrainingFields, Task):
    """All settings of a member except its seed; a subclass adds the fields of a task (``setting_of``).

    Values such as numpy numbers and lists are converted to the type of their field; raises BadInput if that fails.
    ``validate`` checks whether they make sense together. Without a task, it only describes the model and its training.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            _SETTINGS[cls.name] = cls

    def __post_init__(self) -> None:
        convert_fields(self)

    @property
    def chunk_steps(self) -> int:
        """Steps between two reports."""
        return math.ceil(self._needed_steps / self.reports)

    @property
    def chunks(self) -> int:
        """Number of reports in the run; fewer than ``reports`` if fewer chunks cover the budget."""
        return math.ceil(self._needed_steps / self.chunk_steps)

    @property
    def steps(self) -> int:
        """Training steps: the budget ``epochs * examples / batch_size``, rounded up to whole chunks."""
        return self.chunks * self.chunk_steps

    @property
    def _needed_steps(self) -> int:
        return math.ceil(self.epochs * self.examples / self.batch_size)

    @functools.cached_property
    def static(self: S) -> S:
        """The setting with all but its static fields at their defaults: equal for the members of a group."""
        others: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self) if f.metadata["kind"] != STATIC}
        return dataclasses.replace(self, **others)

    def with_task(self, task: Task, **changes: Any) -> Any:
        """The setting of a task with this size of model and training; ``changes`` overrides fields."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TaskSetting)}
        own = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
        return setting_of(type(task))(**shared | own | changes)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Columns that describe a setting in every table, those that the figures vary first."""
        first = [*cls.first_columns, "width", "layers"]
        return (*first, *sorted(f.name for f in dataclasses.fields(cls) if f.name not in first))

    @classmethod
    def default_row(cls) -> dict[str, Any]:
        """Values of these columns when all fields have their defaults."""
        return _default_row(cls)  # type: ignore[arg-type]

    def as_row(self) -> dict[str, Any]:
        """Flat values for tables: defaults taken from another field are filled in, and lists joined by '+'."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | self.filled_in()
        row = {name: "+".join(map(str, v)) if isinstance(v, tuple) else v for name, v in row.items()}
        return {name: row[name] for name in self.columns()}

    @classmethod
    def from_row(cls: type[S], row: Mapping[str, Any]) -> S:
        """The inverse of ``as_row``, for a row read back from JSON; a missing field gets its default."""
        values: dict[str, Any] = {f.name: row[f.name] for f in dataclasses.fields(cls) if f.name in row}
        for f in dataclasses.fields(cls):
            if isinstance(f.default, tuple) and f.name in values:
                values[f.name] = tuple(int(part) for part in str(values[f.name]).split("+"))
        return cls(**values)

    def validate(self) -> None:
        """Raises BadInput, naming the flag, for a setting that cannot be trained. Cheap: builds no tables."""
        check_fields(self)
        if self.epochs * self.examples / self.batch_size >= 2**31:
            refuse("epochs", self.epochs, "a run must have fewer than 2^31 steps")
        self.check_task()
        if self.instructions > self.examples:
            refuse("instructions", self.instructions, f"must not exceed --config.examples={self.examples}")
        if self.width % self.heads:
            refuse("heads", self.heads, f"must divide --config.width={self.width}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            refuse("heads", self.heads, f"rotary positions need an even head size, got {self.width // self.heads}")
        if self.warmup_steps > self.steps:
            refuse("warmup_steps", self.warmup_steps, f"must not exceed the {self.steps} steps of the run")


_SETTINGS: dict[str, type[TaskSetting]] = {}


@functools.cache
def _default_row(settings: Any) -> dict[str, Any]:
    return settings().as_row()


#: Names that a task's fields and the parts of its prompt must not have: columns that tables already use.
TAKEN_COLUMNS = (
    *("id", "figure", "group", "member", "seed", "step", "examples_seen", "split", "slice", "exact_match", "tests"),
    *("status", "examples_per_rule", "exact_match_low", "exact_match_high"),
)
TAKEN_PARTS = ("answer", "decoded", "error", "asked", "rule_id")


def setting_of(task: type[Task] | str) -> type[TaskSetting]:
    """The settings class of a task: its own fields and those that all tasks share.

    Raises KeyError for an unknown name; ValueError for a field without a kind, and for a field or a part of the prompt
    whose name is reserved.
    """
    task = TASKS[task] if isinstance(task, str) else task
    own = {f.name for f in dataclasses.fields(task)} - {f.name for f in dataclasses.fields(Task)}
    for f in dataclasses.fields(task):
        if f.metadata.get("kind") is None:
            raise ValueError(f"{task.__name__}: field {f.name} needs a kind: field(…, kind=TABLE), TRACED, or STATIC")
    for name in sorted((own & {*dir(TaskSetting), *TAKEN_COLUMNS}) | ({*task.parts} & {*TAKEN_COLUMNS, *TAKEN_PARTS})):
        raise ValueError(f"{task.__name__}: the name {name} is reserved; rename the field or part")
    if task.name not in _SETTINGS or not issubclass(_SETTINGS[task.name], task):
        made = type(f"{task.__name__}Setting", (task, TaskSetting), {"__module__": task.__module__})
        _SETTINGS[task.name] = dataclasses.dataclass(frozen=True)(made)
    return _SETTINGS[task.name]


@dataclasses.dataclass(frozen=True)
class Member:
    """A setting and a seed, which together define a model.

    The seed determines the instruction pool, the inputs and the initial weights; the whole sweep shares one order of
    the examples.
    """

    setting: Any
    seed: int

    STREAMS: ClassVar[tuple[int, int]] = (0x7365656E, 0x7368617265)  # for ``seen_rules``: evenly, by share

    @property
    def id(self) -> str:
        """Stable name: a hash of the seed and of the setting's non-default values.

        A field added later, with the old behavior as its default, therefore changes no name.
        """
        row, default = self.setting.as_row(), self.setting.default_row()
        text = json.dumps({k: v for k, v in row.items() if v != default[k]} | {"seed": self.seed}, sort_keys=True)
        return "m" + hashlib.sha256(text.encode()).hexdigest()[:9]

    def rule_counts(self) -> np.ndarray:
        """How many of the N training examples use each instruction: int32 [I]; see ``counts.rule_counts``."""
        s = self.setting
        return counts.rule_counts(s.instructions, s.examples, s.tail_shape, s.tail_reading, self.seed)

    def seen_rules(self, tests: int, by_share: bool = False) -> np.ndarray:
        """Trained instructions to test on, as indices into the pool, int32 [tests].

        Each instruction that has examples equally often; with ``by_share``, in proportion to its share of the examples.
        """
        rule_counts, stream = self.rule_counts(), np.array([self.seed, self.STREAMS[by_share]], np.uint64)
        if by_share:
            words = np.random.Philox(key=stream).random_raw(tests)
            examples = (words % np.uint64(self.setting.examples)).astype(np.int64)
            return np.searchsorted(np.cumsum(rule_counts), examples, side="right").astype(np.int32)
        trained = np.flatnonzero(rule_counts)
        words = np.random.Philox(key=stream).random_raw(len(trained))
        return np.resize(trained[np.argsort(words, kind="stable")], tests).astype(np.int32)
