"""Measures how diverse a set of instructions is, in numbers and as a map.

Two measures estimate how many *different* instructions N texts contain. Both equal N if all texts are dissimilar, and k
for k dissimilar texts that are repeated equally often:

- *clusters*: the exponential of the entropy over clusters, found by average linkage, cut where two clusters have a mean
  cosine below ``same``. Not k-means, which splits a narrow source into k cells as evenly as a wide one, so that the
  number would depend on k alone; ``same`` is a distance that means the same for every source.
- *Vendi score* (Friedman and Dieng, arXiv 2210.02410): the exponential of the von Neumann entropy of K / N, where K
  contains the cosines of all pairs. It has no threshold, but is at most d for d-dimensional embeddings.

Both grow with N, so sources are compared at the same N, on random draws; intervals are over draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.cluster import hierarchy

from instrdiv.data.cleaning import exact_duplicates, near_duplicates
from instrdiv.data.embedding import Embedder, Embeddings
from instrdiv.data.mixtures import shuffled
from instrdiv.data.schemas import ALL
from instrdiv.evaluation.statistics import mean_interval
from instrdiv.runtime.errors import needs
from instrdiv.runtime.tables import Row
from instrdiv.tasks.counts import effective_number

#: Number of draws from a source that has more texts than one draw.
DRAWS = 5
#: Cosines at which clusters are counted, in addition to the headline one.
SCALES = tuple(round(0.05 * step, 2) for step in range(1, 20))
#: Total number of points on a map, and number of principal directions of the embeddings it is computed from.
MAP_POINTS, MAP_DIRECTIONS = 2_400, 50
#: Methods to make the map.
MAPS = ("tsne", "pca")

#: Columns of diversity.csv: a row per source, and one for all of them. Over all its texts: the number of texts and of
#: distinct ones, the effective number of the latter (exponential of the entropy of their shares), and the shares of
#: exact and of near duplicates (which include the exact ones). Over ``draws`` draws of ``drawn`` texts: means and 95 %
#: t-intervals (none for a single draw).
DIVERSITY_COLUMNS = (
    *("source", "texts", "distinct", "effective_distinct", "exact_duplicates", "near_duplicates", "drawn", "draws"),
    *("clusters", "clusters_low", "clusters_high", "vendi", "vendi_low", "vendi_high", "same", "embedder"),
)
#: Columns of scales.csv: the mean number of clusters over draws, for other values of ``same``.
SCALE_COLUMNS = ("source", "same", "clusters")
#: Columns of overlap.csv: the share of a source's texts whose nearest other text is from ``nearest``.
OVERLAP_COLUMNS = ("source", "nearest", "share")
#: Columns of map.csv: the coordinates of each text on the map.
MAP_COLUMNS = ("source", "row", "x", "y")


@dataclasses.dataclass(frozen=True)
class Diversity:
    """The tables of a report, with the columns above; ``row`` of the map is the text's index in its source."""

    scores: list[Row]
    scales: list[Row]
    overlap: list[Row]
    map: list[Row]


