"""The order of training: which example stands where, and which way round it is seen, functions of the seed alone.

A position is counted from the start of the run, over all batches.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0 … examples - 1, int32, a function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(examples).astype(np.int32)


def batch_rows(seed: int, step: int, batch_size: int, examples: int) -> np.ndarray:
    """Rows of the batch of `step` (counted from 0), int32 [batch_size].

    Epochs follow each other without a gap: each shows every example once, and one may end within a batch.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch, index = position // examples, position % examples
    rows = np.empty(batch_size, np.int32)
    for e in range(epoch[0], epoch[-1] + 1):
        rows[epoch == e] = epoch_order(seed, e, examples)[index[epoch == e]]
    return rows


def mirrored(seed: int, rows: np.ndarray, positions: np.ndarray, examples: int) -> np.ndarray:
    """Whether each example is seen in the mirror, bool of the shape of `rows` and of their `positions` (int64).

    Alternating flip (Jordan, 2024, arXiv 2404.00498): in its first epoch a coin of each example decides,
    and every epoch after that it is the other way round.
    """
    return _coins(seed, examples)[rows] ^ (positions // examples % 2 == 1)


@functools.lru_cache(maxsize=4)
def _coins(seed: int, examples: int) -> np.ndarray:
    """bool [examples], a function of seed and example; an example's coin is the same in a larger set."""
    return np.random.default_rng([seed, 0, 2]).random(examples) < 0.5
