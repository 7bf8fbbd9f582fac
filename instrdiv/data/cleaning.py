"""What leaves a data set before it is sampled: rows that repeat others, and rows that repeat evaluation prompts.

- *Contamination*: a row that has 13 words in a row in common with an evaluation prompt, in its prompt, its response or
  a later turn (GPT-3, arXiv 2005.14165, appendix C). A prompt of 8 to 12 words is looked for as a whole (8 is the least
  that GPT-3 compared). One of fewer says too little to be looked for in longer texts: a row goes only where one of its
  texts has these very words. Unlike GPT-3 we drop the row, not the words, and ignore no 13 words for being frequent:
  what matched is told, so that boilerplate can be told from answers.
- *Exact duplicates*: rows that are equal except for case, width and white space.
- *Near duplicates*: rows whose sets of 5-grams of words have a Jaccard similarity of at least ``SIMILARITY`` with a row
  that is kept. Found exactly, by prefix filtering (Bayardo et al. 2007; Xiao et al. 2008), not by sampling hashes.

The first of equal rows stays; sources are compared with each other in the order in which they are named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from instrdiv.data.ngrams import Words, normalize, words_of
from instrdiv.data.schemas import TextRow
from instrdiv.runtime.tables import Table

#: Words in a row that contaminate, and the fewest of a prompt that is looked for as a whole.
NGRAM, SHORTEST = 13, 8
#: Words of the n-grams by which near duplicates are compared, and how similar these are.
SHINGLE, SIMILARITY = 5, 0.8
#: What duplicates are dropped: none, exact ones, or near ones, too.
DUPLICATES = ("none", "exact", "near")
#: Why rows go. One is counted under the first that applies.
REASONS = ("contamination", "exact duplicate", "near duplicate")
#: Columns of cleaning.csv: of the rows of a source, how many were kept, and how many dropped for a reason; an example.
CLEANING_COLUMNS = ("source", "reason", "kept", "dropped", "example", "example_like", "example_matched")
#: Columns of dropped.csv: a row that is not used, and what it repeats. ``matched`` is the words that it has in common
#: with an evaluation prompt, or how similar it is to another row.
DROPPED_COLUMNS = ("source", "where", "reason", "like", "matched")

_TEXTS = 10_000  # looked through at a time; bounds the memory


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Why a row is not used.

    Attributes:
      row: itself.
      reason: one of ``REASONS``.
      like: the row, or the evaluation prompt, that it repeats.
      matched: the words that both have, or how similar they are.
    """

    row: TextRow
    reason: str
    like: TextRow
    matched: str


def clean(
    sources: Mapping[str, Sequence[TextRow]],
    evaluation: Sequence[TextRow] = (),
    duplicates: str = "none",
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, list[TextRow]], list[Dropped]]:
    """The rows that stay, by source, and those that go, in their order.

    Args:
      sources: name -> rows.
      evaluation: rows whose prompts must not be trained on.
      duplicates: one of ``DUPLICATES``.
      say: is told what is being done.
    """
    rows = [row for of_source in sources.values() for row in of_source]
    dropped: dict[int, Dropped] = {}
    if evaluation:
        say(f"looking for {len(evaluation):,} evaluation prompts in {len(rows):,} rows")
        prompts = [row.prompt for row in evaluation]
        texts = [(number, text) for number, row in enumerate(rows) for text in texts_of(row)]
        for place, prompt, words in contaminated([text for _, text in texts], prompts):
            number = texts[place][0]
            dropped.setdefault(number, Dropped(rows[number], "contamination", evaluation[prompt], words))
    if duplicates != "none":
        say(f"looking for rows that are equal among {len(rows):,}")
        rest = [number for number in range(len(rows)) if number not in dropped]
        for place, first in enumerate(exact_duplicates([whole(rows[number]) for number in rest]).tolist()):
            if first >= 0:
                dropped[rest[place]] = Dropped(rows[rest[place]], "exact duplicate", rows[rest[first]], "1.00")
    if duplicates == "near":
        rest = [number for number in rest if number not in dropped]
        like, similarity = near_duplicates([whole(rows[number]) for number in rest], say=say)
        for place in np.flatnonzero(like >= 0).tolist():
            found = f"{similarity[place]:.2f}"
            dropped[rest[place]] = Dropped(rows[rest[place]], "near duplicate", rows[rest[like[place]]], found)
    kept: dict[str, list[TextRow]] = {}
    numbers = iter(range(len(rows)))
    for name, of_source in sources.items():
        kept[name] = [row for row, number in zip(of_source, numbers, strict=False) if number not in dropped]
    return kept, [dropped[number] for number in sorted(dropped)]