def measure(
    texts: Mapping[str, Sequence[str]],
    embedder: Embedder,
    same: float | None = None,
    sample: int = 2_000,
    layout: str = "tsne",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Diversity:
    """Computes all tables of a report on some sources.

    Args:
      texts: source -> its instructions.
      embedder: turns texts into vectors.
      same: cosine above which texts count as the same instruction; the embedder's by default.
      sample: maximum number of texts per draw; all draws are as large as the smallest source allows.
      layout: method to make the map, one of ``MAPS``.
      seed: for the draws and the map.
      say: called with progress messages.

    Raises:
      BadInput: the embedder gives no directions, or a package is missing.
    """
    if layout == "tsne":
        _tsne()  # fails early, before anything is measured, if it is not installed
    same = embedder.same if same is None else same
    drawn = min(sample, *(len(of_source) for of_source in texts.values()))
    pooled = [text for of_source in texts.values() for text in of_source]
    whole = {ALL: pooled} if len(texts) > 1 else {}
    tables = Diversity([], [], [], [])
    firsts = []
    for source, of_source in {**texts, **whole}.items():
        number = DRAWS if drawn < len(of_source) else 1
        clusters, vendis, scales = [], [], []
        for draw in range(number):
            say(f"measuring {source}: draw {draw + 1} of {number}")
            chosen = shuffled(of_source, seed * DRAWS + draw)[:drawn]
            embedded = embedder([of_source[row] for row in chosen.tolist()])
            if draw == 0 and source in texts:
                firsts.append((source, chosen, embedded))
            tree = merges(embedded)
            clusters.append(effective_clusters(tree, same))
            scales.append([effective_clusters(tree, scale) for scale in SCALES])
            vendis.append(vendi(embedded))
        tables.scores.append(
            {"source": source, **_of_all(of_source, say), "drawn": drawn, "draws": number}
            | {"same": same, "embedder": embedder.name}
            | _interval("clusters", clusters)
            | _interval("vendi", vendis)
        )
        for scale, value in zip(SCALES, np.mean(scales, 0).tolist(), strict=True):
            tables.scales.append({"source": source, "same": scale, "clusters": value})
    names = list(texts)
    if len(names) > 1:
        say("finding nearest neighbors")
        shares = nearest_sources([embedded for *_, embedded in firsts])
        tables.overlap.extend(
            {"source": a, "nearest": b, "share": shares[i, j].item()}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
        )
    say("drawing the map")
    each = max(MAP_POINTS // len(names), 1)
    points = layouts(_stack([embedded[:each] for *_, embedded in firsts]), layout, seed)
    places = ((source, row) for source, chosen, _ in firsts for row in chosen[:each].tolist())
    for (source, row), (x, y) in zip(places, points.tolist(), strict=True):
        tables.map.append({"source": source, "row": row, "x": x, "y": y})
    return tables


def merges(embeddings: Embeddings) -> np.ndarray:
    """The average-linkage tree by cosine distance, in scipy's format: float64 [N - 1, 4]."""
    n = embeddings.shape[0]
    distances = 1 - cosines(embeddings, embeddings)[np.triu_indices(n, 1)]
    distances[distances < 1e-9] = 0  # equal texts, up to rounding
    return hierarchy.average(distances) if n > 1 else np.zeros((0, 4))


def effective_clusters(tree: np.ndarray, same: float) -> float:
    """The exponential of the entropy over the clusters whose mean cosine is at least ``same``."""
    if not len(tree):
        return 1.0
    labels = hierarchy.fcluster(tree, 1 - same + 1e-9, "distance")
    return effective_number(np.bincount(labels))


def vendi(embeddings: Embeddings) -> float:
    """The exact Vendi score with the cosine kernel. K / N [N, N] and the covariance [d, d] have the same nonzero
    eigenvalues, so the smaller matrix is used."""
    n, d = embeddings.shape
    kernel = cosines(embeddings.T, embeddings.T) if d < n else cosines(embeddings, embeddings)
    shares = scipy.linalg.eigvalsh(kernel / n)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def nearest_sources(sources: Sequence[Embeddings]) -> np.ndarray:
    """float64 [S, S]: the share of a source's texts (row) whose nearest other text is from each source (column).

    Equally near texts share the count. Well mixed sources of equal size have equal shares.
    """
    pooled = _stack(sources)
    sizes = [embeddings.shape[0] for embeddings in sources]
    of_source = np.eye(len(sources))[np.repeat(np.arange(len(sources)), sizes)]
    shares, start = np.zeros((len(sources), len(sources))), 0
    for i, embeddings in enumerate(sources):
        near = cosines(embeddings, pooled)
        near[np.arange(sizes[i]), start + np.arange(sizes[i])] = -np.inf
        nearest = near >= near.max(1, keepdims=True) - 1e-9
        shares[i] = ((nearest @ of_source) / nearest.sum(1, keepdims=True)).mean(0)
        start += sizes[i]
    return shares


def layouts(embeddings: Embeddings, layout: str, seed: int) -> np.ndarray:
    """float64 [N, 2]: a map on which similar texts are close together.

    ``pca``: the two directions of largest variance. ``tsne``: computed from the first ``MAP_DIRECTIONS`` of them;
    neighborhoods are meaningful, distances and sizes are not. Deterministic on the same machine and versions.
    """
    n = embeddings.shape[0]
    if n < 3:
        return np.stack([np.arange(n), np.zeros(n)], 1)
    kernel = cosines(embeddings, embeddings)
    kernel -= kernel.mean(0)
    kernel -= kernel.mean(1, keepdims=True)
    some = min(MAP_DIRECTIONS, n)
    values, vectors = scipy.linalg.eigh(kernel, subset_by_index=(n - some, n - 1))
    directions = (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1]
    directions *= np.where(directions[np.abs(directions).argmax(0), np.arange(some)] < 0, -1, 1)  # signs are arbitrary
    if layout == "pca":
        return directions[:, :2]
    start = 1e-4 * directions[:, :2] / max(directions[:, 0].std(), 1e-12)
    perplexity = min(30, (n - 1) / 3)
    return _tsne()(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(directions).astype(np.float64)


def cosines(a: Embeddings, b: Embeddings) -> np.ndarray:
    """Dense float64 [N, M]: the dot products of all pairs of rows."""
    found: Any = a @ b.T
    return found.toarray() if scipy.sparse.issparse(found) else found


def _stack(sources: Sequence[Embeddings]) -> Embeddings:
    return scipy.sparse.vstack(sources, "csr") if scipy.sparse.issparse(sources[0]) else np.concatenate(sources)


def _of_all(texts: Sequence[str], say: Callable[[str], None]) -> Row:
    """Counts over all texts of a source that need no embedder."""
    first = exact_duplicates(texts)
    counts = np.bincount(np.where(first < 0, np.arange(len(texts)), first))
    distinct = int(np.count_nonzero(first < 0))
    like, _ = near_duplicates(
        [text for text, earlier in zip(texts, first.tolist(), strict=True) if earlier < 0], say=say
    )
    near = int(np.count_nonzero(like >= 0))
    return {
        "texts": len(texts),
        "distinct": distinct,
        "effective_distinct": effective_number(counts),
        "exact_duplicates": 1 - distinct / len(texts),
        "near_duplicates": 1 - (distinct - near) / len(texts),
    }


def _interval(name: str, values: Sequence[float]) -> Row:
    found = mean_interval(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _tsne():
    with needs("scikit-learn", "finetune", "--map=tsne, unlike --map=pca"):
        from sklearn.manifold import TSNE
    return TSNE
