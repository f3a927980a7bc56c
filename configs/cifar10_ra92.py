"""CIFAR-10, ra92_cifar: the public PyTorch code's plain recipe (tengshaofeng, train.py), 95.4 % top-1 there.

    python main.py --config=configs/cifar10_ra92.py

That figure is of the best epoch on the test set. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.total_epochs = 300.0
    c.model.name = "ra92_cifar"
    c.model.init = "pytorch"
    c.data.name = "cifar10"  # pixels in [0, 1], no mean or deviation
    c.augment.crop_padding = 4
    c.augment.flip = True
    c.schedule.boundaries = ("30%", "60%", "90%")
    return c
