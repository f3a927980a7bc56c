"""What happens to a batch on the device, inside the compiled step: colours, normalise, crop, flip, erase, mix.

Randomness belongs to an example's position in the global batch, never to the device that holds it, so that a batch is
the same on one device and on many.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from resattn_jax.trivial_augment import trivial_augment


def normalize(images: jax.Array, mean: np.ndarray, std: np.ndarray) -> jax.Array:
    """uint8 [B, H, W, C] -> float32, (x / 255 - mean) / std.

    mean and std are of pixels in [0, 1] and have the last axes of an image: [C] or [1], or [H, W, C] for a mean image.
    """
    mean, std = (np.asarray(x, np.float32).reshape((1,) * (4 - np.ndim(x)) + np.shape(x)) for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_crop(keys: jax.Array, images: jax.Array, padding: int, mode: str = "zeros") -> jax.Array:
    """Pads `padding` pixels on each side and crops the old size at random. [B, H, W, C], one key an image.

    mode: "zeros", or "reflect": the image goes on mirrored, the outermost pixel not repeated, as NumPy's reflect does.
    Rows and columns are picked by products with zeros and ones, exact in this precision: slices of as many places as
    there are images would be a loop over them on a TPU, 3 % of a step.
    """
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, widths, "reflect") if mode == "reflect" else jnp.pad(images, widths)
    starts = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(keys)

    def picked(starts: jax.Array, size: int) -> jax.Array:
        """[B, size, size + 2 * padding]: in row i a one at start + i."""
        rows = starts[:, None] + jnp.arange(size)[None]
        return jax.nn.one_hot(rows, size + 2 * padding, dtype=images.dtype)

    rows, columns = (picked(starts[:, axis], size) for axis, size in enumerate(images.shape[1:3]))
    return jnp.einsum("bhH,bHWc,bwW->bhwc", rows, padded, columns, precision="highest")


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors half of the images left to right. [B, H, W, C], one key an image."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Zeroes a rectangle of so many of the images (Zhong et al., 2017, arXiv 1708.04896). [B, H, W, C], one key each.

    It covers 2 to 33 % of the image, its height / width is log-uniform in 0.3 … 3.3, and it lies wholly inside; a
    side that would be too long is as long as the image's. Zero is the mean colour, in normalised images.
    """
    height, width = images.shape[1:3]

    def rectangle(key: jax.Array) -> jax.Array:
        on, area, aspect, y, x = jax.random.uniform(key, (5,))
        area = (0.02 + 0.31 * area) * height * width
        aspect = 0.3 * (3.3 / 0.3) ** aspect
        h = jnp.minimum(jnp.round(jnp.sqrt(area * aspect)), height)
        w = jnp.minimum(jnp.round(jnp.sqrt(area / aspect)), width)
        top, left = jnp.floor(y * (height - h + 1)), jnp.floor(x * (width - w + 1))
        return jnp.where(on < probability, jnp.stack([top, left, top + h, left + w]), 0)

    inside = jax.vmap(_window, (0, None, None))(jax.vmap(rectangle)(keys), height, width)
    return jnp.where(inside[..., None], 0, images)


