"""A step whose loss or gradient is not finite changes nothing; what it was made of is kept."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, lines

import resattn_jax.experiment
from resattn_jax.checkpoint import Reader
from resattn_jax.data.order import batch_rows
from resattn_jax.data.sources import open_source, read
from resattn_jax.errors import RunError
from resattn_jax.models.layers import BatchNorm
from resattn_jax.models.nets import NETS, Spec
from resattn_jax.modes.train import train_and_evaluate

# What a run asks of its net beside: how the first weights are drawn, and that there is no mask to show.
SPEC = dataclasses.replace(NETS["ra_tiny"], stages=())


class NanNet(nn.Module):
    """A linear classifier whose loss, or whose gradient alone, is NaN for a batch that holds one certain image."""

    num_classes: int
    poison: np.ndarray  # the image, as the net sees it, [H, W, C]
    where: str = "loss"
    dtype: type = jnp.float32
    spec: Spec = SPEC

    @nn.compact
    def __call__(self, images, *, train):
        x = BatchNorm(train=train)(images).reshape(len(images), -1)
        logits = nn.Dense(self.num_classes)(x)
        hit = (jnp.abs(images - self.poison[None]).max((1, 2, 3)) < 1e-6).any() & train
        zero = jnp.where(hit, 0.0, 1.0)
        if self.where == "loss":
            return logits / zero
        return logits + (jnp.sqrt(jnp.sum(logits**2) * 0 + zero) - zero) * logits  # at 0 the root has no derivative


class NanForever(nn.Module):
    """A linear classifier whose loss is always NaN."""

    num_classes: int
    dtype: type = jnp.float32
    spec: Spec = SPEC

    @nn.compact
    def __call__(self, images, *, train):
        x = BatchNorm(train=train)(images).reshape(len(images), -1)
        return nn.Dense(self.num_classes)(x) * (jnp.nan if train else 1.0)


@pytest.fixture
def poisoned(tiny_config, monkeypatch):
    """A run of 12 steps of 64 images, one of which is NaN in the 8th; gives a function that starts it."""
    tiny_config.update(batch_size=64, total_epochs=None, total_steps=12, steps_per_dispatch=4)
    tiny_config.update(log_every="3 steps")
    tiny_config.eval.every = "6 steps"
    tiny_config.augment.update(mixup_alpha=0.0, crop_padding=0, cutout=0)
    rows = batch_rows(tiny_config.seed, 7, 64, 1437)
    image = read(open_source("digits", "train")).images[rows[5]].astype(np.float32) / 255
    image = (image - np.float32(tiny_config.data.mean)) / np.float32(tiny_config.data.std)

    def start(workdir, on_nan, where="loss"):
        monkeypatch.setattr(
            resattn_jax.experiment, "build_model", lambda config, classes, platform: NanNet(classes, image, where)
        )
        tiny_config.on_nan = on_nan
        return train_and_evaluate(tiny_config, workdir, jax.devices()[:1])

    start.rows = rows
    return start


def kept(workdir, step):
    with Reader(workdir / "checkpoints") as checkpoints:
        return checkpoints._read(step, {"model": None, "optimizer": None})


@pytest.mark.parametrize("where", ["loss", "gradient_norm"])
def test_it_ends_the_run_and_the_state_before_it_and_its_rows_are_kept(where, poisoned, tmp_path):
    words = where.replace("_", " ")
    said = rf"the {words} at step 8 is nan; the checkpoint of step 7 is kept; .*config\.on_nan=skip"
    with pytest.raises(RunError, match=said):
        poisoned(tmp_path, "fail", where)
    row = json.loads((tmp_path / "not_finite.jsonl").read_text())
    assert (row["step"], row[where], row["rows"]) == (8, "nan", poisoned.rows.tolist())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept(tmp_path, 7)))
    assert int(kept(tmp_path, 7)["optimizer"]["step"]) == 7
    with pytest.raises(RunError, match=said):  # again, and it is the same
        poisoned(tmp_path, "fail", where)
    assert len((tmp_path / "not_finite.jsonl").read_text().splitlines()) == 1


def test_a_run_that_skips_it_is_the_same_whether_it_had_ended_there_or_not(poisoned, tmp_path):
    straight = poisoned(tmp_path / "straight", "skip")
    with pytest.raises(RunError):
        poisoned(tmp_path / "ended", "fail")
    ended = poisoned(tmp_path / "ended", "skip")
    assert straight["final"] == ended["final"]
    assert_same_bits(kept(tmp_path / "straight", 12), kept(tmp_path / "ended", 12))
    both = [lines(tmp_path / name) for name in ("straight", "ended")]
    for line in (line for logged in both for line in logged):
        line.pop("train/images_per_second", None)
    assert both[0] == both[1]
    assert [line.get("train/steps_not_finite") for line in both[0] if "train/loss" in line] == [None, None, 1, 1]
    assert all(np.isfinite(value) for line in both[0] for value in line.values() if isinstance(value, float))


def test_ten_in_a_row_end_a_run_that_skips_them(tiny_config, monkeypatch, tmp_path):
    tiny_config.update(total_epochs=None, total_steps=30, on_nan="skip")
    monkeypatch.setattr(resattn_jax.experiment, "build_model", lambda config, classes, platform: NanForever(classes))
    with pytest.raises(RunError, match="the loss at step 10 is nan, as at the 9 steps before; no checkpoint"):
        train_and_evaluate(tiny_config, tmp_path, jax.devices()[:1])
    assert [json.loads(row)["step"] for row in (tmp_path / "not_finite.jsonl").read_text().splitlines()] == list(
        range(1, 11)
    )
