"""How many training examples each instruction gets: evenly, or with a long tail; the same for every task."""

from __future__ import annotations

import math

import numpy as np

#: How a power-law shape is read; see ``rule_counts``.
TAIL_READINGS = ("weights", "index")


def rule_counts(
    instructions: int, examples: int, tail_shape: float = math.inf, tail_reading: str = "weights", seed: int = 0
) -> np.ndarray:
    """How many of the N examples use each of the I instructions: int32 [I], summing to exactly N.

    If ``tail_shape`` is infinite, counts differ by at most one. Otherwise they follow a power law of that shape (paper
    P2, figure 3; density f(w) = a w^(a-1)), read in one of two ways: ``weights`` (default; the only reading under which
    large shapes tend to uniform): each instruction draws a weight from that density and gets a share proportional to
    it; ``index``: the instruction of an example is floor(I u^(1/a)), u uniform. Shares are rounded to counts by the
    largest-remainder method.

    Raises ValueError if I > N or a parameter is out of range.
    """
    if not 1 <= instructions <= examples:
        raise ValueError(f"{instructions} instructions need at least as many examples, got {examples}")
    if not tail_shape > 0:
        raise ValueError(f"tail_shape must be positive, got {tail_shape}")
    if math.isinf(tail_shape):
        shares = np.full(instructions, 1 / instructions)
    elif tail_reading == "weights":
        words = np.random.Philox(key=np.array([seed, 0x7461696C], np.uint64)).random_raw(instructions)
        weights = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        log_weights = np.log(weights) / tail_shape
        shares = np.exp(log_weights - log_weights.max())
        shares /= shares.sum()
    elif tail_reading == "index":
        shares = np.diff((np.arange(instructions + 1) / instructions) ** tail_shape)
    else:
        raise ValueError(f"tail_reading must be one of {TAIL_READINGS}, got {tail_reading!r}")
    exact = shares * examples
    counts = np.floor(exact).astype(np.int64)
    missing = examples - int(counts.sum())
    # Remainders are compared after rounding, so that the last bit of `exp` cannot change a count.
    order = np.argsort(-np.round(exact - counts, 6), kind="stable")
    counts[order[:missing]] += 1
    return counts.astype(np.int32)


def effective_number(counts: np.ndarray) -> float:
    """How many equally frequent instructions are as diverse as these counts: exp of the entropy of the shares."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
