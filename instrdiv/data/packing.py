"""Rows of text to the arrays that a model is trained on.

A row becomes an ``Example``: its tokens, and which of them the loss is on. Examples are cut at a length and put into
the rows of ``Packed``, several to a row where they fit; segments keep them from seeing each other, and positions
restart, so that an example means the same packed or alone. What is cut off or left out is counted in a ``Report``.
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

#: Columns of a report's table: a row per source, and one of all sources, called ``all``.
REPORT_COLUMNS = (
    *("source", "examples", "tokens", "response_tokens", "longest", "with_special_tokens"),
    *("truncated", "response_tokens_lost", "dropped"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens.

    Attributes:
      tokens: int32 [n].
      loss_mask: bool [n]; True where the token is one of a response, or ends it; False at the first.
      source, where: of the row.
      has_special_tokens: special tokens are written out in the row's own text, and have become themselves.
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
      positions: int32 [N, T]; from 0 in every segment, 0 in padding.
      segments: int32 [N, T]; 1, 2, ... for the examples of a row, 0 for padding.
      loss_mask: bool [N, T]; True where the token is to be predicted, from the place before.
      sources: int8 [N, T]; place in ``source_names``, -1 for padding.
      source_names: of the sources, in the order of their first examples.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    loss_mask: np.ndarray
    sources: np.ndarray
    source_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the examples.

    Attributes:
      table: rows with ``REPORT_COLUMNS``, numbers of examples and tokens: ``examples`` and ``tokens`` as they are in
        the packed rows, ``longest`` (tokens) as it was before truncation. An example is ``dropped`` where no token of
        a response was left; its tokens count as lost.
      rows, length: N and T.
    """

    table: tuple[dict, ...]
    rows: int
    length: int

    @property
    def efficiency(self) -> float:
        """Share of the places that hold a token."""
        return self.table[-1]["tokens"] / (self.rows * self.length)

    @property
    def text(self) -> str:
        """For people: a line per source, and what was lost where something was."""
        lines = []
        for row in self.table if len(self.table) > 2 else self.table[-1:]:
            name = "all sources" if row is self.table[-1] else row["source"]
            lines.append(
                f"{name}: {row['examples']:,} examples, {row['tokens']:,} tokens, {row['response_tokens']:,} of them "
                f"of responses; the longest example has {row['longest']:,}"
            )
            if row["truncated"] or row["dropped"]:
                lines.append(
                    f"  cut at {self.length:,} tokens: {row['truncated']:,} examples truncated, {row['dropped']:,} "
                    f"dropped, {row['response_tokens_lost']:,} tokens of responses lost"
                )
            if row["with_special_tokens"]:
                lines.append(f"  {row['with_special_tokens']:,} examples have special tokens written out in their text")
        lines.append(f"{self.rows:,} rows of {self.length:,} tokens, {self.efficiency:.1%} filled")
        return "\n".join(lines)


def tokenize(rows: Iterable[TextRow], template: Template, tokenizer: Tokenizer) -> Iterator[Example]:
    """The rows as examples, whole, one after another.

    Prompt and response are tokenized apart (see tokenizer.py): the tokens that the loss is on are those of the response
    and of the token that ends it, and the prompt's are those that ``prompt_tokens`` gives.

    Raises BadInput, naming the row, where template or tokenizer cannot express it.
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
    """The tokens of every row's first prompt: what a model is asked, and what examples of these rows begin with."""
    texts = [[template.prompt(row)] for row in rows]
    return [ids for (ids,) in _named_where(tokenizer, texts, template.starts, rows)]


def pack(examples: Iterable[Example], length: int, pad_id: int, several: bool = True) -> tuple[Packed, Report]:
    """Puts examples into rows.

    Longer ones are cut at the end, and left out where no token of a response remains. Of the others, each is in one
    row, whole. With ``several``, by best fit, the longest first: each goes into the fullest row that has room for it.
    Rows are in the order of their first examples, and so are the examples within a row. The same examples make the
    same rows.

    Args:
      examples: as ``tokenize`` makes them.
      length: T, tokens a row.
      pad_id: the token that fills rows up.
      several: False for one example a row.

    Raises:
      BadInput: nothing is left, or there are more than 127 sources.
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
        raise BadInput(f"--max_length={length}: no token of a response is left in any example; make it larger")
    if len(names) > np.iinfo(np.int8).max:
        raise BadInput(f"{len(names)} sources are too many: at most {np.iinfo(np.int8).max}")
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
    """Which examples share a row, by best fit decreasing: in order of their first members, each in order."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows with so much room
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
    """``encode_pieces``; a mistake names the row."""
    try:
        return tokenizer.encode_pieces(texts, start=not starts)
    except BadInput:
        for row, text in zip(rows, texts, strict=True):
            try:
                tokenizer.encode_pieces([text], start=not starts)
            except BadInput as error:
                raise BadInput(f"{row.where}: {error}") from None
        raise
