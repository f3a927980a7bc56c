"""What a config describes, built: mesh, data, model, recipe and optimizer. Training and evaluation both start here."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax import runtime
from resattn_jax.config import Durations, choose
from resattn_jax.data.label_noise import noisy_labels
from resattn_jax.data.resident import Resident
from resattn_jax.data.sources import Examples, Source, open_source, read
from resattn_jax.data.streaming import Streaming
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import UsageError
from resattn_jax.models import create_model
from resattn_jax.optimizer import make_optimizer, make_schedule
from resattn_jax.train_step import Recipe, TrainState, create_state

RESIDENT_BYTES = 2 << 30  # a larger set leaves a small device too little room for the net

EVENTS = {"log": "log_every", "eval": "eval.every", "save": "checkpoint.every"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config's parts, checked. every: {"log", "eval", "save"}, in steps, 0 for never but at the end."""

    mesh: Mesh
    train: Resident | Streaming
    test: Resident | Streaming
    model: nn.Module
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    durations: Durations
    every: dict[str, int]
    eval_batch_size: int

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without its values."""
        sharding = NamedSharding(self.mesh, P())
        shapes = self._create_state.eval_shape()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    def initial_state(self) -> TrainState:
        """The state of step 0, whole on every device."""
        return self._create_state()

    @functools.cached_property  # one function for both, so that the net is traced once
    def _create_state(self):
        create = functools.partial(create_state, self.model, self.optimizer, self.recipe, self.train.image_shape)
        return jax.jit(create, out_shardings=NamedSharding(self.mesh, P()))


def build(config: ml_collections.ConfigDict, devices: list[jax.Device] | None = None) -> Experiment:
    """Loads the data and builds everything the config names. It does not change the config.

    devices: which to use; None: all of all hosts. Raises UsageError for whatever in the config cannot be.
    """
    mesh = runtime.make_mesh(devices)
    _check_batch(config, mesh.size)
    data = config.data
    sources = [open_source(data.name, split, data.dir) for split in (data.train_split, data.eval_split)]
    _check_classes(config, *(source.class_names for source in sources))
    if _is_streaming(config, sources):
        mean = None
        train, test = _streaming(config, mesh, *sources)
    else:
        examples, measured = _noisy(config, read(sources[0])), read(sources[1])
        mean = examples.images.mean(0) / 255 if data.mean_image else None
        train, test = Resident(examples, mesh), Resident(measured, mesh)
    model = _build_model(config, len(train.class_names))
    durations = Durations(config, train.examples)
    schedule = make_schedule(config, durations)
    recipe = Recipe(
        seed=config.seed,
        mean=_per_channel(config, "mean", train.image_shape[-1]) if mean is None else mean,
        std=_per_channel(config, "std", train.image_shape[-1]),
        crop_padding=config.augment.crop_padding,
        flip=config.augment.flip,
        mixup_alpha=config.augment.mixup_alpha,
        mixup_until=durations.total - durations("augment.mixup_off_last"),
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        cutmix_alpha=config.augment.cutmix_alpha,
        color_jitter=_color_jitter(config, train.image_shape[-1]),
        pca_lighting=config.augment.pca_lighting,
        random_erasing=config.augment.random_erasing,
        cutout=config.augment.cutout,
        accumulate=config.accumulate,
        mirror=choose("eval.views", config.eval.views, (1, 2, 10)) > 1,
    )
    return Experiment(
        mesh=mesh,
        train=train,
        test=test,
        model=model,
        recipe=recipe,
        schedule=schedule,
        optimizer=make_optimizer(config, schedule),
        durations=durations,
        every={event: durations(key) for event, key in EVENTS.items()},
        eval_batch_size=-(-config.eval.batch_size // mesh.size) * mesh.size,
    )


def _build_model(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
    options = {k: v for k, v in config.model.items() if k not in ("name", "dtype") and v is not None}
    dtype = choose("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16"))
    try:
        return create_model(
            config.model.name,
            num_classes=num_classes,
            dtype=runtime.compute_dtype(dtype),
            axis_name="data" if config.sync_batch_norm else None,
            **options,
        )
    except ValueError as error:
        raise UsageError(f"config.model: {error}") from error


def _check_batch(config: ml_collections.ConfigDict, devices: int) -> None:
    size = config.batch_size
    if size < 1:
        raise UsageError(f"config.batch_size is {size}; it must be 1 or more")
    if size % devices:
        near = max(size // devices, 1) * devices
        raise UsageError(
            f"config.batch_size is {size}, which does not divide by the {devices} devices;"
            f" {near} or {near + devices} would"
        )
    if config.accumulate < 1 or size // devices % config.accumulate:
        raise UsageError(
            f"config.accumulate is {config.accumulate}; it must be 1 or more and divide the {size // devices} images"
            f" that each of the {devices} devices has of a batch of {size}"
        )
    if (config.augment.mixup_alpha or config.augment.cutmix_alpha) and size // devices % 2:
        raise UsageError(
            f"mixup and CutMix pair the images of a device, but a batch of {size} leaves {size // devices} for each of"
            f" the {devices} devices, an odd number; set config.batch_size to a multiple of {2 * devices}"
        )


def _is_streaming(config: ml_collections.ConfigDict, sources: list[Source]) -> bool:
    """Which pipeline config.data.pipeline means. Raises UsageError when the set cannot be resident and has to."""
    name, data = choose("data.pipeline", config.data.pipeline, ("auto", "resident", "streaming")), config.data
    reasons = {  # why it has to stream
        "the images have different sizes": any(source.image_shape is None for source in sources),
        "config.augment.random_resized_crop is set": config.augment.random_resized_crop,
        "config.augment.randaugment is set": config.augment.randaugment > 0,
        "config.eval.views is 10": config.eval.views == 10,
    }
    if not any(reasons.values()):
        shape = sources[0].image_shape
        sizes = {size for size in (data.image_size, config.eval.image_size) if size}
        reasons["the images have another size than config asks for"] = bool(sizes) and {*shape[:2]} != sizes
        reasons["the splits differ in size"] = sources[1].image_shape != shape
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if name == "resident" and reason:
        raise UsageError(f"{data.name} cannot be resident: {reason}; set config.data.pipeline=streaming")
    if name != "auto":
        return name == "streaming"
    return bool(reason) or sum(len(s) * math.prod(s.image_shape) for s in sources) > RESIDENT_BYTES


def _streaming(config: ml_collections.ConfigDict, mesh: Mesh, train: Source, test: Source):
    """Both splits' pipelines. Raises UsageError for what the config asks of them in vain."""
    data, augment = config.data, config.augment
    size = data.image_size or (train.image_shape[0] if train.image_shape else None)
    if not size:
        raise UsageError(f"the images of {data.name} have different sizes; set config.data.image_size, say to 224")
    for key in ("mean_image", "label_noise"):
        if data[key]:
            raise UsageError(f"config.data.{key} is for resident sets, but {data.name} is streamed")
    if config.steps_per_dispatch not in (None, 1):
        raise UsageError(f"config.steps_per_dispatch must be 1, or unset, for {data.name}, which is streamed")
    for key in ("crop_area", "crop_aspect"):
        low, high = augment[key]
        if not 0 < low <= high or (key == "crop_area" and high > 1):
            raise UsageError(f"config.augment.{key} is {augment[key]}; write (least, most), such as {_EXAMPLES[key]}")
    if not 0 < config.eval.crop_fraction <= 1:
        raise UsageError(f"config.eval.crop_fraction is {config.eval.crop_fraction}; it must be over 0 and at most 1")
    transforms = (
        TrainTransform(
            size,
            augment.random_resized_crop,
            tuple(augment.crop_area),
            tuple(augment.crop_aspect),
            (augment.randaugment, augment.randaugment_magnitude),
        ),
        EvalTransform(config.eval.image_size or size, config.eval.crop_fraction, 5 if config.eval.views == 10 else 1),
    )
    skip = choose("data.broken", data.broken, ("fail", "skip")) == "skip"
    return tuple(
        Streaming(source, mesh, transform, data.workers, skip)
        for source, transform in zip((train, test), transforms, strict=True)
    )


