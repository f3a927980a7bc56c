"""The demo: scikit-learn's 1,797 handwritten digits of 8x8 pixels, ra_tiny.

make demo        (python main.py --config=configs/digits.py)
"""

import ml_collections

from resattn_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.total_epochs = 40.0
    c.batch_size = 64
    c.model.name = "ra_tiny"
    c.data.name = "digits"
    c.data.mean = (0.306,)
    c.data.std = (0.377,)
    c.augment.crop_padding = 1
    c.label_smoothing = 0.1
    c.optimizer.decay_norms_and_biases = False
    c.optimizer.weight_decay = 5e-4
    c.schedule.name = "cosine"
    c.schedule.warmup = "2 epochs"
    c.ema_decay = 0.99
    c.eval.every = "5 epochs"
    c.log_every = "50 steps"
    return c
