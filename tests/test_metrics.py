"""Metrics are sums and counts: exact on any split of the examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import built, examples
from sklearn.metrics import confusion_matrix

from resattn_jax.data.resident import ResidentEval
from resattn_jax.metrics import compute, is_better, sums
from resattn_jax.runtime import make_mesh


def test_a_case_worked_by_hand():
    """Three classes with probabilities 1/2, 1/4, 1/4; labels 0, 1 and one that only fills the batch."""
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    got = compute([sums(logits, jnp.array([0, 1, 2]), jnp.array([True, True, False]))])
    assert got["examples"] == 2
    assert got["top1"] == 0.5
    assert got["top5"] == 1.0  # three classes: all are among the first five
    assert got["loss"] == pytest.approx((np.log(2) + np.log(4)) / 2, rel=1e-6)
    assert got["class_top1"] == [1.0, 0.0, None]
    assert got["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_the_confusions_of_many_classes_are_not_kept():
    got = [compute([sums(jnp.zeros((2, n)), jnp.array([0, 1]), jnp.array([True, True]))]) for n in (40, 41)]
    assert ["confusion" in values for values in got] == [True, False]


def test_top5_of_ten_classes():
    logits = jnp.arange(10.0)[None].repeat(2, axis=0)
    got = compute([sums(logits, jnp.array([5, 4]), jnp.array([True, True]))])
    assert (got["top1"], got["top5"]) == (0.0, 0.5)


class LogitsInThePixels:
    """Stands for a net whose logits are known: the image's first ten pixels."""

    def apply(self, variables, images, train):
        return images.reshape(images.shape[0], -1)[:, :10] * 255


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [8, 24, 64])
def test_an_evaluation_is_exact_whatever_the_batch_and_the_devices(tiny_config, devices, batch_size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 4, 4, 1), np.uint8)
    labels = rng.integers(0, 10, 53).astype(np.int32)
    logits = images.reshape(53, -1)[:, :10].astype(np.float64)

    mesh = make_mesh(jax.devices()[:devices])
    split = ResidentEval(
        examples(images, labels, tuple("0123456789")), batch_size=batch_size, max_examples=None, mesh=mesh
    )
    tiny_config.data.mean, tiny_config.data.std = (0.0,), (1.0,)
    experiment = dataclasses.replace(built(tiny_config, jax.devices()[:devices]), model=LogitsInThePixels())
    got = experiment.evaluate({}, split)

    order = np.argsort(-logits, axis=1, kind="stable")
    log_softmax = logits - logits.max(1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(1, keepdims=True))
    confidence = np.exp(log_softmax).max(1)
    bins = np.ceil(confidence * 15).astype(int)  # (i / 15, (i + 1) / 15]
    hits = order[:, 0] == labels
    assert got["examples"] == 53
    assert got["top1"] == pytest.approx(hits.mean())
    assert got["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert got["loss"] == pytest.approx(-log_softmax[np.arange(53), labels].mean(), rel=1e-5)
    assert got["class_top1"] == pytest.approx([hits[labels == c].mean() for c in range(10)])
    np.testing.assert_array_equal(got["confusion"], confusion_matrix(labels, order[:, 0], labels=range(10)))
    gaps = [(bins == b).mean() * abs(hits[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)]
    assert got["ece"] == pytest.approx(sum(gaps), rel=1e-5)


def test_calibration_worked_by_hand():
    """Confidences 0.95, 0.94, 0.55 (labels right, wrong, right): 2/3 |1/2 - 0.945| + 1/3 |1 - 0.55|."""
    probabilities = np.array([[0.95, 0.05], [0.06, 0.94], [0.55, 0.45]], np.float32)
    got = compute([sums(jnp.log(probabilities), jnp.array([0, 0, 0]), jnp.array([True, True, True]))])
    assert got["ece"] == pytest.approx(2 / 3 * 0.445 + 1 / 3 * 0.45, rel=1e-5)


def test_a_confidence_of_one_and_a_tie_have_a_bin_of_their_own():
    got = compute([sums(jnp.array([[200.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1]), jnp.array([True, True]))])
    assert got["ece"] == pytest.approx(1 / 2 * 0 + 1 / 2 * 0.5, abs=1e-6)


def test_the_best_is_the_first_of_equals():
    assert is_better({"top1": 0.5}, None)
    assert is_better({"top1": 0.6}, {"top1": 0.5})
    assert not is_better({"top1": 0.5}, {"top1": 0.5})
