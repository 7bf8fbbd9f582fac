"""Settings: what one member is trained on and how, as data.

A setting has three parts, told apart by their types:

- ``TableFields`` decide tables that are built on the host (rules, counts a rule);
- ``TracedFields`` become traced scalars: members that differ in them share one compiled program;
- ``StaticFields`` decide array shapes and code, or are seldom swept: members that differ in them form *groups*.

``Setting`` is all three, flat, so that a field is changed in one place: ``dataclasses.replace(setting, width=128)``.
To make a field cheap to sweep, move its line from one part to another (and read it there).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from instrdiv.rewriting import rules
from instrdiv.rewriting.alphabet import LETTERS, Alphabet
from instrdiv.rewriting.examples import TaskShape
from instrdiv.rewriting.families import FAMILIES


class BadInput(ValueError):
    """Something a user asked for cannot be done. The message is one line: what is wrong, and what would be right."""


def field(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A configuration field: its default, one line of help, and its choices if they are few."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class TableFields:
    """Fields that decide a member's tables."""

    instructions: int = field(1000, "number of different rules I that are trained")
    tail_shape: float = field(math.inf, "power-law shape of the shares of the rules; inf: uniform")
    tail_reading: str = field("weights", "how the shape is read, see rule_counts", rules.TAIL_READINGS)
    family: str = field("free", f"families of the strings, joined by '+': {', '.join(FAMILIES)}")
    k_min: int = field(1, "lowest order k of the family")
    k_max: int = field(1, "highest order k of the family")
    pattern_length_min: int | None = field(None, "shortest pattern (default: pattern_length)")
    replacement_length_min: int | None = field(None, "shortest replacement (default: replacement_length)")
    held_out: str = field("pattern_and_replacement", "what of a held-out rule is never trained on", rules.SPLITS)
    held_out_share: float = field(0.2, "share of all strings that is kept for held-out rules")
    split_seed: int = field(0, "which strings those are, and which held-out rules are tested")


@dataclasses.dataclass(frozen=True)
class TracedFields:
    """Fields that become traced scalars of a member."""

    no_op_fraction: float = field(0.0, "probability that an example's input lacks the pattern")
    near_miss_fraction: float = field(0.0, "share of the no-ops that contain the pattern but for one letter")
    occurrences: tuple[int, ...] = field((1,), "how often the pattern is planted; drawn uniformly from this list")
    input_length_min: int | None = field(None, "shortest input (default: input_length)")
    learning_rate: float = field(1e-3, "peak learning rate (of Muon's matrices where the optimiser is muon)")
    adam_learning_rate: float = field(2e-3, "muon only: peak rate of the parameters that Adam updates")
    weight_decay: float = field(0.1, "decoupled weight decay of the matrices, times the learning rate")


