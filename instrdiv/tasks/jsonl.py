"""A task read from a JSON Lines file with ``instruction``, ``input`` and ``answer``; for data that needs the host.

Whole instructions are held out, ranked by a hash of their text: none of their rows is ever trained on. For each trained
instruction, a share of the rows is held back so that ``seen`` has fresh inputs; an instruction with a single input is
both trained and tested on it. Nothing is dropped: all rows are padded to the longest, with one token per character.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import STATIC, TABLE, field
from instrdiv.tasks.conditions import Condition, of_the_prompt
from instrdiv.tasks.instructions import Instructions, TooFew, as_opaque
from instrdiv.tasks.task import Example, Sizes, Task, register
from instrdiv.tasks.tokens import FIRST_TOKEN, SPECIAL, answer_tokens, prompt_tokens

FIELDS = ("instruction", "input", "answer")


@dataclasses.dataclass(frozen=True)
class RowTable(Instructions):
    """N instructions with their rows, padded to E rows each.

    Attributes:
      text, text_length: [N, P] tokens counted from 0, and int32 [N].
      inputs, input_lengths: [N, E, L] and int32 [N, E].
      answers, answer_lengths: [N, E, A] and int32 [N, E].
      trained: int32 [N], how many rows, counted from the first, may be trained on.
      rows: int32 [N], number of rows.
      corpus: uint8 [N, 8], digest of the whole file, so that a run resumes only with the rows it started with.
    """

    text: np.ndarray
    text_length: np.ndarray
    inputs: np.ndarray
    input_lengths: np.ndarray
    answers: np.ndarray
    answer_lengths: np.ndarray
    trained: np.ndarray
    rows: np.ndarray
    corpus: np.ndarray

    def arrays(self) -> Any:
        return {name: array for name, array in super().arrays().items() if name != "corpus"}

    def keys(self) -> np.ndarray:
        """Keys made from the instruction texts alone."""
        return as_opaque(np.concatenate([self.text.view(np.uint8), self.text_length[:, None].view(np.uint8)], axis=1))


class Corpus(NamedTuple):
    """The contents of a file.

    Attributes:
      rows: instruction -> (input, answer) of its rows, in file order.
      characters: one per token; see ``Task.characters``.
      longest: number of characters in the longest instruction, input and answer.
      ragged: whether prompts differ in length.
      digest: of all rows.
    """

    rows: Mapping[str, Sequence[tuple[str, str]]]
    characters: str
    longest: tuple[int, int, int]
    ragged: bool
    digest: bytes


def read_corpus(path: str) -> Corpus:
    """The corpus in a file, read again if the file has changed. Raises BadInput, naming the line."""
    if not path:
        raise BadInput("--config.data: must name a JSON Lines file with instruction, input and answer")
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise BadInput(f"--config.data={path}: cannot be read ({error.strerror}); give a JSON Lines file") from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: str, changed: int, size: int) -> Corpus:
    rows: dict[str, dict[tuple[str, str], None]] = {}
    try:
        # Not splitlines: a text may contain a Unicode line separator.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--config.data={path}: cannot be read as text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            instruction, text, answer = (row[name] for name in FIELDS)
            f"{instruction}{text}{answer}".encode()  # fails for an unpaired surrogate
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"--config.data={path}: line {number} is not an object with {', '.join(FIELDS)} "
                           f"({type(error).__name__}: {error})") from None  # fmt: skip
        if not all(isinstance(part, str) for part in (instruction, text, answer)) or not instruction:
            raise BadInput(
                f"--config.data={path}: line {number}: {', '.join(FIELDS)} must be strings, the first not empty"
            )
        rows.setdefault(instruction, {}).setdefault((text, answer))
    if len(rows) < 3:
        raise BadInput(f"--config.data={path}: has {len(rows)} instructions; at least three are needed, two for tests")
    everything = [(i, x, a) for i, of_instruction in rows.items() for x, a in of_instruction]
    letters = sorted(set().union(*(set(part) for row in everything for part in row)))
    # A special character that also occurs in the texts is shown as a private-use character.
    private = (c for c in map(chr, range(0xE000, 0xF900)) if c not in letters)
    special = "".join(c if c not in letters else next(private) for c in SPECIAL)
    longest = tuple(max(map(len, column)) for column in zip(*everything, strict=True))
    ragged = len({(len(i), len(x)) for i, x, _ in everything}) > 1
    digest = hashlib.blake2b(json.dumps(everything).encode(), digest_size=8).digest()
    return Corpus({i: list(of) for i, of in rows.items()}, special + "".join(letters), longest, ragged, digest)  # type: ignore[arg-type]


def _order(texts: Sequence[str], seed: int, what: str) -> list[int]:
    """Indices of the texts, in an order determined by their hashes and the seed."""
    keyed = [hashlib.blake2b(f"{what} {seed} {text}".encode(), digest_size=8).digest() for text in texts]
    return sorted(range(len(texts)), key=lambda place: keyed[place])


@dataclasses.dataclass(frozen=True)
class JsonSource:
    """The instructions of a file, in a different order per seed; see ``instructions.Source``.

    ``digest`` is that of the file, so a source from before the file changed is a different one.
    """

    data: str
    digest: bytes
    held_out_share: float
    test_rows: float
    split_seed: int

    @property
    def flag(self) -> str:
        return f"--config.data={self.data}"

    @property
    def remedy(self) -> str:
        return "lower --tests and --dev_tests, or provide more data"

    def _side(self, held_out: bool) -> list[str]:
        """The texts of one side, ranked by their hashes: at least two are held out, and at least one is not."""
        texts = list(read_corpus(self.data).rows)
        order = _order(texts, self.split_seed, "split")
        count = min(max(2, round(self.held_out_share * len(texts))), len(texts) - 1)
        return [texts[place] for place in (order[:count] if held_out else sorted(order[count:]))]

    def capacity(self, held_out: bool) -> int | None:
        return None if held_out else len(self._side(held_out=False))

    def none(self) -> RowTable:
        return self._table([])

    def pool(self, seed: int, size: int) -> RowTable:
        texts = self._side(held_out=False)
        if size > len(texts):
            raise TooFew(f"{size} training instructions were requested, but the file has only {len(texts)}")
        rows = read_corpus(self.data).rows
        chosen = [texts[place] for place in _order(texts, seed, "pool")[:size]]
        most = max(map(len, rows.values()))  # over all of them, so that the pools of all seeds have one shape
        return self._table([(text, *self._split(rows[text])) for text in chosen], most)

    def held_out(self, size: int) -> RowTable:
        return self.tests(0, size)[1]

    def tests(self, dev_tests: int, tests: int) -> tuple[RowTable, RowTable]:
        """Rows of a third of the held-out instructions, to tune on, and of the others, to test on; one entry per row.

        Which instructions those are does not depend on the number of tests: none to tune on is ever tested.
        """
        texts = self._side(held_out=True)
        first = max(1, len(texts) // 3) if dev_tests else 0
        return self._rows_of(texts[:first], dev_tests), self._rows_of(texts[first:], tests)

    def _rows_of(self, texts: Sequence[str], count: int) -> RowTable:
        """``count`` rows of these instructions, taken in turn."""
        rows = read_corpus(self.data).rows
        most = max((len(rows[text]) for text in texts), default=0)
        turns = [(text, rows[text][turn]) for turn in range(most) for text in texts if turn < len(rows[text])]
        if len(turns) < count:
            raise TooFew(f"{count} held-out rows were requested, but this split has only {len(turns)} "
                         f"(held-out instructions: {len(texts)})", len(turns))  # fmt: skip
        return self._table([(text, [row], 0) for text, row in turns[:count]])

    def _split(self, rows: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], int]:
        """The rows of an instruction, training rows first, and the number of those; no input is on both sides."""
        inputs = list(dict.fromkeys(text for text, _ in rows))
        if len(inputs) < 2:
            return list(rows), len(rows)
        kept_back = min(max(1, round(self.test_rows * len(inputs))), len(inputs) - 1)
        tested = {inputs[place] for place in _order(inputs, self.split_seed, "rows")[:kept_back]}
        train, test = ([row for row in rows if (row[0] in tested) == side] for side in (False, True))
        return train + test, len(train)

    def _table(self, entries: Sequence[tuple[str, Sequence[tuple[str, str]], int]], most: int = 1) -> RowTable:
        """A table of (instruction, rows, how many of them may be trained on), with room for ``most`` rows each."""
        corpus = read_corpus(self.data)
        token = {character: i for i, character in enumerate(corpus.characters[FIRST_TOKEN:])}
        kind = np.uint8 if len(token) <= 256 else np.int32

        def padded(texts: Sequence[Sequence[str]], width: int, most: int) -> tuple[np.ndarray, np.ndarray]:
            """[N, most, width] and [N, most]."""
            shape = (len(texts), most)
            tokens, lengths = np.zeros((*shape, width), kind), np.zeros(shape, np.int32)
            for i, of_entry in enumerate(texts):
                for j, text in enumerate(of_entry):
                    tokens[i, j, : len(text)] = [token[character] for character in text]
                    lengths[i, j] = len(text)
            return tokens, lengths

        of_text, of_input, of_answer = corpus.longest
        text, text_length = padded([[text] for text, _, _ in entries], of_text, 1)
        inputs, input_lengths = padded([[x for x, _ in rows] for _, rows, _ in entries], of_input, most)
        answers, answer_lengths = padded([[a for _, a in rows] for _, rows, _ in entries], of_answer, most)
        trained = np.array([count for _, _, count in entries], np.int32)
        rows = np.array([len(rows) for _, rows, _ in entries], np.int32)
        digest = np.tile(np.frombuffer(corpus.digest, np.uint8), (len(entries), 1))
        return RowTable(
            *(text[:, 0], text_length[:, 0], inputs, input_lengths, answers, answer_lengths, trained, rows, digest)
        )


def _of_the_prompt(setting: Any) -> list[Condition]:
    """Held-out instructions unchanged, and blanked; not shuffled, since a file lacks the answers for other pairs."""
    return [condition for condition in of_the_prompt(setting) if condition.prompt != "shuffled"]


@register
@dataclasses.dataclass(frozen=True)
class JsonLines(Task):
    """Instructions, inputs and answers from a file."""

    name: ClassVar[str] = "jsonl"
    finite: ClassVar[bool] = True
    suites: ClassVar[Mapping[str, Any]] = {"held_out": _of_the_prompt}

    data: str = field("", "a JSON Lines file with instruction, input and answer", kind=STATIC)
    test_rows: float = field(
        0.2, "share of a trained instruction's rows held back for the split seen", kind=TABLE,
        bound=lambda share: None if 0 < share < 1 else "must be between 0 and 1",
    )  # fmt: skip

    @property
    def shape(self) -> Sizes:
        corpus = read_corpus(self.data)
        instruction, text, answer = corpus.longest
        most = max(map(len, corpus.rows.values()))
        return Sizes(
            vocabulary=len(corpus.characters),
            prompt=instruction + text + 2,
            answer=answer,
            ragged=corpus.ragged,
            instruction_bytes=instruction + most * (text + answer + 8),
        )

    @property
    def characters(self) -> str:
        return read_corpus(self.data).characters

    @property
    def source(self) -> JsonSource:
        return JsonSource(
            self.data, read_corpus(self.data).digest, self.held_out_share, self.test_rows, self.split_seed
        )

    @staticmethod
    def make_input(shape: Sizes, knobs: Any, instruction: Any, key: jax.Array) -> Any:
        """A row of the instruction: for indices from 0 up, the training rows in turn; below 0, one of the others."""
        trained, rows = instruction["trained"], instruction["rows"]
        tests = jax.numpy.maximum(rows - trained, 1)  # a single row is both trained on and tested
        # Hashed: tests cycle through the instructions, so taking rows in turn would use one of 2 rows for each of 16.
        mixed = (jax.numpy.uint32(-1 - key) * jax.numpy.uint32(0x9E3779B1)) >> 16
        test = rows - 1 - (mixed % jax.numpy.uint32(tests)).astype(jax.numpy.int32)
        place = jax.numpy.where(key >= 0, key % jax.numpy.maximum(trained, 1), test)
        names = ("inputs", "input_lengths", "answers", "answer_lengths")
        return tuple(instruction[name][place] for name in names)

    @staticmethod
    def spell(shape: Sizes, instruction: Any, input: Any) -> Example:
        text, length, answer, answer_length = input
        lengths = (instruction["text_length"], length) if shape.ragged else None
        prompt, padding = prompt_tokens((instruction["text"], text), lengths)
        right, loss_mask = answer_tokens(answer.astype(jax.numpy.int32), answer_length)
        tokens = jax.numpy.concatenate([prompt, right]).astype(jax.numpy.int32)
        return Example(tokens, padding, loss_mask, facts={})

    @staticmethod
    def testable(trained: RowTable, instructions: RowTable) -> RowTable:
        """The instructions whose text was never trained on; each row is a separate test."""
        return instructions[~np.isin(instructions.keys(), trained.keys())]

    def check_task(self) -> None:
        read_corpus(self.data)
