"""Command-line flags, and the handling of mistakes, signals and ``--help`` that all commands share.

Each command defines its flags in its own ``FlagValues``; there are no global flags, so several commands can run in one
process. ``start`` parses the flags and runs the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
from absl import flags
from absl.flags import FlagValues

from instrdiv.config.settings import TaskSetting
from instrdiv.data.schemas import SCHEMAS
from instrdiv.runtime.checkpoints import quieten_orbax
from instrdiv.runtime.compile_cache import use_compile_cache
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import Bound
from instrdiv.runtime.interruption import Interrupted

#: Exit status of a run that was interrupted and saved (EX_TEMPFAIL: rerun the same command to resume).
STOPPED = 75

_QUOTED_DEFAULT, _DEFAULT = r"\(default: '([^']*)'\)", r"(default: \1)"  # absl quotes numbers, too
_HELP = ("--help", "-help", "--helpshort", "--helpfull", "-h", "-?")


def start(
    main: Callable[[FlagValues], int | None],
    define_flags: Callable[[FlagValues], None],
    about: str | None = None,
    argv: Sequence[str] | None = None,
    name: str | None = None,
) -> int:
    """Parses flags and runs ``main``; a user error prints one line to standard error and exits with status 2.

    Args:
      main: the command; takes its flags and returns its exit status, None for 0.
      define_flags: defines its flags; may raise BadInput if they depend on a file.
      about: the docstring, for ``--help``.
      argv: the flags, without the command name; the exit status is returned. None: parse the flags of this process and
        exit with the status.
      name: the command's file name, for provenance.json; by default that of this process.
    """
    if argv is None:
        faulthandler.enable()
        absl.logging.use_absl_handler()
        sys.exit(_status(main, define_flags, about, sys.argv[1:]))
    with _as_command([name or sys.argv[0], *argv]):
        return _status(main, define_flags, about, argv)


def _status(
    main: Callable[[FlagValues], int | None],
    define_flags: Callable[[FlagValues], None],
    about: str | None,
    argv: Sequence[str],
) -> int:
    """Runs a command and returns its exit status."""
    quieten_orbax()
    values = FlagValues()
    try:
        define_flags(values)
    except BadInput as error:
        return _fail(str(error))
    if not {*_HELP}.isdisjoint(argv):
        help = values.get_help("  ", include_special_flags=False)
        print(f"{(about or '').replace('``', '')}\nflags:\n\n{re.sub(_QUOTED_DEFAULT, _DEFAULT, help)}")
        return 0
    try:
        rest = values([sys.argv[0], *argv])[1:]
    except flags.Error as error:
        return _fail(f"{' '.join(str(error).split())} (--help lists the flags)")
    try:
        if rest:
            raise BadInput(f"unexpected argument {rest[0]!r}; flags start with -- (--help lists them)")
        use_compile_cache()
        return main(values) or 0
    except BadInput as error:
        return _fail(str(error))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except OSError as error:  # such as a full disk
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _as_command(words: list[str]) -> Iterator[None]:
    """Temporarily sets ``sys.argv``, so that provenance.json records the command to resume with."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def define(values: FlagValues, parser: flags.ArgumentParser, name: str, help: str, default: Any = None) -> None:
    values[name] = flags.Flag(parser, flags.ArgumentSerializer(), name, default, help)


def define_switch(values: FlagValues, name: str, help: str, default: bool | None = False) -> None:
    """A boolean flag ``--<name>``, ``--no<name>``. Not absl's own, whose error message shows a tuple."""
    values[name] = flags.Flag(_BoolParser(), None, name, default, help, boolean=True)


def define_enum(values: FlagValues, name: str, choices: Sequence[str], help: str, default: str | None) -> None:
    values[name] = flags.EnumFlag(name, default, help, list(choices))


def define_many(values: FlagValues, parser: flags.ArgumentParser, name: str, help: str) -> None:
    """A flag that may be repeated; its value is a list, or None."""
    values[name] = flags.MultiFlag(parser, flags.ArgumentSerializer(), name, None, help)


def define_preset_flag(values: FlagValues, names: Mapping[str, Any] | Sequence[str], default: str = "laptop") -> None:
    """The flag --preset; defaults to ``default`` if there is such a preset, otherwise to the first one."""
    default = default if default in names else next(iter(names))
    define_enum(values, "preset", list(names), "size of the task, the model and the training budget", default)


def define_run_flags(values: FlagValues, name: str, models: str) -> None:
    """Flags shared by all launchers of figures: seeds, devices and run directory.

    ``name`` is the figure's name; ``models`` is what is trained per seed, in the plural.
    """
    define(values, NumberParser(int, low=1), "seeds", f"{models} per setting (default: the preset's)")
    define(
        values, NumberParser(int, low=1, high=256), "devices", "number of devices (default: all; on CPU, one per core)"
    )
    define(
        values,
        NumberParser(int, low=1),
        "data_parallel",
        "devices that share the batch of a member (a model: one setting, one seed)",
        1,
    )
    define(
        values,
        NameParser(),
        "run_dir",
        f"directory for tables, pictures, and checkpoints (default: runs/{name}-<preset>)",
    )
    define_switch(values, "dry_run", "print the plan with estimated time and memory, and exit")
    define_switch(values, "overwrite", "delete the run that the directory contains, and start from scratch")
    minutes = NumberParser(float, low=0)
    define(
        values, minutes, "checkpoint_minutes", "minutes between the checkpoints that a run resumes from; inf: none", 2
    )


def run_dir_of(values: FlagValues, name: str) -> Path:
    """The run directory of the figure with this name."""
    return Path(values.run_dir or Path("runs") / f"{name}-{values.preset}")


