"""What a config describes, built: mesh, data, model, recipe and optimizer. Training and evaluation both start here."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax import runtime
from resattn_jax.config import Durations, choose
from resattn_jax.data.pipelines import Pipeline, open_pipelines
from resattn_jax.errors import UsageError
from resattn_jax.models import create_model
from resattn_jax.optimizer import make_optimizer, make_schedule
from resattn_jax.train_step import Recipe, TrainState, create_state

EVENTS = {"log": "log_every", "eval": "eval.every", "save": "checkpoint.every"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config's parts, checked. every: {"log", "eval", "save"}, in steps, 0 for never but at the end."""

    mesh: Mesh
    train: Pipeline
    test: Pipeline
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
    train, test, mean_image = open_pipelines(config, mesh)
    model = _build_model(config, len(train.class_names))
    durations = Durations(config, train.examples)
    schedule = make_schedule(config, durations)
    recipe = Recipe(
        seed=config.seed,
        mean=_per_channel(config, "mean", train.image_shape[-1]) if mean_image is None else mean_image,
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


def _color_jitter(config: ml_collections.ConfigDict, channels: int) -> tuple[float, float, float]:
    ranges = tuple(config.augment.color_jitter)
    if len(ranges) != 3 or not all(0 <= x <= 1 for x in ranges):
        raise UsageError(f"config.augment.color_jitter is {ranges}; write three numbers from 0 to 1")
    if channels != 3 and (any(ranges) or config.augment.pca_lighting):
        raise UsageError(
            f"color_jitter and pca_lighting are for colour images; {config.data.name} has {channels} channel"
        )
    return ranges


def _per_channel(config: ml_collections.ConfigDict, key: str, channels: int) -> np.ndarray:
    values = tuple(config.data[key])
    if len(values) not in (1, channels):
        raise UsageError(f"config.data.{key} has {len(values)} values, but the images have {channels} channels")
    return np.array(values, np.float32)
