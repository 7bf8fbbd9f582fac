"""The order in which examples are visited: one permutation per epoch, cut into batches."""

from __future__ import annotations

import numpy as np


def epoch_order(examples: int, epoch: int, seed: int = 0) -> np.ndarray:
    """The order in which an epoch visits the N examples, int32 [N]; shared by all members.

    Obtained by sorting raw Philox words, so the permutation does not change with the numpy version.
    """
    words = np.random.Philox(key=np.array([seed, 0x6F726465_00000000 + epoch], np.uint64)).random_raw(examples)
    return np.argsort(words, kind="stable").astype(np.int32)


class ExampleOrder:
    """Which examples each step visits: the epochs' orders, concatenated and cut into batches; see ``epoch_order``."""

    def __init__(self, examples: int, batch_size: int, seed: int = 0):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def batches(self, first_step: int, steps: int) -> np.ndarray:
        """Example indices of consecutive steps, int32 [steps, batch_size]."""
        start, stop = first_step * self.batch_size, (first_step + steps) * self.batch_size
        epochs = range(start // self.examples, (stop - 1) // self.examples + 1)
        kept = self._epochs
        self._epochs = {e: kept[e] if e in kept else epoch_order(self.examples, e, self.seed) for e in epochs}
        joined = np.concatenate([self._epochs[e] for e in epochs])
        offset = epochs[0] * self.examples
        return joined[start - offset : stop - offset].reshape(steps, self.batch_size)
