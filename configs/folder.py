"""Your own pictures: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (JPEG, PNG, WebP; "test" will do for "val").

    python main.py --config=configs/folder.py --config.data.name=folder:DIR

With DIR/train alone: --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'. Look first at what
the net will see: --mode=show_data. A few thousand pictures are too few to start from nothing: give weights of
ImageNet with --config.init_from=WORKDIR and a lower --config.schedule.learning_rate.
"""

import ml_collections

from resattn_jax.configs import default, imagenet_ra56


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.batch_size = 64
    c.total_epochs = 90.0
    c.model.name = "ra56"
    c.data.name = "folder:data"
    c.data.eval_split = "val"
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
