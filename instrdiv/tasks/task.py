"""The task interface: everything that the rest of the package knows about a task.

A task is one frozen dataclass. Its *fields* are what can be varied; its methods define what an instruction is, how an
example is made on the device, and how both are shown as text. Everything else (populations, training, tests, tables,
reports, launchers, export) uses only this interface, so a task is one file: docs/extending.md.

A task must define ``name``, ``parts``, ``shape``, ``characters``, its instructions (``draw``, or its own ``source``),
``make_input`` and ``spell``. Everything else has a default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from flax import struct

from instrdiv.runtime.fields import TABLE, between, field, number_below
from instrdiv.runtime.tables import Row
from instrdiv.tasks.conditions import of_the_prompt
from instrdiv.tasks.instructions import (
    DrawnSource,
    Instructions,
    Source,
)
from instrdiv.tasks.tokens import PAD, SEPARATOR, before_end, compare_answers


class Shape(Protocol):
    """The static sizes of a task's examples, which determine all array shapes. Hashable; ``Sizes`` is the simplest.

    Attributes:
      vocabulary: number of tokens.
      prompt: number of tokens before the answer, separators included; the answer starts there in every row.
      answer: number of tokens in the longest answer, without its end token.
      sequence: number of tokens in a whole row, T: prompt, answer, end.
      ragged: some prompts are shorter than the longest, so rows are padded on the left.
      instruction_bytes: device memory per instruction, for plans.
    """

    @property
    def vocabulary(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def answer(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def ragged(self) -> bool: ...
    @property
    def instruction_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A ``Shape`` with explicitly given sizes; a task adds the sizes of its own parts in a subclass."""

    vocabulary: int
    prompt: int
    answer: int
    ragged: bool = False
    instruction_bytes: int = 16

    @property
    def sequence(self) -> int:
        return self.prompt + self.answer + 1


@struct.dataclass
class Example:
    """One row of tokens and what is known about it (a batch has a leading axis).

    Attributes:
      tokens: int32 [T]: padding, the parts of the prompt, answer, end, padding; see ``tokens.py``.
      padding: int32, number of padding tokens on the left; 0 if the shape is not ragged.
      loss_mask: bool [answer + 1]; entry i: token ``prompt + i`` belongs to the answer or is its end token.
      facts: a tree of scalars that slices are computed from, such as how often a pattern occurs.
    """

    tokens: jax.Array
    padding: jax.Array
    loss_mask: jax.Array
    facts: Any


class Measure(NamedTuple):
    """A column of resemblance.csv, as shown in the report.

    Attributes:
      column, heading: its name in the table and in the report.
      percent: whether it is a share.
      least: for several members, show the minimum, without decimals, instead of the mean.
    """

    column: str
    heading: str
    percent: bool = False
    least: bool = False


