"""CIFAR-10, ra92_cifar: the public PyTorch code's mixup recipe (tengshaofeng, train_mixup.py), 96.84 % top-1 there.

    python main.py --config=configs/cifar10_ra92_mixup.py

320 epochs, mixup in all but the last 20. That figure is of the best epoch on the test set. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import cifar10_ra92


def get_config() -> ml_collections.ConfigDict:
    c = cifar10_ra92.get_config()
    c.total_epochs = 320.0
    c.augment.mixup_alpha = 1.0
    c.augment.mixup_off_last = "20 epochs"
    return c
