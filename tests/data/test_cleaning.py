"""Duplicates and contamination against brute force over all pairs."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.data.cleaning import clean, contaminated, exact_duplicates, near_duplicates, whole
from instrdiv.data.ngrams import words_of
from instrdiv.data.schemas import TextRow

WORDS = [f"w{i}" for i in range(400)]
sentences = st.lists(st.sampled_from("abcd"), max_size=30).map(" ".join)


def said(count, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def shingles(text):
    words = words_of(text)
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))} if words else set()


def brute_force_near(texts, least):
    kept, like, similarity = [], [], []
    for number, own in enumerate(map(shingles, texts)):
        found = [(len(own & other) / len(own | other), -at) for at, other in kept if own and other]
        best, at = max(found, default=(0, 0))
        repeats = best >= least
        like.append(-at if repeats else -1)
        similarity.append(best if repeats else 0)
        if not repeats:
            kept.append((number, own))
    return like, similarity


def brute_force_contaminated(texts, prompts):
    found = []
    for number, words in enumerate(map(words_of, texts)):
        spans = {}
        for place, asked in reversed([*enumerate(map(words_of, prompts))]):
            for n in {min(len(asked), 13)} if len(asked) >= 8 else ():
                grams = {tuple(asked[i : i + n]) for i in range(len(asked) - n + 1)}
                for at in range(len(words) - n + 1):
                    if tuple(words[at : at + n]) in grams:
                        spans[at, n] = place
            if 0 < len(asked) < 8 and asked == words:
                spans[0, len(asked)] = place
        if spans:
            at, n = min(spans)
            found.append((number, spans[at, n], " ".join(words[at : at + n])))
    return found


class TestExactDuplicates:
    def test_are_equal_but_for_case_width_and_white_space(self):
        texts = ["Sort it.", "sort  IT.\n", "Sort it!", "ｓort it.", "sort it!", ""]
        assert exact_duplicates(texts).tolist() == [-1, 0, -1, 0, 2, -1]


class TestNearDuplicates:
    @settings(max_examples=200)
    @given(st.lists(sentences, max_size=12), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
    def test_are_those_of_brute_force(self, texts, least):
        like, similarity = near_duplicates(texts, least)
        expected = brute_force_near(texts, least)
        assert like.tolist() == expected[0] and similarity == pytest.approx(expected[1], abs=0)

    def test_are_those_of_brute_force_among_edited_prose(self):
        generator = random.Random(0)
        texts = [said(generator.randint(1, 60), i) for i in range(150)]
        for _ in range(150):
            words = generator.choice(texts).split()
            for _ in range(generator.randint(0, 3)):
                words[generator.randrange(len(words))] = generator.choice(WORDS)
            texts.append(" ".join(words))
        like, similarity = near_duplicates(texts)
        assert (like.tolist(), similarity.tolist()) == brute_force_near(texts, 0.8)
        assert 30 < (like >= 0).sum() < 150  # the edits are on both sides of the threshold

    def test_the_ends_of_a_chain_stay(self):
        first = said(40, 0).split()
        middle = ["x", *first[1:]]
        last = [*middle[:-1], "y"]
        like, similarity = near_duplicates([" ".join(words) for words in (first, middle, last)], 0.94)
        assert like.tolist() == [-1, 0, -1]  # 35 of 37 shingles in common; the ends have 34 of 38
        assert similarity.tolist() == [0, 35 / 37, 0]

    def test_nothing_is_no_duplicate_of_nothing(self):
        assert near_duplicates(["", "...", "!"])[0].tolist() == [-1, -1, -1]
        assert near_duplicates([])[0].tolist() == []


class TestContaminated:
    @settings(max_examples=100)
    @given(st.lists(sentences, max_size=8), st.lists(sentences, max_size=8))
    def test_are_those_of_brute_force(self, texts, prompts):
        assert list(contaminated(texts, prompts)) == brute_force_contaminated(texts, prompts)

    def test_thirteen_words_are_enough_and_twelve_are_not(self):
        prompt = said(30, 1)
        middle = prompt.split()[7:]
        texts = [f"{said(9, i)} {' '.join(middle[:count])} {said(9, i)}" for i, count in enumerate((12, 13, 14))]
        assert list(contaminated(texts, [prompt])) == [
            (1, 0, " ".join(middle[:13])),
            (2, 0, " ".join(middle[:13])),
        ]

    def test_short_prompts_are_looked_for_whole_and_very_short_ones_must_be_all(self):
        eight, seven = said(8, 2), said(7, 3)
        texts = [f"so {eight} so", f"so {seven} so", seven.upper(), eight.rpartition(" ")[0]]
        assert [(text, prompt) for text, prompt, _ in contaminated(texts, [eight, seven])] == [(0, 0), (2, 1)]

    def test_case_and_punctuation_do_not_count(self):
        prompt = said(13, 4)
        (found,) = contaminated([f"Well: {prompt.upper().replace(' ', ', ')}!"], ["nothing", prompt])
        assert found == (0, 1, prompt)

    def test_where_there_are_more_texts_than_are_looked_through_at_a_time(self, monkeypatch):
        monkeypatch.setattr("instrdiv.data.cleaning._TEXTS", 3)
        prompt = said(13, 4)
        assert [text for text, *_ in contaminated(["a", prompt] * 4, [prompt])] == [1, 3, 5, 7]


def row(instruction, response, line=1, source="a", **parts):
    return TextRow(instruction, response, source, f"{source}.jsonl: line {line}", **parts)


class TestClean:
    evaluation = (row(said(20, 9), "secret", source="eval"), row("too short", "secret", source="eval"))

    def sources(self):
        asked = self.evaluation[0].prompt
        return {
            "a": [
                row(said(40, 0), "yes", 1),
                row(said(40, 0).upper(), "Yes", 2),  # an exact duplicate
                row(said(40, 0), "no", 3),  # a near duplicate: another answer
                row(said(40, 1), f"It is {asked}", 4),  # contaminated in its response
                row("too short", "yes", 5),  # contaminated: equal to a whole prompt
                row("too short to tell", "yes", 6),
            ],
            "b": [
                row(said(40, 1), "fine", 1, "b", turns=((asked, "so"),)),  # contaminated in a later turn
                row(said(40, 0), "yes", 2, "b"),  # repeats a row of another source
                row(said(40, 2), "fine", 3, "b"),
            ],
        }

    @pytest.mark.parametrize(
        "evaluated, duplicates, kept, reasons",
        [
            (False, "none", {"a": [1, 2, 3, 4, 5, 6], "b": [1, 2, 3]}, []),
            (False, "exact", {"a": [1, 3, 4, 5, 6], "b": [1, 3]}, ["a2 exact duplicate a1", "b2 exact duplicate a1"]),
            (
                True,
                "none",
                {"a": [1, 2, 3, 6], "b": [2, 3]},
                ["a4 contamination eval1", "a5 contamination eval1", "b1 contamination eval1"],
            ),
            (
                True,
                "near",
                {"a": [1, 6], "b": [3]},
                [
                    "a2 exact duplicate a1",
                    "a3 near duplicate a1",
                    "a4 contamination eval1",
                    "a5 contamination eval1",
                    "b1 contamination eval1",
                    "b2 exact duplicate a1",
                ],
            ),
        ],
    )
    def test_keeps_the_first_and_says_why_the_others_go(self, evaluated, duplicates, kept, reasons):
        sources = self.sources()
        stay, gone = clean(sources, self.evaluation if evaluated else (), duplicates)

        def short(row):
            return row.where.replace(".jsonl: line ", "")

        assert {name: [int(short(row)[1:]) for row in rows] for name, rows in stay.items()} == kept
        assert [f"{short(one.row)} {one.reason} {short(one.like)}" for one in gone] == reasons
        everything = [row for rows in sources.values() for row in rows]
        assert sorted(map(short, [*stay["a"], *stay["b"], *(one.row for one in gone)])) == sorted(
            map(short, everything)
        )

    def test_shows_what_matched(self):
        _, gone = clean(self.sources(), self.evaluation, "near")
        matched = {one.row.where: one.matched for one in gone}
        assert matched["a.jsonl: line 4"] == " ".join(said(20, 9).split()[:13])
        assert matched["a.jsonl: line 5"] == "too short" and matched["a.jsonl: line 2"] == "1.00"
        assert matched["a.jsonl: line 3"] == "0.95"  # 36 of 38 shingles: the last one includes the answer

    def test_all_of_a_row_is_compared(self):
        rows = [row("ask", "answer"), row("ask", "answer", system="be brief"), row("ask", "answer", input="this"),
                row("ask", "answer", turns=(("more", "no"),))]  # fmt: skip
        assert len({whole(row) for row in rows}) == 4
        assert not clean({"a": rows}, (), "exact")[1]
        assert len(clean({"a": [*rows, replace(rows[2], where="again")]}, (), "exact")[1]) == 1

    def test_of_nothing_is_nothing(self):
        assert clean({"a": []}, self.evaluation, "near") == ({"a": []}, [])
        assert np.array_equal(exact_duplicates([]), [])