@dataclasses.dataclass(frozen=True)
class StaticFields:
    """Fields that decide shapes and code. Hashable: members with equal ``StaticFields`` can form a group."""

    alphabet_size: int = field(26, "number of letters")
    input_length: int = field(50, "longest input")
    pattern_length: int = field(20, "longest pattern")
    replacement_length: int | None = field(None, "longest replacement (default: pattern_length)")
    examples: int = field(1_000_000, "size N = I * S of the fixed training set")
    epochs: float = field(50.0, "passes over the training set; the schedule ends with them")
    batch_size: int = field(512, "examples a step")
    layers: int = field(6, "depth")
    width: int = field(256, "width of the residual stream")
    heads: int = field(4, "attention heads a layer")
    mlp_ratio: int = field(4, "hidden width of the MLP over the width")
    positions: str = field("learned", "position information", ("learned", "rotary", "none"))
    activation: str = field("gelu", "MLP activation", ("gelu", "relu"))
    norm: str = field("layernorm", "normalisation", ("layernorm", "rmsnorm"))
    biases: bool = field(True, "biases in the linear layers and norms")
    tied_head: bool = field(True, "output head shares the embedding's weights")
    init: str = field("gpt2", "initial weights: N(0, 0.02), or N(0, 1/fan_in)", ("gpt2", "fan_in"))
    dropout: float = field(0.0, "dropout rate")
    precision: str = field("float32", "compute precision; parameters are float32", ("float32", "bfloat16"))
    optimizer: str = field("adamw", "optimiser", ("adamw", "muon"))
    schedule: str = field("linear", "decay of the rate to the end of the budget", ("linear", "cosine", "constant"))
    warmup_steps: int = field(0, "steps of linear warm-up")
    final_rate: float = field(0.0, "rate at the end, as a share of the peak")
    adam_b2: float = field(0.999, "decay of Adam's second moment")
    clip: float = field(1.0, "largest global norm of a gradient")
    reports: int = field(100, "progress reports a run, at most; they cut it into equal chunks")

    @property
    def chunk_steps(self) -> int:
        """Steps between two reports."""
        return math.ceil(self._needed_steps / self.reports)

    @property
    def chunks(self) -> int:
        """Reports of the run; fewer than ``reports`` where the budget divides better."""
        return math.ceil(self._needed_steps / self.chunk_steps)

    @property
    def steps(self) -> int:
        """Training steps: the budget ``epochs * examples / batch_size``, rounded up to whole chunks."""
        return self.chunks * self.chunk_steps

    @property
    def _needed_steps(self) -> int:
        return math.ceil(self.epochs * self.examples / self.batch_size)

    @property
    def longest_replacement(self) -> int:
        return self.pattern_length if self.replacement_length is None else self.replacement_length


