"""Words and n-grams against slices in plain Python."""

import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instrdiv.data.ngrams import Words, normalize, words_of

texts = st.lists(st.text(alphabet="ab éÉ１\n.ﬁ", max_size=12), max_size=6)


def test_case_width_composition_and_white_space_do_not_count():
    assert normalize(" Ｔhe  ﬁrst\n\tCAFÉ ") == normalize("the first cafe\u0301") == "the first café"
    assert normalize("Straße") == normalize("STRASSE")
    assert normalize("a-b") != normalize("a b")
    assert words_of("It's a_b, x=(1.5)!") == ["it", "s", "a_b", "x", "1", "5"]


@given(st.text())
def test_normalizing_again_changes_nothing(text):
    assert normalize(normalize(text)) == normalize(text)
    assert unicodedata.is_normalized("NFKC", normalize(text))


@given(texts, st.integers(1, 4))
def test_ngrams_are_equal_where_the_words_are(texts, n):
    words = Words.of(texts)
    hashes, places = words.ngrams(n)
    expected = [(number, tuple(said[at : at + n])) for number, said in enumerate(map(words_of, texts))
                for at in range(len(said) - n + 1)]  # fmt: skip
    assert words.lengths.tolist() == [len(words_of(text)) for text in texts] and len(words) == len(texts)
    assert words.text_at(places).tolist() == [number for number, _ in expected]
    assert len({*zip(hashes.tolist(), [gram for _, gram in expected], strict=True)}) == len(
        {gram for _, gram in expected}
    )
    assert len(set(hashes.tolist())) == len({gram for _, gram in expected})


def test_hashes_are_the_same_everywhere():
    hashes, _ = Words.of(["to be or not"]).ngrams(3)
    assert hashes.dtype == np.uint64 and hashes.tolist() == [966028526612161957, 17034895072578079192]


def test_order_and_place_count():
    hashes, _ = Words.of(["a b", "b a", "ab", "a a"]).ngrams(2)
    assert len(set(hashes.tolist())) == 3
