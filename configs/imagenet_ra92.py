"""ImageNet, ra92: the paper's recipe, which reports 19.5 % top-1 error for it, measured at 320 pixels.

    python main.py --config=configs/imagenet_ra92.py

Trained at 224, measured at 320. What the paper leaves out is filled in as in imagenet_ra56. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import imagenet_ra56


def get_config() -> ml_collections.ConfigDict:
    c = imagenet_ra56.get_config()
    c.model.name = "ra92"
    c.eval.image_size = 320
    c.eval.batch_size = 128
    return c
