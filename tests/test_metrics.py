"""Metrics are sums and counts: exact on any split of the examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resattn_jax.data.resident import Resident
from resattn_jax.data.sources import Examples
from resattn_jax.evaluate import evaluate
from resattn_jax.metrics import Metrics
from resattn_jax.runtime import make_mesh
from resattn_jax.train_step import Recipe, make_eval_step

PLAIN = Recipe(0, np.zeros(1), np.ones(1), 0, False, 0.0, 0, 0.0, None)


def test_a_case_worked_by_hand():
    """Three classes with probabilities 1/2, 1/4, 1/4; labels 0, 1 and one that only fills the batch."""
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    got = Metrics.summarize([Metrics.from_logits(logits, jnp.array([0, 1, 2]), jnp.array([True, True, False]))])
    assert got["examples"] == 2
    assert got["top1"] == 0.5
    assert got["top5"] == 1.0  # three classes: all are among the first five
    assert got["loss"] == pytest.approx((np.log(2) + np.log(4)) / 2, rel=1e-6)
    assert got["class_top1"] == [1.0, 0.0, None]


def test_top5_of_ten_classes():
    logits = jnp.arange(10.0)[None].repeat(2, axis=0)
    got = Metrics.summarize([Metrics.from_logits(logits, jnp.array([5, 4]), jnp.array([True, True]))])
    assert (got["top1"], got["top5"]) == (0.0, 0.5)


class LogitsInThePixels:
    """Stands for a net whose logits are known: the image's first ten pixels."""

    def apply(self, variables, images, train):
        return images.reshape(images.shape[0], -1)[:, :10] * 255


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [8, 24, 64])
def test_an_evaluation_is_exact_whatever_the_batch_and_the_devices(devices, batch_size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 4, 4, 1), np.uint8)
    labels = rng.integers(0, 10, 53).astype(np.int32)
    logits = images.reshape(53, -1)[:, :10].astype(np.float64)

    mesh = make_mesh(jax.devices()[:devices])
    split = Resident(Examples(images, labels, tuple("0123456789")), mesh)
    got = evaluate(make_eval_step(LogitsInThePixels(), PLAIN, mesh, split.take), {}, split, batch_size, None)

    order = np.argsort(-logits, axis=1, kind="stable")
    log_softmax = logits - logits.max(1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(1, keepdims=True))
    hits = order[:, 0] == labels
    assert got["examples"] == 53
    assert got["top1"] == pytest.approx(hits.mean())
    assert got["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert got["loss"] == pytest.approx(-log_softmax[np.arange(53), labels].mean(), rel=1e-5)
    assert got["class_top1"] == pytest.approx([hits[labels == c].mean() for c in range(10)])
