"""What a config describes, built for the devices of a mesh. It opens no data: a `DataSpec` says what it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax import metrics
from resattn_jax.config import Durations, check_values
from resattn_jax.data import resident, streaming
from resattn_jax.data.pipelines import EvalStream
from resattn_jax.data.spec import DataSpec
from resattn_jax.errors import UsageError
from resattn_jax.metrics import Sums
from resattn_jax.models import create_model
from resattn_jax.models.nets import smallest_side
from resattn_jax.optimizer import changes_value_by_value, make_optimizer, make_schedule
from resattn_jax.runtime import Platform, device_faults, platform_of
from resattn_jax.state import TrainState, random_key
from resattn_jax.train_step import Recipe, Take, make_eval_step, make_train_steps

EVENTS = {"log": "log_every", "eval": "eval.every", "save": "checkpoint.every"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A config's parts. every: {"log", "eval", "save"} in steps, 0 for the end alone; batch sizes are global.

    pack: as `make_train_steps` takes it.
    """

    spec: DataSpec
    mesh: Mesh
    platform: Platform
    model: nn.Module
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    durations: Durations
    every: dict[str, int]
    batch_size: int
    eval_batch_size: int
    steps_per_dispatch: int
    pack: bool

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without its values."""
        sharding = NamedSharding(self.mesh, P())
        shapes = self._create_state.eval_shape()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    def initial_state(self) -> TrainState:
        """The state of step 0, weights drawn from the seed, whole on every device."""
        return self._create_state()

    @functools.cached_property
    def train_steps(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """What `make_train_steps` gives, jitted."""
        take, steps = self._pipeline.take, self.steps_per_dispatch
        parts = self.model, self.optimizer, self.recipe, self.mesh, self.platform, take, steps
        return make_train_steps(*parts, pack=self.pack)

    def train_shapes(self) -> tuple[TrainState, Any, Any, jax.ShapeDtypeStruct]:
        """The arguments of `train_steps` as shapes, dtypes and shardings: (state, arrays, batches, span)."""
        arrays, batches = self._pipeline.train_shapes(self.spec, self.batch_size, self.steps_per_dispatch, self.mesh)
        span = jax.ShapeDtypeStruct((2,), np.int32, sharding=NamedSharding(self.mesh, P()))
        return self.abstract_state(), arrays, batches, span

    @functools.cache  # noqa: B019 — an experiment lives as long as its process
    def eval_step(self, take: Take) -> Callable[..., Sums]:
        """What `make_eval_step` gives for a stream's `take`, jitted."""
        return make_eval_step(self.model, self.recipe, self.mesh, self.platform, take)

    def evaluate(self, variables: Any, stream: EvalStream, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The metrics of `variables` over a stream, each example once: what `metrics.compute` gives.

        alive: called after each batch.
        Broken pictures that were skipped are counted in "broken_pictures_skipped", where there are any.
        Raises UsageError when no example is left, and RunError when a device is out of memory.
        """
        parts: list[Sums] = []
        step = self.eval_step(stream.take)
        size = self.eval_batch_size
        with device_faults(f"evaluating {size} images at a time; lower config.eval.batch_size"):
            for batch, mask in stream:
                if parts:
                    jax.block_until_ready(parts[-1])  # two batches at a time: streamed ones would fill the memory
                parts.append(step(variables, stream.arrays, batch, mask))
                alive()
            parts = jax.device_get(parts)
        if not any(part["Accuracy"]["examples"] for part in parts):
            raise UsageError("not one example of the evaluation split could be read")
        values = metrics.compute(parts)
        return {**values, "broken_pictures_skipped": stream.skipped} if stream.skipped else values

    @property
    def _pipeline(self) -> Any:
        return resident if self.spec.resident else streaming

    @functools.cached_property  # one function for both, so that the net is traced once
    def _create_state(self) -> Any:
        create = functools.partial(
            create_state,
            self.model,
            self.optimizer,
            self.spec.image_shape,
            seed=self.recipe.seed,
            ema=self.recipe.ema_decay is not None,
        )
        return jax.jit(create, out_shardings=NamedSharding(self.mesh, P()))


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """The state of step 0, weights drawn from the seed. image_shape: (H, W, C); ema: with a moving average."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(random_key(seed, "init"), images, train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, dict(variables)) if ema else None,
    )