def cleaning_tables(kept: Mapping[str, Sequence[TextRow]], dropped: Sequence[Dropped]) -> dict[str, Table]:
    """cleaning.csv and dropped.csv: the rows that stay, by source, and those that go."""
    counts = []
    for source, stay in kept.items():
        for reason in REASONS:
            gone = [one for one in dropped if one.row.source == source and one.reason == reason]
            example = (gone[0].row.where, gone[0].like.where, gone[0].matched) if gone else ("", "", "")
            cells = (source, reason, len(stay), len(gone), *example)
            counts.append(dict(zip(CLEANING_COLUMNS, cells, strict=True)))
    listed = ((one.row.source, one.row.where, one.reason, one.like.where, one.matched) for one in dropped)
    rows = [dict(zip(DROPPED_COLUMNS, row, strict=True)) for row in listed]
    return {"cleaning.csv": Table(CLEANING_COLUMNS, counts), "dropped.csv": Table(DROPPED_COLUMNS, rows)}


def texts_of(row: TextRow) -> list[str]:
    """What is said in a row, turn by turn; the system prompt is not looked at."""
    return [row.prompt, row.response, *(text for turn in row.turns for text in turn)]


def whole(row: TextRow) -> str:
    """A row as one text, system prompt and all turns included."""
    return "\n\n".join(text for text in (row.system, *texts_of(row)) if text)


