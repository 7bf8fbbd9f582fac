"""Cleaning before sampling: drops rows that duplicate other rows, and rows that repeat evaluation prompts.

- *Contamination*: a row that shares 13 consecutive words with an evaluation prompt, in its prompt, its response or a
  later turn (GPT-3, arXiv 2005.14165, appendix C). Prompts of 8 to 12 words are matched as a whole (8 is the minimum
  that GPT-3 compared). Shorter prompts are too unspecific to search for in longer texts: a row is dropped only if one
  of its texts consists of exactly these words. Unlike GPT-3, we drop the row instead of the words, and do not ignore
  frequent n-grams: the matched words are reported, so that boilerplate can be distinguished from answers.
- *Exact duplicates*: rows that are equal except for case, width and white space.
- *Near duplicates*: rows whose sets of word 5-grams have a Jaccard similarity of at least ``SIMILARITY`` with a kept
  row. The search is exact, by prefix filtering (Bayardo et al. 2007; Xiao et al. 2008), not by sampling hashes.

The first of several equal rows is kept; sources are compared with each other in the order in which they are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from instrdiv.data.ngrams import Words, normalize, words_of
from instrdiv.data.schemas import TextRow
from instrdiv.runtime.tables import Table

#: Number of consecutive shared words that count as contamination, and the minimum length of a prompt that is matched
#: as a whole.
NGRAM, SHORTEST = 13, 8
#: Length in words of the n-grams that near duplicates are compared by, and their minimum similarity.
SHINGLE, SIMILARITY = 5, 0.8
#: Which duplicates are dropped: none, exact ones, or exact and near ones.
DUPLICATES = ("none", "exact", "near")
#: Reasons for dropping rows. A row is counted under the first that applies.
REASONS = ("contamination", "exact duplicate", "near duplicate")
#: Columns of cleaning.csv: per source and reason, how many rows were kept and dropped, with an example.
CLEANING_COLUMNS = ("source", "reason", "kept", "dropped", "example", "example_like", "example_matched")
#: Columns of dropped.csv: a dropped row, and what it repeats. ``matched`` is the words that it shares with an
#: evaluation prompt, or its similarity to another row.
DROPPED_COLUMNS = ("source", "where", "reason", "like", "matched")

_TEXTS = 10_000  # processed at a time, to bound the memory


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A dropped row.

    Attributes:
      row: the row itself.
      reason: one of ``REASONS``.
      like: the row, or the evaluation prompt, that it repeats.
      matched: the words that both share, or their similarity.
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
    """The kept rows by source, and the dropped ones, in order.

    Args:
      sources: name -> rows.
      evaluation: rows whose prompts must not be trained on.
      duplicates: one of ``DUPLICATES``.
      say: called with status messages.
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
        say(f"looking for exact duplicates among {len(rows):,} rows")
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
    """cleaning.csv and dropped.csv: counts of kept and dropped rows per source, and the list of dropped rows."""
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
    """The texts of a row, turn by turn, without the system prompt."""
    return [row.prompt, row.response, *(text for turn in row.turns for text in turn)]


def whole(row: TextRow) -> str:
    """A row as one text, system prompt and all turns included."""
    return "\n\n".join(text for text in (row.system, *texts_of(row)) if text)


def contaminated(texts: Sequence[str], prompts: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yields (text index, prompt index, shared words) for every text that repeats an evaluation prompt; of several
    matches, the first in the text."""
    asked = Words.of(prompts)
    lengths = asked.lengths
    # The n-grams to search for, by length: their sorted hashes, and the prompt that each comes from.
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
        found: dict[int, tuple[int, int, int]] = {}  # text -> (index of the first word, number of words, prompt)
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
    """int64 [N]: the first text equal to this one, ignoring case, width and white space; -1 if it is the first."""
    first: dict[str, int] = {}
    earliest = [first.setdefault(normalize(text), number) for number, text in enumerate(texts)]
    return np.array([-1 if one == number else one for number, one in enumerate(earliest)], np.int64)


def near_duplicates(
    texts: Sequence[str], least: float = SIMILARITY, say: Callable[[str], None] = lambda line: None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds, for each text, the earlier text that it nearly duplicates, and their similarity.

    In order, each text is kept unless it is similar to a text that was kept. Every dropped text is therefore similar to
    a kept one, and of a chain a ~ b ~ c whose ends differ, only b is dropped. Texts are compared by their sets of word
    5-grams (of all their words as one n-gram, if there are fewer than 5). Texts without words are kept.

    Returns:
      int64 [N]: the most similar kept text, the earliest of several; -1 if the text itself is kept.
      float64 [N]: their Jaccard similarity; 0 if the text itself is kept.
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
    """The shingle sets of N texts, each sorted from the rarest to the most frequent shingle.

    Attributes:
      members: int64 [S], all sets concatenated; a shingle is represented by its frequency rank.
      starts: int64 [N + 1]; set i is ``members[starts[i] : starts[i + 1]]``.
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
        # Sorted by text, then by rank; repeated shingles of a text count once.
        keys = np.sort(np.concatenate(of_texts) * max(len(distinct), 1) + rank[inverse])
        keys = keys[np.diff(keys, prepend=-1) > 0]
        of_text, members = np.divmod(keys, max(len(distinct), 1))
        return cls(members, np.cumsum([0, *np.bincount(of_text, minlength=len(texts))]))

    def __getitem__(self, number: int) -> np.ndarray:
        return self.members[self.starts[number] : self.starts[number + 1]]

    def count(self, numbers: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """int64: how many members of each of these non-empty sets are in ``chosen`` (bool [shingles])."""
        sizes = self.sizes[numbers]
        begins = np.cumsum(sizes) - sizes
        places = np.repeat(self.starts[numbers] - begins, sizes) + np.arange(sizes.sum())
        return np.add.reduceat(chosen[self.members[places]], begins, dtype=np.int64)


class _PrefixIndex:
    """An index of the kept sets by the members of their prefixes.

    The prefix of a set is its rarest members, just enough that two sets which share only members outside their prefixes
    cannot be similar. The prefixes of two similar sets therefore share a member, and from the first such member
    on, each set has enough members left to reach the overlap that the similarity requires.
    """

    def __init__(self, sets: _Sets, least: float):
        self._sizes, self._share = sets.sizes, least / (1 + least)  # _share: needed overlap / sum of both sizes
        lengths = sets.sizes - np.ceil(least * sets.sizes - 1e-9).astype(np.int64) + 1
        lengths[sets.sizes == 0] = 0
        in_prefix = np.arange(len(sets.members)) < np.repeat(sets.starts[:-1] + lengths, sets.sizes)
        _, self._members, counts = np.unique(sets.members[in_prefix], return_inverse=True, return_counts=True)
        self._starts = np.cumsum([0, *lengths])
        # Member m is in the prefixes of the sets _kept[_begins[m] : _ends[m]], which have _left members from m on.
        self._begins = np.cumsum([0, *counts])[:-1]
        self._ends = self._begins.copy()
        self._kept, self._left = np.empty((2, len(self._members)), np.int32)
        self._met = np.full(len(sets.sizes), -1, np.int32)  # the last query for which each set was found

    def _prefix(self, number: int) -> np.ndarray:
        return self._members[self._starts[number] : self._starts[number + 1]]

    def keep(self, number: int) -> None:
        members = self._prefix(number)
        places = self._ends[members]
        self._kept[places], self._left[places] = number, self._sizes[number] - np.arange(len(members))
        self._ends[members] += 1

    def candidates(self, number: int) -> np.ndarray:
        """int64, ascending: the kept sets that can be similar to this one, judging by their prefixes."""
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
