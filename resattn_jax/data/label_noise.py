"""Label noise as the paper makes it (section 4.1, table 5)."""

from __future__ import annotations

import numpy as np


def noisy_labels(labels: np.ndarray, num_classes: int, noise: float, seed: int) -> np.ndarray:
    """Draws each label anew from its row of the confusion matrix, a function of the seed.

    The matrix has 1 - noise on the diagonal and noise / (num_classes - 1) elsewhere; the paper's clean ratio r is
    1 - noise. labels: int32 [N] -> int32 [N]. Raises ValueError when noise is not in [0, 1].
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"label noise is a share of the labels, from 0 to 1, not {noise}")
    rng = np.random.default_rng([seed, 0x1ABE1])
    wrong = rng.random(len(labels)) < noise
    shift = rng.integers(1, num_classes, len(labels))  # to each of the other classes alike
    return np.where(wrong, (labels + shift) % num_classes, labels).astype(np.int32)
