"""Turns rows of text into the arrays that a model is trained on.

A row becomes an ``Example``: its tokens and a loss mask. Examples are truncated and packed into the rows of ``Packed``,
several per row if they fit; segments keep them from attending to each other, and positions restart, so packing does not
change what the model computes for an example. Truncated and dropped examples are counted in a ``Report``.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from instrdiv.data.schemas import ALL, TextRow
from instrdiv.data.templates import Template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.runtime.errors import BadInput

_TOKENISED_AT_ONCE = 1_000

#: Columns of a report's table: one row per source, and one for all sources, called ``all``.
REPORT_COLUMNS = (
    *("source", "examples", "tokens", "response_tokens", "longest", "with_special_tokens"),
    *("truncated", "response_tokens_lost", "dropped"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens.

    Attributes:
      tokens: int32 [n].
      loss_mask: bool [n]; True for the tokens of a response and the token that ends it; False for the first token.
      source, where: copied from the row.
      has_special_tokens: whether the row's text contains special tokens, which are then encoded as such.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: str
    where: str
    has_special_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class Packed:
    """N rows of T tokens each, on the host.

    Attributes:
      tokens: int32 [N, T].
      positions: int32 [N, T]; restart at 0 in every segment, 0 for padding.
      segments: int32 [N, T]; 1, 2, ... for the examples of a row, 0 for padding.
      loss_mask: bool [N, T]; True if the token is to be predicted (from the previous position).
      sources: int8 [N, T]; index into ``source_names``, -1 for padding.
      source_names: names of the sources, in the order of their first examples.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    loss_mask: np.ndarray
    sources: np.ndarray
    source_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """How the examples were packed.

    Attributes:
      table: rows with ``REPORT_COLUMNS``, counts of examples and tokens: ``examples`` and ``tokens`` count what is in
        the packed rows, ``longest`` is in tokens before truncation. An example is ``dropped`` if truncation leaves no
        response token; its response tokens count as lost.
      rows, length: N and T.
    """

    table: tuple[dict, ...]
    rows: int
    length: int

    @property
    def efficiency(self) -> float:
        """Share of the positions that hold a token."""
        return self.table[-1]["tokens"] / (self.rows * self.length)

    @property
    def text(self) -> str:
        """A summary: one line per source, and a second one if something was lost."""
        lines = []
        for row in self.table if len(self.table) > 2 else self.table[-1:]:
            name = "all sources" if row is self.table[-1] else row["source"]
            lines.append(
                f"{name}: {row['examples']:,} examples, {row['tokens']:,} tokens, {row['response_tokens']:,} of them "
                f"in responses; longest example: {row['longest']:,} tokens"
            )
            if row["truncated"] or row["dropped"]:
                lines.append(
                    f"  limit of {self.length:,} tokens: {row['truncated']:,} examples truncated, {row['dropped']:,} "
                    f"dropped, {row['response_tokens_lost']:,} response tokens lost"
                )
            if row["with_special_tokens"]:
                lines.append(f"  {row['with_special_tokens']:,} examples contain special tokens in their text")
        lines.append(f"{self.rows:,} rows of {self.length:,} tokens, {self.efficiency:.1%} full")
        return "\n".join(lines)


def tokenize(rows: Iterable[TextRow], template: Template, tokenizer: Tokenizer) -> Iterator[Example]:
    """Yields the rows as examples, without truncation.

    Prompt and response are tokenized separately (see tokenizer.py): the loss covers the tokens of the response and the
    token that ends it, and the prompt has the tokens that ``prompt_tokens`` returns.

    Raises BadInput, naming the row, if the template or the tokenizer cannot express it.
    """
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _TOKENISED_AT_ONCE)):
        texts = [template.pieces(row) for row in batch]
        for row, pieces in zip(batch, texts, strict=True):
            if not pieces[0].text:
                raise BadInput(
                    f"{row.where}: the prompt is empty, and nothing predicts the first token of the response"
                )
        tokens = _named_where(tokenizer, [[piece.text for piece in pieces] for pieces in texts], template.starts, batch)
        for row, pieces, ids in zip(batch, texts, tokens, strict=True):
            if not ids[0]:
                raise BadInput(
                    f"{row.where}: the prompt is empty, and nothing predicts the first token of the response"
                )
            mask = np.repeat([piece.loss for piece in pieces], [len(piece) for piece in ids])
            said = (row.system, row.prompt, row.response, *itertools.chain(*row.turns))
            special = any(tokenizer.special_pattern.search(text) for text in said)
            yield Example(np.fromiter(itertools.chain(*ids), np.int32), mask, row.source, row.where, special)


