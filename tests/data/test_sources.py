import gzip
import json

import pytest

from instrdiv.data.schemas import SCHEMAS, TextRow
from instrdiv.data.sources import read_rows
from instrdiv.runtime.errors import BadInput

#: One record of every documented data set, with all the fields of its card, and the fields of the row that we read.
DOCUMENTED = {
    "oss_instruct": (
        {"lang": "python", "raw_index": 7, "index": 3, "seed": "def f", "openai_fingerprint": "fp_1"}
        | {"problem": "Sort it.", "solution": "sorted(x)"},
        {"instruction": "Sort it.", "response": "sorted(x)"},
    ),
    "alpaca": (
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day", "text": "Below is ..."},
        {"instruction": "Translate.", "input": "Guten Tag", "response": "Good day"},
    ),
    "cot_collection": (
        {"source": "2 + 2?", "target": "4", "rationale": "Two and two make four.", "task": "math", "type": "CoT"},
        {"instruction": "2 + 2?", "response": "Two and two make four.\n[ANSWER] 4"},
    ),
    "ultrainteract": (
        {"task": "Math_CoT", "dataset": "MATH", "instruction": "Prove it.", "response": "Step 1", "id": "a_0_1"}
        | {"parent_id": "a"},
        {"instruction": "Prove it.", "response": "Step 1"},
    ),
    "openorca": (
        {"id": "flan.1", "system_prompt": "You are helpful.", "question": "Why?", "response": "Because."},
        {"instruction": "Why?", "response": "Because.", "system": "You are helpful."},
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"},
                      {"role": "assistant", "content": "Farewell"}]},
        {"instruction": "Hi", "response": "Hello", "system": "Be brief.", "turns": (("Bye", "Farewell"),)},
    ),
    "pairs": ({"instruction": "a", "response": "b"}, {"instruction": "a", "response": "b"}),
}  # fmt: skip
PAIR = {"instruction": "say a", "response": "a"}


