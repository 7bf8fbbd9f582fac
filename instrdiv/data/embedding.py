"""Embeddings of texts. All results depend on the embedder, so embedders carry a descriptive name.

An embedder is specified by a string: ``hashed``, ``sentence-transformers:DIRECTORY`` (a local model; nothing is
downloaded), or ``MODULE:FUNCTION``, a custom function from a list of N texts to an array [N, d].
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse

from instrdiv.data.ngrams import Words, normalize
from instrdiv.runtime.errors import BadInput, needs

#: N embeddings of d numbers each, all of length 1: a dense or a sparse float64 [N, d].
Embeddings: TypeAlias = "np.ndarray | scipy.sparse.csr_matrix"

#: Dimensions of the hashed embedder: half for words, half for letters; enough that collisions hardly matter.
HASHED = 1 << 20

_TEXTS = 1_000  # hashed at a time, to bound the memory


@dataclasses.dataclass(frozen=True)
class Embedder:
    """How texts become vectors.

    Attributes:
      name: a human-readable description with the parameters.
      same: default minimum cosine at which two texts count as the same instruction. A convention: similar texts have
        cosines of 0.5 under one embedder and 0.9 under another.
      embed: N texts -> array or sparse matrix [N, d].
    """

    name: str
    same: float
    embed: Callable[[Sequence[str]], Embeddings]

    @classmethod
    def parse(cls, text: str) -> Embedder:
        """The embedder that a flag specifies. Raises BadInput if there is none."""
        flag = f"--embedder={text}"
        if text == "hashed":
            return cls("hashed n-grams (words, pairs of words, triples of letters)", 0.5, hashed)
        kind, _, rest = text.partition(":")
        if kind == "sentence-transformers":
            return _sentence_transformers(flag, rest)
        if not kind or not rest:
            raise BadInput(f"{flag}: must be hashed, sentence-transformers:DIRECTORY or MODULE:FUNCTION")
        try:
            function = getattr(importlib.import_module(kind), rest)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise BadInput(f"{flag}: cannot be imported: {error}") from None
        return cls(text, 0.7, function)

    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """The embeddings of the texts. Raises BadInput if the embedder returns anything else."""
        found: Any = self.embed(texts)
        if not scipy.sparse.issparse(found):
            found = np.asarray(found)
        if found.ndim != 2 or len(texts) != found.shape[0] or found.dtype.kind != "f":
            gave = f"{found.dtype} {list(found.shape)}"
            raise BadInput(f"--embedder: {self.name} must return floats [{len(texts)}, d], got {gave}")
        found = found.astype(np.float64)
        squares = found.multiply(found) if scipy.sparse.issparse(found) else found**2
        lengths = np.sqrt(np.asarray(squares.sum(1))).ravel()
        wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(wrong):
            what = "a zero" if lengths[wrong[0]] == 0 else "a non-finite"
            raise BadInput(f"--embedder: {self.name} returns {what} vector for the text {texts[wrong[0]][:60]!r}")
        if scipy.sparse.issparse(found):
            return (scipy.sparse.diags(1 / lengths) @ found).tocsr()
        return found / lengths[:, None]


def hashed(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """Hashed words, word pairs and letter triples: sparse float64 [N, HASHED], the same on every machine.

    Each n-gram of a normalized text is hashed to a column, whose value is the square root of its count, so that
    repeated n-grams do not dominate. Words and pairs contribute half of the squared norm, letter triples the rest.
    Nothing is fitted to the texts, so numbers are comparable between reports, and boilerplate counts in full.
    """
    blocks = []
    for start in range(0, len(texts), _TEXTS):
        some = [normalize(text) for text in texts[start : start + _TEXTS]]
        words = Words.of(some)
        singles, pairs = words.ngrams(1), words.ngrams(2)
        grams, places = (np.concatenate(both) for both in zip(singles, pairs, strict=True))
        letters, of_text = _letter_triples(some)
        halves = (_counts(words.text_at(places), grams, len(some)), _counts(of_text, letters, len(some)))
        blocks.append(scipy.sparse.hstack(halves, "csr"))
    return scipy.sparse.vstack(blocks, "csr") if blocks else scipy.sparse.csr_matrix((0, HASHED))


def _letter_triples(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of letter triples, including a space before and after each text: uint64 [G]; and the text of each."""
    padded = [f" {text} " for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    of_text = np.repeat(np.arange(len(texts)), [len(text) for text in padded])
    triples = (codes[:-2] << np.uint64(42)) | (codes[1:-1] << np.uint64(21)) | codes[2:]
    inside = np.flatnonzero(of_text[:-2] == of_text[2:])
    return (triples[inside] * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32), of_text[inside]


def _counts(of_text: np.ndarray, grams: np.ndarray, texts: int) -> scipy.sparse.csr_matrix:
    """Square roots of each text's n-gram counts, normalized to length 1: sparse float64 [texts, HASHED / 2]."""
    columns = (grams % np.uint64(HASHED // 2)).astype(np.int64)
    counts = scipy.sparse.csr_matrix((np.ones(len(grams)), (of_text, columns)), (texts, HASHED // 2))
    total = np.maximum(np.bincount(of_text, minlength=texts), 1)  # the squared length of the square roots
    return (scipy.sparse.diags(1 / np.sqrt(total)) @ counts.sqrt()).tocsr()


def _sentence_transformers(flag: str, directory: str) -> Embedder:
    if not directory or not Path(directory).is_dir():
        raise BadInput(f"{flag}: {directory or 'an empty name'} is not a directory; download a model and pass its path")
    with needs("sentence-transformers", "embed", flag):
        from sentence_transformers import SentenceTransformer
    try:  # only safetensors weights: unpickling can run code
        model = SentenceTransformer(directory, local_files_only=True, model_kwargs={"use_safetensors": True})
    except Exception as error:  # the type depends on what is missing and on two libraries
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{flag}: cannot be loaded: {said}") from None

    def embed(texts: Sequence[str]) -> np.ndarray:
        return model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)

    name = f"sentence-transformers {Path(directory).resolve().name}, of a text the first {model.max_seq_length} tokens"
    return Embedder(name, 0.7, embed)
