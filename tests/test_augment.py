"""Augmentation on the device, against cases worked by hand and by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
from helpers import augmentation

from resattn_jax.augment import (
    augment,
    color_jitter,
    cutmix,
    cutout,
    mix,
    mixup,
    normalize,
    pca_lighting,
    random_crop,
    random_erasing,
    random_flip,
    recolor,
)


def images(count, size=6, channels=3):
    return np.random.default_rng(0).integers(1, 256, (count, size, size, channels), np.uint8)


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def test_normalize_is_the_mean_and_deviation_of_pixels_in_0_to_1():
    x = np.array([[[[0, 51, 255]]]], np.uint8)
    got = normalize(x, np.array([0.5, 0.2, 0.0]), np.array([0.25, 0.1, 2.0]))
    np.testing.assert_allclose(got[0, 0, 0], [-2.0, 0.0, 0.5], atol=1e-6)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(normalize(x, np.zeros(1), np.ones(1)) * 255, x, rtol=1e-6)


def test_a_mean_image_is_subtracted_pixel_by_pixel():
    x = images(10)
    mean = x.mean(0) / 255
    np.testing.assert_allclose(normalize(x, mean, np.ones(1)).mean(0), np.zeros(mean.shape), atol=1e-6)


@pytest.mark.parametrize(("size", "padding"), [(6, 6), (3, 3), (1, 1)])
def test_reflection_pads_up_to_the_size_of_the_image_as_numpy_does(size, padding):
    x = images(60, size)
    crops = np.asarray(random_crop(keys(60), x, padding, "reflect"))
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), "reflect")
    places = range(2 * padding + 1)
    for image, crop in zip(padded, crops, strict=True):
        assert any((image[i : i + size, j : j + size] == crop).all() for i in places for j in places)


@pytest.mark.parametrize(("mode", "numpys"), [("zeros", "constant"), ("reflect", "reflect")])
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs(mode, numpys):
    x = images(400)
    crops = np.asarray(random_crop(keys(400), x, 2, mode))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), numpys)
    found = set()
    for image, crop in zip(padded, crops, strict=True):
        where = [(i, j) for i in range(5) for j in range(5) if (image[i : i + 6, j : j + 6] == crop).all()]
        assert len(where) == 1
        found.add(where[0])
    assert len(found) == 25


def test_a_flip_mirrors_left_to_right_half_of_the_images():
    x = images(400)
    flipped = np.asarray(random_flip(keys(400), x))
    mirrored = [(f == i[:, ::-1]).all() for f, i in zip(flipped, x, strict=True)]
    same = [(f == i).all() for f, i in zip(flipped, x, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 150 < sum(mirrored) < 250


def test_randomness_belongs_to_the_place_in_the_batch_not_to_the_device():
    x, key = images(8), jax.random.key(1)
    section = augmentation(crop_padding=2, flip=True)
    whole = augment(section, key, jnp.arange(8), x)
    half = augment(section, key, jnp.arange(4, 8), x[4:])
    np.testing.assert_array_equal(whole[4:], half)


def test_without_options_a_batch_is_left_as_it_is():
    x = images(4)
    np.testing.assert_array_equal(augment(augmentation(), jax.random.key(0), jnp.arange(4), x), x)


def test_mixup_mixes_images_and_targets_of_neighbours_with_one_lambda():
    x = np.asarray(jax.random.normal(jax.random.key(3), (6, 2, 2, 1)))
    y = np.eye(6, dtype=np.float32)
    mixed, targets = mixup(jax.random.key(4), x, y, 1.0, jnp.array(True))
    lam = float(targets[0, 0])
    assert 0 < lam < 1
    for i, partner in enumerate([1, 0, 3, 2, 5, 4]):
        np.testing.assert_allclose(mixed[i], lam * x[i] + (1 - lam) * x[partner], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(targets[i], lam * y[i] + (1 - lam) * y[partner], rtol=1e-5)


def test_mixup_off_leaves_the_batch_as_it_is():
    x, y = np.ones((2, 2, 2, 1), np.float32) * np.array([1, 2]).reshape(2, 1, 1, 1), np.eye(2)
    mixed, targets = mixup(jax.random.key(0), x, y, 1.0, jnp.array(False))
    np.testing.assert_array_equal(mixed, x)
    np.testing.assert_array_equal(targets, y)


@pytest.mark.parametrize(("alpha", "deviation"), [(1.0, (1 / 12) ** 0.5), (0.2, (0.25 / 1.4) ** 0.5)])
def test_lambda_is_drawn_from_the_beta_distribution(alpha, deviation):
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    x, y = np.zeros((2, 1, 1, 1), np.float32), np.eye(2, dtype=np.float32)
    lams = jax.vmap(lambda key: mixup(key, x, y, alpha, jnp.array(True))[1][0, 0])(keys(4000))
    assert np.mean(lams) == pytest.approx(0.5, abs=0.03)
    assert np.std(lams) == pytest.approx(deviation, abs=0.02)


def on():
    return jnp.array(True)


def test_cutmix_takes_one_window_from_the_neighbour_and_mixes_targets_by_its_area():
    x = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None, None], (6, 20, 30, 1))
    y = np.eye(6, dtype=np.float32)
    shares = []
    for seed in range(20):
        mixed, targets = cutmix(jax.random.key(seed), x, y, 1.0, on())
        foreign = np.asarray(mixed)[0, ..., 0] == 1
        rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
        if len(rows):  # a rectangle without holes
            assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        for i, partner in enumerate([1, 0, 3, 2, 5, 4]):
            np.testing.assert_array_equal(np.asarray(mixed)[i, ..., 0], np.where(foreign, partner, i))
            assert targets[i, partner] == pytest.approx(foreign.mean(), abs=1e-6)
            assert targets[i, i] == pytest.approx(1 - foreign.mean(), abs=1e-6)
        shares.append(foreign.mean())
    assert max(shares) > 0.3
    mixed, targets = cutmix(jax.random.key(0), x, y, 1.0, jnp.array(False))
    np.testing.assert_array_equal(mixed, x)
    np.testing.assert_array_equal(targets, y)


def test_with_both_each_batch_is_mixed_one_way_or_the_other():
    x = np.broadcast_to(np.arange(2, dtype=np.float32)[:, None, None, None], (2, 16, 16, 1))
    y = np.eye(2, dtype=np.float32)
    blended = []
    for seed in range(40):
        mixed, targets = mix(augmentation(mixup_alpha=1.0, cutmix_alpha=1.0), jax.random.key(seed), x, y, on())
        assert np.asarray(mixed)[0].mean() == pytest.approx(float(targets[0, 1]), abs=1e-5)
        blended.append(len(np.unique(np.asarray(mixed)[0])) == 1 and bool(0 < targets[0, 1] < 1))
    assert 8 < sum(blended) < 32
    np.testing.assert_array_equal(mix(augmentation(), jax.random.key(0), x, y, on())[0], x)


def test_random_erasing_zeroes_rectangles_of_the_published_range_in_so_many_images():
    x = np.ones((400, 40, 50, 1), np.float32)
    gone = np.asarray(random_erasing(keys(400), x, 0.6))[..., 0] == 0
    hit = gone[gone.any((1, 2))]
    assert 200 < len(hit) < 280
    shares = hit.mean((1, 2))
    assert shares.min() >= 0.01  # 0.02, rounded to pixels
    assert 0.25 < shares.max() <= 0.35
    for one in hit:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert len(rows) / len(columns) < 4.5


def test_cutout_zeroes_a_square_around_any_pixel():
    gone = np.asarray(cutout(keys(400), np.ones((400, 12, 12, 3), np.float32), 6))[..., 0] == 0
    heights, widths = gone.any(2).sum(1), gone.any(1).sum(1)
    np.testing.assert_array_equal(gone.sum((1, 2)), heights * widths)
    assert heights.max() == widths.max() == 6
    assert heights.min() == widths.min() == 3  # the centre on the rim
    assert gone.mean(0).min() > 0  # it comes everywhere


@pytest.mark.parametrize("which", [0, 1, 2])
def test_color_jitter_is_pillows_enhancement_by_some_factor(which):
    x = images(20, size=12)
    ranges = tuple(0.5 if i == which else 0.0 for i in range(3))
    got = np.asarray(color_jitter(keys(20), x, ranges))
    kind = (PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color)[which]
    factors = []
    for image, jittered in zip(x, got, strict=True):
        tried = np.linspace(0.5, 1.5, 201)
        errors = [np.abs(np.asarray(kind(PIL.Image.fromarray(image)).enhance(f)) - jittered).mean() for f in tried]
        assert min(errors) < 1.5
        factors.append(tried[int(np.argmin(errors))])
    assert min(factors) < 0.75
    assert max(factors) > 1.25


def test_pca_lighting_adds_one_colour_an_image_with_alexnets_covariance():
    """It is the sum of p_i p_i^T (0.1 l_i)^2, which is 0.01 times the covariance of ImageNet's colours."""
    x = np.zeros((4000, 2, 2, 3), np.uint8)
    got = np.asarray(pca_lighting(keys(4000), x, 0.1)) / 255
    assert (got == got[:, :1, :1]).all()
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = vectors @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(got[:, 0, 0].T), expected, rtol=0.08)


def test_colours_and_erasing_too_belong_to_the_place_in_the_batch():
    x, key = images(8, size=16), jax.random.key(1)
    section = augmentation(color_jitter=(0.4, 0.4, 0.4), pca_lighting=0.1, random_erasing=0.5, cutout=4)

    def both(positions, part):
        return augment(section, key, positions, recolor(section, key, positions, part))

    np.testing.assert_allclose(both(jnp.arange(8), x)[4:], both(jnp.arange(4, 8), x[4:]), atol=1e-3)  # of 255