def cutout(keys: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Zeroes a square of `size` pixels around a random one (DeVries and Taylor, 2017, arXiv 1708.04552).

    The part beyond the rim falls away. [B, H, W, C], one key an image.
    """
    height, width = images.shape[1:3]

    def square(key: jax.Array) -> jax.Array:
        top, left = jax.random.randint(key, (2,), 0, jnp.array([height, width])) - size // 2
        return jnp.stack([top, left, top + size, left + size])

    inside = jax.vmap(_window, (0, None, None))(jax.vmap(square)(keys), height, width)
    return jnp.where(inside[..., None], 0, images)


def color_jitter(keys: jax.Array, images: jax.Array, ranges: tuple[float, float, float]) -> jax.Array:
    """Changes brightness, contrast and saturation, in this order, each by a factor of 1 - range … 1 + range.

    As Pillow's ImageEnhance does: a blend with black, with the mean grey, with the grey image.
    images: RGB [B, H, W, 3] in 0 … 255, one key an image. Returns float32, clipped to 0 … 255.
    """
    factors = 1 + jax.vmap(lambda key: jax.random.uniform(key, (3,), minval=-1) * jnp.asarray(ranges))(keys)
    brightness, contrast, saturation = jnp.moveaxis(factors, -1, 0)[..., None, None, None]
    images = _blend(jnp.zeros(()), images.astype(jnp.float32), brightness)
    images = _blend(jnp.mean(_grey(images), (1, 2, 3), keepdims=True), images, contrast)
    return _blend(_grey(images), images, saturation)


# AlexNet's principal components of the colours of ImageNet's pixels in [0, 1] (Krizhevsky et al., 2012, section 4.1).
_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045], np.float32)
_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32)


def pca_lighting(keys: jax.Array, images: jax.Array, deviation: float) -> jax.Array:
    """Adds to each image one colour along ImageNet's principal components, with N(0, deviation) as their weights.

    images: RGB [B, H, W, 3] in 0 … 255, one key an image. Returns float32, which may leave 0 … 255.
    """
    weights = jax.vmap(lambda key: deviation * _DEVIATIONS * jax.random.normal(key, (3,)))(keys)
    return images.astype(jnp.float32) + 255 * (weights @ _DIRECTIONS.T)[:, None, None]


def recolor(
    section: ml_collections.FrozenConfigDict, key: jax.Array, positions: jax.Array, images: jax.Array
) -> jax.Array:
    """What config.augment asks for before images are normalised, [B, H, W, C] in 0 … 255.

    positions int32 [B] are the examples' positions in the global batch.
    """
    if section.trivialaugment:
        images = trivial_augment(_keys(key, positions, 6), images)
    if any(section.color_jitter):
        images = color_jitter(_keys(key, positions, 2), images, section.color_jitter)
    if section.pca_lighting:
        images = pca_lighting(_keys(key, positions, 3), images, section.pca_lighting)
    return images


def augment(
    section: ml_collections.FrozenConfigDict, key: jax.Array, positions: jax.Array, images: jax.Array
) -> jax.Array:
    """What config.augment asks for of normalised images [B, H, W, C], whose zero is the mean colour.

    positions as in `recolor`. Each operation has a number of its own for its random keys.
    """
    if section.crop_padding:
        images = random_crop(_keys(key, positions, 0), images, section.crop_padding, section.crop_mode)
    if section.flip:
        images = random_flip(_keys(key, positions, 1), images)
    if section.random_erasing:
        images = random_erasing(_keys(key, positions, 4), images, section.random_erasing)
    if section.cutout:
        images = cutout(_keys(key, positions, 5), images, section.cutout)
    return images


def mix(
    section: ml_collections.FrozenConfigDict, key: jax.Array, images: jax.Array, targets: jax.Array, on: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixup, CutMix, or where both have an alpha one of them a batch, with equal chances. Arguments as theirs."""
    if section.mixup_alpha and section.cutmix_alpha:
        key, coin = jax.random.split(key)
        first = jax.random.bernoulli(coin)
        images, targets = mixup(key, images, targets, section.mixup_alpha, on & first)
        return cutmix(key, images, targets, section.cutmix_alpha, on & ~first)
    if section.mixup_alpha:
        return mixup(key, images, targets, section.mixup_alpha, on)
    if section.cutmix_alpha:
        return cutmix(key, images, targets, section.cutmix_alpha, on)
    return images, targets


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float, on: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al., ICLR 2018): lambda * x_a + (1 - lambda) * x_b with one lambda ~ Beta(alpha, alpha) a batch.

    The partner of an example is its neighbour in the batch. The batch comes in random order, so this is a random
    pairing, the same on any number of devices and without a word between them. It needs an even number of examples.

    images float [B, H, W, C], targets float [B, num_classes], on: bool scalar, False leaves the batch as it is.
    Returns the mixed images and targets.
    """
    lam = jnp.where(on, jax.random.beta(key, alpha, alpha), 1.0)

    def mix(x: jax.Array) -> jax.Array:
        return lam * x + (1 - lam) * _neighbours(x)

    return mix(images), mix(targets)


def cutmix(
    key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float, on: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """CutMix (Yun et al., ICCV 2019): a window of each image is its neighbour's, the same window for all of a batch.

    Its share of the area is 1 - lambda, lambda ~ Beta(alpha, alpha), before what lies beyond the rim falls away; the
    targets are mixed by the share that is left. Arguments and pairs as in `mixup`.
    """
    height, width = images.shape[1:3]
    for_lam, for_place = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(for_lam, alpha, alpha))
    y, x = jax.random.uniform(for_place, (2,))
    h, w = side * height, side * width
    box = jnp.round(jnp.stack([y * height - h / 2, x * width - w / 2, y * height + h / 2, x * width + w / 2]))
    inside = _window(box, height, width) & on
    share = jnp.mean(inside, dtype=jnp.float32)
    mixed = jnp.where(inside[None, ..., None], _neighbours(images), images)
    return mixed, (1 - share) * targets + share * _neighbours(targets)


def _neighbours(x: jax.Array) -> jax.Array:
    """Each example's partner: 1, 0, 3, 2, …"""
    return x.reshape(x.shape[0] // 2, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _keys(key: jax.Array, positions: jax.Array, purpose: int) -> jax.Array:
    """One key for each example and purpose, wherever in the world the example lies."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def _window(box: jax.Array, height: int, width: int) -> jax.Array:
    """bool [height, width], true within (top, left, bottom, right)."""
    y, x = jnp.arange(height, dtype=box.dtype)[:, None], jnp.arange(width, dtype=box.dtype)[None]
    return (y >= box[0]) & (y < box[2]) & (x >= box[1]) & (x < box[3])


def _blend(a: jax.Array, b: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(a + factor * (b - a), 0, 255)


def _grey(images: jax.Array) -> jax.Array:
    """Luma (ITU-R 601), [B, H, W, 1]."""
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    return jnp.sum(images * luma.reshape(1, 1, 1, 3), -1, keepdims=True)  # no product of matrices: TPUs round those
