"""How diverse a set of instructions is: numbers, and a map.

Two ways of counting say how many *different* instructions N texts amount to. Both are N where all are unlike, and k for
k unlike ones that are repeated equally often:

- *clusters*: the exponential of the entropy over clusters, which are those of average linkage, cut where two have a
  mean cosine below ``same``. Not k-means: it cuts a narrow source into its k cells as evenly as a wide one, so that the
  number would tell of k alone, while ``same`` is a distance, and means the same for every source.
- *Vendi score* (Friedman and Dieng, arXiv 2210.02410): the exponential of the von Neumann entropy of K / N, where K has
  the cosines of all pairs. No threshold, but at most d for embeddings of d numbers.

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

#: Draws of a source that has more rows than one takes.
DRAWS = 5
#: Cosines at which the clusters are counted, besides that of the headline.
SCALES = tuple(round(0.05 * step, 2) for step in range(1, 20))
#: Points of a map, in all; and how many directions of the embeddings it is made of.
MAP_POINTS, MAP_DIRECTIONS = 2_400, 50
#: How the map is made.
MAPS = ("tsne", "pca")

#: Columns of diversity.csv: a row per source, and one for all. Of all its texts: how many, how many distinct ones, the
#: effective number of these (exponential of the entropy of their shares), and the shares of exact and of near (exact
#: ones included) duplicates. Of ``draws`` draws of ``drawn`` texts: means and 95 % t-intervals (none of one draw).
DIVERSITY_COLUMNS = (
    *("source", "texts", "distinct", "effective_distinct", "exact_duplicates", "near_duplicates", "drawn", "draws"),
    *("clusters", "clusters_low", "clusters_high", "vendi", "vendi_low", "vendi_high", "same", "embedder"),
)
#: Columns of scales.csv: the number of clusters, mean over draws, where ``same`` is another cosine.
SCALE_COLUMNS = ("source", "same", "clusters")
#: Columns of overlap.csv: of the texts of a source, the share whose nearest other one is of ``nearest``.
OVERLAP_COLUMNS = ("source", "nearest", "share")
#: Columns of map.csv: where a text is on the map.
MAP_COLUMNS = ("source", "row", "x", "y")


@dataclasses.dataclass(frozen=True)
class Diversity:
    """The tables of a report, with the columns above; ``row`` of the map is the text's number in its source."""

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
    """Everything that a report says of some sources.

    Args:
      texts: source -> its instructions.
      embedder: makes them vectors.
      same: the cosine of one instruction; the embedder's by default.
      sample: texts a draw, at most; all draws are as large as the smallest source allows.
      layout: of the map, one of ``MAPS``.
      seed: of the draws, and of the map.
      say: is told what is being done.

    Raises:
      BadInput: where the embedder gives no directions, or a package is missing.
    """
    if layout == "tsne":
        _tsne()  # is it there? asked before anything is measured
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
        say("looking for nearest neighbors")
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
    """The tree of average linkage by cosine distance, as scipy writes it: float64 [N - 1, 4]."""
    n = embeddings.shape[0]
    distances = 1 - cosines(embeddings, embeddings)[np.triu_indices(n, 1)]
    distances[distances < 1e-9] = 0  # equal texts, except for rounding
    return hierarchy.average(distances) if n > 1 else np.zeros((0, 4))


def effective_clusters(tree: np.ndarray, same: float) -> float:
    """The exponential of the entropy over the clusters whose mean cosine is at least ``same``."""
    if not len(tree):
        return 1.0
    labels = hierarchy.fcluster(tree, 1 - same + 1e-9, "distance")
    return effective_number(np.bincount(labels))


def vendi(embeddings: Embeddings) -> float:
    """The Vendi score with the cosine as kernel, exactly: K / N [N, N] and the covariance [d, d] have the same
    eigenvalues except zeros, so the smaller one is taken."""
    n, d = embeddings.shape
    kernel = cosines(embeddings.T, embeddings.T) if d < n else cosines(embeddings, embeddings)
    shares = scipy.linalg.eigvalsh(kernel / n)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def nearest_sources(sources: Sequence[Embeddings]) -> np.ndarray:
    """float64 [S, S]: of the texts of a source (row), the share whose nearest other text is of which source.

    Of several texts that are equally near, each counts in part. Well mixed sources of equal size have equal shares.
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
    """float64 [N, 2]: a map on which similar texts are near each other.

    ``pca``: the two directions of largest variance. ``tsne``: of the first ``MAP_DIRECTIONS`` of them; neighborhoods
    mean something there, distances and sizes do not. The same on the same machine and versions.
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
    directions *= np.where(directions[np.abs(directions).argmax(0), np.arange(some)] < 0, -1, 1)  # a sign is arbitrary
    if layout == "pca":
        return directions[:, :2]
    start = 1e-4 * directions[:, :2] / max(directions[:, 0].std(), 1e-12)
    perplexity = min(30, (n - 1) / 3)
    return _tsne()(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(directions).astype(np.float64)


def cosines(a: Embeddings, b: Embeddings) -> np.ndarray:
    """Dense float64 [N, M]: the products of all rows."""
    found: Any = a @ b.T
    return found.toarray() if scipy.sparse.issparse(found) else found


def _stack(sources: Sequence[Embeddings]) -> Embeddings:
    return scipy.sparse.vstack(sources, "csr") if scipy.sparse.issparse(sources[0]) else np.concatenate(sources)


def _of_all(texts: Sequence[str], say: Callable[[str], None]) -> Row:
    """What is counted in all texts of a source, without an embedder."""
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
