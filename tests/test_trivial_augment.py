"""TrivialAugment-Wide on the device, each operation at each strength against Pillow's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
from helpers import augmentation, plain_spec

from configs import default
from resattn_jax.augment import recolor
from resattn_jax.errors import UsageError
from resattn_jax.experiment import build
from resattn_jax.runtime import make_mesh
from resattn_jax.trivial_augment import LEVELS, OPERATIONS, apply, draw

SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness"}


def pillows(image, operation, level, negative):
    """The operation by Pillow, with the strengths of the paper's table 1 (wide), as torchvision has them."""
    share = level / 30 * (-1 if negative else 1)
    affine = {
        "shear_x": (1, 0.99 * share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.99 * share, 1, 0),
        "translate_x": (1, 0, -math.trunc(32 * share), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -math.trunc(32 * share)),
    }
    enhance = {"brightness": "Brightness", "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness"}
    if operation in affine:
        return image.transform(image.size, PIL.Image.Transform.AFFINE, affine[operation], PIL.Image.Resampling.NEAREST)
    if operation == "rotate":
        return image.rotate(135 * share, PIL.Image.Resampling.NEAREST)
    if operation in enhance:
        return getattr(PIL.ImageEnhance, enhance[operation])(image).enhance(1 + 0.99 * share)
    if operation == "posterize":
        return PIL.ImageOps.posterize(image, 8 - round(level / 5))
    if operation == "solarize":
        return PIL.ImageOps.solarize(image, 255 - 8.5 * level)
    return {"identity": lambda x: x, "autocontrast": PIL.ImageOps.autocontrast, "equalize": PIL.ImageOps.equalize}[
        operation
    ](image)


def pictures(shape):
    """Noise, noise of a narrow range, a ramp, one colour, a few values."""
    x = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
    x[1] = x[1] // 3 + 50
    x[2] = (np.arange(shape[1]) * 255 // shape[1]).astype(np.uint8)[None, :, None]
    x[3] = 77
    x[4] = x[4] // 100 * 100
    return x


def quotient_is_whole(image):
    """Where autocontrast's 255 (v - least) / (most - least) is a whole number, bool [H, W, C]."""
    image = image.astype(int)
    least, most = image.min((0, 1)), image.max((0, 1))
    return 255 * (image - least) % np.maximum(most - least, 1) == 0


CASES = [
    (operation, level, negative)
    for operation in OPERATIONS
    for level in range(LEVELS)
    for negative in range(2 if operation in SIGNED else 1)
]


@pytest.mark.parametrize("shape", [(24, 22, 3), (8, 8, 1)])
def test_every_operation_is_pillows_at_every_strength(shape):
    """In one batch, so that none disturbs another. A sum of Pillow's floats that should be a whole number may be less,
    and then the fraction is cut off to the number below; ours may be that number.
    """
    x = pictures(shape)
    cases = [(OPERATIONS.index(operation), level, negative) for operation, level, negative in CASES]
    numbers = np.repeat(np.array(cases, np.int32), len(x), axis=0).T
    got = np.asarray(jax.jit(apply)(np.tile(x, (len(cases), 1, 1, 1)), *numbers))
    assert got.dtype == np.uint8
    sources = [PIL.Image.fromarray(image if shape[-1] == 3 else image[..., 0]) for image in x]
    cut_off = []
    for case, ours in zip(CASES, got.reshape(len(CASES), *x.shape), strict=True):
        theirs = np.stack([np.asarray(pillows(image, *case)).reshape(shape) for image in sources])
        different, most = ours != theirs, np.abs(ours.astype(int) - theirs).max()
        if case[0] == "autocontrast":
            assert most <= 1
            assert not (different & ~np.stack([quotient_is_whole(image) for image in x])).any()
        elif case[0] in ("brightness", "color", "contrast", "sharpness"):
            assert most <= 1, case
            cut_off.append(different.mean())
        else:
            assert not different.any(), case
    assert np.mean(cut_off) < 1e-4


def test_operation_strength_and_sign_are_drawn_evenly_and_apart():
    """Of 14 x 31 x 2 triples each comes 30 times in 26,040, give or take six times the root of 30."""
    drawn = np.stack(jax.jit(draw)(jax.random.split(jax.random.key(0), 26_040)), -1)
    triples, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(triples) == 14 * 31 * 2
    np.testing.assert_array_equal(triples.max(0), [13, 30, 1])
    assert np.abs(counts - 30).max() < 6 * 30**0.5


def test_it_belongs_to_the_place_in_the_batch():
    x = np.concatenate([pictures((8, 8, 3))] * 2)
    recolored = jax.jit(functools.partial(recolor, augmentation(trivialaugment=True), jax.random.key(1)))
    whole = recolored(jnp.arange(10), x)
    assert whole.dtype == jnp.uint8
    turned = np.roll(np.arange(10), 4)
    np.testing.assert_array_equal(np.asarray(whole)[turned], recolored(turned, x[turned]))
    assert (np.asarray(whole) != x).any()


def test_images_of_two_channels_are_refused():
    c = default.get_config()
    c.total_steps, c.model.name, c.augment.trivialaugment = 1, "ra_tiny", True
    with pytest.raises(UsageError, match="trivialaugment is for grey and colour images; digits has 2 channels"):
        build(c, plain_spec((8, 8, 2)), make_mesh(jax.devices()[:1]))
