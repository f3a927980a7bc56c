"""Pictures as PyTorch's ImageNet example reads them, with Pillow."""

from __future__ import annotations

import io
import math

import numpy as np
import PIL.Image
import torch

from resattn_jax.data.sources import Source


class Pictures(torch.utils.data.Dataset):
    """Random resized crops of a source's JPEGs, half of them mirrored. area, aspect: the ranges of a crop's."""

    def __init__(self, source: Source, size: int, area: tuple[float, float], aspect: tuple[float, float]):
        self.source, self.size, self.area, self.aspect = source, size, area, aspect

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        data, label = self.source[row]
        image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        image = image.crop(self._random_box(*image.size))
        image = image.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR)
        if torch.rand(()) < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), label

    def _random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom; after ten crops that do not fit, the whole image."""
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(*self.area).item()
            shape = math.exp(torch.empty(1).uniform_(*map(math.log, self.aspect)).item())
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w, h = width, height
        left = int(torch.randint(0, width - w + 1, ()))
        top = int(torch.randint(0, height - h + 1, ()))
        return left, top, left + w, top + h
