"""The hashed embedder matches counted n-grams; invalid embedders and embeddings give one-line errors."""

import sys
import types
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from instrdiv.data.embedding import Embedder, hashed
from instrdiv.data.ngrams import normalize, words_of
from instrdiv.runtime.errors import BadInput

texts = st.lists(st.text(alphabet="ab, É\n", min_size=1, max_size=15).filter(str.strip), min_size=1, max_size=5)


def counted(text):
    """The two halves of the embedding as dictionaries, counted in plain Python."""
    words, letters = words_of(text), f" {normalize(text)} "
    halves = [
        Counter([(word,) for word in words] + [*pairwise(words)]),
        Counter(letters[i : i + 3] for i in range(len(letters) - 2)),
    ]
    return [{gram: (count / half.total()) ** 0.5 for gram, count in half.items()} for half in halves if half]


def cosine(a, b):
    def product(x, y):
        return sum(x[gram] * y[gram] for gram in x.keys() & y.keys())

    def total(x, y):
        kinds = [{type(next(iter(half))): half for half in halves} for halves in (x, y)]
        return sum(product(kinds[0][kind], kinds[1][kind]) for kind in kinds[0].keys() & kinds[1].keys())

    return total(a, b) / (total(a, a) * total(b, b)) ** 0.5


class TestHashed:
    @given(texts)
    def test_has_the_cosines_of_counted_ngrams(self, texts):
        embedded = Embedder.parse("hashed")(texts)
        expected = [[cosine(counted(a), counted(b)) for b in texts] for a in texts]
        assert np.allclose((embedded @ embedded.T).toarray(), expected, atol=1e-12)

    def test_a_text_has_the_same_embedding_among_any_others(self, monkeypatch):
        texts = [f"do {i} things, {i * i} times" for i in range(7)]
        together = hashed(texts)
        monkeypatch.setattr("instrdiv.data.embedding._TEXTS", 2)
        assert abs(hashed(texts) - together).max() == 0
        assert abs(scipy.sparse.vstack([hashed([text]) for text in texts]) - together).max() == 0

    def test_is_the_same_everywhere(self):
        embedded = hashed(["Sort the list"]).tocoo()
        assert sorted(embedded.col.tolist())[:3] == [567, 70510, 241096]

    def test_case_and_white_space_do_not_count(self):
        one, other, third = hashed(["Sort  the LIST", "sort the list\n", "list the sort"]).toarray()
        assert (one == other).all() and 0 < one @ third < 1.9


def of(function):
    return Embedder("mine", 0.5, function)


class TestEmbedder:
    def test_gives_directions(self):
        dense = of(lambda texts: np.array([[3.0, 4.0], [0.0, 2.0]], np.float32))(["a", "b"])
        assert dense.dtype == np.float64 and np.allclose(dense, [[0.6, 0.8], [0, 1]])
        sparse = of(lambda texts: scipy.sparse.csr_matrix([[3.0, 4.0], [0.0, 2.0]]))(["a", "b"])
        assert np.allclose(sparse.toarray(), dense)

    @pytest.mark.parametrize(
        "given, said",
        [
            (np.ones((3, 2)), r"must return floats \[2, d\], got float64 \[3, 2\]"),
            (np.ones(2), r"must return floats \[2, d\], got float64 \[2\]"),
            (np.ones((2, 2), int), r"must return floats \[2, d\], got int64 \[2, 2\]"),
            (np.array([[1.0, 0], [0, 0]]), "returns a zero vector for the text 'b'"),
            (scipy.sparse.csr_matrix([[1.0, 0], [0, 0]]), "returns a zero vector for the text 'b'"),
            (np.array([[np.nan, 0], [0, 1]]), "returns a non-finite vector for the text 'a'"),
        ],
    )
    def test_refuses_what_is_none(self, given, said):
        with pytest.raises(BadInput, match=said):
            of(lambda texts: given)(["a", "b"])

    def test_of_ones_own(self, monkeypatch):
        module = types.ModuleType("of_ones_own")
        module.lengths = lambda texts: np.array([[len(text), 1.0] for text in texts])
        monkeypatch.setitem(sys.modules, "of_ones_own", module)
        embedder = Embedder.parse("of_ones_own:lengths")
        assert embedder.name == "of_ones_own:lengths" and embedder(["aaa"]).tolist() == [[3 / 10**0.5, 1 / 10**0.5]]

    @pytest.mark.parametrize(
        "text, said",
        [
            ("", "must be hashed, sentence-transformers:DIRECTORY or MODULE:FUNCTION"),
            ("hash", "must be hashed"),
            ("nowhere:embed", "cannot be imported: No module named 'nowhere'"),
            ("math:embed", "cannot be imported: module 'math' has no attribute 'embed'"),
            (".x:embed", "cannot be imported"),
            ("sentence-transformers:", "an empty name is not a directory"),
            ("sentence-transformers:all-MiniLM-L6-v2", "all-MiniLM-L6-v2 is not a directory"),
        ],
    )
    def test_that_is_not_there_is_one_line(self, text, said):
        with pytest.raises(BadInput) as refused:
            Embedder.parse(text)
        assert str(refused.value).startswith(f"--embedder={text}: ") and said in str(refused.value)

    def test_sentence_transformers_that_are_not_installed_are_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(BadInput, match=r"needs the package sentence-transformers: pip install -e '\.\[embed\]'"):
            Embedder.parse(f"sentence-transformers:{tmp_path}")
