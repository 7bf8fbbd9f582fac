"""One row of an instruction data set, and the schemas by which published data sets become rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from instrdiv.runtime.errors import BadInput


@dataclasses.dataclass(frozen=True, slots=True)
class TextRow:
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
      others: fields by which the data set is recognized, besides.
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

    def row(self, record: Any, source: str, where: str) -> TextRow:
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
        return TextRow(record[self.instruction], response, source, where, **optional)


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


def _texts(row: TextRow) -> Iterator[str]:
    yield from (row.instruction, row.response, row.input, row.system)
    for turn in row.turns:
        yield from turn


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


def _from_messages(messages: Any, source: str, field: str, where: str) -> TextRow:
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
    return TextRow(instruction, response, source, where, system=system, turns=tuple(turns))


def _text(raw: bytes, path: Path, line: int) -> str:
    """The bytes of a file from this line on, as text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise BadInput(f"{path}: line {line}: is not UTF-8 (byte {error.object[error.start]:#04x})") from None


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
