"""scikit-learn's handwritten digits: a set that needs no download."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

from resattn_jax.data.sources import Source
from resattn_jax.data.sources.slices import sliced
from resattn_jax.errors import UsageError


def open_split(name: str, split: str, data_dir: str | None) -> Source:
    """Opens a split or a slice of it. Raises UsageError."""
    return sliced(split, DigitsSource)


def prepare(name: str, data_dir: str | None) -> str:
    """Says that there is nothing to do."""
    return "digits come with scikit-learn and need no preparing"


class DigitsSource:
    """1,797 grey pictures of 8x8, given as PNG. 360 of them, stratified by class, are the test split."""

    image_shape = (8, 8, 1)
    class_names = tuple("0123456789")

    def __init__(self, split: str):
        """Raises UsageError if there is no such split."""
        from sklearn.datasets import load_digits  # imports of seconds that only digits need
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise UsageError(f"digits have the splits train and test, not {split!r}")
        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.images)), test_size=360, stratify=digits.target, random_state=0, shuffle=True
        )
        rows = train if split == "train" else test
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[rows]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        file = io.BytesIO()
        PIL.Image.fromarray(self._images[row]).save(file, "PNG")
        return file.getvalue(), int(self._labels[row])

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        return ""

    def name(self, row: int) -> str:
        return f"digits example {row}"
