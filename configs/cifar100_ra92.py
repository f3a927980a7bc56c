"""CIFAR-100, ra92_cifar: the paper's recipe (section 4.1); its own 92-layer net, six times smaller, has 21.71 % error.

    python main.py --config=configs/cifar100_ra92.py

160k steps of 64 images, less the mean image. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.total_steps = 160_000
    c.model.name = "ra92_cifar"
    c.data.name = "cifar100"
    c.data.mean_image = True
    c.augment.crop_padding = 4
    c.augment.flip = True
    c.schedule.boundaries = ("64000 steps", "96000 steps")
    return c
