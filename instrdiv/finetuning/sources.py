"""Data sets as rows of text: files, or the Hugging Face hub, in the schemas that their authors document.

A location is a ``.jsonl``, ``.json`` or ``.parquet`` file (the first two also with ``.gz``), a directory of such files,
or ``hub:owner/name[:split]``. Rows are read one after another; only a ``.json`` file is held in memory, as text.

What the documented data sets leave open, and we chose: a row of OSS-Instruct asks for the problem alone (Magicoder puts
``Write a solution to the following coding problem:`` before it); the response of a CoT-Collection row is the rationale,
``\\n[ANSWER] `` and the target, as its authors' code has it; every node of an UltraInteract tree is a row of its own.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instrdiv.settings import BadInput


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One example of a data set.

    Attributes:
      instruction: what is asked, the first turn of the user.
      response: the answer to it.
      source: name of the data set.
      where: its place there, for messages: file and line, or row.
      input: what the instruction is applied to, where the data set keeps it apart (Alpaca); else empty.
      system: the system prompt; empty where there is none.
      turns: further turns, (instruction, response) each.
    """

    instruction: str
    response: str
    source: str = ""
    where: str = ""
    input: str = ""
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """What is asked for first, in one string: the instruction, an empty line and the input, if there is one."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclasses.dataclass(frozen=True)
class Schema:
    """Which fields of a record are which part of a row; empty where there is no such field.

    Attributes:
      instruction, response, input, system: fields with strings.
      rationale: a field with what is said before the response.
      messages: instead of all of these, a field with a list of ``{"role": ..., "content": ...}``: perhaps ``system``,
        then ``user`` and ``assistant`` in turn; every one of the assistant's is a response.
      others: fields by which the data set is recognised, besides.
    """

    instruction: str = ""
    response: str = ""
    input: str = ""
    system: str = ""
    rationale: str = ""
    messages: str = ""
    others: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """The fields that are read."""
        named = (self.system, self.instruction, self.input, self.rationale, self.response, self.messages)
        return tuple(name for name in named if name)

    def row(self, record: Any, source: str, where: str) -> Row:
        """The row that a record makes.

        Raises:
          BadInput: a field is missing or has another type.
          Empty: nothing is asked, or nothing answered.
        """
        if not isinstance(record, Mapping):
            raise BadInput(f"{where}: must be an object with the fields {', '.join(self.read)}, is {_kind(record)}")
        for name in self.read:
            if name not in record:
                raise BadInput(f"{where}: lacks the field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
            if name != self.messages and not isinstance(record[name], str):
                raise BadInput(f"{where}: the field {name!r} must be a string, is {_kind(record[name])}")
        if self.messages:
            return _from_messages(record[self.messages], source, f"{where}: the field {self.messages!r}", where)
        for name in (self.instruction, self.rationale, self.response):
            if name and not record[name].strip():
                raise Empty(f"{where}: the field {name!r} is empty")
        response = record[self.response]
        if self.rationale:
            response = f"{record[self.rationale].strip()}\n[ANSWER] {response.strip()}"
        optional = {part: record[name] for part in ("input", "system") if (name := getattr(self, part))}
        return Row(record[self.instruction], response, source, where, **optional)


class Empty(BadInput):
    """A row asks or answers nothing."""


#: What tables call all sources together.
ALL = "all"
#: Schemas by name, with the fields that their data sets' cards document.
SCHEMAS = {
    "oss_instruct": Schema("problem", "solution"),  # ise-uiuc/Magicoder-OSS-Instruct-75K
    "alpaca": Schema("instruction", "output", input="input"),  # tatsu-lab/alpaca
    "cot_collection": Schema("source", "target", rationale="rationale"),  # kaist-ai/CoT-Collection
    "ultrainteract": Schema("instruction", "response", others=("parent_id",)),  # openbmb/UltraInteract_sft
    "openorca": Schema("question", "response", system="system_prompt"),  # Open-Orca/OpenOrca
    "messages": Schema(messages="messages"),
    "pairs": Schema("instruction", "response"),
}
#: The parts that a schema of the user's own can name.
_PARTS = ("instruction", "response", "input", "system", "rationale", "messages")


def parse_schema(text: str) -> Schema:
    """A schema by its name, or of fields that the user names: ``instruction=question,response=answer``.

    Raises BadInput, without a flag's name, where it is neither.
    """
    if text in SCHEMAS:
        return SCHEMAS[text]
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    parts: dict[str, Any] = {part.strip(): name.strip() for part, name in pairs}
    known = f"schemas are {', '.join(SCHEMAS)}, or fields of your own: instruction=FIELD,response=FIELD"
    if len(parts) < len(pairs) or not parts.keys() <= set(_PARTS) or not all(parts.values()):
        raise BadInput(f"the schema {text!r} is not known; {known}[,input=…][,system=…][,rationale=…], or messages=…")
    if ("messages" in parts) != (len(parts) == 1) or ("messages" not in parts and not {*_PARTS[:2]} <= parts.keys()):
        raise BadInput(f"the schema {text!r} must name both instruction and response, or messages alone")
    return Schema(**parts)


def read_rows(
    location: str | Path, schema: str | None = None, name: str | None = None, dropped: list[str] | None = None
) -> Iterator[Row]:
    """The rows of a data set, in its order.

    Args:
      location: see above.
      schema: see ``parse_schema``; by default the one that the first record's fields tell.
      name: of the source; by default that of the file, directory or repository.
      dropped: rows that ask or answer nothing are left out, and their places are added to this list (28 of Alpaca's
        have no output); where it is not given, the first of them is an error.

    Raises:
      BadInput: on reading, naming file, line or row, and field.
    """
    location = str(location)
    name = name or _default_name(location)
    try:
        chosen = None if schema is None else parse_schema(schema)
    except BadInput as error:
        raise BadInput(f"{location}: {error}") from None
    where = ""
    for where, record in _records(location):
        chosen = chosen or _detect(record, where)
        try:
            row = chosen.row(record, name, where)
        except Empty as error:
            if dropped is None:
                raise BadInput(f"{error}; give it a text, or leave such rows out (--drop_empty)") from None
            dropped.append(where)
            continue
        if any("\ud800" <= character <= "\udfff" for text in _texts(row) for character in text):
            raise BadInput(f"{where}: half of a character (a lone surrogate, such as \\ud800) is in it; mend the text")
        yield row
    if not where:
        raise BadInput(f"{location}: has no rows")


def _texts(row: Row) -> Iterator[str]:
    yield from (row.instruction, row.response, row.input, row.system)
    for turn in row.turns:
        yield from turn


def read_sources(data: Sequence[str], schema: str | None, empty: list[str] | None) -> dict[str, list[Row]]:
    """The rows of several data sets, by source.

    Args:
      data: locations, or NAME=LOCATION.
      schema: see ``read_rows``.
      empty: its ``dropped``.

    Raises BadInput as ``read_rows``, and for names that two sources have, or that mean all.
    """
    sources: dict[str, list[Row]] = {}
    unnamed: Counter[str] = Counter()
    for part in data:
        name, named, location = part.partition("=")
        if not (name and (location or not named)):
            raise BadInput(f"--data={part}: must be FILE or NAME=FILE")
        rows = list(read_rows(location if named else part, schema, name if named else None, empty))
        if not rows:
            raise BadInput(f"--data={part}: has nothing but rows that ask or answer nothing")
        source = rows[0].source
        unnamed[source] += not named
        if source == ALL or (unnamed[source] and source in sources):
            why = "stands for all sources" if source == ALL else "is the name of two files"
            raise BadInput(f"--data={part}: {source} {why}; name it otherwise, NAME={location if named else part}")
        sources.setdefault(source, []).extend(rows)
    return sources


def _detect(record: Any, where: str) -> Schema:
    """The schema whose fields a record has; one with more of them goes before one with fewer."""
    found = set(record) if isinstance(record, Mapping) else set()
    fitting = {name: s for name, s in SCHEMAS.items() if {*s.read, *s.others} <= found}
    best = [
        name
        for name, schema in fitting.items()
        if not any({*schema.read, *schema.others} < {*other.read, *other.others} for other in fitting.values())
    ]
    if len(best) == 1:
        return SCHEMAS[best[0]]
    fields = f"has the fields {', '.join(map(str, record)) or 'none'}" if found else f"is {_kind(record)}"
    if best:
        raise BadInput(f"{where}: {fields}, which fit {' and '.join(best)}; name one with --schema")
    known = ", ".join(f"{name} ({', '.join((*s.read, *s.others))})" for name, s in SCHEMAS.items())
    raise BadInput(f"{where}: {fields}; known schemas are {known}; name fields with --schema=instruction=…,response=…")


def _from_messages(messages: Any, source: str, field: str, where: str) -> Row:
    if not isinstance(messages, list):
        raise BadInput(f"{field} must be a list of messages, is {_kind(messages)}")
    said: list[str] = []
    system = ""
    for number, message in enumerate(messages, 1):
        at = f"{field}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadInput(f"{at} must have 'role' and 'content', is {_kind(message)}")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise BadInput(f"{at}: 'content' must be a string, is {_kind(content)}")
        if role == "system" and number == 1:
            system = content
            continue
        expected = ("user", "assistant")[len(said) % 2]
        if role != expected:
            raise BadInput(f"{at} must be of the role {expected!r}, is of {role!r}: they take turns, after 'system'")
        if not content.strip():
            raise Empty(f"{at} is empty")
        said.append(content)
    if not said or len(said) % 2:
        raise BadInput(f"{field} must end with a message of the role 'assistant'")
    (instruction, response), *turns = zip(said[::2], said[1::2], strict=True)
    return Row(instruction, response, source, where, system=system, turns=tuple(turns))


def _records(location: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of everything at a location."""
    if location.startswith("hub:"):
        yield from _hub(location)
        return
    path = Path(location)
    if not path.is_dir():
        yield from _file(path)
        return
    files = sorted(file for file in path.iterdir() if _READERS.get(_suffix(file)) and not file.name.startswith("."))
    if not files:
        raise BadInput(f"{path}: is a directory without data files; they end in {', '.join(_READERS)}")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise BadInput(f"{path}: is of no known kind; data files end in {', '.join(_READERS)}")
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    try:
        yield from reader(path)
    except RecursionError:
        raise BadInput(f"{path}: cannot be read: its JSON is nested too deeply") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:  # as bytes: a line ends with \n, while text mode knows other ends, which JSON may contain
        for number, line in enumerate(file, 1):
            text = _text(line, path, number)
            if not text.strip():
                continue
            where = f"{path}: line {number}"
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise BadInput(f"{where}: is not JSON: {error.msg}, at column {error.colno}") from None
            yield where, record


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, or an object of them (CoT-Collection); else JSON lines, which some call ``.json``."""
    with _open(path) as file:
        text = _text(file.read(), path, 1)
    opening = re.match(r'\s*(\[|\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(?=\{))', text)
    if opening is None:
        try:
            json.loads(text.strip().partition("\n")[0] or "{}")
        except json.JSONDecodeError:
            raise BadInput(f"{path}: is no list of records, no object of them, and no JSON lines") from None
        yield from _json_lines(path)
        return
    keyed = opening[1] != "["
    close = "}" if keyed else "]"
    decoder = json.JSONDecoder()
    number, line, counted, at = 0, 1, 0, _skip(text, text.index(opening[1][0]) + 1)
    if text[at : at + 1] == close:
        return
    while True:
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        where = f"{path}: row {number}, line {line}"
        try:
            if keyed:
                _, at = decoder.raw_decode(text, at)
                at = _skip(text, at)
                if text[at : at + 1] != ":":
                    raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
                at = _skip(text, at + 1)
            record, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
            following = text[at : at + 1]
            if following not in (",", close):
                raise json.JSONDecodeError(f"Expecting ',' or '{close}'", text, at)
        except json.JSONDecodeError as error:
            place = f"at line {error.lineno}, column {error.colno}"
            raise BadInput(f"{where}: is not JSON: {error.msg}, {place}") from None
        yield where, record
        at = _skip(text, at + 1)
        if following == close:
            if text[at:]:
                raise BadInput(f"{path}: is not JSON: something follows the last {close!r}")
            return


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise BadInput(f"{path}: needs the package pyarrow: pip install -e '.[finetune]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: cannot be read as Parquet: {_line(error)}") from None


def _hub(location: str) -> Iterator[tuple[str, Any]]:
    name, _, split = location.removeprefix("hub:").partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise BadInput(f"{location}: must be hub:owner/name or hub:owner/name:split")
    try:
        import datasets
    except ModuleNotFoundError:
        raise BadInput(f"{location}: needs the package datasets: pip install -e '.[datasets]'") from None
    try:
        records = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # which one depends on what fails, and on the versions of three libraries
        hint = "download its files and name those instead, if there is no network"
        raise BadInput(f"{location}: cannot be loaded: {_line(error)}; {hint}") from None
    for number, record in enumerate(records, 1):
        yield f"{location}: row {number}", record


_READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json,
    ".json.gz": _json,
    ".parquet": _parquet,
}


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _default_name(location: str) -> str:
    if location.startswith("hub:"):
        return location.removeprefix("hub:").partition(":")[0].rpartition("/")[2]
    return Path(location).name.removesuffix(_suffix(Path(location)))


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _text(raw: bytes, path: Path, line: int) -> str:
    """The bytes of a file from this line on, as text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise BadInput(f"{path}: line {line}: is not UTF-8 (byte {error.object[error.start]:#04x})") from None


def _skip(text: str, at: int) -> int:
    """The next place that is not white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


_SPACE = re.compile(r"[ \t\n\r]*")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _line(error: Exception) -> str:
    """The first line of what an exception says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
