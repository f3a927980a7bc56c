"""ImageNet at 448 pixels, ra92_448: the net of the public PyTorch code with the paper's recipe.

    python main.py --config=configs/imagenet_ra92_448.py

Nobody has published a figure for it. What the paper leaves out is filled in as in imagenet_ra56. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import imagenet_ra56


def get_config() -> ml_collections.ConfigDict:
    c = imagenet_ra56.get_config()
    c.model.name = "ra92_448"
    c.data.image_size = 448
    c.eval.batch_size = 128
    return c
