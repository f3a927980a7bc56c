"""Transforms on the host: random resized crop, RandAugment, resize and centre crop, ten-crop.

The decoder shrinks a picture as far as the crop allows. OpenCV or Pillow does the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import cv2
import numpy as np
import PIL.Image

from resattn_jax.data.pictures import MAX_PIXELS, BrokenPicture, Picture, Scratch
from resattn_jax.data.randaugment import randaugment

cv2.setNumThreads(0)  # the pipelines already use a thread for each core
_scratch = Scratch()


class HasPixels(Protocol):
    """A picture, or what stands for one: its size and, when they are asked for, its pixels, uint8 [H, W, C]."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def pixels(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Makes a training image, uint8 [size, size, 3], from a picture.

    crop is True for a random resized crop, False for resize and centre crop. area is the range of the crop's share of
    the picture, aspect the range of its width / height. randaugment is (operations per image, magnitude from 0 to 10).
    upright: the picture is one whose EXIF orientation was applied.
    """

    size: int
    crop: bool
    area: tuple[float, float]
    aspect: tuple[float, float]
    randaugment: tuple[int, float]
    upright: bool = False

    def __call__(self, picture: Picture, rng: np.random.Generator, out: np.ndarray) -> None:
        """Writes the image to `out`. Raises BrokenPicture."""
        if self.crop:
            resize(picture, crop_box(rng, picture.height, picture.width, self.area, self.aspect), out)
        else:
            out[...] = EvalTransform(self.size, 1.0, 1)(picture)[0]
        if self.randaugment[0]:
            out[...] = randaugment(rng, out, *self.randaugment)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Makes the views of a picture for evaluation, uint8 [views, size, size, C].

    One view is the centre; five are the four corners and the centre. The picture is first resized so that its shorter
    side is size / fraction, by Pillow's antialiased bilinear filter, as in the evaluation of the published nets.
    upright: as in `TrainTransform`.
    """

    size: int
    fraction: float
    views: int
    upright: bool = False

    def __call__(self, picture: HasPixels) -> np.ndarray:
        """Raises BrokenPicture, also if the picture is so narrow that it would be too large when resized."""
        scale = round(self.size / self.fraction) / min(picture.height, picture.width)
        height, width = (max(round(side * scale), self.size) for side in (picture.height, picture.width))
        if height * width > MAX_PIXELS:
            raise BrokenPicture(f"with {picture.height} x {picture.width} pixels it is too narrow to be resized")
        pixels = picture.pixels()
        image = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if (width, height) != image.size:
            image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        bottom, right = height - self.size, width - self.size
        corners = [(round(bottom / 2), round(right / 2))]
        if self.views == 5:
            corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), *corners]
        pixels = np.asarray(image).reshape(height, width, -1)
        return np.stack([pixels[y : y + self.size, x : x + self.size] for y, x in corners])


def crop_box(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random window (top, left, height, width) of a picture (Szegedy et al., "Going deeper", section 6).

    Its share of the picture is uniform in `area`, its width / height log-uniform in `aspect`. If ten draws do not fit
    into the picture, the window is the largest in the middle whose aspect is allowed.
    """
    for _ in range(10):
        share = rng.uniform(*area) * height * width
        shape = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(share * shape)), round(math.sqrt(share / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, max(round(height * aspect[1]), 1)), min(height, max(round(width / aspect[0]), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(picture: Picture, box: tuple[int, int, int, int], out: np.ndarray) -> None:
    """Writes the window (top, left, height, width) of a picture, resized, to `out`, uint8 [H, W, 3].

    The decoder halves the picture while the window stays larger than the result. Bilinear interpolation then shrinks
    one side at least by less than a factor of two, so that it skips no pixel there.
    """
    top, left, height, width = box
    shrink = 1
    while shrink < 8 and height >= 2 * shrink * out.shape[0] and width >= 2 * shrink * out.shape[1]:
        shrink *= 2
    pixels = picture.top_pixels(top + height, shrink, _scratch)
    y, x = top // shrink, left // shrink
    window = pixels[y : y + max(height // shrink, 1), x : x + max(width // shrink, 1)]
    cv2.ipp.setUseIPP_NotExact(True)  # a setting of each thread; on x86 it is quicker and nearer to the exact result
    cv2.resize(window, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)