@dataclasses.dataclass(frozen=True)
class Setting(StaticFields, TracedFields, TableFields):
    """Everything about a member but its seed.

    Values are brought to the type of their field (numpy numbers, lists); BadInput where that cannot be. Whether they
    make sense together is checked by ``validate``.
    """

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _as_type(f.name, getattr(self, f.name)))

    @property
    def static(self) -> StaticFields:
        return StaticFields(**{f.name: getattr(self, f.name) for f in dataclasses.fields(StaticFields)})

    @property
    def shortest_pattern(self) -> int:
        return self.pattern_length if self.pattern_length_min is None else self.pattern_length_min

    @property
    def shortest_replacement(self) -> int:
        return self.longest_replacement if self.replacement_length_min is None else self.replacement_length_min

    @property
    def shortest_input(self) -> int:
        return self.input_length if self.input_length_min is None else self.input_length_min

    @property
    def rule_source(self) -> rules.RuleSource:
        """Where this setting's rules, trained and held out, come from."""

        def strings(shortest, longest):
            families = tuple(self.family.split("+"))
            return rules.StringFamily(self.alphabet_size, families, shortest, longest, self.k_min, self.k_max)

        return rules.RuleSource(
            pattern=strings(self.shortest_pattern, self.pattern_length),
            replacement=strings(self.shortest_replacement, self.longest_replacement),
            split=self.held_out,
            held_out_share=self.held_out_share,
            split_seed=self.split_seed,
        )

    @property
    def task_shape(self) -> TaskShape:
        """The sizes this setting needs; a group takes the largest of its members'."""
        growth = max(0, self.longest_replacement - self.shortest_pattern)
        return TaskShape(
            alphabet_size=self.alphabet_size,
            pattern=self.pattern_length,
            replacement=self.longest_replacement,
            input=self.input_length,
            answer=self.input_length + growth,
            planted=max(self.occurrences),
            ragged=(self.shortest_pattern, self.shortest_replacement, self.shortest_input)
            != (self.pattern_length, self.longest_replacement, self.input_length),
        )

    def as_row(self) -> dict[str, Any]:
        """Flat values for tables, the settings of the figures first; defaults that point elsewhere filled in."""
        row = dataclasses.asdict(self) | {
            "pattern_length_min": self.shortest_pattern,
            "replacement_length": self.longest_replacement,
            "replacement_length_min": self.shortest_replacement,
            "input_length_min": self.shortest_input,
            "occurrences": "+".join(map(str, self.occurrences)),
        }
        return {name: row[name] for name in SETTING_COLUMNS}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Setting:
        """The setting whose ``as_row`` this is, as read back from JSON; a field that is missing has its default."""
        values: dict[str, Any] = {f.name: row[f.name] for f in dataclasses.fields(cls) if f.name in row}
        if "occurrences" in values:
            values["occurrences"] = tuple(int(count) for count in str(values["occurrences"]).split("+"))
        return cls(**values)

    def validate(self) -> None:
        """Raises BadInput, naming the flag, for a setting that cannot be trained. Cheap: builds no table."""
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                _refuse(f.name, value, f"must be one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value) and f.name not in ("tail_shape", "clip"):
                _refuse(f.name, value, "must be a finite number")
        _at_least(
            self, 1, "instructions", "pattern_length", "input_length", "k_min", "examples", "batch_size", "layers"
        )
        _at_least(self, 1, "width", "heads", "mlp_ratio", "reports")
        _at_least(
            self, 0, "split_seed", "warmup_steps", "weight_decay", "learning_rate", "adam_learning_rate", "final_rate"
        )
        for name in ("examples", "batch_size"):
            if getattr(self, name) >= 2**31:
                _refuse(name, getattr(self, name), "must be below 2^31")
        for name in ("no_op_fraction", "near_miss_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                _refuse(name, getattr(self, name), "must be in [0, 1]")
        for name, low, high in (("dropout", 0, 1), ("adam_b2", 0, 1)):
            if not low <= getattr(self, name) < high:
                _refuse(name, getattr(self, name), f"must be in [{low}, {high})")
        for name in ("epochs", "clip", "tail_shape"):
            if not getattr(self, name) > 0:
                _refuse(name, getattr(self, name), "must be positive")
        if self.epochs * self.examples / self.batch_size >= 2**31:
            _refuse("epochs", self.epochs, "a run has fewer than 2^31 steps")
        if self.split_seed >= 2**30:
            _refuse("split_seed", self.split_seed, f"must be below {2**30}")
        if not 0.001 <= self.held_out_share <= 0.999:
            _refuse("held_out_share", self.held_out_share, "must be in [0.001, 0.999]")
        if not 2 <= self.alphabet_size <= len(LETTERS):
            _refuse("alphabet_size", self.alphabet_size, f"must be in 2..{len(LETTERS)}")
        self._validate_strings()
        self._validate_inputs()
        if self.instructions > self.examples:
            _refuse("instructions", self.instructions, f"must not exceed --config.examples={self.examples}")
        if self.width % self.heads:
            _refuse("heads", self.heads, f"must divide --config.width={self.width}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            _refuse("heads", self.heads, f"rotary positions need an even head size, got {self.width // self.heads}")
        if self.warmup_steps > self.steps:
            _refuse("warmup_steps", self.warmup_steps, f"must not exceed the {self.steps} steps of the run")

    def _validate_strings(self) -> None:
        if self.replacement_length is not None and self.replacement_length < 0:
            _refuse("replacement_length", self.replacement_length, "must be at least 0")
        if self.pattern_length > 250 or self.longest_replacement > 250:
            _refuse("pattern_length", self.pattern_length, "patterns and replacements have at most 250 letters")
        if not 1 <= self.shortest_pattern <= self.pattern_length:
            _refuse("pattern_length_min", self.shortest_pattern, f"must be in 1..{self.pattern_length}")
        if not 0 <= self.shortest_replacement <= self.longest_replacement:
            _refuse("replacement_length_min", self.shortest_replacement, f"must be in 0..{self.longest_replacement}")
        names = self.family.split("+")
        unknown = [name for name in names if name not in FAMILIES]
        if unknown:
            _refuse("family", self.family, f"families are {', '.join(FAMILIES)}, joined by '+'")
        if self.k_max < self.k_min:
            _refuse("k_max", self.k_max, f"must be at least --config.k_min={self.k_min}")
        for strings in (self.rule_source.pattern, self.rule_source.replacement):
            try:
                _ = strings.components
            except ValueError as error:
                _refuse("k_min", self.k_min, str(error))

    def _validate_inputs(self) -> None:
        if self.input_length > 60_000:
            _refuse("input_length", self.input_length, "must be at most 60000")
        if not 1 <= self.shortest_input <= self.input_length:
            _refuse("input_length_min", self.shortest_input, f"must be in 1..{self.input_length}")
        if self.pattern_length > self.shortest_input:
            _refuse("pattern_length", self.pattern_length, f"must not exceed the shortest input, {self.shortest_input}")
        if not self.occurrences or min(self.occurrences) < 1:
            _refuse("occurrences", ",".join(map(str, self.occurrences)), "must be a list of positive numbers")
        room = self.shortest_input // self.pattern_length
        if max(self.occurrences) > room:
            _refuse(
                "occurrences",
                ",".join(map(str, self.occurrences)),
                f"at most {room} patterns of {self.pattern_length} fit into an input of {self.shortest_input}",
            )
        # No-ops are drawn until one lacks the pattern, so that must not be rare.
        if self.no_op_fraction > 0 and self._absence() < 0.02:
            _refuse(
                "no_op_fraction",
                self.no_op_fraction,
                f"an input of {self.input_length} may almost never lack a pattern of {self.shortest_pattern}; "
                "use longer patterns, more letters or shorter inputs",
            )

    def _absence(self) -> float:
        """Probability that the longest input lacks the shortest pattern, for the pattern that is hardest to avoid.

        That is one that cannot overlap itself; the strings without it obey a(n) = A a(n-1) - a(n-L).
        """
        length, lacking = self.shortest_pattern, [1.0] * self.shortest_pattern
        for n in range(length, self.input_length + 1):
            lacking.append(lacking[n - 1] - lacking[n - length] * self.alphabet_size**-length)
        return lacking[-1]


_FIRST_COLUMNS = [
    "instructions",
    "no_op_fraction",
    "tail_shape",
    "family",
    "k_min",
    "k_max",
    "occurrences",
    "input_length",
    "pattern_length",
    "width",
    "layers",
]
#: Columns of a setting in every table.
SETTING_COLUMNS = tuple(
    _FIRST_COLUMNS + sorted(f.name for f in dataclasses.fields(Setting) if f.name not in _FIRST_COLUMNS)
)


def _refuse(name: str, value: Any, why: str) -> typing.NoReturn:
    raise BadInput(f"--config.{name}={value}: {why}")


def _as_type(name: str, value: Any) -> Any:
    """The value as its field's type; numbers of any kind are welcome if they mean the same."""
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(operator.index(item) for item in value)
        if kind is int and float(value).is_integer():
            return int(value)
        if kind is float:
            return float(value)
        if (kind is bool and value in (True, False)) or (kind is str and isinstance(value, str)):
            return kind(value)
    except (TypeError, ValueError, OverflowError):
        pass
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    _refuse(name, value, f"must be {words.get(kind, 'a list of whole numbers')}")


_TYPES = typing.get_type_hints(Setting)

#: Values of a setting's columns where nothing was chosen.
DEFAULT_ROW = Setting().as_row()


@dataclasses.dataclass(frozen=True)
class Member:
    """A setting, a seed, and the model they make.

    The seed decides the rule pool, the inputs and the initial weights; the order of the examples is the sweep's.
    """

    setting: Setting
    seed: int

    @property
    def id(self) -> str:
        """Stable name: a hash of the seed and of what in the setting is not the default.

        So a field added later, with the old behaviour as its default, changes no name.
        """
        row, default = self.setting.as_row(), DEFAULT_ROW
        text = json.dumps({k: v for k, v in row.items() if v != default[k]} | {"seed": self.seed}, sort_keys=True)
        return "m" + hashlib.sha256(text.encode()).hexdigest()[:9]

    def rule_counts(self) -> np.ndarray:
        """How many of the N training examples use each of its rules: int32 [I]; see ``rules.rule_counts``."""
        s = self.setting
        return rules.rule_counts(s.instructions, s.examples, s.tail_shape, s.tail_reading, self.seed)


def alphabet_of(setting: StaticFields) -> Alphabet:
    return Alphabet(setting.alphabet_size)


def _at_least(setting: Setting, low: float, *names: str) -> None:
    for name in names:
        value = getattr(setting, name)
        if value < low:
            _refuse(name, value, f"must be at least {low}")