def prompt_tokens(rows: Sequence[TextRow], template: Template, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of every row's first prompt: the model's input at evaluation, and the beginning of its example."""
    texts = [[template.prompt(row)] for row in rows]
    return [ids for (ids,) in _named_where(tokenizer, texts, template.starts, rows)]


def pack(examples: Iterable[Example], length: int, pad_id: int, several: bool = True) -> tuple[Packed, Report]:
    """Packs examples into rows.

    Examples longer than ``length`` are truncated at the end, and dropped if no response token remains. No example is
    split across rows. With ``several``, packing is best fit decreasing: the longest first, each into the fullest row
    with room for it. Rows are sorted by their first example, and examples within a row keep their order. Packing is
    deterministic.

    Args:
      examples: as ``tokenize`` yields them.
      length: T, tokens per row.
      pad_id: the padding token.
      several: False for one example per row.

    Raises:
      BadInput: if no example is left, or there are more than 127 sources.
    """
    names: dict[str, int] = {}
    counts: dict[str, collections.Counter] = {}
    kept: list[Example] = []
    for example in examples:
        count = counts.setdefault(example.source, collections.Counter())
        count["longest"] = max(count["longest"], len(example.tokens))
        learned = int(example.loss_mask[:length].sum())
        count["response_tokens_lost"] += int(example.loss_mask.sum()) - learned
        if not learned:
            count["dropped"] += 1
            continue
        names.setdefault(example.source, len(names))
        kept.append(example)
        count["examples"] += 1
        count["tokens"] += min(len(example.tokens), length)
        count["response_tokens"] += learned
        count["truncated"] += len(example.tokens) > length
        count["with_special_tokens"] += example.has_special_tokens
    if not kept:
        raise BadInput(f"--max_length={length}: truncation leaves no response token in any example; increase it")
    if len(names) > np.iinfo(np.int8).max:
        raise BadInput(f"{len(names)} sources are too many; use at most {np.iinfo(np.int8).max}")
    rows = _best_fit([min(len(e.tokens), length) for e in kept], length) if several else [[i] for i in range(len(kept))]

    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask, sources = np.zeros(shape, bool), np.full(shape, -1, np.int8)
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, 1):
            example = kept[member]
            size = min(len(example.tokens), length)
            here = np.s_[row, start : start + size]
            tokens[here], positions[here], segments[here] = example.tokens[:size], np.arange(size), segment
            loss_mask[here], sources[here] = example.loss_mask[:size], names[example.source]
            start += size
    packed = Packed(tokens, positions, segments, loss_mask, sources, tuple(names))
    everything: collections.Counter = sum(counts.values(), collections.Counter())
    everything["longest"] = max(count["longest"] for count in counts.values())
    table = [{"source": name, **{c: count[c] for c in REPORT_COLUMNS[1:]}}
             for name, count in (*counts.items(), (ALL, everything))]  # fmt: skip
    return packed, Report(tuple(table), len(rows), length)


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best fit decreasing: the examples of each row, in order; rows are sorted by their first example."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by remaining room
    any_with_room = np.zeros(length + 1, bool)
    for member in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[member]
        room = size + int(any_with_room[size:].argmax())
        if any_with_room[room]:
            row = by_room[room].pop()
            any_with_room[room] = bool(by_room[room])
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(member)
        by_room[room - size].append(row)
        any_with_room[room - size] = True
    return sorted(sorted(row) for row in rows)


def _named_where(tokenizer: Tokenizer, texts: list[list[str]], starts: bool, rows: Sequence[TextRow]) -> list:
    """Calls ``encode_pieces``; errors name the row."""
    try:
        return tokenizer.encode_pieces(texts, start=not starts)
    except BadInput:
        for row, text in zip(rows, texts, strict=True):
            try:
                tokenizer.encode_pieces([text], start=not starts)
            except BadInput as error:
                raise BadInput(f"{row.where}: {error}") from None
        raise
