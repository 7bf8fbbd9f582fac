"""Diversity measures against values known by construction, and elsewhere against their definitions."""

import math

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.analysis.diversity import (
    DIVERSITY_COLUMNS,
    MAP_COLUMNS,
    OVERLAP_COLUMNS,
    SCALE_COLUMNS,
    SCALES,
    cosines,
    effective_clusters,
    layouts,
    measure,
    merges,
    nearest_sources,
    vendi,
)
from instrdiv.data.embedding import Embedder
from instrdiv.data.schemas import ALL
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.counts import effective_number

counts = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def repeated(counts, dimensions=12):
    """Orthogonal directions, repeated by these counts and shuffled."""
    rows = np.repeat(np.eye(dimensions)[: len(counts)], counts, axis=0)
    return np.random.default_rng(0).permutation(rows)


def random_directions(n, d, seed=0):
    found = np.random.default_rng(seed).normal(size=(n, d))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


class TestEffectiveNumbers:
    @given(counts)
    def test_of_repeated_directions_are_those_of_the_counts(self, counts):
        expected = effective_number(np.array(counts))
        for embeddings in (repeated(counts), scipy.sparse.csr_matrix(repeated(counts))):
            assert vendi(embeddings) == pytest.approx(expected, rel=1e-9)
            for same in (0.05, 0.5, 1.0):
                assert effective_clusters(merges(embeddings), same) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("k", [1, 2, 7])
    def test_of_k_directions_repeated_equally_are_k(self, k):
        assert vendi(repeated([5] * k)) == pytest.approx(k)
        assert effective_clusters(merges(repeated([5] * k)), 0.5) == pytest.approx(k)

    def test_of_one_text_are_one(self):
        assert vendi(np.eye(3)[:1]) == 1 and effective_clusters(merges(np.eye(3)[:1]), 0.5) == 1

    @pytest.mark.parametrize("n, d", [(30, 5), (5, 30), (12, 12)])
    def test_the_vendi_score_is_that_of_its_definition_both_ways(self, n, d):
        embeddings = random_directions(n, d)
        values = np.linalg.svd(embeddings, compute_uv=False) ** 2 / n  # the eigenvalues of K / N, computed a third way
        expected = math.exp(-sum(value * math.log(value) for value in values if value > 0))
        assert vendi(embeddings) == pytest.approx(expected, rel=1e-9)
        wider = np.concatenate([embeddings, np.zeros((n, 50))], 1)  # the same cosines, and d > n
        assert vendi(wider) == pytest.approx(expected, rel=1e-9)
        assert vendi(scipy.sparse.csr_matrix(wider)) == pytest.approx(expected, rel=1e-9)
        assert vendi(embeddings) <= min(n, d) + 1e-9

    @settings(max_examples=25)
    @given(st.integers(2, 15), st.integers(0, 20), st.floats(0.01, 0.99))
    def test_clusters_are_those_of_merging_by_hand(self, n, seed, same):
        embeddings = random_directions(n, 3, seed)
        similar = embeddings @ embeddings.T
        clusters = [[i] for i in range(n)]
        while len(clusters) > 1:
            pairs = [(similar[np.ix_(a, b)].mean(), i, j) for i, a in enumerate(clusters)
                     for j, b in enumerate(clusters) if i < j]  # fmt: skip
            mean, i, j = max(pairs)
            if mean < same:
                break
            clusters[i] += clusters.pop(j)
        expected = effective_number(np.array([len(cluster) for cluster in clusters]))
        assert effective_clusters(merges(embeddings), same) == pytest.approx(expected)

    def test_fewer_are_the_same_where_more_must_be_alike(self):
        tree = merges(random_directions(60, 4))
        found = [effective_clusters(tree, same) for same in SCALES]
        assert found == sorted(found) and found[0] < 10 < found[-1]


