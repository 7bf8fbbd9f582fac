"""One-step rewriting against ``str.replace(x, y, 1)``, and Markov algorithms."""

import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import instrdiv
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.markov import occurrences, rewrite_letters

HARD_CASES = [
    ("aa", "b", "aaa"),  # occurrences overlap
    ("aba", "c", "ababa"),
    ("abcd", "x", "abc"),  # pattern longer than the input
    ("a", "", "bab"),  # empty replacement
    ("ab", "ab", "cab"),  # pattern = replacement
    ("a", "bb", "aaaa"),  # several occurrences
    ("ab", "c", "xaby"),
    ("a", "b", ""),  # empty input
    ("", "b", "aa"),  # the empty pattern occurs first at the very start
    ("c", "ddd", "abc"),  # at the end
    ("aab", "b", "aaab"),  # a false start
]

A = Alphabet(26)
P, R, T = 4, 4, 8


@pytest.mark.parametrize("pattern, replacement, text", HARD_CASES)
def test_rewrite_is_replace_once(pattern, replacement, text):
    assert instrdiv.rewrite(pattern, replacement, text) == text.replace(pattern, replacement, 1)


words = st.text("ab", max_size=P)


@given(words, words, st.text("ab", max_size=T))
def test_rewrite_is_replace_once_on_random_strings(pattern, replacement, text):
    assert instrdiv.rewrite(pattern, replacement, text) == text.replace(pattern, replacement, 1)


def padded(strings, size, fill):
    letters = np.full((len(strings), size), fill, np.uint8)
    for row, string in enumerate(strings):
        letters[row, : len(string)] = A.encode(string)
    return letters, np.array([len(string) for string in strings], np.int32)


def batched_rewrite(cases, fill=255):
    """The JAX version on many cases at once, as strings, with the number of occurrences."""
    columns = [padded(column, size, fill) for column, size in zip(zip(*cases, strict=True), (P, R, T), strict=True)]
    arguments = [array for column in columns for array in column]
    answers, lengths, counts = jax.jit(jax.vmap(lambda *a: rewrite_letters(*a, answer_size=T + R)))(*arguments)
    return [A.decode(a[:n]) for a, n in zip(np.asarray(answers), np.asarray(lengths), strict=True)], np.asarray(counts)


@pytest.mark.parametrize("fill", [0, 255])
def test_batched_rewrite_is_replace_once_on_every_small_case(fill):
    """Every pattern, replacement and text over two letters up to lengths 3, 2, 5, whatever the padding."""
    strings = {n: ["".join(s) for k in range(n + 1) for s in itertools.product("ab", repeat=k)] for n in (2, 3, 5)}
    cases = HARD_CASES[:-1] + list(itertools.product(strings[3], strings[2], strings[5]))
    answers, _ = batched_rewrite(cases, fill)
    assert answers == [text.replace(pattern, replacement, 1) for pattern, replacement, text in cases]


def test_occurrences_are_counted_with_overlaps():
    cases = [("aa", "", "aaaa"), ("ab", "", "cd"), ("aba", "", "ababa")]
    assert batched_rewrite(cases)[1].tolist() == [3, 0, 2]


@settings(max_examples=30, deadline=None)
@given(st.text("ab", min_size=1, max_size=P), st.text("ab", min_size=1, max_size=T))
def test_occurrences_are_where_the_pattern_starts(pattern, text):
    (pattern_P,), (n,) = padded([pattern], P, 255)
    (text_T,), (length,) = padded([text], T, 255)
    found = np.asarray(jax.jit(occurrences)(pattern_P, n, text_T, length))
    assert found.tolist() == [text[i : i + len(pattern)] == pattern for i in range(T + 1)]


def test_replacements_may_have_no_letters_at_all():
    (pattern, n), (text, length) = padded(["ab", "cd"], P, 0), padded(["xaby", "xaby"], T, 0)
    nothing = np.zeros((2, 0), np.uint8), np.zeros(2, np.int32)
    answers, lengths, _ = jax.jit(jax.vmap(lambda *a: rewrite_letters(*a, answer_size=T)))(
        pattern, n, *nothing, text, length
    )
    assert [A.decode(a[:n]) for a, n in zip(np.asarray(answers), np.asarray(lengths), strict=True)] == ["xy", "xaby"]


def test_the_empty_pattern_is_counted_as_python_does():
    assert batched_rewrite([("", "b", "aa")])[1].tolist() == ["aa".count("")]


class TestMarkovAlgorithm:
    def test_appends_the_reverse(self):
        """P2 (arXiv 2410.04717), appendix A: a string becomes itself and its reverse. Capitals and @ are markers."""
        letters = "ab"
        rules = [(f"{x.upper()}{y}", f"{y}{x.upper()}") for x in letters for y in letters]  # copies move right
        rules += [(f"@{x}", f"{x}@{x.upper()}") for x in letters]  # the marker passes a letter and leaves its copy
        rules += [(f"@{x.upper()}", f"{x}@") for x in letters]  # at the end, copies become letters
        rules += [("@", "", True), ("", "@")]
        algorithm = instrdiv.MarkovAlgorithm(rules)
        assert algorithm.run("abb", max_steps=100) == "abbbba"
        for text in ("", "a", "ba", "aabab"):
            assert algorithm.run(text, max_steps=1000) == text + text[::-1]

    def test_earlier_rules_come_first(self):
        assert instrdiv.MarkovAlgorithm([("b", "x"), ("a", "y")]).step("ab") == ("ax", False)

    def test_the_leftmost_occurrence_is_rewritten(self):
        assert instrdiv.MarkovAlgorithm([("aa", "b")]).step("caaa") == ("cba", False)

    def test_a_stop_rule_ends_the_run(self):
        assert instrdiv.MarkovAlgorithm([("a", "b", True)]).run("aa", max_steps=5) == "ba"

    def test_the_run_ends_where_no_rule_applies(self):
        assert instrdiv.MarkovAlgorithm([("a", "b")]).run("aac", max_steps=5) == "bbc"

    def test_exactly_enough_steps_are_enough(self):
        assert instrdiv.MarkovAlgorithm([("a", "b")]).run("aac", max_steps=2) == "bbc"

    def test_an_endless_run_is_cut(self):
        with pytest.raises(RuntimeError, match="did not end after 7 steps"):
            instrdiv.MarkovAlgorithm([("a", "aa")]).run("a", max_steps=7)

    @pytest.mark.parametrize("rule", [("a",), ("a", 3), ("a", "b", "c"), ("a", "b", True, 1), "ab", 5, None, ()])
    def test_a_rule_of_another_form_is_refused_by_name(self, rule):
        with pytest.raises(ValueError, match=rf"^a rule is \(pattern, replacement.*got {re.escape(repr(rule))}$"):
            instrdiv.MarkovAlgorithm([("a", "b"), rule])
