"""Your own pictures: DIR/CLASS/*.jpg, or DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (JPEG, PNG, WebP and others).

    python main.py --config=configs/folder.py:DIR

Without DIR/val (or "valid", "validation", "dev", "test") a fifth of the pictures is held out. Look first at what the
net will see: --mode=show_data. This is for a GPU and some ten thousand pictures; folder_small is for a laptop. Fewer
are too few to start from nothing: give weights of ImageNet with --config.init_from=WORKDIR and a lower
--config.schedule.learning_rate.
"""

import pathlib

import ml_collections

from resattn_jax.configs import default, imagenet_ra56

HELD_OUT = ("val", "valid", "validation", "dev", "test")


def get_config(folder: str | None = None) -> ml_collections.ConfigDict:
    c = default.get_config()
    c.batch_size = 64
    c.total_epochs = 90.0
    c.model.name = "ra56"
    c.data.name = f"folder:{folder or 'data'}"
    c.data.eval_split = "val"
    if folder and not any((pathlib.Path(folder).expanduser() / name).is_dir() for name in HELD_OUT):
        c.data.train_split, c.data.eval_split = "train[:80%]", "train[80%:]"
    c.data.image_size = 224
    c.data.mean, c.data.std = imagenet_ra56.MEAN, imagenet_ra56.STD
    c.augment.random_resized_crop = True
    c.augment.flip = True
    c.augment.color_jitter = (0.4, 0.4, 0.4)
    c.label_smoothing = 0.1
    c.optimizer.decay_norms_and_biases = False
    c.schedule.name = "cosine"
    c.schedule.learning_rate = 0.025  # 0.1 for each 256 images
    c.schedule.warmup = "5 epochs"
    c.eval.batch_size = 64
    return c