def build(
    config: ml_collections.ConfigDict, spec: DataSpec, mesh: Mesh, platform: Platform | None = None
) -> Experiment:
    """Builds everything the config names for data that `spec` describes. It does not change the config.

    platform: None for that of the mesh's devices. Raises UsageError for whatever cannot be.
    """
    check_values(config)
    platform = platform or platform_of(mesh)
    _check_batch(config, mesh.size)
    _check_images(config, spec)
    durations = Durations(config, spec.examples)
    schedule = make_schedule(config, durations)
    recipe = Recipe(
        seed=config.seed,
        mean=spec.mean,
        std=spec.std,
        augment=ml_collections.FrozenConfigDict(config.augment),
        mixup_until=durations.total - durations("augment.mixup_off_last"),
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        mirror=config.eval.views > 1,
        skip_not_finite=config.on_nan == "skip",
        all_reduce_dtype=config.all_reduce_dtype,
    )
    return Experiment(
        spec=spec,
        mesh=mesh,
        platform=platform,
        model=build_model(config, spec.num_classes, platform),
        recipe=recipe,
        schedule=schedule,
        optimizer=make_optimizer(config, schedule),
        durations=durations,
        every={event: durations(key) for event, key in EVENTS.items()},
        batch_size=config.batch_size,
        eval_batch_size=-(-config.eval.batch_size // mesh.size) * mesh.size,
        steps_per_dispatch=(config.steps_per_dispatch or platform.steps_per_dispatch) if spec.resident else 1,
        pack=platform.packs and changes_value_by_value(config),
    )


def build_model(config: ml_collections.ConfigDict, num_classes: int, platform: Platform) -> nn.Module:
    """The net of config.model. Raises UsageError for options that do not go together."""
    options = {k: v for k, v in config.model.items() if k not in ("name", "dtype") and v is not None}
    try:
        return create_model(
            config.model.name,
            num_classes=num_classes,
            dtype=platform.dtype(config.model.dtype),
            axis_name="data" if config.sync_batch_norm else None,
            **options,
            **platform.layers,
        )
    except ValueError as error:
        raise UsageError(f"config.model: {error}") from error


def _check_batch(config: ml_collections.ConfigDict, devices: int) -> None:
    size = config.batch_size
    if size % devices:
        near = max(size // devices, 1) * devices
        raise UsageError(
            f"config.batch_size is {size}, which does not divide by the {devices} devices;"
            f" {near} or {near + devices} would"
        )
    if size // devices % config.accumulate:
        raise UsageError(
            f"config.accumulate is {config.accumulate}; it must be 1 or more and divide the {size // devices} images"
            f" that each of the {devices} devices has of a batch of {size}"
        )
    if (config.augment.mixup_alpha or config.augment.cutmix_alpha) and size // devices % 2:
        raise UsageError(
            f"mixup and CutMix pair the images of a device, but a batch of {size} leaves {size // devices} for each of"
            f" the {devices} devices, an odd number; set config.batch_size to a multiple of {2 * devices}"
        )


def _check_images(config: ml_collections.ConfigDict, spec: DataSpec) -> None:
    height, width, channels = spec.image_shape
    augment, least = config.augment, smallest_side(config.model.name, config.model.wiring, config.model.mask)
    for shape in (spec.image_shape, spec.eval_shape):
        if min(shape[:2]) < least:
            raise UsageError(
                f"config.model.name is {config.model.name!r}, which needs images of {least}x{least} at least; those of"
                f" {config.data.name} have {shape[0]}x{shape[1]}"
            )
    if channels != 3 and (any(augment.color_jitter) or augment.pca_lighting):
        raise UsageError(
            f"color_jitter and pca_lighting are for colour images; {config.data.name} has {channels} channel"
        )
    for key in ("crop_padding", "cutout"):
        if augment[key] > min(height, width):
            raise UsageError(
                f"config.augment.{key} is {augment[key]}; the images are {height}x{width}, and it must be no larger"
            )
