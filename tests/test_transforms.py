"""Geometry and RandAugment on the host, against Pillow and cases worked by hand."""

import io

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest

from resattn_jax.data import randaugment as ra
from resattn_jax.data.pictures import BrokenPicture, Picture
from resattn_jax.data.transforms import EvalTransform, TrainTransform, crop_box, resize


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 120 * np.sin(x / a + y / b) for a, b in ((37, 49), (43, -39), (-51, 63))], -1).astype(
        np.uint8
    )


def picture(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return Picture(file.getvalue())


def rng(seed=0):
    return np.random.default_rng(seed)


def test_crops_have_the_areas_and_shapes_asked_for_and_lie_inside():
    boxes = np.array([crop_box(rng(i), 300, 400, (0.2, 0.6), (0.75, 4 / 3)) for i in range(2000)])
    top, left, height, width = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 300
    assert (left + width).max() <= 400
    share, shape = height * width / 120_000, width / height
    assert 0.197 < share.min() < 0.21
    assert 0.59 < share.max() < 0.603
    assert 0.74 < shape.min() < 0.76
    assert 1.32 < shape.max() < 1.345
    assert np.mean(share) == pytest.approx(0.4, abs=0.01)  # uniform
    assert np.mean(np.log(shape)) == pytest.approx(0, abs=0.01)  # log-uniform: as often wide as high


@pytest.mark.parametrize(
    ("size", "box"), [((10, 400), (0, 193, 10, 13)), ((400, 12), (192, 0, 16, 12)), ((1, 1), (0, 0, 1, 1))]
)
def test_a_picture_too_long_for_any_crop_gives_its_middle(size, box):
    """Of 10 x 400 pixels, 13 are 4/3 of the height; of 400 x 12, 16 are 12 / (3/4)."""
    assert crop_box(rng(), *size, (0.9, 1.0), (0.75, 4 / 3)) == box


@pytest.mark.parametrize("box", [(0, 0, 480, 640), (100, 60, 300, 250), (7, 9, 64, 64), (20, 30, 40, 50)])
def test_a_window_is_resized_as_pillow_resizes_it(box):
    pixels = smooth(480, 640)
    out = np.empty((64, 64, 3), np.uint8)
    resize(picture(pixels), box, out)
    top, left, height, width = box
    window = (left, top, left + width, top + height)
    expected = PIL.Image.fromarray(pixels).resize((64, 64), PIL.Image.Resampling.BILINEAR, box=window)
    difference = np.abs(out.astype(int) - np.asarray(expected))
    assert difference.mean() < 2  # a pixel's place may be off by a part of one, as the decoder shrinks by whole factors
    if (height, width) == (64, 64):
        np.testing.assert_array_equal(out, pixels[top : top + 64, left : left + 64])


def bilinear(pixels, size):
    """Exactly, pixels being squares and what is beyond the rim as the rim."""

    def weights(count):
        places = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        return np.maximum(0, 1 - abs(places[:, None] - np.arange(count)))

    rows, columns = (weights(count) for count in pixels.shape[:2])
    return np.moveaxis(rows @ np.moveaxis(pixels, 2, 0) @ columns.T, 0, 2)


@pytest.mark.parametrize("shape", [(300, 250), (224, 224), (100, 90), (447, 440), (30, 20), (1, 1), (2, 300)])
def test_a_window_less_than_twice_the_result_is_resized_bilinearly(shape):
    pixels = rng(2).integers(0, 256, (*shape, 3), np.uint8)
    out = np.empty((224, 224, 3), np.uint8)
    resize(picture(pixels), (0, 0, *shape), out)
    assert np.abs(out - bilinear(pixels, 224)).max() < 0.8  # of 255; rounding alone is 0.5


def test_a_picture_too_narrow_to_be_resized_is_refused():
    """256 pixels wide, it would be 15 million high: 12 GB."""
    with pytest.raises(BrokenPicture, match="with 60000 x 1 pixels it is too narrow"):
        EvalTransform(224, 0.875, 1)(picture(np.zeros((60_000, 1, 3), np.uint8)))


@pytest.mark.parametrize("size", [224, 320, 448])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (200, 150), (1000, 300)])
def test_evaluation_is_pillows_resize_and_the_middle(size, shape):
    pixels = smooth(*shape)
    got = EvalTransform(size, 0.875, 1)(picture(pixels))
    assert got.shape == (1, size, size, 3)
    shorter = round(size / 0.875)
    scale = shorter / min(shape)
    width, height = round(shape[1] * scale), round(shape[0] * scale)
    image = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    np.testing.assert_array_equal(got[0], np.asarray(image.crop((left, top, left + size, top + size))))


