"""Both splits of the data a config asks for, each in the pipeline that suits it: resident or streaming."""

from __future__ import annotations

import contextlib
import math

import ml_collections
import numpy as np
from jax.sharding import Mesh

from resattn_jax.config import choose
from resattn_jax.data.label_noise import NoisySource
from resattn_jax.data.resident import Resident
from resattn_jax.data.sources import Source, open_source, read
from resattn_jax.data.streaming import Streaming
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import UsageError

RESIDENT_BYTES = 2 << 30  # a larger set leaves a small device too little room for the net

Pipeline = Resident | Streaming


def open_pipelines(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[Pipeline, Pipeline, np.ndarray | None]:
    """The training and the evaluation split, and with config.data.mean_image the former's mean image, else None.

    The mean image is [H, W, C], of pixels in [0, 1]. Raises UsageError for what the config asks of the data in vain.
    """
    data = config.data
    _check_values(config)
    train, test = (open_source(data.name, split, data.dir) for split in (data.train_split, data.eval_split))
    _check_classes(data, train, test)
    _check_labels(data, train, test)
    if data.label_noise:
        train = NoisySource(train, data.label_noise, config.seed)
    if _is_streamed(config, train, test):
        return *_streaming(config, mesh, train, test), None
    examples, measured = read(train), read(test)
    mean = examples.images.mean(0) / 255 if data.mean_image else None
    return Resident(examples, mesh), Resident(measured, mesh), mean


def _check_values(config: ml_collections.ConfigDict) -> None:
    def is_range(values):
        return len(values) == 2 and 0 < values[0] <= values[1]

    for key, holds, rule in (
        ("seed", lambda x: x >= 0, "it must be 0 or more"),
        ("data.workers", lambda x: x >= 0, "it must be 0 or more"),
        ("data.image_size", lambda x: x is None or x > 0, "it must be over 0, or unset"),
        ("eval.image_size", lambda x: x is None or x > 0, "it must be over 0, or unset"),
        ("eval.max_examples", lambda x: x is None or x > 0, "it must be over 0, or unset"),
        ("eval.crop_fraction", lambda x: 0 < x <= 1, "it must be over 0 and at most 1"),
        ("augment.randaugment", lambda x: x >= 0, "it must be 0 or more"),
        ("augment.randaugment_magnitude", lambda x: 0 <= x <= 10, "it must be from 0 to 10"),
        ("augment.crop_area", lambda x: is_range(x) and x[1] <= 1, "write (least, most), such as (0.08, 1.0)"),
        ("augment.crop_aspect", is_range, "write (least, most), such as (0.75, 1.33)"),
    ):
        section, _, name = key.rpartition(".")
        value = (config[section] if section else config)[name]
        if not holds(value):
            raise UsageError(f"config.{key} is {value}; {rule}")


def _check_classes(data: ml_collections.ConfigDict, train: Source, test: Source) -> None:
    if train.class_names != test.class_names:
        ours, theirs = set(train.class_names), set(test.class_names)
        only = [
            f"only {split} has {', '.join(sorted(names)[:5])}"
            for split, names in ((data.train_split, ours - theirs), (data.eval_split, theirs - ours))
            if names
        ]
        raise UsageError(f"the classes of {data.name} differ between its splits: {'; '.join(only)}")


def _check_labels(data: ml_collections.ConfigDict, train: Source, test: Source) -> None:
    for split, source in ((data.train_split, train), (data.eval_split, test)):
        with contextlib.suppress(OSError):  # a file that cannot be read is told of when its turn comes
            if source[0][1] < 0:
                raise UsageError(f"the split {split!r} of {data.name} has no labels: TFDS writes -1 for each")


def _is_streamed(config: ml_collections.ConfigDict, train: Source, test: Source) -> bool:
    """Which pipeline config.data.pipeline means. Raises UsageError when the set cannot be resident and has to."""
    name, data = choose("data.pipeline", config.data.pipeline, ("auto", "resident", "streaming")), config.data
    shapes = train.image_shape, test.image_shape
    sizes = {size for size in (data.image_size, config.eval.image_size) if size}
    reasons = {  # why it has to stream
        "the images have different sizes": None in shapes or shapes[0] != shapes[1],
        "config.augment.random_resized_crop is set": config.augment.random_resized_crop,
        "config.augment.randaugment is set": config.augment.randaugment > 0,
        "config.eval.views is 10": config.eval.views == 10,
        "the images have another size than config asks for": sizes and {*(shapes[0] or ())[:2]} != sizes,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if name == "resident" and reason:
        raise UsageError(f"{data.name} cannot be resident: {reason}; set config.data.pipeline=streaming")
    if name == "auto":
        return bool(reason) or (len(train) + len(test)) * math.prod(train.image_shape) > RESIDENT_BYTES
    return name == "streaming"


def _streaming(config: ml_collections.ConfigDict, mesh: Mesh, train: Source, test: Source):
    """Both splits' pipelines. Raises UsageError for what the config asks of them in vain."""
    data, augment = config.data, config.augment
    size = data.image_size or (train.image_shape[0] if train.image_shape else None)
    if not size:
        raise UsageError(f"the images of {data.name} have different sizes; set config.data.image_size, say to 224")
    if data.mean_image:
        raise UsageError(f"config.data.mean_image is for resident sets, but {data.name} is streamed")
    if config.steps_per_dispatch not in (None, Streaming.max_steps_per_dispatch):
        raise UsageError(f"config.steps_per_dispatch must be 1, or unset, for {data.name}, which is streamed")
    crop = TrainTransform(
        size,
        augment.random_resized_crop,
        tuple(augment.crop_area),
        tuple(augment.crop_aspect),
        (augment.randaugment, augment.randaugment_magnitude),
    )
    views = 5 if config.eval.views == 10 else 1
    centre = EvalTransform(config.eval.image_size or size, config.eval.crop_fraction, views)
    skip = choose("data.broken", data.broken, ("fail", "skip")) == "skip"
    return tuple(
        Streaming(source, mesh, transform, data.workers, skip) for source, transform in ((train, crop), (test, centre))
    )
