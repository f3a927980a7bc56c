"""ImageNet, ra56 with what has been learnt since the paper: cosine rate, label smoothing, EMA, mixup, RandAugment.

    python main.py --config=configs/imagenet_ra56_modern.py

100 epochs, batch 1024 at a rate of 0.4 (0.1 for each 256 images, Goyal et al., 2017). Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import imagenet_ra56


def get_config() -> ml_collections.ConfigDict:
    c = imagenet_ra56.get_config()
    c.batch_size = 1024
    c.total_steps, c.total_epochs = None, 100.0
    c.log_every = "100 steps"
    c.augment.pca_lighting = 0.0
    c.augment.randaugment = 2
    c.augment.randaugment_magnitude = 6.0
    c.augment.mixup_alpha = 0.2
    c.augment.mixup_off_last = "5 epochs"
    c.label_smoothing = 0.1
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 5e-5
    c.optimizer.decay_norms_and_biases = False
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.4
    c.schedule.warmup = "5 epochs"
    c.ema_decay = 0.9999
    c.eval.every = "1 epoch"
    return c
