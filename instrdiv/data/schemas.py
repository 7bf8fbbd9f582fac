"""The row type of instruction data sets, and the schemas that convert published data sets to rows."""

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
      instruction: the first turn of the user.
      response: the answer to it.
      source: name of the data set.
      where: its location in the data set, for messages: file and line, or row.
      input: what the instruction is applied to, if the data set has a separate field for it (Alpaca); else empty.
      system: the system prompt; empty if there is none.
      turns: further turns, as (instruction, response).
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
        """The first prompt as one string: the instruction, followed by an empty line and the input if there is one."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclasses.dataclass(frozen=True)
class Schema:
    """Which field of a record holds which part of a row; empty if there is no such field.

    Attributes:
      instruction, response, input, system: fields with strings.
      rationale: a field with the reasoning that precedes the response.
      messages: instead of all of these, a field with a list of ``{"role": ..., "content": ...}``: optional ``system``,
        then ``user`` and ``assistant`` alternating; every assistant message is a response.
      others: additional fields by which the data set is recognized.
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
        """Converts a record to a row.

        Raises:
          BadInput: if a field is missing or has the wrong type.
          Empty: if the instruction, the rationale, the response or a message is empty.
        """
        if not isinstance(record, Mapping):
            raise BadInput(f"{where}: must be an object with the fields {', '.join(self.read)}, got {_kind(record)}")
        for name in self.read:
            if name not in record:
                raise BadInput(f"{where}: lacks the field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
            if name != self.messages and not isinstance(record[name], str):
                raise BadInput(f"{where}: the field {name!r} must be a string, got {_kind(record[name])}")
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
    """A row with an empty instruction or response."""


#: The name of all sources together in tables.
ALL = "all"


#: Schemas by name, with the fields documented in the data set cards.
SCHEMAS = {
    "oss_instruct": Schema("problem", "solution"),  # ise-uiuc/Magicoder-OSS-Instruct-75K
    "alpaca": Schema("instruction", "output", input="input"),  # tatsu-lab/alpaca
    "cot_collection": Schema("source", "target", rationale="rationale"),  # kaist-ai/CoT-Collection
    "ultrainteract": Schema("instruction", "response", others=("parent_id",)),  # openbmb/UltraInteract_sft
    "openorca": Schema("question", "response", system="system_prompt"),  # Open-Orca/OpenOrca
    "messages": Schema(messages="messages"),
    "pairs": Schema("instruction", "response"),
}


#: The parts that a custom schema can specify.
_PARTS = ("instruction", "response", "input", "system", "rationale", "messages")


def parse_schema(text: str) -> Schema:
    """A schema by its name, or with custom fields: ``instruction=question,response=answer``.

    Raises BadInput if it is neither; the message does not name a flag.
    """
    if text in SCHEMAS:
        return SCHEMAS[text]
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    parts: dict[str, Any] = {part.strip(): name.strip() for part, name in pairs}
    known = f"use one of {', '.join(SCHEMAS)}, or name your fields: instruction=FIELD,response=FIELD"
    if len(parts) < len(pairs) or not parts.keys() <= set(_PARTS) or not all(parts.values()):
        raise BadInput(f"unknown schema {text!r}; {known}[,input=…][,system=…][,rationale=…], or messages=…")
    if ("messages" in parts) != (len(parts) == 1) or ("messages" not in parts and not {*_PARTS[:2]} <= parts.keys()):
        raise BadInput(f"the schema {text!r} must name both instruction and response, or messages alone")
    return Schema(**parts)


def _texts(row: TextRow) -> Iterator[str]:
    yield from (row.instruction, row.response, row.input, row.system)
    for turn in row.turns:
        yield from turn


def _detect(record: Any, where: str) -> Schema:
    """The schema whose fields a record has; a schema whose fields are a subset of another match is ignored."""
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
        raise BadInput(f"{where}: {fields}, which match {' and '.join(best)}; choose one with --schema")
    known = ", ".join(f"{name} ({', '.join((*s.read, *s.others))})" for name, s in SCHEMAS.items())
    raise BadInput(f"{where}: {fields}; known schemas: {known}; or pass --schema=instruction=…,response=…")


def _from_messages(messages: Any, source: str, field: str, where: str) -> TextRow:
    if not isinstance(messages, list):
        raise BadInput(f"{field} must be a list of messages, got {_kind(messages)}")
    said: list[str] = []
    system = ""
    for number, message in enumerate(messages, 1):
        at = f"{field}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadInput(f"{at} must be an object with 'role' and 'content', got {_kind(message)}")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise BadInput(f"{at}: 'content' must be a string, got {_kind(content)}")
        if role == "system" and number == 1:
            system = content
            continue
        expected = ("user", "assistant")[len(said) % 2]
        if role != expected:
            raise BadInput(f"{at} must have the role {expected!r}, got {role!r}; roles alternate after 'system'")
        if not content.strip():
            raise Empty(f"{at} is empty")
        said.append(content)
    if not said or len(said) % 2:
        raise BadInput(f"{field} must end with an 'assistant' message")
    (instruction, response), *turns = zip(said[::2], said[1::2], strict=True)
    return TextRow(instruction, response, source, where, system=system, turns=tuple(turns))


def _text(raw: bytes, path: Path, line: int) -> str:
    """Decodes the bytes of a file from this line on."""
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
    """The first line of an exception's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
