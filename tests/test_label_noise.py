"""Label noise against the paper's confusion matrix (table 5)."""

import numpy as np
import pytest

from resattn_jax.data.label_noise import NoisySource
from resattn_jax.errors import UsageError


class Labels:
    """Examples without pictures."""

    image_shape, class_names = None, tuple("0123456789")

    def __init__(self, labels):
        self._labels = labels

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, row):
        return b"picture", int(self._labels[row])

    def name(self, row):
        return f"example {row}"


def noisy_labels(labels, noise, seed):
    source = NoisySource(Labels(labels), noise, seed)
    assert source[0][0] == b"picture"
    return np.array([source[row][1] for row in range(len(source))])


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.5, 0.7])
def test_labels_follow_the_confusion_matrix(noise):
    """r = 1 - noise on the diagonal, (1 - r) / 9 elsewhere: 5,000 draws a class stay within four deviations."""
    labels = np.repeat(np.arange(10), 5000)
    matrix = np.zeros((10, 10))
    np.add.at(matrix, (labels, noisy_labels(labels, noise, seed=3)), 1 / 5000)
    wanted = np.full((10, 10), noise / 9)
    np.fill_diagonal(wanted, 1 - noise)
    assert (abs(matrix - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 5000)).all()


def test_they_are_a_function_of_the_seed_and_no_noise_is_none():
    labels = np.arange(100) % 10
    np.testing.assert_array_equal(noisy_labels(labels, 0.5, 1), noisy_labels(labels, 0.5, 1))
    assert (noisy_labels(labels, 0.5, 1) != noisy_labels(labels, 0.5, 2)).any()
    np.testing.assert_array_equal(noisy_labels(labels, 0.0, 1), labels)


def test_a_share_beyond_one_is_refused():
    with pytest.raises(UsageError, match="from 0 to 1, not 30"):
        NoisySource(Labels(np.zeros(3, int)), 30, 0)
