"""Label noise as in the paper (section 4.1, table 5)."""

from __future__ import annotations

import numpy as np

from resattn_jax.data.sources import Source, identity_of
from resattn_jax.errors import UsageError


class NoisySource:
    """A source with noisy labels: each is drawn once from its row of a confusion matrix, by the seed.

    The matrix has 1 - noise on the diagonal and noise / (classes - 1) elsewhere. The paper's clean ratio r is
    1 - noise.
    """

    def __init__(self, source: Source, noise: float, seed: int):
        """Raises UsageError if noise is not in [0, 1]."""
        if not 0 <= noise <= 1:
            raise UsageError(f"config.data.label_noise is a share of the labels, from 0 to 1, not {noise}")
        self._source, self.class_names, self.image_shape = source, source.class_names, source.image_shape
        self._noise = f"labels wrong: {noise}, {seed}"
        rng = np.random.default_rng([seed, 0x1ABE1])
        wrong = rng.random(len(source)) < noise
        # What is added to each label, modulo the number of classes. All wrong classes are equally likely.
        self._shifts = np.where(wrong, rng.integers(1, len(self.class_names), len(source)), 0)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        data, label = self._source[row]
        return data, int(label + self._shifts[row]) % len(self.class_names)

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        return self._source.fingerprint(rows)

    def identity(self) -> tuple[str, str] | None:
        """That of the source, and what is wrong of it."""
        inner = identity_of(self._source)
        return inner and (inner[0], f"{inner[1]}\0{self._noise}")

    def name(self, row: int) -> str:
        return self._source.name(row)