def contaminated(texts: Sequence[str], prompts: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(number of the text, number of the prompt, words in common) of every text that repeats an evaluation prompt; of
    several matches, the one that comes first in the text."""
    asked = Words.of(prompts)
    lengths = asked.lengths
    # What is looked for, by length: the hashes of its n-grams, sorted, and the prompts that they are of.
    wanted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for n in range(SHORTEST, NGRAM + 1):
        grams, places = asked.ngrams(n)
        of_prompt = asked.text_at(places)
        chosen = (lengths[of_prompt] >= n) if n == NGRAM else (lengths[of_prompt] == n)
        if chosen.any():
            hashes, first = np.unique(grams[chosen], return_index=True)
            wanted[n] = hashes, of_prompt[chosen][first]
    few = {tuple(words_of(prompts[i])): i for i in np.flatnonzero((lengths > 0) & (lengths < SHORTEST))[::-1].tolist()}
    for start in range(0, len(texts), _TEXTS):
        some = texts[start : start + _TEXTS]
        words = Words.of(some)
        found: dict[int, tuple[int, int, int]] = {}  # text -> (place of the first word, its number of words, prompt)
        for n, (hashes, of_prompt) in wanted.items():
            grams, places = words.ngrams(n)
            at = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            hits = np.flatnonzero(hashes[at] == grams)
            for text, hit in zip(words.text_at(places[hits]).tolist(), hits.tolist(), strict=True):
                match = (int(places[hit] - words.starts[text]), n, int(of_prompt[at[hit]]))
                found[text] = min(found.get(text, match), match)
        for text in np.flatnonzero((words.lengths > 0) & (words.lengths < SHORTEST)).tolist() if few else ():
            said = tuple(words_of(some[text]))
            if said in few:
                found[text] = (0, len(said), few[said])
        for text, (place, n, prompt) in sorted(found.items()):
            yield start + text, prompt, " ".join(words_of(some[text])[place : place + n])


def exact_duplicates(texts: Sequence[str]) -> np.ndarray:
    """int64 [N]: the first text that equals this one, whatever its case, width and white space; -1 if it is."""
    first: dict[str, int] = {}
    earliest = [first.setdefault(normalize(text), number) for number, text in enumerate(texts)]
    return np.array([-1 if one == number else one for number, one in enumerate(earliest)], np.int64)


def near_duplicates(
    texts: Sequence[str], least: float = SIMILARITY, say: Callable[[str], None] = lambda line: None
) -> tuple[np.ndarray, np.ndarray]:
    """Which earlier text each text repeats, and how similar the two are.

    Going through the texts in order, one is kept unless it is similar to one that was kept. So what is dropped is
    similar to something that stays, and of a chain a ~ b ~ c, whose ends differ, only b goes. Similarity is that of
    the sets of 5-grams of words (of all words where there are fewer). Texts without words are kept.

    Returns:
      int64 [N]: the most similar kept text, the earliest of several; -1 if this one is kept.
      float64 [N]: the Jaccard similarity of the two; 0 if this one is kept.
    """
    sets = _Sets.of_shingles(texts)
    index = _PrefixIndex(sets, least)
    like, similarity = np.full(len(texts), -1), np.zeros(len(texts))
    own = np.zeros(sets.members.max(initial=0) + 1, bool)
    for number, size in enumerate(sets.sizes.tolist()):
        if number % _TEXTS == 0:
            say(f"looking for near duplicates: {number:,} of {len(texts):,} rows")
        candidates = index.candidates(number)
        if len(candidates):
            own[sets[number]] = True
            common = sets.count(candidates, own)
            own[sets[number]] = False
            found = common / (size + sets.sizes[candidates] - common)
            best = int(found.argmax())
            if found[best] >= least:
                like[number], similarity[number] = candidates[best], found[best]
                continue
        index.keep(number)
    return like, similarity


class _Sets:
    """The sets of shingles of N texts, each from the rarest to the most frequent.

    Attributes:
      members: int64 [S], all sets one after another; a shingle is named by its rank in frequency.
      starts: int64 [N + 1]: set i has the members ``starts[i]`` to ``starts[i + 1]``.
      sizes: int64 [N].
    """

    def __init__(self, members: np.ndarray, starts: np.ndarray):
        self.members, self.starts, self.sizes = members, starts, np.diff(starts)

    @classmethod
    def of_shingles(cls, texts: Sequence[str]) -> _Sets:
        words = Words.of(texts)
        shingles, of_texts = [], []
        for n in range(1, SHINGLE + 1):
            grams, places = words.ngrams(n)
            of_text = words.text_at(places)
            chosen = np.minimum(words.lengths[of_text], SHINGLE) == n
            shingles.append(grams[chosen])
            of_texts.append(of_text[chosen])
        distinct, inverse, counts = np.unique(np.concatenate(shingles), return_inverse=True, return_counts=True)
        rank = np.empty(len(distinct), np.int64)
        rank[np.argsort(counts, kind="stable")] = np.arange(len(distinct))
        # Sorted by text, then by rank; what a text says twice counts once.
        keys = np.sort(np.concatenate(of_texts) * max(len(distinct), 1) + rank[inverse])
        keys = keys[np.diff(keys, prepend=-1) > 0]
        of_text, members = np.divmod(keys, max(len(distinct), 1))
        return cls(members, np.cumsum([0, *np.bincount(of_text, minlength=len(texts))]))

    def __getitem__(self, number: int) -> np.ndarray:
        return self.members[self.starts[number] : self.starts[number + 1]]

    def count(self, numbers: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """int64: how many members of each of these sets, none of which is empty, are chosen (bool [shingles])."""
        sizes = self.sizes[numbers]
        begins = np.cumsum(sizes) - sizes
        places = np.repeat(self.starts[numbers] - begins, sizes) + np.arange(sizes.sum())
        return np.add.reduceat(chosen[self.members[places]], begins, dtype=np.int64)


class _PrefixIndex:
    """The sets that are kept, by the members of their prefixes.

    The prefix of a set is its rarest members: all but so many that two sets which have only the others in common could
    not be similar. So two similar sets have a member of both prefixes in common, and after the first such member each
    has enough others left.
    """

    def __init__(self, sets: _Sets, least: float):
        self._sizes, self._share = sets.sizes, least / (1 + least)  # the latter: in common, of the sum of both sizes
        lengths = sets.sizes - np.ceil(least * sets.sizes - 1e-9).astype(np.int64) + 1
        lengths[sets.sizes == 0] = 0
        in_prefix = np.arange(len(sets.members)) < np.repeat(sets.starts[:-1] + lengths, sets.sizes)
        _, self._members, counts = np.unique(sets.members[in_prefix], return_inverse=True, return_counts=True)
        self._starts = np.cumsum([0, *lengths])
        # Member m is in the prefixes of the sets _kept[_begins[m] : _ends[m]]; from it on, they have _left members.
        self._begins = np.cumsum([0, *counts])[:-1]
        self._ends = self._begins.copy()
        self._kept, self._left = np.empty((2, len(self._members)), np.int32)
        self._met = np.full(len(sets.sizes), -1, np.int32)  # the set for which each one was last met

    def _prefix(self, number: int) -> np.ndarray:
        return self._members[self._starts[number] : self._starts[number + 1]]

    def keep(self, number: int) -> None:
        members = self._prefix(number)
        places = self._ends[members]
        self._kept[places], self._left[places] = number, self._sizes[number] - np.arange(len(members))
        self._ends[members] += 1

    def candidates(self, number: int) -> np.ndarray:
        """int64, ascending: the kept sets that can be similar to this one, for all that their prefixes tell."""
        members, size = self._prefix(number), self._sizes[number]
        found = []
        for place in np.flatnonzero(self._ends[members] > self._begins[members]).tolist():
            span = slice(self._begins[members[place]], self._ends[members[place]])
            kept, left = self._kept[span], self._left[span]
            first = self._met[kept] != number
            kept, left = kept[first], left[first]
            self._met[kept] = number
            needed = self._share * (size + self._sizes[kept]) - 1e-9
            found.append(kept[np.minimum(left, size - place) >= needed])
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
