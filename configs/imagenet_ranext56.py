"""ImageNet, ranext56 (AttentionNeXt-56): the paper's recipe, 21.2 % top-1 error at 224 pixels.

    python main.py --config=configs/imagenet_ranext56.py

What the paper leaves out is filled in as in imagenet_ra56. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import imagenet_ra56


def get_config() -> ml_collections.ConfigDict:
    c = imagenet_ra56.get_config()
    c.model.name = "ranext56"
    return c