def define_task_flag(values: FlagValues) -> None:
    define(values, NameParser(), "task", "the Python file that defines a task of your own (docs/extending.md)")


def define_row_flags(values: FlagValues) -> None:
    """How the rows of a data file are read."""
    schemas = f"{', '.join(SCHEMAS)}, or fields of your own such as instruction=question,response=answer"
    help = f"which fields hold the instruction and the response (default: detected from their names): {schemas}"
    define(values, NameParser(), "schema", help)
    define_switch(values, "drop_empty", "skip rows with an empty instruction or response, and report how many")


def define_against_flags(values: FlagValues) -> None:
    """Evaluation prompts that must not be trained on."""
    define(
        values, ListParser(NameParser()), "against", "files with evaluation prompts; rows that repeat one are dropped"
    )
    help = "the field of these files with the prompt (default: detected from the names)"
    define(values, NameParser(), "against_field", help)


def define_setting_flags(
    values: FlagValues,
    of: type,
    swept: Collection[str] = (),
    aliases: Collection[str] = (),
    names: Collection[str] | None = None,
) -> None:
    """Defines one flag ``--config.<field>`` per field of a dataclass.

    Args:
      values: where to define the flags.
      of: the dataclass; its fields were made by ``field``.
      swept: fields that take a list.
      aliases: fields that also have an equivalent flag ``--<field>``.
      names: the fields to define; all by default.
    """
    types_of = typing.get_type_hints(of)
    for field in sorted(dataclasses.fields(of), key=lambda field: field.name):
        if names is not None and field.name not in names:
            continue
        parser = _parser_for(types_of[field.name], field.metadata)
        text = field.metadata["help"]
        if field.name in swept:
            if isinstance(parser, ListParser):  # commas now separate the lists
                parser = ListParser(parser.item, separators="+")
            if isinstance(parser, _Bounded):  # ``check_fields`` reports which value is out of bounds
                parser = parser.parser
            parser, text = ListParser(parser), f"{text}; this figure compares a list of values"
        default = "" if "(default: " in text else " (default: the preset's)"
        define(values, parser, f"config.{field.name}", text + default)
        if field.name in aliases:
            help = f"same as --config.{field.name}{default}"
            values[field.name] = _Alias(parser, flags.ArgumentSerializer(), field.name, None, help)


class _Alias(flags.Flag):
    """Another name for a field's flag."""


def setting_flags(values: FlagValues, of: type) -> dict[str, Any]:
    """The fields of the dataclass ``of`` that were given as flags. Raises BadInput if one was given twice."""
    given = {}
    for name in (field.name for field in dataclasses.fields(of)):
        flags_of = [f"config.{name}"] if f"config.{name}" in values else []
        flags_of += [name] if name in values and isinstance(values[name], _Alias) else []
        said = [flag for flag in flags_of if values[flag].value is not None]
        if len(said) > 1:
            raise BadInput(f"--{said[1]} and --{said[0]}: are two names for the same flag; give only one")
        if said:
            given[name] = values[said[0]].value
    return given


def changes_a_setting(values: FlagValues) -> bool:
    """Whether any field was given as a flag."""
    fields = (name for name in values if name.startswith("config.") or isinstance(values[name], _Alias))
    return any(values[name].value is not None for name in fields)


def refuse_idle_flags(settings: Sequence[TaskSetting], given: Collection[str]) -> None:
    """Raises BadInput for a field that was given as a flag but has no effect in any of the settings."""
    for name, neutral, used, why in settings[0].idle_fields(settings):
        value = max(getattr(setting, name) for setting in settings)
        if name in given and value > neutral and not used:
            raise BadInput(f"--config.{name}={value}: has no effect, {why}")


def _parser_for(kind: Any, metadata: Mapping[str, Any]) -> flags.ArgumentParser:
    if metadata["choices"]:
        return enum_parser(metadata["choices"])
    if isinstance(kind, types.UnionType):  # int | None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return _BoolParser()
    if typing.get_origin(kind) is tuple:
        return ListParser(_parser_for(typing.get_args(kind)[0], metadata), separators=",+")
    parser = NameParser() if kind is str else NumberParser(kind)
    return _Bounded(parser, metadata["bound"]) if metadata["bound"] else parser


class _Bounded(flags.ArgumentParser):
    """Applies a field's bound to the values of another parser."""

    def __init__(self, parser: flags.ArgumentParser, bound: Bound):
        self.parser, self.bound, self.syntactic_help = parser, bound, parser.syntactic_help

    def parse(self, argument):
        value = self.parser.parse(argument)
        if why := self.bound(value):
            raise ValueError(why)
        return value


def enum_parser(choices: Sequence[str]) -> flags.ArgumentParser:
    enum = flags.EnumParser(list(choices))
    enum.syntactic_help = f"one of {', '.join(choices)}"
    return enum


class NumberParser(flags.ArgumentParser):
    """An integer or a float, within bounds."""

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
    """A list. Lists within a list are joined by '+', as in the tables: ``1,5,1+5``."""

    def __init__(self, item: flags.ArgumentParser, separators: str = ","):
        self.item, self.separators = item, separators
        names = {",": "comma", "+": "plus", ",+": "comma- or plus"}
        self.syntactic_help = f"a {names[separators]}-separated list, each {item.syntactic_help or 'a string'}"

    def parse(self, argument):
        parts = re.split(f"[{self.separators}]", argument) if isinstance(argument, str) else argument
        return tuple(self.item.parse(part.strip() if isinstance(part, str) else part) for part in parts)


class NameParser(flags.ArgumentParser):
    """A non-empty string."""

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