#: A slice: (facts of a batch, ``Task.relation`` of its instructions) -> bool for every example.
Slice = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is asked to do. See the module's docstring.

    Class attributes:
      name: of the task, as in config.json.
      parts: names of the parts of the prompt, the input last; columns of samples.csv.
      joint: text between the parts of an instruction.
      headline: the slice that thresholds and claims are based on.
      headline_words: the name of that slice on pages.
      slices: subsets of the tests that are scored separately; the first one, ``all``, is everything.
      suites: further tests for ``experiments.evaluate``: name -> ``conditions.Suite``.
      mistakes: names of the classes that ``classify`` returns.
      measures: columns of resemblance.csv shown in the report; ``measures_about`` explains them, with the columns of a
        row in braces.
      site_about: a description of what ``site`` marks in an input.
      first_columns: setting columns that come first in every table.
      plain_tests: fields that suites reset, such as a share of easy examples, and their values.
      finite: an instruction has a list of inputs instead of a way to draw them. ``make_input`` then gets an index into
        the list instead of a key: 0, 1, 2, ... for training examples, -1, -2, ... for tests.
      words_drawn: number of random words that ``draw`` gets per instruction.
    """

    name: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ("instruction", "input")
    joint: ClassVar[str] = " "
    headline: ClassVar[str] = "all"
    headline_words: ClassVar[str] = "all"
    slices: ClassVar[Mapping[str, Slice]] = {"all": lambda facts, relation: True}
    suites: ClassVar[Mapping[str, Any]] = {"held_out": of_the_prompt}
    mistakes: ClassVar[tuple[str, ...]] = ("wrong length", "wrong token")
    measures: ClassVar[tuple[Measure, ...]] = (Measure("instruction_seen", "instruction\ntrained", percent=True),)
    measures_about: ClassVar[str] = "The share of the {held_out:,.0f} instructions in unseen that were trained on."
    site_about: ClassVar[str] = ""
    first_columns: ClassVar[tuple[str, ...]] = ("instructions", "tail_shape")
    plain_tests: ClassVar[Mapping[str, Any]] = {}
    finite: ClassVar[bool] = False
    words_drawn: ClassVar[int] = 32

    held_out_share: float = field(
        0.2, "share of all instructions that is held out of training", kind=TABLE, bound=between(0.001, 0.999)
    )
    split_seed: int = field(
        0, "seed that selects the held-out and the tested instructions", kind=TABLE, bound=number_below(2**30)
    )

    # Instructions and examples.

    @property
    def shape(self) -> Shape:
        """The sizes this setting needs; a group uses the largest of its members' (``common_shape``)."""
        raise NotImplementedError(f"{self.name}.shape: define the sizes of its examples")

    @property
    def characters(self) -> str:
        """One character per token, padding, separator and end included, such as ``SPECIAL + "abc"``."""
        raise NotImplementedError(f"{self.name}.characters: define how its tokens are shown")

    @property
    def source(self) -> Source:
        """Where the instructions come from; by default, from ``draw``."""
        return DrawnSource(self.own_task())

    def draw(self, words: np.ndarray) -> Instructions:
        """Instructions made from random words uint64 [N, words_drawn], one per row; they may repeat."""
        raise NotImplementedError(f"{self.name}.draw: define how instructions are drawn, or define source")

    def knobs(self) -> Any:
        """The traced fields for ``make_input``: a tree of numpy scalars, and of arrays [n], which get padded."""
        return {}

    @staticmethod
    def make_input(shape: Any, knobs: Any, instruction: Any, key: jax.Array) -> Any:
        """The input that an instruction is applied to, as a tree. A pure function, run on the device under ``vmap``.

        Args:
          shape: the group's shape (static).
          knobs: the member's knobs (traced).
          instruction: one entry of ``Instructions.arrays``, without the leading axis.
          key: a typed PRNG key; the same key makes the same input everywhere. See ``finite``.
        """
        raise NotImplementedError("make_input: define how inputs are made")

    @staticmethod
    def spell(shape: Any, instruction: Any, input: Any) -> Example:
        """The example of an instruction and an input: prompt, answer, and the facts about them."""
        raise NotImplementedError("spell: define how instruction, input and answer become tokens")

    @classmethod
    def example(cls, shape: Any, knobs: Any, instruction: Any, key: jax.Array) -> Example:
        """An example of one instruction; see ``make_input``."""
        return cls.spell(shape, instruction, cls.make_input(shape, knobs, instruction, key))

    @classmethod
    def test_key(cls, key: jax.Array, number: jax.Array) -> jax.Array:
        """The key for the input of test ``number`` (int32): a new PRNG key, or an index if the task is ``finite``."""
        return -1 - number if cls.finite else jax.random.fold_in(key, number)

    @staticmethod
    def common_shape(shapes: Sequence[Any]) -> Any:
        """The smallest shape that fits the examples of all these shapes: the largest of each size.

        Raises NotImplementedError if the shapes are of a subclass of ``Sizes`` and the result is none of them: only the
        task knows how its own sizes combine.
        """
        columns = {f.name: [getattr(shape, f.name) for shape in shapes] for f in dataclasses.fields(shapes[0])}
        largest = {name: max(values) for name, values in columns.items()}
        largest["ragged"] |= len(set(columns["prompt"])) > 1
        common = dataclasses.replace(shapes[0], **largest)
        alike = (dataclasses.replace(shape, ragged=common.ragged) for shape in shapes)
        if type(common) is not Sizes and common not in alike:
            raise NotImplementedError("common_shape: define a shape that fits all of " + ", ".join(map(str, shapes)))
        return common

    # Properties of tests and answers.

    @staticmethod
    def relation(trained: Any, tested: Any) -> np.ndarray:
        """bool [N, K]: what each tested instruction shares with the trained ones, for slices. Nothing by default."""
        return np.zeros((len(tested), 0), bool)

    @staticmethod
    def testable(trained: Any, instructions: Any) -> Any:
        """The instructions that can be tested as unseen: distinct, and never trained on."""
        keys = instructions.keys()
        _, first = np.unique(keys, return_index=True)
        kept = np.sort(first)
        return instructions[kept[~np.isin(keys[kept], trained.keys())]]

    @staticmethod
    def resemblance(trained: Any, held_out: Any, compared: int) -> Row:
        """How similar held-out instructions are to a member's trained ones; cells of resemblance.csv.

        Up to ``compared`` of the held-out ones may be compared in detail.
        """
        seen = float(np.isin(held_out.keys(), trained.keys()).mean())
        return {"trained": len(trained), "held_out": len(held_out), "instruction_seen": seen}

    @staticmethod
    def classify(instructions: Any, inputs: Any, right: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        """The class of each answer, as an index into ``mistakes``, or -1 if it is right: int8 [N].

        Args:
          instructions, inputs: trees of numpy arrays [N, ...].
          right, decoded: tokens [N, A + 1]: answer, end token, padding; anything past the end token is ignored.
        """
        right_length, decoded_length, is_right = compare_answers(right, decoded)
        return np.select([is_right, right_length != decoded_length], [-1, 0], 1).astype(np.int8)

    # Text for people.

    def words(self, tokens: np.ndarray) -> dict[str, str]:
        """The parts of one whole row of tokens [T], and its answer, as text."""
        named, rest = {}, tokens[np.flatnonzero(tokens != PAD)[0] :]
        for part in self.parts:
            end = np.flatnonzero(rest == SEPARATOR)[0]
            named[part], rest = self.text(rest[:end]), rest[end + 1 :]
        return named | {"answer": self.text(before_end(rest))}

    def text(self, tokens: np.ndarray) -> str:
        return "".join(self.characters[int(token)] for token in tokens)

    @classmethod
    def instruction_words(cls, row: Mapping[str, str], arrow: str = "->") -> str:
        """The instruction of a row of samples.csv, on one line; ``arrow`` replaces ``->``."""
        return cls.joint.replace("->", arrow).join(row[part] or "(nothing)" for part in cls.parts[:-1])

    @classmethod
    def site(cls, row: Mapping[str, str]) -> tuple[str, str, str]:
        """The input of a row of samples.csv, split into what precedes the changed site, the site, and what follows."""
        return row[cls.parts[-1]], "", ""

    @staticmethod
    def fact_words(facts: Any) -> dict[str, str]:
        """Columns of ``show_data`` made from the facts of one example (numpy scalars)."""
        return {}

    @staticmethod
    def caption(rows: Sequence[Row]) -> str:
        """The task's own settings in words, for the caption of a figure of these rows."""
        return ""

    @property
    def about(self) -> str:
        """What a trained model does, in a sentence or two, for the README of an exported model."""
        return f"It was trained on the task {self.name}."

    # Checks.

    def check_task(self) -> None:
        """Raises BadInput, naming the flag, for fields that do not fit together. Bounds have already been checked."""

    @classmethod
    def idle_fields(cls, settings: Sequence[Any]) -> Iterable[tuple[str, Any, bool, str]]:
        """Fields that may have no effect: (name, neutral value, whether the field is used, why it is not)."""
        return ()

    def filled_in(self) -> dict[str, Any]:
        """Values for fields that are None and therefore follow another field."""
        return {}

    @classmethod
    def task_type(cls) -> type[Task]:
        """The registered class among the bases: the task itself, without the model and training fields."""
        return next(base for base in cls.__mro__ if base.__dict__.get("name"))

    def own_task(self) -> Task:
        """The task alone, with the fields that determine its instructions; traced fields have their defaults."""
        task = self.task_type()
        decides = {f.name: getattr(self, f.name) for f in dataclasses.fields(task) if f.metadata["kind"] != "traced"}
        return task(**decides)


#: The tasks that config.json may name.
TASKS: dict[str, type[Task]] = {}
#: The built-in tasks: name -> the module that registers it.
BUILT_IN = {"rewriting": "instrdiv.tasks.strings.rewriting", "jsonl": "instrdiv.tasks.jsonl"}


def register(task: type[Task]) -> type[Task]:
    """Registers a task under its name; a class decorator."""
    if not task.__dict__.get("name"):
        raise ValueError(f"{task.__name__}: a task needs a name")
    if BUILT_IN.get(task.name, task.__module__) != task.__module__:
        raise ValueError(f"{task.__name__}: the name {task.name} is taken by the task in {BUILT_IN[task.name]}")
    known = TASKS.get(task.name)
    if known is not None and (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        raise ValueError(f"{task.__name__}: the name {task.name} is taken by the task in {known.__module__}")
    TASKS[task.name] = task
    return task


def task_of(columns: Iterable[str]) -> type[Task]:
    """The task of a results table, judging by its columns; ``Task`` itself if no registered task fits."""
    columns = set(columns)
    shared = {f.name for f in dataclasses.fields(Task)}

    def fit(task: type[Task]) -> int:
        own = {f.name for f in dataclasses.fields(task)} - shared
        return len(own & columns) - len(own - columns)

    best = max(TASKS.values(), key=fit, default=Task)
    return best if best is not Task and fit(best) > 0 else Task
