"""Reads data sets as rows of text, from files or the Hugging Face hub, in the schemas that their authors document.

A location is a ``.jsonl``, ``.json`` or ``.parquet`` file (the first two also with ``.gz``), a directory of such files,
or ``hub:owner/name[:split]``. Rows are streamed; only a ``.json`` file is held in memory, as text.

Our choices where the documentation leaves something open: the prompt of an OSS-Instruct row is the problem alone
(Magicoder prepends ``Write a solution to the following coding problem:``); the response of a CoT-Collection row is the
rationale, ``\\n[ANSWER] `` and the target, as in its authors' code; every node of an UltraInteract tree is its own row.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instrdiv.data.schemas import _SPACE, ALL, Empty, TextRow, _detect, _line, _text, _texts, parse_schema
from instrdiv.runtime.errors import BadInput, needs


def read_rows(
    location: str | Path, schema: str | None = None, name: str | None = None, dropped: list[str] | None = None
) -> Iterator[TextRow]:
    """Yields the rows of a data set in order.

    Args:
      location: see the module docstring.
      schema: see ``parse_schema``; by default it is detected from the fields of the first record.
      name: name of the source; by default that of the file, directory or repository.
      dropped: empty rows are skipped, and their locations are appended to this list (28 of Alpaca's rows have no
        output); if None, the first empty row is an error.

    Raises:
      BadInput: while reading; names the file, line or row, and field.
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
                raise BadInput(f"{error}; fill it in, or skip such rows with --drop_empty") from None
            dropped.append(where)
            continue
        if any("\ud800" <= character <= "\udfff" for text in _texts(row) for character in text):
            raise BadInput(f"{where}: contains half of a character (a lone surrogate, such as \\ud800); fix the text")
        yield row
    if not where:
        raise BadInput(f"{location}: has no rows")


def read_sources(data: Sequence[str], schema: str | None, empty: list[str] | None) -> dict[str, list[TextRow]]:
    """The rows of several data sets, by source.

    Args:
      data: locations, or NAME=LOCATION.
      schema: see ``read_rows``.
      empty: passed to ``read_rows`` as ``dropped``.

    Raises BadInput like ``read_rows``, and for a source name that is ambiguous or reserved (``all``).
    """
    sources: dict[str, list[TextRow]] = {}
    unnamed: Counter[str] = Counter()
    for part in data:
        name, named, location = part.partition("=")
        if not (name and (location or not named)):
            raise BadInput(f"--data={part}: must be FILE or NAME=FILE")
        rows = list(read_rows(location if named else part, schema, name if named else None, empty))
        if not rows:
            raise BadInput(f"--data={part}: contains only empty rows")
        source = rows[0].source
        unnamed[source] += not named
        if source == ALL or (unnamed[source] and source in sources):
            why = "is reserved for all sources together" if source == ALL else "is the name of two files"
            raise BadInput(f"--data={part}: {source} {why}; use another name, NAME={location if named else part}")
        sources.setdefault(source, []).extend(rows)
    return sources


def _records(location: str) -> Iterator[tuple[str, Any]]:
    """Yields (where, record) for every record at a location."""
    if location.startswith("hub:"):
        yield from _hub(location)
        return
    path = Path(location)
    if not path.is_dir():
        yield from _file(path)
        return
    files = sorted(file for file in path.iterdir() if _READERS.get(_suffix(file)) and not file.name.startswith("."))
    if not files:
        raise BadInput(f"{path}: is a directory without data files; supported are {', '.join(_READERS)}")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise BadInput(f"{path}: unsupported file type; supported are {', '.join(_READERS)}")
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    try:
        yield from reader(path)
    except RecursionError:
        raise BadInput(f"{path}: cannot be read: its JSON is nested too deeply") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:  # as bytes: text mode would also split at other line ends, which JSON may contain
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
    """A list of records, or an object of records (CoT-Collection); else JSON lines, as in some ``.json`` files."""
    with _open(path) as file:
        text = _text(file.read(), path, 1)
    opening = re.match(r'\s*(\[|\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(?=\{))', text)
    if opening is None:
        try:
            json.loads(text.strip().partition("\n")[0] or "{}")
        except json.JSONDecodeError:
            raise BadInput(f"{path}: must be a list of records, an object of records, or JSON lines") from None
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
                raise BadInput(f"{path}: is not JSON: extra data after the closing {close!r}")
            return


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with needs("pyarrow", "finetune", str(path)):
        import pyarrow
        from pyarrow import parquet
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
    with needs("datasets", "datasets", location):
        import datasets
    try:
        records = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the type depends on the failure and on the versions of three libraries
        hint = "without network access, download its files and pass those instead"
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


def _skip(text: str, at: int) -> int:
    """The next position that is not white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at
