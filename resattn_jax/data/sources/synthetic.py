"""Made-up pictures to measure speed with: no data set is needed."""

from __future__ import annotations

import functools
import io

import numpy as np
import PIL.Image

from resattn_jax.data.sources import Source
from resattn_jax.data.sources.slices import sliced
from resattn_jax.errors import UsageError

_EXAMPLES = {"train": 10_000, "validation": 1_000, "test": 1_000}


def open_split(name: str, split: str, data_dir: str | None) -> Source:
    """Opens a split or a slice of it. Raises UsageError."""
    return sliced(split, SyntheticSource)


def prepare(name: str, data_dir: str | None) -> str:
    """Says that there is nothing to do."""
    return "synthetic pictures are made as they are read; synthetic needs no preparing; start training"


class SyntheticSource:
    """JPEGs of smooth noise, in the sizes of ImageNet's photographs."""

    image_shape = None
    class_names = tuple(f"class {i:03}" for i in range(1000))
    _PICTURES = 64  # different ones; the rows repeat them

    def __init__(self, split: str):
        """Raises UsageError if there is no such split."""
        if split not in _EXAMPLES:
            raise UsageError(f"synthetic has the splits {', '.join(_EXAMPLES)}, not {split!r}")
        self._count = _EXAMPLES[split]
        self._seed = sum(split.encode())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        return _jpeg(self._seed, row % self._PICTURES), (row * 7919) % len(self.class_names)

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        return ""

    def name(self, row: int) -> str:
        return f"synthetic example {row}"


@functools.lru_cache(maxsize=256)
def _jpeg(seed: int, index: int) -> bytes:
    rng = np.random.default_rng([seed, index])
    # ImageNet's shapes: half are 500 x 375 or upright, the rest spread around (mean 400 x 350, a few of 2000 and more).
    size = (500, 375) if rng.random() < 0.5 else np.exp(rng.normal(np.log((430, 370)), 0.35)).astype(int)
    width, height = size if rng.random() < 0.75 else size[::-1]
    image = PIL.Image.fromarray(rng.integers(0, 256, (max(height // 8, 4), max(width // 8, 4), 3), np.uint8))
    pixels = np.asarray(image.resize((int(width), int(height)), PIL.Image.Resampling.BICUBIC), np.int16)
    noisy = pixels + rng.integers(-10, 11, pixels.shape)  # fine detail makes a file as long as a photograph's
    file = io.BytesIO()
    PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()
