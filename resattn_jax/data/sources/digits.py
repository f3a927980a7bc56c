"""scikit-learn's handwritten digits: a set that needs no download.

digits.npz has them as `sklearn.datasets.load_digits` gives them, grey values of 0 to 16, those of the test split last.
"""

from __future__ import annotations

import io
import pathlib

import numpy as np
import PIL.Image

from resattn_jax.data.sources import Source
from resattn_jax.data.sources.slices import sliced
from resattn_jax.errors import UsageError

_TEST = 360


def open_split(name: str, split: str, data_dir: str | None) -> Source:
    """Opens a split or a slice of it. Raises UsageError."""
    return sliced(split, DigitsSource)


def prepare(name: str, data_dir: str | None) -> str:
    """Says that there is nothing to do."""
    return "digits are on board and need no preparing"


class DigitsSource:
    """1,797 grey pictures of 8x8, given as PNG. 360 of them, stratified by class, are the test split."""

    image_shape = (8, 8, 1)
    class_names = tuple("0123456789")

    def __init__(self, split: str):
        """Raises UsageError if there is no such split."""
        if split not in ("train", "test"):
            raise UsageError(f"digits have the splits train and test, not {split!r}")
        rows = slice(None, -_TEST) if split == "train" else slice(-_TEST, None)
        with np.load(pathlib.Path(__file__).with_name("digits.npz")) as digits:
            self._images = np.round(digits["images"][rows] * (255 / 16)).astype(np.uint8)
            self._labels = digits["labels"][rows].astype(np.int64)

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