def lines(records) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def written(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("named", [False, True])
def test_documented_records_become_rows(tmp_path, schema, named):
    record, expected = DOCUMENTED[schema]
    path = written(tmp_path / "some.jsonl", lines([record]))
    (row,) = read_rows(path, schema if named else None)
    assert row == TextRow(**expected, source="some", where=f"{path}: line 1")


def test_every_kind_of_file_has_the_same_rows(tmp_path):
    """Unicode line separators, which JSON allows within strings, do not end a line."""
    records = [{"instruction": f"ask {i} é\u2028\u0085", "response": f"say {i}"} for i in range(1500)]
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    plain = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    paths = [
        written(tmp_path / "lines.jsonl", plain + b"\n\n"),
        written(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + plain),
        written(tmp_path / "lines.jsonl.gz", gzip.compress(plain)),
        written(tmp_path / "list.json", json.dumps(records).encode()),
        written(tmp_path / "pretty.json", json.dumps(records, indent=2).encode()),
        written(tmp_path / "keyed.json", json.dumps({str(i): r for i, r in enumerate(records)}, indent=1).encode()),
        written(tmp_path / "list.json.gz", gzip.compress(json.dumps(records).encode())),
        written(tmp_path / "lines.json", plain),
        tmp_path / "table.parquet",
    ]
    parquet.write_table(table.from_pylist(records), paths[-1])
    for path in paths:
        rows = list(read_rows(path, name="same"))
        assert [(row.instruction, row.response) for row in rows] == [tuple(r.values()) for r in records], path
        assert {row.source for row in rows} == {"same"}
    assert rows[1400].where == f"{paths[-1]}: row 1401"
    written(paths[-1], b"PAR1 not at all")
    with pytest.raises(BadInput, match=r"table.parquet: cannot be read as Parquet: "):
        list(read_rows(paths[-1]))
    *_, row = read_rows(tmp_path / "pretty.json")
    assert row.where == f"{tmp_path / 'pretty.json'}: row 1500, line {2 + 4 * 1499}"


def test_a_directory_is_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.json", ".hidden.json"):
        written(tmp_path / name, lines([PAIR | {"response": name}]))
    (tmp_path / "README.md").write_text("about")
    rows = list(read_rows(tmp_path))
    assert [row.response for row in rows] == ["a.json", "b.jsonl"] and rows[0].source == tmp_path.name


def test_fields_of_the_user_s_own(tmp_path):
    path = written(
        tmp_path / "own.jsonl", lines([{"q": "Why?", "a": "So.", "s": "Be kind.", "more": "it", "r": " x "}])
    )
    (row,) = read_rows(path, "instruction=q, response=a,system=s,input=more,rationale=r")
    assert row == TextRow("Why?", "x\n[ANSWER] So.", "own", f"{path}: line 1", input="it", system="Be kind.")
    assert row.prompt == "Why?\n\nit"
    chats = written(tmp_path / "chats.jsonl", lines([{"talk": DOCUMENTED["messages"][0]["messages"]}]))
    assert next(read_rows(chats, "messages=talk")).turns == (("Bye", "Farewell"),)


def test_rows_without_a_response_are_left_out_where_that_is_asked_for(tmp_path):
    path = written(tmp_path / "a.jsonl", lines([PAIR, PAIR | {"response": " \n"}, PAIR, PAIR | {"instruction": ""}]))
    dropped: list[str] = []
    assert len(list(read_rows(path, dropped=dropped))) == 2
    assert dropped == [f"{path}: line 2", f"{path}: line 4"]
    with pytest.raises(BadInput, match=r"a.jsonl: line 2: the field 'response' is empty; .*--drop_empty"):
        list(read_rows(path))


def chat(*turns):
    return lines([{"messages": [{"role": role, "content": content} for role, content in turns]}])


#: file name, content, schema -> the message after the path.
MISTAKES = [
    ("a.jsonl", lines([PAIR, {"instruction": "x", "output": "y"}]), None,
     ": line 2: lacks the field 'response'; it has 'instruction', 'output'"),
    ("a.jsonl", lines([PAIR, PAIR | {"response": 3}]), None,
     ": line 2: the field 'response' must be a string, got a number"),
    ("a.jsonl", lines([PAIR | {"response": None}]), None, ": line 1: the field 'response' must be a string, got null"),
    ("a.jsonl", lines([PAIR, ["x"]]), None,
     ": line 2: must be an object with the fields instruction, response, got a list"),
    ("a.jsonl", lines([PAIR]) + b"\n{'x': 1}\n", None, ": line 2: is not JSON: Expecting property name"),
    ("a.jsonl", lines([PAIR]) + b'\n{"instruction": "x", "resp', None, ": line 2: is not JSON: Unterminated string"),
    ("a.jsonl", lines([PAIR]) + b'\n{"instruction": "\xff"}', None, ": line 2: is not UTF-8 (byte 0xff)"),
    ("a.jsonl", b"[" * 10**6, None, ": cannot be read: its JSON is nested too deeply"),
    ("a.jsonl", b"", None, ": has no rows"),
    ("a.jsonl", b"\n\n", None, ": has no rows"),
    ("a.json", b"[]", None, ": has no rows"),
    ("a.json", b"[\n" + lines([PAIR]) + b",\n{1}]", None, ": row 2, line 3: is not JSON: Expecting property name"),
    ("a.json", b"[" + lines([PAIR]), None, ": row 1, line 1: is not JSON: Expecting ',' or ']'"),
    ("a.json", b"[" + lines([PAIR]) + b",]", None, ": row 2, line 1: is not JSON: Expecting value, at "),
    ("a.json", b"[" + lines([PAIR]) + b"] more", None, ": is not JSON: extra data after the closing ']'"),
    ("a.json", b"[\n\n\xe9]", None, ": line 3: is not UTF-8 (byte 0xe9)"),
    ("a.json", b'{"0": ' + lines([PAIR]) + b',\n "1" ' + lines([PAIR]) + b"}", None,
     ": row 2, line 2: is not JSON: Expecting ':' delimiter"),
    ("a.json", b'{\n "version": 1,\n "rows": []\n}', None,
     ": must be a list of records, an object of records, or JSON lines"),
    ("a.json", b'{"version": 1, "rows": []}', None, ": line 1: has the fields version, rows; known schemas: "),
    ("a.jsonl.gz", b"plain", None, ": cannot be read: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(lines([PAIR] * 99))[:-9], None, ": cannot be read: "),
    ("a.csv", b"x,y", None, ": unsupported file type; supported are .jsonl, "),
    ("a.jsonl", lines([{"text": "x", "n": 1}]), None,
     ": line 1: has the fields text, n; known schemas: oss_instruct"),
    ("a.jsonl", lines([PAIR | {"input": "", "output": "y"}]), None,
     ": line 1: has the fields instruction, response, input, output, which match alpaca and pairs; choose one"),
    ("a.jsonl", lines([PAIR]), "alpaka", ": unknown schema 'alpaka'; use one of oss_instruct, alpaca"),
    ("a.jsonl", lines([PAIR]), "instruction=x", ": the schema 'instruction=x' must name both instruction and response"),
    ("a.jsonl", lines([PAIR]), "instruction=x,instruction=y", "unknown schema 'instruction=x,inst"),
    ("a.jsonl", lines([PAIR]), "instruction=x,messages=y",
     "must name both instruction and response, or messages alone"),
    ("a.jsonl", lines([{"messages": "Hi"}]), None, ": the field 'messages' must be a list of messages, got a string"),
    ("a.jsonl", lines([{"messages": []}]), None,
     ": the field 'messages' must end with an 'assistant' message"),
    ("a.jsonl", chat(("user", "Hi")), None, " must end with an 'assistant' message"),
    ("a.jsonl", chat(("user", "Hi"), ("tool", "x")), None, ", message 2 must have the role 'assistant', got 'tool'"),
    ("a.jsonl", chat(("user", "Hi"), ("system", "x")), None,
     ", message 2 must have the role 'assistant', got 'system'"),
    ("a.jsonl", chat(("user", "Hi"), ("assistant", "")), None, ", message 2 is empty; fill it in"),
    ("a.jsonl", chat(("user", ["Hi"]), ("assistant", "x")), None, " 1: 'content' must be a string, got a list"),
    ("a.jsonl", lines([{"messages": ["Hi"]}]), None, " 1 must be an object with 'role' and 'content', got a string"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, schema, part", MISTAKES)
def test_a_mistake_is_one_line_that_says_where(tmp_path, name, content, schema, part):
    path = written(tmp_path / name, content)
    with pytest.raises(BadInput) as mistake:
        list(read_rows(path, schema))
    said = str(mistake.value)
    assert said.startswith(str(path)) and part in said and "\n" not in said, said


def test_what_is_not_there(tmp_path):
    for location, part in [
        (tmp_path / "no.jsonl", "no.jsonl: there is no such file"),
        (tmp_path, "is a directory without data files"),
        ("hub:alpaca", "must be hub:owner/name"),
    ]:
        with pytest.raises(BadInput, match=part):
            list(read_rows(location))


def test_the_hub(monkeypatch):
    """Loading is left to the ``datasets`` library, which is mocked here; its errors become one line."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([PAIR, PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("hub:owner/name:test"))
    assert [row.where for row in rows] == ["hub:owner/name:test: row 1", "hub:owner/name:test: row 2"]
    assert rows[0].source == "name" and asked == [("owner/name", "test")]

    def fail(name, split):
        raise ConnectionError("Couldn't reach the Hub\nTraceback: more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadInput) as mistake:
        list(read_rows("hub:owner/name"))
    assert str(mistake.value).startswith("hub:owner/name: cannot be loaded: Couldn't reach the Hub; download its files")


def test_half_a_character_is_refused_where_it_is_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": "\\ud800"}\n')
    with pytest.raises(BadInput, match=r"mine\.jsonl: line 2: contains half of a character"):
        list(read_rows(path))