_EXAMPLES = {"crop_area": "(0.08, 1.0)", "crop_aspect": "(0.75, 1.33)"}


def _check_classes(config: ml_collections.ConfigDict, train: tuple[str, ...], test: tuple[str, ...]) -> None:
    if train != test:
        only = [f"only {split} has {', '.join(sorted(a - b)[:5])}" for split, a, b in (
            (config.data.train_split, set(train), set(test)), (config.data.eval_split, set(test), set(train))
        ) if a - b]  # fmt: skip
        raise UsageError(f"the classes of {config.data.name} differ between its splits: {'; '.join(only)}")


def _color_jitter(config: ml_collections.ConfigDict, channels: int) -> tuple[float, float, float]:
    ranges = tuple(config.augment.color_jitter)
    if len(ranges) != 3 or not all(0 <= x <= 1 for x in ranges):
        raise UsageError(f"config.augment.color_jitter is {ranges}; write three numbers from 0 to 1")
    if channels != 3 and (any(ranges) or config.augment.pca_lighting):
        raise UsageError(
            f"color_jitter and pca_lighting are for colour images; {config.data.name} has {channels} channel"
        )
    return ranges


def _noisy(config: ml_collections.ConfigDict, examples: Examples) -> Examples:
    try:
        labels = noisy_labels(examples.labels, len(examples.class_names), config.data.label_noise, config.seed)
    except ValueError as error:
        raise UsageError(f"config.data.label_noise: {error}") from error
    return dataclasses.replace(examples, labels=labels)


def _per_channel(config: ml_collections.ConfigDict, key: str, channels: int) -> np.ndarray:
    values = tuple(config.data[key])
    if len(values) not in (1, channels):
        raise UsageError(f"config.data.{key} has {len(values)} values, but the images have {channels} channels")
    return np.array(values, np.float32)
