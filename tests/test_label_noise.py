"""Label noise against the paper's confusion matrix (table 5)."""

import numpy as np
import pytest

from resattn_jax.data.label_noise import noisy_labels


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.5, 0.7])
def test_labels_follow_the_confusion_matrix(noise):
    """r = 1 - noise on the diagonal, (1 - r) / 9 elsewhere: 5,000 draws a class stay within four deviations."""
    labels = np.repeat(np.arange(10), 5000).astype(np.int32)
    noisy = noisy_labels(labels, 10, noise, seed=3)
    matrix = np.zeros((10, 10))
    np.add.at(matrix, (labels, noisy), 1 / 5000)
    wanted = np.full((10, 10), noise / 9)
    np.fill_diagonal(wanted, 1 - noise)
    assert (abs(matrix - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 5000)).all()
    assert noisy.dtype == np.int32


def test_they_are_a_function_of_the_seed_and_no_noise_is_none():
    labels = np.arange(100, dtype=np.int32) % 10
    np.testing.assert_array_equal(noisy_labels(labels, 10, 0.5, 1), noisy_labels(labels, 10, 0.5, 1))
    assert (noisy_labels(labels, 10, 0.5, 1) != noisy_labels(labels, 10, 0.5, 2)).any()
    np.testing.assert_array_equal(noisy_labels(labels, 10, 0.0, 1), labels)


def test_a_share_beyond_one_is_refused():
    with pytest.raises(ValueError, match="from 0 to 1, not 30"):
        noisy_labels(np.zeros(3, np.int32), 10, 30, 0)
