"""Families of strings: how constrained a string is (paper P2, arXiv 2410.04717, section 3.3).

A family of order k (k divides the length L) has L/k free letters: *repeated* (k=3: aaabbbccc), *periodic*
(k=2: abcabc), *mirrored* (k=3: abccbaabc). Order 1 of every family is *free*. Families overlap, so compare
strings, never parameters.

To add a family, write a function and a line ``register("name", expand)`` below (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: name -> expand(free letters [N, L/k], k) -> letters [N, L]
FAMILIES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {}


def register(name: str, expand: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Registers a family. ``expand`` maps free letters [N, L/k] and k to strings [N, L], one to one."""
    FAMILIES[name] = expand


def _mirrored(letters: np.ndarray, k: int) -> np.ndarray:
    return np.concatenate([letters[:, ::-1] if i % 2 else letters for i in range(k)], axis=1)


register("free", lambda letters, k: letters)
register("repeated", lambda letters, k: np.repeat(letters, k, axis=1))
register("periodic", lambda letters, k: np.tile(letters, (1, k)))
register("mirrored", _mirrored)


def orders(family: str, length: int, k_min: int, k_max: int) -> list[int]:
    """The orders k in [k_min, k_max] that a string of this length can have (free: only 1)."""
    if family == "free":
        return [1]
    return [k for k in range(k_min, k_max + 1) if length % k == 0]