class TestNearestSources:
    def test_are_those_of_looking_at_every_pair(self):
        sources = [random_directions(n, 3, seed=n) for n in (9, 14, 5)]
        of = np.repeat(range(3), [9, 14, 5])
        similar = cosines(np.concatenate(sources), np.concatenate(sources))
        expected = np.zeros((3, 3))
        for i in range(28):
            nearest = max((j for j in range(28) if j != i), key=lambda j: similar[i, j])
            expected[of[i], of[nearest]] += 1
        expected /= expected.sum(1, keepdims=True)
        assert np.allclose(nearest_sources(sources), expected)
        assert np.allclose(nearest_sources([scipy.sparse.csr_matrix(source) for source in sources]), expected)

    def test_equally_near_ones_count_in_part(self):
        one, other = np.eye(2)[[0, 0, 0]], np.eye(2)[[0, 0, 1]]
        # Each text of the first source has two equals in each source. Of the other source, two texts have three equals
        # in the first and one in their own; the third has a cosine of 0 with all five others.
        assert np.allclose(
            nearest_sources([one, other]), [[2 / 4, 2 / 4], [(3 / 4 + 3 / 4 + 3 / 5) / 3, (0.5 + 0.4) / 3]]
        )

    def test_sources_that_lie_apart_have_none_of_each_other(self):
        assert (nearest_sources([np.eye(4)[[0, 0, 1, 1]], np.eye(4)[[2, 2, 3, 3]]]) == np.eye(2)).all()