def test_five_views_are_the_corners_and_the_middle():
    pixels = smooth(8, 8)
    views = EvalTransform(4, 0.5, 5)(picture(pixels))
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    np.testing.assert_array_equal(views, np.stack([pixels[y : y + 4, x : x + 4] for y, x in corners]))


def test_without_a_crop_a_picture_of_the_right_size_is_left_as_it_is():
    pixels, out = smooth(32, 32), np.empty((32, 32, 3), np.uint8)
    TrainTransform(32, False, (0.08, 1), (0.75, 1.33), (0, 9))(picture(pixels), rng(), out)
    np.testing.assert_array_equal(out, pixels)


# ---- RandAugment: Pillow's operations.

IMAGE = np.clip(smooth(60, 80) * 0.7 + rng(1).integers(0, 60, (60, 80, 3)), 0, 255).astype(np.uint8)


def pillow_affine(matrix):
    return lambda image, s: image.transform(
        image.size, PIL.Image.Transform.AFFINE, matrix(s), PIL.Image.Resampling.BILINEAR, fillcolor=ra.FILL
    )


def enhance(kind):
    return lambda image, s: getattr(PIL.ImageEnhance, kind)(image).enhance(1 + 0.9 * s)


PILLOW = {
    ra.identity: lambda image, s: image,
    ra.autocontrast: lambda image, s: PIL.ImageOps.autocontrast(image),
    ra.equalize: lambda image, s: PIL.ImageOps.equalize(image),
    ra.posterize: lambda image, s: PIL.ImageOps.posterize(image, 8 - round(4 * abs(s))),
    ra.solarize: lambda image, s: PIL.ImageOps.solarize(image, 256 * (1 - abs(s))),
    ra.brightness: enhance("Brightness"),
    ra.contrast: enhance("Contrast"),
    ra.color: enhance("Color"),
    ra.sharpness: enhance("Sharpness"),
    ra.rotate: lambda image, s: image.rotate(30 * s, PIL.Image.Resampling.BILINEAR, fillcolor=ra.FILL),
    ra.shear_x: pillow_affine(lambda s: (1, -0.3 * s, 0, 0, 1, 0)),
    ra.shear_y: pillow_affine(lambda s: (1, 0, 0, -0.3 * s, 1, 0)),
    ra.translate_x: pillow_affine(lambda s: (1, 0, -round(0.45 * s * 80), 0, 1, 0)),
    ra.translate_y: pillow_affine(lambda s: (1, 0, 0, 0, 1, -round(0.45 * s * 60))),
}


@pytest.mark.parametrize("strength", [-1.0, -0.6, 0.3, 0.9])
@pytest.mark.parametrize("operation", ra.OPERATIONS, ids=lambda f: f.__name__)
def test_an_operation_is_pillows(operation, strength):
    got = operation(IMAGE, strength).astype(int)
    expected = np.asarray(PILLOW[operation](PIL.Image.fromarray(IMAGE), strength)).astype(int)
    difference = np.abs(got - expected)
    if operation in (ra.rotate, ra.shear_x, ra.shear_y):  # half a pixel's different origin, and the rim
        assert np.median(difference) <= 8
        assert np.mean(difference > 40) < 0.06
    else:
        assert difference.max() <= 2  # Pillow rounds the grey image down


def test_all_fourteen_operations_are_drawn_and_the_numbers_decide():
    assert len(ra.OPERATIONS) == len(PILLOW) == 14
    results = {ra.randaugment(rng(seed), IMAGE, 1, 9).tobytes() for seed in range(300)}
    assert len(results) >= 20  # operations times signs, some of which do the same
    np.testing.assert_array_equal(ra.randaugment(rng(5), IMAGE, 2, 9), ra.randaugment(rng(5), IMAGE, 2, 9))
