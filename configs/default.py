"""What every recipe starts from. A recipe sets what it needs; `--config.key=value` overrides it for one run.

A duration is written '500 steps', '5 epochs' or '30%' (of the run).
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.batch_size = 64  # images a step, over all devices
    c.accumulate = 1  # micro-batches that a device's share of a batch is split into, for its memory's sake; one update
    c.total_epochs = placeholder(float)  # exactly one of these two is set
    c.total_steps = placeholder(int)
    c.sync_batch_norm = False  # batch statistics over all devices; else each device's own, as published runs had
    c.batch_norm_span = placeholder(int)  # images with statistics in common: a part of a device's, or several's
    c.all_reduce_dtype = "float32"  # what devices send gradients to each other in: float32 | bfloat16, half the bytes
    c.init_from = placeholder(str)  # first weights: WORKDIR (or :best, :STEP), an exported folder, a net on board
    c.steps_per_dispatch = placeholder(int)  # None: 1 on the CPU, 50 elsewhere
    c.log_every = "100 steps"
    c.on_nan = "fail"  # a step whose loss or gradient is not finite: fail (the run ends) | skip (it changes nothing)
    c.watchdog_minutes = 10.0  # without a step for so long it is told, once, what every thread does; 0: never
    c.tracker = placeholder(str)  # wandb: what TensorBoard's curves have goes there too (pip install '.[wandb]')

    c.model = ml_collections.ConfigDict()
    c.model.name = "ra92_cifar"
    c.model.dtype = "auto"  # auto: bfloat16 on accelerators, float32 on the CPU
    c.model.remat = False  # keep less for the backward pass and compute it anew: less memory, one more forward pass
    c.model.wiring = placeholder(str)  # None: as the net's source has it. paper | double_skip
    c.model.attention = placeholder(str)  # mixed | channel | spatial
    c.model.learning = placeholder(str)  # arl | nal
    c.model.mask = placeholder(str)  # encoder_decoder | local_convolutions
    c.model.p = placeholder(int)  # residual units before trunk and mask part (paper, section 3)
    c.model.t = placeholder(int)  # of the trunk branch
    c.model.r = placeholder(int)  # between two poolings of the mask branch
    c.model.last = placeholder(int)  # after the mask product
    c.model.init = placeholder(str)  # he_fan_in | he_fan_out | pytorch

    c.data = ml_collections.ConfigDict()
    c.data.name = "digits"  # digits, folder:DIR (DIR/train/CLASS/*.jpg), synthetic, or a TFDS classification set
    c.data.dir = placeholder(str)  # None: TFDS_DATA_DIR, or TFDS's own default
    c.data.train_split = "train"  # or a part: 'train[:90%]' to train on and 'train[90%:]' to choose an epoch by
    c.data.eval_split = "test"
    c.data.pipeline = "auto"  # resident: the whole set on the devices | streaming: decoded as needed | auto
    c.data.image_size = placeholder(int)  # streaming: side of the square the net sees; None: the set's own size
    c.data.workers = 0  # streaming: processes that decode; 0: threads of this one
    c.data.broken = "fail"  # streaming, a broken picture: fail (the run ends) | skip (reported, counted, left out)
    c.data.exif_orientation = (
        False  # streaming: pictures as phones mean them to be looked at; published runs: as stored
    )
    c.data.mean = (0.0,)  # of pixels in [0, 1]; one for all channels, or one for each
    c.data.std = (1.0,)
    c.data.mean_image = False  # subtract the mean image of the training set instead of `mean`
    c.data.label_noise = 0.0  # share of training labels drawn anew among the other classes, by the seed

    c.augment = ml_collections.ConfigDict()
    c.augment.crop_padding = 0  # pad so many pixels on each side, crop the old size at random
    c.augment.crop_mode = "zeros"  # what is padded: zeros (the mean colour) | reflect (the image mirrored)
    c.augment.flip = False  # left to right, half of the images
    c.augment.alternating_flip = False  # instead: at random in the first epoch, then the other way round in each
    c.augment.random_resized_crop = False  # streaming: a window of random area and aspect, resized to image_size
    c.augment.crop_area = (0.08, 1.0)  # its share of the picture
    c.augment.crop_aspect = (0.75, 4 / 3)  # its width / height
    c.augment.randaugment = 0  # streaming: so many operations an image
    c.augment.randaugment_magnitude = 9.0  # of 10
    c.augment.trivialaugment = False  # one operation an image, of any strength (TrivialAugment-Wide)
    c.augment.color_jitter = (0.0, 0.0, 0.0)  # brightness, contrast, saturation: by a factor of 1 - x to 1 + x
    c.augment.pca_lighting = 0.0  # standard deviation along the principal components; AlexNet's is 0.1
    c.augment.random_erasing = 0.0  # share of images that lose a rectangle
    c.augment.cutout = 0  # side of a square that each image loses
    c.augment.mixup_alpha = 0.0  # lambda ~ Beta(alpha, alpha), one a batch; 0: no mixup
    c.augment.cutmix_alpha = 0.0  # the same for CutMix; with both, each batch gets one or the other
    c.augment.mixup_off_last = "0 steps"  # the last part of the run goes without either

    c.label_smoothing = 0.0

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "sgd"  # sgd | lars: for batches beyond 8,192
    c.optimizer.momentum = 0.9
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 1e-4
    c.optimizer.decay_norms_and_biases = True  # False: weight decay on convolution and linear kernels only
    c.optimizer.decay_norm_scales = placeholder(bool)  # of norms the scales apart from the biases; None: as these
    c.optimizer.clip_norm = placeholder(float)  # global norm of the gradients

    c.sam = ml_collections.ConfigDict()  # sharpness-aware minimisation: flatter minima, twice the time of a step
    c.sam.rho = 0.0  # how far from the weights, up the gradient, a step takes its gradient; 0: without it
    c.sam.last = "100%"  # the last part of the run goes with it

    c.schedule = ml_collections.ConfigDict()
    c.schedule.name = "step"  # step | cosine | linear | constant
    c.schedule.learning_rate = 0.1  # the highest
    c.schedule.boundaries = ("30%", "60%", "90%")  # step: where it is multiplied by factor
    c.schedule.factor = 0.1
    c.schedule.warmup = "0 steps"  # linear from 0

    c.ema_decay = placeholder(float)  # evaluate an exponential moving average of the weights, say 0.999

    c.eval = ml_collections.ConfigDict()
    c.eval.every = "1 epoch"  # the last step is always evaluated
    c.eval.batch_size = 500  # rounded up to divide by the devices
    c.eval.max_examples = placeholder(int)  # None: all
    c.eval.image_size = placeholder(int)  # streaming: other than data.image_size
    c.eval.crop_fraction = 0.875  # streaming: of the shorter side; the centre of so much is what the net sees
    c.eval.views = 1  # 1: as it is | 2: and mirrored | 10: streaming, four corners and centre, and these mirrored

    c.checkpoint = ml_collections.ConfigDict()  # one is written with each evaluation
    c.checkpoint.every = placeholder(str)  # and so often between
    c.checkpoint.keep_newest = 2
    c.checkpoint.keep_best = 1  # by top-1
    return c
