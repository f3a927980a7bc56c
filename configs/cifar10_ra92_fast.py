"""CIFAR-10, ra92_cifar on one GPU in minutes, second edition: large batch, TrivialAugment, mixing, EMA, SAM at the end.

    python main.py --config=configs/cifar10_ra92_fast.py

Ours: not run yet. Batch 512 at a rate of 0.4 is 0.1 for each 128 images (Goyal et al., 2017). 150 epochs, then 25 with
SAM, each step of which takes the time of two. The first edition reached 97.07 % (last epoch, one H100); its config lies
in benchmarks/results/cifar10_ra92_fast_h100.
"""

import ml_collections

from resattn_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.batch_size = 512
    c.total_epochs = 175.0
    c.log_every = "200 steps"
    c.model.name = "ra92_cifar"
    c.model.init = "he_fan_out"
    c.data.name = "cifar10"
    c.data.mean = (0.4914, 0.4822, 0.4465)
    c.data.std = (0.2470, 0.2435, 0.2616)
    c.augment.crop_padding = 4
    c.augment.crop_mode = "reflect"
    c.augment.alternating_flip = True
    c.augment.trivialaugment = True
    c.augment.mixup_alpha = 0.8
    c.augment.cutmix_alpha = 1.0
    c.label_smoothing = 0.1
    c.optimizer.weight_decay = 5e-4
    c.optimizer.decay_norms_and_biases = False
    c.sam.rho = 0.1
    c.sam.last = "25 epochs"
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.4
    c.schedule.warmup = "5 epochs"
    c.ema_decay = 0.999
    c.eval.every = "35 epochs"
    c.eval.batch_size = 1000
    return c
