"""The paper's CIFAR experiments (section 4.1, tables 1, 3, 4 and 5), a variant a run.

    python main.py --config=configs/paper_cifar.py:net=ra56_cifar_slim,learning=nal

    data=cifar10 | cifar100
    net=ra{56,92,128,164,236,452}_cifar_slim           tables 3 and 6
    learning=arl | nal                                 table 3
    attention=mixed | channel | spatial                table 1
    mask=encoder_decoder | local_convolutions          table 4
    noise=0.1 | 0.3 | 0.5 | 0.7                        table 5

Batch 64, 160,000 iterations, Nesterov momentum 0.9, weight decay 1e-4, rate 0.1 divided by 10 after 64,000 and 96,000;
zero-padded by 4, random crop, flip, per-pixel mean subtracted; He initialisation. Ours: not run yet.
"""

import ml_collections

from resattn_jax.configs import default

OPTIONS = ("data", "net", "learning", "attention", "mask", "noise")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    pairs = (pair.partition("=") for pair in variant.split(",") if pair)
    options = {key: value for key, _, value in pairs}
    for key, value in options.items():
        if key not in OPTIONS or not value:
            raise ValueError(f"paper_cifar.py takes NAME=VALUE with {', '.join(OPTIONS)}, not {key!r}")
    c = default.get_config()
    c.batch_size = 64
    c.total_steps = 160_000
    c.model.name = options.get("net", "ra92_cifar_slim")
    c.model.init = "he_fan_in"
    c.model.learning = options.get("learning", "arl")
    c.model.attention = options.get("attention", "mixed")
    c.model.mask = options.get("mask", "encoder_decoder")
    c.data.name = options.get("data", "cifar10")
    c.data.mean_image = True
    c.data.label_noise = float(options.get("noise", 0))
    c.augment.crop_padding = 4
    c.augment.flip = True
    c.schedule.boundaries = ("64000 steps", "96000 steps")
    return c