class TestLayouts:
    def test_pca_is_that_of_the_singular_vectors(self):
        embeddings = random_directions(20, 6)
        u, s, _ = np.linalg.svd(embeddings - embeddings.mean(0))
        found, expected = layouts(embeddings, "pca", 0), u[:, :2] * s[:2]
        assert np.allclose(np.abs(found), np.abs(expected))
        assert np.allclose(layouts(scipy.sparse.csr_matrix(embeddings), "pca", 0), found)

    def test_tsne_keeps_groups_together_and_gives_the_same_map_again(self):
        pytest.importorskip("sklearn")
        embeddings = np.repeat(np.eye(30)[:3], 20, axis=0) + 0.1 * random_directions(60, 30)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        points = layouts(embeddings, "tsne", 0)
        assert points.dtype == np.float64 and (layouts(embeddings, "tsne", 0) == points).all()
        distances = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag([np.inf] * 60)
        assert (distances.argmin(1) // 20 == np.arange(60) // 20).all()

    @pytest.mark.parametrize("n", [1, 2])
    def test_of_next_to_nothing(self, n):
        assert layouts(np.eye(3)[:n], "tsne", 0).shape == (n, 2)


class Axes:
    """An embedder whose axis is the first word, a number."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(list(texts))
        return np.array([np.eye(8)[int(text.split()[0])] for text in texts])


@pytest.fixture
def embedder():
    return Embedder("axes", 0.5, Axes())


def texts(axes, count, name):
    return [f"{i % axes} of {name} {i}" for i in range(count)]


class TestMeasure:
    def test_says_what_is_known_by_construction(self, embedder):
        sources = {"narrow": texts(1, 40, "a"), "wide": [*texts(8, 36, "b"), *["0 again"] * 4]}
        found = measure(sources, embedder, layout="pca")
        rows = {row["source"]: row for row in found.scores}
        assert list(rows) == ["narrow", "wide", ALL] and all(set(row) == {*DIVERSITY_COLUMNS} for row in found.scores)
        assert [row["draws"] for row in found.scores] == [1, 1, 5] and {row["drawn"] for row in found.scores} == {40}
        assert rows["narrow"]["clusters"] == pytest.approx(1) and rows["narrow"]["vendi"] == pytest.approx(1)
        wide = effective_number(np.array([9, 5, 5, 5, 4, 4, 4, 4]))
        assert rows["wide"]["clusters"] == pytest.approx(wide) and rows["wide"]["vendi"] == pytest.approx(wide)
        assert math.isnan(rows["wide"]["vendi_low"])  # a single draw has no interval
        assert rows["wide"]["vendi"] > rows[ALL]["vendi"] > rows["narrow"]["vendi"]
        assert rows[ALL]["vendi_low"] < rows[ALL]["vendi"] < rows[ALL]["vendi_high"]
        assert (rows["wide"]["texts"], rows["wide"]["distinct"]) == (40, 37)
        assert rows["wide"]["exact_duplicates"] == rows["wide"]["near_duplicates"] == pytest.approx(3 / 40)
        assert rows["wide"]["effective_distinct"] == pytest.approx(effective_number(np.array([1] * 36 + [4])))
        assert rows[ALL]["distinct"] == 77 and {(row["same"], row["embedder"]) for row in found.scores} == {
            (0.5, "axes")
        }

    def test_compares_sources_at_the_size_of_the_smallest(self, embedder):
        sources = {"small": texts(3, 12, "a"), "large": texts(8, 400, "b")}
        found = measure(sources, embedder, layout="pca")
        assert {row["drawn"] for row in found.scores} == {12} and found.scores[1]["clusters"] <= 8
        assert all(len(asked) == 12 for asked in embedder.embed.asked)
        assert {row["drawn"] for row in measure(sources, embedder, layout="pca", sample=5).scores} == {5}

    def test_the_numbers_of_a_source_do_not_depend_on_the_others(self, embedder):
        a, b = texts(5, 50, "a"), texts(8, 80, "b")
        (alone,) = measure({"a": a}, embedder, layout="pca", sample=20).scores
        among = measure({"b": b, "a": a}, embedder, layout="pca", sample=20).scores[1]
        assert among == alone

    def test_tables_are_whole(self, embedder):
        sources = {"a": texts(2, 30, "a"), "b": texts(8, 40, "b")}
        found = measure(sources, embedder, layout="pca", same=0.9)
        assert {row["same"] for row in found.scores} == {0.9}
        assert [(row["source"], row["same"]) for row in found.scales] == [
            (s, x) for s in ("a", "b", ALL) for x in SCALES
        ]
        for tables, columns in (
            (found.scales, SCALE_COLUMNS),
            (found.overlap, OVERLAP_COLUMNS),
            (found.map, MAP_COLUMNS),
        ):
            assert all(tuple(row) == columns for row in tables)
        shares = {(row["source"], row["nearest"]): row["share"] for row in found.overlap}
        assert shares["a", "a"] + shares["a", "b"] == pytest.approx(1) and len(shares) == 4
        assert shares["b", "a"] < shares["b", "b"]  # six of its eight axes are not shared
        places = [(row["source"], row["row"]) for row in found.map]
        assert len(set(places)) == len(places) == 60 and {row for _, row in places if _ == "a"} == set(range(30))

    def test_more_different_rules_are_a_larger_number(self):
        letters = "abcdefghijklmnopqrstuvwxyz"
        rules = [f"{a}{b}{c} -> {c}{a}{b}" for a in letters for b in letters for c in letters]
        several = {str(k): [rules[(i % k) * 37] for i in range(300)] for k in (1, 4, 16, 64)}
        found = measure(several, Embedder.parse("hashed"), layout="pca").scores[:-1]
        for name in ("clusters", "vendi", "effective_distinct"):
            values = [row[name] for row in found]
            assert values == sorted(values) and values[0] == pytest.approx(1) and values[3] > 3 * values[1]
        assert [row["distinct"] for row in found] == [1, 4, 16, 64]

    def test_tsne_without_scikit_learn_is_refused_before_anything_is_measured(self, embedder, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
        with pytest.raises(BadInput, match=r"--map=tsne, .*: needs the package scikit-learn"):
            measure({"a": texts(1, 9, "a")}, embedder)
        assert not embedder.embed.asked
