"""TrivialAugment-Wide (Müller and Hutter, ICCV 2021, arXiv 2103.10158) on the device: one operation an image.

Images, uint8, go through one program without branches: a warp, a blend, a stretch of the contrast, an equalisation, an
inversion and a mask of bits, each with parameters under which it changes nothing but for the images whose operation it
is. Operations, strengths and rounding are torchvision's on Pillow images.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
LEVELS = 31  # strengths of an operation, 0 the weakest
_UNIT = 1 << 16  # Pillow computes places in 65536ths of a pixel


def trivial_augment(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Applies an operation to each image, drawn with its strength and its sign. One key an image.

    images: uint8 [B, H, W, C], grey or RGB -> the same.
    """
    return apply(images, *draw(keys))


def draw(keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The operation, level and sign of each image, as `apply` takes them."""
    counts = jnp.array([len(OPERATIONS), LEVELS, 2])
    drawn = jax.vmap(lambda key: jax.random.randint(key, (3,), 0, counts))(keys)
    return drawn[:, 0], drawn[:, 1], drawn[:, 2]


def apply(images: jax.Array, operation: jax.Array, level: jax.Array, negative: jax.Array) -> jax.Array:
    """Applies to each image OPERATIONS[operation] with a strength of `level`, 0 … LEVELS - 1, all int32 [B].

    negative: 1 for the other direction, where the operation has two, else 0. images as in `trivial_augment`.
    """
    row = (operation * LEVELS + level) * 2 + negative
    affine, factor, mask, threshold = (jnp.asarray(table)[row] for table in _tables(*images.shape[1:3]))

    def among(*names: str) -> jax.Array:
        return functools.reduce(jnp.logical_or, [operation == OPERATIONS.index(name) for name in names])

    images = _warp(images, affine).astype(jnp.float32)
    images = _blend(images, factor, among("color"), among("contrast"), among("sharpness"))
    images = _stretch(images, among("autocontrast"))
    images = _equalize(images, among("equalize"))
    images = jnp.where(images >= threshold[:, None, None, None], 255 - images, images)
    return images.astype(jnp.uint8) & mask[:, None, None, None]


@functools.cache
def _tables(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What each operation does at each level and sign, a row for each: affine, factor, mask, threshold.

    affine int32 [N, 6]: (a, b, c, d, e, f) of the place a x + b y + c, d x + e y + f that pixel (x, y) comes from, in
    65536ths. factor float32 [N]: of a blend. mask uint8 [N]: the bits that are kept. threshold float32 [N]: what is
    inverted is at or above it.
    """
    affine, factor, mask, threshold = [], [], [], []
    for operation in OPERATIONS:
        for level in range(LEVELS):
            share = level / (LEVELS - 1)
            for sign in (1, -1):
                affine.append(_fixed(_matrix(operation, share, sign, height, width)))
                blended = operation in ("brightness", "color", "contrast", "sharpness")
                factor.append(1 + 0.99 * share * sign if blended else 1.0)
                bits = 8 - round(6 * share) if operation == "posterize" else 8
                mask.append(256 - (1 << (8 - bits)))
                threshold.append(255 - 17 * level // 2 if operation == "solarize" else 256)  # 255 of 30 levels is 8.5
    return (
        np.array(affine, np.int32), np.array(factor, np.float32), np.array(mask, np.uint8),
        np.array(threshold, np.float32),
    )  # fmt: skip


def _matrix(operation: str, share: float, sign: int, height: int, width: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the point (x, y) shows what lies at (a x + b y + c, d x + e y + f), in pixels."""
    shear, shift, angle = 0.99 * share * sign, int(32 * share) * sign, math.radians(135 * share * sign)
    if operation == "shear_x":
        return 1, shear, 0, 0, 1, 0
    if operation == "shear_y":
        return 1, 0, 0, shear, 1, 0
    if operation == "translate_x":
        return 1, 0, -shift, 0, 1, 0
    if operation == "translate_y":
        return 1, 0, 0, 0, 1, -shift
    if operation == "rotate":  # counter-clockwise around the middle
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
    return 1, 0, 0, 0, 1, 0


def _fixed(matrix: tuple[float, ...]) -> list[int]:
    """The same of pixels, whose points are their middles, in 65536ths."""
    a, b, c, d, e, f = matrix
    return [math.floor(v * _UNIT + 0.5) for v in (a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e)]


def _warp(images: jax.Array, affine: jax.Array) -> jax.Array:
    """Nearest neighbours, black where nothing was. affine: int32 [B, 6] as in `_tables`."""
    count, height, width, channels = images.shape
    a, b, c, d, e, f = jnp.moveaxis(affine, -1, 0)[..., None, None]
    y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None]
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    places = jnp.where(inside, row * width + column, 0).reshape(count, -1, 1)
    warped = jnp.take_along_axis(images.reshape(count, -1, channels), places, axis=1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], warped.reshape(images.shape), 0)


def _blend(
    images: jax.Array, factor: jax.Array, color: jax.Array, contrast: jax.Array, sharpness: jax.Array
) -> jax.Array:
    """What lies `factor` of the way to each image from black, from grey, from its mean grey or from it smoothed.

    images: whole numbers in float32. factor float32 [B], 1 changes nothing; the others bool [B]: from what.
    """
    grey = _grey(images)
    origin = jnp.where(contrast[:, None, None, None], _mean(grey), 0)
    origin = jnp.where(sharpness[:, None, None, None], _smooth(images), origin)
    origin = jnp.where(color[:, None, None, None], grey, origin)
    blend = origin + factor[:, None, None, None] * (images - origin)
    return jnp.floor(jnp.clip(blend, 0, 255))


def _grey(images: jax.Array) -> jax.Array:
    """Luma as Pillow rounds it, [B, H, W, 1]. The sums, below 2^24, are exact."""
    if images.shape[-1] == 1:
        return images
    luma = np.array([19595, 38470, 7471], np.float32)[None, None, None]
    return jnp.floor((jnp.sum(images * luma, -1, keepdims=True) + 0x8000) / _UNIT)


def _mean(grey: jax.Array) -> jax.Array:
    """The mean, rounded, of each image, [B, 1, 1, 1]; exact up to 4,096 x 4,096 pixels."""
    total = jnp.sum(grey.astype(jnp.uint32), (1, 2, 3), keepdims=True, dtype=jnp.uint32)
    pixels = np.uint32(grey.shape[1] * grey.shape[2])
    rest = total % pixels
    return jnp.where(rest >= pixels - rest, total // pixels + 1, total // pixels).astype(jnp.float32)


def _smooth(images: jax.Array) -> jax.Array:
    """The average of 3x3 pixels, of which the middle counts five times, rounded; the rim is as it was."""
    height, width = images.shape[1:3]
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    columns = sum(jnp.roll(images, shift, axis=1) for shift in (-1, 0, 1))
    total = 4 * images + sum(jnp.roll(columns, shift, axis=2) for shift in (-1, 0, 1))
    return jnp.where(inside[None, ..., None], jnp.floor((total + 6.5) / 13), images)


def _stretch(images: jax.Array, on: jax.Array) -> jax.Array:
    """Stretches the values of each channel to 0 … 255 where on, bool [B]. images: whole numbers in float32."""
    low, high = jnp.min(images, (1, 2), keepdims=True), jnp.max(images, (1, 2), keepdims=True)
    on = on[:, None, None, None] & (high > low)
    low, scale = jnp.where(on, low, 0), jnp.where(on, 255 / jnp.maximum(high - low, 1), 1)
    return jnp.floor((images - low) * scale + 1 / 512)  # a quotient is whole, or 1 / 255 below a whole number


def _equalize(images: jax.Array, on: jax.Array) -> jax.Array:
    """Flattens the histogram of each channel where on, bool [B]. images: whole numbers in float32.

    A histogram is a product of matrices: of the upper four bits of each pixel, one-hot, and of the lower four.
    """
    count, height, width, channels = images.shape
    values = jnp.moveaxis(images, -1, 1).reshape(count * channels, -1).astype(jnp.int32)
    upper, lower = jax.nn.one_hot(values >> 4, 16, axis=1), jax.nn.one_hot(values & 15, 16, axis=1)
    histogram = jnp.einsum("iup,ilp->iul", upper, lower).reshape(-1, 256)
    most = jnp.max(values, 1, keepdims=True)
    step = jnp.floor((height * width - jnp.take_along_axis(histogram, most, axis=1)) / 255)
    before = jnp.cumsum(histogram, 1) - histogram
    table = jnp.floor((before + jnp.floor(step / 2) + 0.5) / jnp.maximum(step, 1))
    flat = jnp.minimum(jnp.take_along_axis(table, values, axis=1, mode="promise_in_bounds"), 255)
    flat = jnp.where(step > 0, flat, values.astype(flat.dtype))
    flat = jnp.moveaxis(flat.reshape(count, channels, height, width), 1, -1)
    return jnp.where(on[:, None, None, None], flat, images)
