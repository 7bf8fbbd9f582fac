"""Fields of settings: one definition of default, help, bounds and kind, from which flags, columns and checks derive."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

from instrdiv.runtime.errors import BadInput

#: Kinds of fields, by what an extra value costs in a sweep. ``TABLE``: different tables on the host, the same program.
#: ``TRACED``: a different scalar on the device, the same program. ``STATIC``: another group, compiled separately.
TABLE, TRACED, STATIC = "table", "traced", "static"

#: Returns what is wrong with a value, or None.
Bound = Callable[[Any], str | None]


def field(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    kind: str | None = None,
    bound: Bound | None = None,
    infinite: bool = False,
) -> Any:
    """A field of a setting.

    Args:
      default: the default value.
      help: one line.
      choices: the allowed values, if they are a few names.
      kind: ``TABLE``, ``TRACED`` or ``STATIC``; None for settings that do not form groups.
      bound: a condition on the value (for a list, on each item), such as ``at_least(1)``; checked by the flag and by
        ``check_fields``.
      infinite: whether infinity is allowed.
    """
    metadata = {"help": help, "choices": choices, "kind": kind, "bound": bound, "infinite": infinite}
    return dataclasses.field(default=default, metadata=metadata)


def at_least(low: float) -> Bound:
    return lambda value: None if value >= low else f"must be at least {low}"


def between(low: float, high: float) -> Bound:
    return lambda value: None if low <= value <= high else f"must be in [{low}, {high}]"


def from_zero_to_one(value: float) -> str | None:
    """A fraction below 1."""
    return None if 0 <= value < 1 else "must be in [0, 1)"


def positive(value: float) -> str | None:
    return None if value > 0 else "must be positive"


def whole_between(low: int, high: int) -> Bound:
    return lambda value: None if low <= value <= high else f"must be in {low}..{high}"


def number_below(high: int) -> Bound:
    return lambda value: at_least(0)(value) or (None if value < high else f"must be below {high}")


def size(value: int) -> str | None:
    """A positive count that fits in an int32."""
    return at_least(1)(value) or (None if value < 2**31 else "must be below 2^31")


def refuse(name: str, value: Any, why: str) -> typing.NoReturn:
    """Raises BadInput for the value of a field, naming its flag."""
    raise BadInput(f"--config.{name}={value}: {why}")


def check_fields(settings: Any) -> None:
    """Raises BadInput, naming the flag, for a value that is not among the choices, not finite, or out of bounds.

    For a tuple, checks each item.
    """
    for f in dataclasses.fields(settings):
        value, about = getattr(settings, f.name), f.metadata
        for each in value if isinstance(value, tuple) else (value,):
            if each is None:
                continue
            if about["choices"] and each not in about["choices"]:
                refuse(f.name, each, f"must be one of {', '.join(about['choices'])}")
            if isinstance(each, float) and not math.isfinite(each) and not about["infinite"]:
                refuse(f.name, each, "must be a finite number")
            if about["bound"] and (why := about["bound"](each)):
                refuse(f.name, each, why)


def convert_fields(settings: Any) -> None:
    """Converts the values of a frozen dataclass to the types of their fields. Raises BadInput if that is impossible."""
    types_of = _types(type(settings))  # type: ignore[arg-type]
    for f in dataclasses.fields(settings):
        object.__setattr__(settings, f.name, _as_type(f.name, getattr(settings, f.name), types_of[f.name]))


@functools.cache
def _types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _as_type(name: str, value: Any, kind: Any) -> Any:
    """The value converted to its field's type; a number of another type is accepted if the conversion is exact."""
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
    refuse(name, value, f"must be {words.get(kind, 'a list of whole numbers')}")
