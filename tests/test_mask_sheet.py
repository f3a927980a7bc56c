"""The pictures whose masks TensorBoard gets are the first of the evaluation split, and drawing them trains nothing."""

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, eval_stream, final_state, save

from configs import folder
from resattn_jax.data.pipelines import TrainingData
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.report.mask_sheet import MaskSheet


def of_the_stream(config, count):
    """The first pictures of the evaluation stream that count, the last view of each."""
    stream = eval_stream(config, jax.devices()[:1])
    batch, mask = next(iter(stream))
    images, _ = stream.take(stream.arrays, batch)
    images = np.asarray(images)[np.asarray(mask)][:count]
    return images[:, -1] if images.ndim == 5 else images


def test_of_a_resident_set_they_are_the_first_of_the_stream(tiny_config):
    found = TrainingData(tiny_config).eval_pictures(8)
    assert found.shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(found, of_the_stream(tiny_config, 8))


@pytest.mark.parametrize("views", [1, 10])
def test_of_a_streamed_set_they_are_the_first_that_can_be_read(tmp_path, views):
    """Of ten views the centre, which lies last of the five that are cut out."""
    for i in range(5):
        for split in "train", "val":
            save(tmp_path / f"{split}/a/{i}.png", (50 * i, 9, 200), size=(40 + i, 30))
            save(tmp_path / f"{split}/b/{i}.png", (7, 50 * i, 99), size=(30, 33 + i))
    (tmp_path / "val/a/1.png").write_bytes(b"\n")
    config = folder.get_config(str(tmp_path))
    config.update(batch_size=2)
    config.data.image_size, config.data.broken, config.eval.views = 32, "skip", views
    config.eval.batch_size = 8  # with the broken one
    found = TrainingData(config).eval_pictures(8)
    assert found.shape == (7, 32, 32, 3)
    np.testing.assert_array_equal(found, of_the_stream(config, 8))


def test_drawing_them_changes_no_bit_of_a_run_on_two_devices(tiny_config, tmp_path, monkeypatch):
    two, drawn = jax.devices()[:2], []
    with monkeypatch.context() as patch:
        patch.setattr(MaskSheet, "draw", lambda *_: None)
        train_and_evaluate(tiny_config, tmp_path / "without", two)
    draw = MaskSheet.draw
    monkeypatch.setattr(MaskSheet, "draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    train_and_evaluate(tiny_config, tmp_path / "with", two)
    assert [sheet.dtype for sheet in drawn] == [np.uint8, np.uint8]
    without, with_them = (final_state(tiny_config, tmp_path / name, two) for name in ("without", "with"))
    assert_same_bits(without, with_them)
