"""RandAugment (Cubuk et al., 2019, arXiv 1909.13719) on the host: operations on uint8 RGB images by OpenCV.

Each operation means what Pillow's of the same name does. All but sharpness and the moving ones are tables of 256
values, which is why this is quicker here than on the device, where every image would go through every operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

LEVELS = np.arange(256)
FILL = (124, 116, 104)  # ImageNet's mean colour, where a moved image leaves a gap


def randaugment(rng: np.random.Generator, image: np.ndarray, count: int, magnitude: float) -> np.ndarray:
    """Applies `count` operations drawn with replacement to uint8 [H, W, 3]. magnitude: 0 (least) to 10 (most)."""
    for operation in rng.integers(len(OPERATIONS), size=count):
        strength = magnitude / 10 * rng.choice((-1, 1))
        image = OPERATIONS[operation](image, strength)
    return image


def autocontrast(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Stretches each channel to 0 … 255."""
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1.0)
    tables = np.where(high > low, (LEVELS[:, None] - low) * scale, LEVELS[:, None])
    return _look_up(image, tables)


def equalize(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Flattens each channel's histogram."""
    tables = np.empty((256, 3))
    for channel in range(3):
        histogram = np.bincount(image[..., channel].ravel(), minlength=256)
        used = histogram[histogram > 0]
        step = (histogram.sum() - used[-1]) // 255
        before = np.cumsum(histogram) - histogram
        tables[:, channel] = (before + step // 2) // step if step else LEVELS
    return _look_up(image, tables)


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
    """Keeps 8 (strength 0) to 4 (strength ±1) bits of each value."""
    return image & np.uint8(0xFF & ~((1 << round(4 * abs(strength))) - 1))


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
    """Inverts what is at or above a threshold, 256 (strength 0: nothing) to 0 (strength ±1: all)."""
    return _look_up(image, np.where(256 * (1 - abs(strength)) > LEVELS, LEVELS, 255 - LEVELS)[:, None])


def brightness(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with black by the factor 1 + 0.9 strength."""
    return _look_up(image, (LEVELS * (1 + 0.9 * strength))[:, None])


def contrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with the mean grey by the factor 1 + 0.9 strength."""
    mean, factor = np.floor(cv2.mean(_grey(image))[0] + 0.5), 1 + 0.9 * strength
    return _look_up(image, (mean + factor * (LEVELS - mean))[:, None])


def color(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with the grey image by the factor 1 + 0.9 strength."""
    return _blend(np.repeat(_grey(image)[..., None], 3, axis=2), image, 1 + 0.9 * strength)


def sharpness(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with the image smoothed over 3x3 pixels (its rim excepted) by the factor 1 + 0.9 strength."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, image, 1 + 0.9 * strength)


def rotate(image: np.ndarray, strength: float) -> np.ndarray:
    """Turns counter-clockwise by 30 degrees times strength."""
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 30 * strength, 1))


def shear_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves each row to the right by 0.3 strength times its distance from the top."""
    return _warp(image, [[1, 0.3 * strength, 0], [0, 1, 0]])


def shear_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves each column down by 0.3 strength times its distance from the left."""
    return _warp(image, [[1, 0, 0], [0.3 * strength, 1, 0]])


def translate_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves right by 0.45 of the width times strength."""
    return _warp(image, [[1, 0, round(0.45 * strength * image.shape[1])], [0, 1, 0]])


def translate_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves down by 0.45 of the height times strength."""
    return _warp(image, [[1, 0, 0], [0, 1, round(0.45 * strength * image.shape[0])]])


def identity(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Nothing: one of the fourteen."""
    return image


OPERATIONS = (
    identity, autocontrast, equalize, rotate, solarize, color, posterize,
    contrast, brightness, sharpness, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


def _look_up(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """tables: [256, 1] for all channels or [256, 3]; fractions are cut off, as Pillow does."""
    tables = np.broadcast_to(np.clip(tables, 0, 255).astype(np.uint8), (256, 3))
    return cv2.LUT(image, np.ascontiguousarray(tables).reshape(256, 1, 3))


def _blend(a: np.ndarray, b: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(a, 1 - factor, b, factor, 0)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _warp(image: np.ndarray, matrix: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    size = image.shape[1], image.shape[0]
    return cv2.warpAffine(image, np.asarray(matrix, np.float64), size, flags=cv2.INTER_LINEAR, borderValue=FILL)
