"""Error classes against a plain-Python reading of their definition, on every kind of wrong answer."""

import collections
import itertools

import numpy as np
import pytest

from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.mistakes import MISTAKES, classify
from instrdiv.tasks.strings.rules import RuleTable
from instrdiv.tasks.tokens import END, PAD


def oracle(pattern, replacement, text, decoded):
    """The class by its definition; ``decoded`` ends with $ where it ends."""
    right = text.replace(pattern, replacement, 1) + "$"
    if decoded == right:
        return None
    if "$" not in decoded or len(decoded) != len(right):
        return "wrong length"
    decoded, start, size = decoded.removesuffix("$"), text.find(pattern), len(pattern)
    sites = [i for i in range(len(text) - size + 1) if i != start]
    if any(decoded == text[:i] + replacement + text[i + size :] for i in sites):
        return "wrong site"
    if start < 0:
        return "copy error"
    if decoded == text:
        return "wrong site"
    end = start + len(replacement)
    if decoded[:start] == text[:start] and decoded[end:] == text[start + size :]:
        return "wrong replacement"
    return "copy error"


def padded(strings, width, fill, encode):
    return np.array([[*encode(string), *[fill] * (width - len(string))] for string in strings])


def classes(cases, letters=26):
    """What ``classify`` says of (pattern, replacement, text, decoded), as names."""
    alphabet = Alphabet(letters)
    patterns, replacements, texts, decoded = zip(*cases, strict=True)
    right = [text.replace(p, r, 1) + "$" for p, r, text, _ in cases]
    P, R, T = (max(map(len, strings)) for strings in (patterns, replacements, texts))
    A = max(map(len, right)) + 1

    def tokens(strings):
        return padded(strings, A, PAD, lambda s: [END if c == "$" else alphabet.letters.index(c) + 3 for c in s])

    table = RuleTable(
        *(padded(s, n, 255, alphabet.encode).astype(np.uint8) for s, n in ((patterns, P), (replacements, R)))
    )
    found = classify(
        table.arrays(),
        padded(texts, T, 7, alphabet.encode).astype(np.uint8),  # letters past the length are noise
        np.array(list(map(len, texts))),
        tokens(right).astype(np.uint8),
        # Without an end, an answer fills its row.
        tokens([d if "$" in d else (d + "a" * A)[:A] for d in decoded]).astype(np.uint8),
    )
    return [None if kind < 0 else MISTAKES[kind] for kind in found]


@pytest.mark.parametrize("seed", range(3))
def test_random_answers_agree_with_the_definition(seed):
    """Two and three letters, lengths that vary, answers made wrong in every way."""
    random = np.random.default_rng(seed)
    letters = "abc"[: 2 + seed % 2]

    def word(low, high):
        return "".join(random.choice(list(letters), random.integers(low, high + 1)))

    cases = []
    while len(cases) < 6_000:
        pattern, replacement, text = word(1, 3), word(0, 3), word(3, 7)
        if pattern == replacement:
            continue
        right = text.replace(pattern, replacement, 1)
        i = random.integers(0, len(text) + 1)
        at, start = random.integers(0, len(text)), text.find(pattern)
        j = random.integers(0, len(right)) if right else 0
        decoded = [
            right,
            text,
            text[:at] + replacement + text[at + len(pattern) :],
            right[:j] + word(1, 1) + right[j + 1 :],
            text[: max(start, 0)] + word(len(replacement), len(replacement)) + text[max(start, 0) + len(pattern) :],
            word(0, 7),
            right[:i],
            right + word(0, 1),
        ][len(cases) % 8]
        cases.append((pattern, replacement, text, decoded[:9] + ("$" if random.random() < 0.95 else "")))
    expected = [oracle(*case) for case in cases]
    assert classes(cases, len(letters)) == expected
    assert min(collections.Counter(expected).values()) > 50 and len(set(expected)) == 5


def test_every_answer_of_the_right_length_to_a_small_text():
    """All 3^4 answers to texts with an overlap, two occurrences, none, and all of the text."""
    for text, pattern in (("aaab", "aa"), ("abab", "ab"), ("abcb", "cc"), ("abca", "abca")):
        replacement = "cb" if len(pattern) == 2 else "bbbb"
        cases = [(pattern, replacement, text, "".join(d) + "$") for d in itertools.product("abc", repeat=4)]
        assert classes(cases, 3) == [oracle(*case) for case in cases]


def test_examples_of_each_class():
    cases = {
        ("iss", "art", "mississippi", "martissippi$"): None,
        ("iss", "art", "mississippi", "martissipp$"): "wrong length",
        ("iss", "art", "mississippi", "martissippi"): "wrong length",
        ("iss", "art", "mississippi", "missartippi$"): "wrong site",
        ("iss", "art", "mississippi", "mississippi$"): "wrong site",
        ("iss", "art", "mississippi", "marrissippi$"): "wrong replacement",
        ("iss", "art", "mississippi", "marrissippo$"): "copy error",
        ("xyz", "art", "mississippi", "artsissippi$"): "wrong site",
        ("xyz", "art", "mississippi", "mississippo$"): "copy error",
    }
    assert classes(list(cases)) == list(cases.values())
