"""Tables are read back as written, whole or not at all."""

import json
import math

import pytest

from instrdiv.config.presets import Setting
from instrdiv.evaluation.rows import varying
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import replacing, write_json
from instrdiv.runtime.provenance import provenance
from instrdiv.runtime.tables import merge_table, read_table, write_table
from tests.worlds import tiny


def test_a_table_is_read_back_as_written(tmp_path):
    rows = [
        {"name": "a,b", "count": 3, "share": 0.1 + 0.2, "shape": math.inf},
        {"name": "", "count": 0, "share": math.nan, "shape": 0.5},
    ]
    write_table(tmp_path / "t.csv", rows, tuple(rows[0]))
    back = read_table(tmp_path / "t.csv")
    assert back[0] == rows[0] and math.isnan(back[1]["share"]) and back[1]["count"] == 0


def test_cells_may_hold_ends_of_lines(tmp_path):
    """A model may answer anything."""
    rows = [{"a": "x\ry", "b": "\r\n"}, {"a": "\n", "b": ' "\x00\x0b\x85'}, {"a": "\r", "b": ""}]
    write_table(tmp_path / "t.csv", rows, ("a", "b"))
    assert read_table(tmp_path / "t.csv", text=("a", "b")) == rows


def test_columns_keep_their_order_and_lines_end_alike_everywhere(tmp_path):
    write_table(tmp_path / "t.csv", [{"b": 1, "a": 2.5}], ("a", "b"))
    assert (tmp_path / "t.csv").read_bytes() == b"a,b\n2.5,1\n"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "t.csv").write_text("old")
    with pytest.raises(KeyError):
        write_table(tmp_path / "t.csv", [{"a": 1}, {}], ("a",))
    assert (tmp_path / "t.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_table_that_is_older_than_a_setting_is_added_to(tmp_path):
    """The old rows get the setting's default; other columns are not made up."""
    (tmp_path / "t.csv").write_text("member,width\nm1,32\n")
    columns = ("member", "width", "near_miss_fraction")
    merge_table(
        tmp_path / "t.csv",
        [{"member": "m2", "width": 64, "near_miss_fraction": 0.5}],
        columns,
        ("member",),
        Setting.default_row(),
    )
    assert (tmp_path / "t.csv").read_text() == "member,width,near_miss_fraction\nm1,32,0.0\nm2,64,0.5\n"
    with pytest.raises(KeyError):
        merge_table(tmp_path / "t.csv", [], (*columns, "exact_match"), ("member",), Setting.default_row())


def test_a_missing_table_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="cannot be read as a table"):
        read_table(tmp_path / "none.csv")


def test_text_stays_text_where_asked(tmp_path):
    write_table(
        tmp_path / "t.csv", [{"pattern": "nan", "replacement": "", "seed": 7}], ("pattern", "replacement", "seed")
    )
    (row,) = read_table(tmp_path / "t.csv", text=("pattern", "replacement"))
    assert row == {"pattern": "nan", "replacement": "", "seed": 7}


@pytest.mark.parametrize(
    "text, why",
    [
        ("a,b\n1,2\n3\n", "differ in length"),
        ("a,b\n1,2,3\n", "differ in length"),
        ("a\n1\n", "lacks the column b"),
        ("a,b\n", "has no rows"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, text, why):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=rf"t\.csv .*{why}"):
        read_table(tmp_path / "t.csv", ("a", "b"))


def test_settings_that_follow_others_do_not_vary():
    """A length that is left open follows another one; given, it may vary by itself."""
    rows = [tiny(input_length=length, width=width).as_row() for length in (5, 6) for width in (16, 32)]
    assert varying(rows) == ("input_length", "width") and varying(rows[:1]) == ()
    given = [row | {"input_length_min": 3 + number} for number, row in enumerate(rows)]
    assert varying(given) == ("input_length", "width", "input_length_min")


def test_json_has_no_infinities(tmp_path):
    write_json(tmp_path / "c.json", {"shape": math.inf, "list": (1, 2)})
    assert json.loads((tmp_path / "c.json").read_text()) == {"shape": "inf", "list": [1, 2]}


def test_replacing_shows_the_file_only_when_whole(tmp_path):
    with replacing(tmp_path / "x") as file:
        file.write("half")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "half"


def test_provenance_says_with_what():
    facts = provenance(extra=1)
    assert facts["versions"]["jax"] and facts["devices"] and facts["extra"] == 1
