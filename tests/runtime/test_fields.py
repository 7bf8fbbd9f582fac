"""Fields of settings: kinds, bounds, choices, the types of their values, and one line for a mistake."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import (
    STATIC,
    TABLE,
    TRACED,
    at_least,
    between,
    check_fields,
    convert_fields,
    field,
    from_zero_to_one,
    number_below,
    positive,
    refuse,
    size,
    whole_between,
)


@dataclasses.dataclass(frozen=True)
class World:
    """One field of every sort."""

    rules: int = field(4, "how many", kind=TABLE, bound=at_least(1))
    share: float = field(0.5, "of all", kind=TRACED, bound=between(0, 1))
    shape: float = field(math.inf, "of the tail", kind=TABLE, bound=positive, infinite=True)
    norm: str = field("layer", "which norm", ("layer", "rms"), kind=STATIC)
    biases: bool = field(True, "with biases", kind=STATIC)
    shortest: int | None = field(None, "default: the longest", kind=TABLE, bound=at_least(1))
    planted: tuple[int, ...] = field((1,), "how often", kind=TRACED)
    data: str = field("", "a file", kind=STATIC)

    def __post_init__(self):
        convert_fields(self)


def test_a_field_keeps_what_is_said_of_it():
    fields = {f.name: f for f in dataclasses.fields(World)}
    assert {name: f.metadata["kind"] for name, f in fields.items()} == {
        **dict.fromkeys(("rules", "shape", "shortest"), "table"),
        **dict.fromkeys(("share", "planted"), "traced"),
        **dict.fromkeys(("norm", "biases", "data"), "static"),
    }
    assert fields["norm"].metadata["choices"] == ("layer", "rms") and fields["rules"].metadata["help"] == "how many"
    assert fields["rules"].metadata["bound"](0) == "must be at least 1" and fields["data"].metadata["bound"] is None
    assert World().rules == 4


BOUNDS = {
    "at_least": (at_least(2), {2: None, 1e9: None, 1: "must be at least 2"}),
    "between": (between(0, 1), {0: None, 1: None, -1e-9: "must be in [0, 1]", 1.1: "must be in [0, 1]"}),
    "from_zero_to_one": (from_zero_to_one, {0: None, 0.99: None, 1: "must be in [0, 1)", -1: "must be in [0, 1)"}),
    "positive": (positive, {1e-9: None, 0: "must be positive", -1: "must be positive"}),
    "whole_between": (whole_between(2, 5), {2: None, 5: None, 1: "must be in 2..5", 6: "must be in 2..5"}),
    "number_below": (number_below(4), {0: None, 3: None, 4: "must be below 4", -1: "must be at least 0"}),
    "size": (size, {1: None, 2**31 - 1: None, 2**31: "must be below 2^31", 0: "must be at least 1"}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_says_what_is_wrong(name):
    bound, said = BOUNDS[name]
    assert {value: bound(value) for value in said} == said
    assert math.isnan(math.nan) and bound(math.nan), "a number that is none is within no bounds"


@given(st.integers(-5, 15), st.integers(-3, 3), st.integers(4, 10))
def test_bounds_against_their_words(value, low, high):
    assert (between(low, high)(value) is None) == (low <= value <= high) == (whole_between(low, high)(value) is None)
    assert (at_least(low)(value) is None) == (value >= low)
    assert (number_below(high)(value) is None) == (0 <= value < high)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rules": 0}, "--config.rules=0: must be at least 1"),
        ({"share": -0.5}, "--config.share=-0.5: must be in [0, 1]"),
        ({"share": math.nan}, "--config.share=nan: must be a finite number"),
        ({"share": math.inf}, "--config.share=inf: must be a finite number"),
        ({"shape": 0}, "--config.shape=0.0: must be positive"),
        ({"norm": "batch"}, "--config.norm=batch: must be one of layer, rms"),
        ({"shortest": 0}, "--config.shortest=0: must be at least 1"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_flag(changes, message):
    with pytest.raises(BadInput) as error:
        check_fields(World(**changes))
    assert str(error.value) == message


def test_of_a_list_each_item_is_within_bounds():
    @dataclasses.dataclass(frozen=True)
    class Lists:
        counts: tuple[int, ...] | None = field((1,), "counts", bound=at_least(1))
        shapes: tuple[float, ...] = field((), "shapes")
        names: tuple[str, ...] = field(("a",), "names", choices=("a", "b"))

    for changes in ({}, {"counts": None}, {"counts": (1, 2), "names": ("a", "b")}):
        check_fields(Lists(**changes))
    for changes, message in (
        ({"counts": (1, 0)}, "--config.counts=0: must be at least 1"),
        ({"shapes": (1.0, math.nan)}, "--config.shapes=nan: must be a finite number"),
        ({"names": ("a", "c")}, "--config.names=c: must be one of a, b"),
    ):
        with pytest.raises(BadInput) as error:
            check_fields(Lists(**changes))
        assert str(error.value) == message


def test_what_is_within_bounds_is_welcome():
    for changes in ({}, {"shape": math.inf}, {"shape": 0.1}, {"shortest": None}, {"shortest": 3}, {"share": 1}):
        check_fields(World(**changes))


@pytest.mark.parametrize(
    "changes, value",
    [
        ({"rules": 8.0}, 8),
        ({"rules": np.int64(8)}, 8),
        ({"rules": np.float32(8)}, 8),
        ({"rules": True}, 1),
        ({"share": 1}, 1.0),
        ({"share": np.float32(0.5)}, 0.5),
        ({"share": "0.25"}, 0.25),
        ({"shape": "inf"}, math.inf),
        ({"biases": np.bool_(False)}, False),
        ({"biases": 1}, True),
        ({"shortest": 3.0}, 3),
        ({"shortest": None}, None),
        ({"planted": [np.int32(1), 2]}, (1, 2)),
        ({"planted": np.array([3, 4])}, (3, 4)),
    ],
)
def test_numbers_of_any_kind_mean_the_same(changes, value):
    (name,) = changes
    found = getattr(World(**changes), name)
    assert found == value and type(found) is type(value)
    assert World(**changes) == World(**{name: value}) and hash(World(**changes)) == hash(World(**{name: value}))
    if isinstance(value, tuple):
        assert all(type(item) is int for item in found)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rules": 4.5}, "--config.rules=4.5: must be a whole number"),
        ({"rules": "many"}, "--config.rules=many: must be a whole number"),
        ({"rules": math.inf}, "--config.rules=inf: must be a whole number"),
        ({"rules": math.nan}, "--config.rules=nan: must be a whole number"),
        ({"rules": None}, "--config.rules=None: must be a whole number"),
        ({"share": "half"}, "--config.share=half: must be a number"),
        ({"share": (0.5,)}, "--config.share=(0.5,): must be a number"),
        ({"biases": "yes"}, "--config.biases=yes: must be true or false"),
        ({"biases": 2}, "--config.biases=2: must be true or false"),
        ({"norm": 3}, "--config.norm=3: must be a name"),
        ({"shortest": 1.5}, "--config.shortest=1.5: must be a whole number"),
        ({"planted": 3}, "--config.planted=3: must be a list of whole numbers"),
        ({"planted": (1.5,)}, "--config.planted=(1.5,): must be a list of whole numbers"),
        ({"planted": "12"}, "--config.planted=12: must be a list of whole numbers"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_flag(changes, message):
    with pytest.raises(BadInput) as error:
        World(**changes)
    assert str(error.value) == message


def test_refusing_names_flag_value_and_reason():
    with pytest.raises(BadInput, match=r"^--config\.rules=3: are too many$"):
        refuse("rules", 3, "are too many")
