"""EXIF orientation, by which phones say how a picture is to be turned: applied when asked for, as Pillow applies it."""

import io
import logging

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from helpers import built

from resattn_jax.classifier import Classifier
from resattn_jax.data.pictures import Picture, exif_orientation
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.modes.show_data import write_contact_sheet

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8).repeat(16, 0).repeat(16, 1)


def picture(orientation, kind="JPEG", mode="RGB"):
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    PIL.Image.fromarray(PIXELS).convert(mode).save(file, kind, exif=exif, quality=95)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("WEBP", "RGB")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_pillow_turns_it(orientation, kind, mode):
    data = picture(orientation, kind, mode)
    assert exif_orientation(data) == orientation
    wanted = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    upright, stored = Picture(data, upright=True), Picture(data)
    assert (upright.width, upright.height) == wanted.size
    assert (stored.width, stored.height) == (144, 96)
    np.testing.assert_allclose(upright.pixels().astype(int), np.asarray(wanted).astype(int), atol=2)  # other decoder


@pytest.mark.parametrize("value", [0, 9, 77])
def test_a_value_that_exif_does_not_have_means_as_it_is_stored(value):
    np.testing.assert_array_equal(Picture(picture(value), upright=True).pixels(), Picture(picture(1)).pixels())


def test_it_is_applied_before_a_crop_in_training_and_evaluation():
    turned = Picture(picture(6), upright=True)
    by_hand = np.rot90(Picture(picture(1)).pixels(), -1)  # 6: the top of the scene is the right side of what is stored
    one, two = (np.empty((32, 32, 3), np.uint8) for _ in range(2))
    transform = TrainTransform(32, True, (0.3, 1.0), (0.75, 4 / 3), (0, 9), upright=True)
    file = io.BytesIO()
    PIL.Image.fromarray(by_hand).save(file, "PNG")
    transform(turned, np.random.default_rng(1), one)
    transform(Picture(file.getvalue()), np.random.default_rng(1), two)
    np.testing.assert_array_equal(one, two)
    evaluation = EvalTransform(32, 0.875, 1, upright=True)
    np.testing.assert_array_equal(evaluation(turned), evaluation(Picture(file.getvalue())))


@pytest.fixture
def phone(tmp_path, tiny_config):
    """A run's config for a folder in which every picture is stored turned."""
    root = tmp_path / "pictures"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                (root / split / name / f"{i}.jpg").write_bytes(picture(8))
    tiny_config.data.update(
        name=f"folder:{root}", eval_split="val", image_size=32, mean=(0.5,), std=(0.25,), mean_image=False
    )
    tiny_config.update(batch_size=8, steps_per_dispatch=None)
    tiny_config.augment.mixup_alpha = 0.0
    return tiny_config


def test_a_net_knows_whether_it_saw_pictures_turned(phone, tmp_path, caplog):
    for on in (False, True):
        phone.data.exif_orientation = on
        caplog.clear()
        with caplog.at_level(logging.WARNING, "resattn_jax"):
            write_contact_sheet(phone, tmp_path / f"show{on}")
        said = "8 of the first 8 pictures are to be turned by their EXIF orientation, which is not applied;"
        assert (said in caplog.text) == (not on)
        experiment = built(phone)
        assert experiment.spec.exif_orientation == on
        net = Classifier(phone, experiment.spec, experiment.initial_state().variables)
        file = phone.data.name.removeprefix("folder:") + "/val/cat/0.jpg"
        seen = net._views(file)
        by_hand = np.rot90(Picture(picture(1)).pixels(), 1) if on else Picture(picture(1)).pixels()
        np.testing.assert_array_equal(seen, net._views(by_hand.copy()))
        np.testing.assert_array_equal(seen, net._views(PIL.Image.open(file)))
