"""Settings: the three kinds of fields, their columns, and validation errors."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from instrdiv.config.presets import BASES, SETTING_COLUMNS, Setting
from instrdiv.config.settings import Member
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import plain
from tests.worlds import tiny


def test_every_field_says_what_it_costs_to_vary():
    kinds = {f.name: f.metadata["kind"] for f in dataclasses.fields(Setting)}
    assert set(kinds.values()) == {"table", "traced", "static"}
    assert [kinds[name] for name in ("instructions", "learning_rate", "width")] == ["table", "traced", "static"]


def test_settings_that_differ_in_no_static_field_have_one_static_part():
    """The other fields of the static part are defaults: whatever is read from it is the same for the whole group."""
    other = tiny(instructions=4, learning_rate=1e-3, family="repeated", k_max=2)
    assert other.static == tiny().static and other.static.width == tiny().width and other.static.steps == tiny().steps
    assert tiny(width=32).static != tiny().static
    unset = {f.name for f in dataclasses.fields(Setting) if f.metadata["kind"] != "static"}
    assert all(getattr(other.static, name) == getattr(Setting(), name) for name in unset)


def test_every_field_has_a_column_and_a_line_of_help():
    names = {field.name for field in dataclasses.fields(Setting)}
    assert set(SETTING_COLUMNS) == names
    assert all(field.metadata["help"] for field in dataclasses.fields(Setting))


def test_the_columns_start_as_the_contract_says():
    assert list(SETTING_COLUMNS[:11]) == [
        *("instructions", "no_op_fraction", "tail_shape", "family", "k_min", "k_max", "occurrences"),
        *("input_length", "pattern_length", "width", "layers"),
    ]


def test_lengths_default_to_fixed_ones():
    row = Setting(pattern_length=7).as_row()
    assert row["pattern_length_min"] == row["replacement_length"] == row["replacement_length_min"] == 7
    assert row["input_length_min"] == row["input_length"]


def test_equal_members_have_equal_ids_however_they_are_written():
    assert Member(tiny(), 0).id == Member(tiny(pattern_length_min=2, replacement_length=2), 0).id


@pytest.mark.parametrize("name", BASES)
def test_presets_are_valid(name):
    BASES[name].validate()


def test_the_paper_preset_has_the_papers_numbers():
    paper = BASES["paper"]
    assert (paper.layers, paper.width, paper.heads, paper.input_length, paper.pattern_length) == (6, 256, 4, 50, 20)
    assert (paper.examples, paper.epochs, paper.learning_rate, paper.optimizer, paper.schedule) == (
        10**6, 50, 1e-3, "adamw", "linear")  # fmt: skip
    assert paper.shape.sequence == 144


REFUSED = {
    "instructions": ({"instructions": 65}, "must not exceed --config.examples=64"),
    "no_op_fraction": ({"no_op_fraction": 1.5}, r"must be in \[0, 1\]"),
    "near_miss_fraction": ({"near_miss_fraction": -0.1}, r"must be in \[0, 1\]"),
    "pattern_length": ({"pattern_length": 6}, "must not exceed the shortest input, 5"),
    "occurrences": ({"occurrences": (1, 3)}, "at most 2 patterns of length 2 fit into 5 letters"),
    "heads": ({"heads": 3}, "must divide --config.width=16"),
    "family": ({"family": "palindromic"}, "must be families joined by"),
    "k_min": ({"family": "repeated", "k_min": 3, "k_max": 3}, r"no order k in 3\.\.3 divides"),
    "k_max": ({"k_min": 3, "k_max": 2}, "at least --config.k_min=3"),
    "learning_rate": ({"learning_rate": -1e-3}, "at least 0"),
    "learning_rate ": ({"learning_rate": math.nan}, "must be a finite number"),
    "adam_learning_rate": ({"adam_learning_rate": math.inf}, "must be a finite number"),
    "epochs ": ({"epochs": math.inf}, "must be a finite number"),
    "tail_shape ": ({"tail_shape": math.nan}, "must be positive"),
    "epochs": ({"epochs": 0.0}, "must be positive"),
    "positions": ({"positions": "sinusoidal"}, "must be one of learned, rotary, none"),
    "warmup_steps": ({"warmup_steps": 10_000}, "must not exceed the 16 steps"),
    "input_length_min": ({"input_length_min": 9}, r"must be in 1\.\.5"),
    "held_out_share": ({"held_out_share": 1.0}, r"must be in \[0.001, 0.999\]"),
    "examples": ({"examples": 3_000_000_000}, r"below 2\^31"),
    "split_seed": ({"split_seed": 2**30}, "must be below"),
    "width": ({"width": 16.5}, "must be a whole number"),
    "layers": ({"layers": "many"}, "must be a whole number"),
    "near_miss_fraction ": ({"near_miss_fraction": math.nan}, "must be a finite number"),
    "tail_shape": ({"tail_shape": 0.0}, "must be positive"),
    "alphabet_size": ({"alphabet_size": 1}, r"must be in 2\.\.62"),
    "replacement_length": ({"replacement_length": -1}, "at least 0"),
    "batch_size": ({"batch_size": 0}, "at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_flag(name):
    changes, why = REFUSED[name]
    with pytest.raises(BadInput, match=rf"^--config\.{name.strip()}=.*{why}") as refusal:
        tiny(**changes)
    assert "\n" not in str(refusal.value)


def test_no_ops_that_could_never_be_drawn_are_refused():
    with pytest.raises(BadInput, match=r"no_op_fraction.*almost never lack a pattern of 1"):
        tiny(no_op_fraction=0.1, pattern_length=1, alphabet_size=2, input_length=30)


@pytest.mark.parametrize("alphabet, pattern, length", [(2, "ab", 9), (2, "aab", 10), (3, "ab", 7), (2, "a", 6)])
def test_the_probability_that_a_pattern_is_absent_is_exact(alphabet, pattern, length):
    """Counted over all inputs, for the pattern that is absent least often among those of its length."""
    strings = ["".join(s) for s in itertools.product("abc"[:alphabet], repeat=length)]
    patterns = ["".join(p) for p in itertools.product("abc"[:alphabet], repeat=len(pattern))]
    absent = {p: sum(p not in s for s in strings) / len(strings) for p in patterns}
    assert absent[pattern] == min(absent.values())
    setting = Setting(alphabet_size=alphabet, pattern_length=len(pattern), input_length=length)
    assert setting._absence() == pytest.approx(absent[pattern])


def test_epochs_that_no_run_can_have_are_refused():
    for epochs in (1e308, 1e12):
        with pytest.raises(BadInput, match=r"--config.epochs=.*fewer than 2\^31 steps"):
            tiny(epochs=epochs)


def test_infinity_is_welcome_where_it_means_something():
    assert tiny(tail_shape=math.inf, clip=math.inf).clip == math.inf


def test_numbers_of_any_kind_mean_the_same():
    array = tiny(instructions=np.int64(8), epochs=np.float32(2), occurrences=[np.int32(1), 2], biases=np.bool_(False))
    assert array == tiny(instructions=8, epochs=2, occurrences=(1, 2)) and hash(array)
    assert Member(array, 0).id == Member(tiny(instructions=8.0, epochs=2.0, occurrences=(1, 2)), 0).id


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_setting_is_read_back_from_its_row(name):
    """Also through JSON, which has no infinities; defaults that refer to other fields are resolved; the id stays."""
    setting = dataclasses.replace(BASES[name], occurrences=(1, 2))
    again = Setting.from_row(json.loads(json.dumps(plain(setting.as_row()))) | {"seed": 3, "id": "m1"})
    assert again.as_row() == setting.as_row() and Member(again, 3).id == Member(setting, 3).id


def test_the_rules_of_seen_are_the_same_for_ever():
    member = Member(tiny(instructions=8), 3)
    assert member.seen_rules(10).tolist() == [7, 2, 5, 4, 0, 1, 6, 3, 7, 2]
    assert member.seen_rules(8, by_share=True).tolist() == [4, 1, 7, 6, 4, 6, 5, 3]
