"""What a config describes, built for the devices of a mesh. Building opens no data: a `DataSpec` says what it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from resattn_jax import metrics
from resattn_jax.config import Durations, check_values, for_measuring
from resattn_jax.data import resident, streaming
from resattn_jax.data.pipelines import EvalStream, for_evaluation, open_eval
from resattn_jax.data.spec import DataSpec
from resattn_jax.errors import UsageError
from resattn_jax.metrics import Sums
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import first_variables, variable_shapes
from resattn_jax.models.nets import smallest_side
from resattn_jax.models.network import ResidualAttentionNetwork
from resattn_jax.optimizer import changes_value_by_value, make_optimizer, make_schedule
from resattn_jax.runtime import Platform, device_faults, platform_of
from resattn_jax.state import TrainState
from resattn_jax.train_step import Recipe, Take, make_eval_step, make_inputs, make_train_steps

NEVER = 2**31 - 1  # a step that no run reaches; unlike its last one the same in the programs of runs of all lengths
EVENTS = {"log": "log_every", "eval": "eval.every", "save": "checkpoint.every"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A config's parts. every: {"log", "eval", "save"} in steps, 0 for the end alone; batch sizes are global.

    sam_from: the number of steps after which the rest are `sam_steps`; without SAM the length of the run.
    pack: whether `train_steps` are packed, as `make_train_steps` takes it.
    """

    spec: DataSpec
    mesh: Mesh
    platform: Platform
    model: ResidualAttentionNetwork
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    durations: Durations
    every: dict[str, int]
    batch_size: int
    eval_batch_size: int
    steps_per_dispatch: int
    sam_rho: float
    sam_from: int
    pack: bool

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without its values."""
        sharding = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self._shapes)

    def initial_state(self) -> TrainState:
        """The state of step 0, weights drawn from the seed, whole on every device."""
        return _fill(self.model, self.optimizer, self._shapes, int(self.recipe.seed), NamedSharding(self.mesh, P()))

    @functools.cached_property
    def train_steps(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """What `make_train_steps` gives, jitted."""
        return self._make_train_steps(self.recipe, self.pack)

    @functools.cached_property
    def sam_steps(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The same with SAM, of the same arguments. Not packed: bfloat16 kernels would round SAM's small way off."""
        return self._make_train_steps(dataclasses.replace(self.recipe, sam_rho=self.sam_rho), pack=False)

    def steps_from(self, step: int) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]] | None:
        """What the steps after `step` are done by: `train_steps` or `sam_steps`, None at the end of the run."""
        if step >= self.durations.total:
            return None
        return self.train_steps if step < self.sam_from else self.sam_steps

    def _make_train_steps(self, recipe: Recipe, pack: bool) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        take = resident.train_take(recipe.augment.alternating_flip) if self.spec.resident else streaming.take
        parts = self.model, self.optimizer, recipe, self.mesh, self.platform
        return make_train_steps(*parts, take, self.steps_per_dispatch, pack=pack)

    def open_eval(self, config: ml_collections.ConfigDict) -> EvalStream:
        """The stream of config.data.eval_split for these devices, as `pipelines.open_eval` gives it."""
        return open_eval(config, self.spec, self.mesh, self.platform, batch_size=self.eval_batch_size)

    def on_every_device(self, tree: Any) -> Any:
        """A tree of arrays, whole on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def train_shapes(self) -> tuple[TrainState, Any, Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """The arguments of `train_steps` as shapes, dtypes and shardings: (state, arrays, batches, span, seed)."""
        arrays, batches = self._pipeline.train_shapes(self.spec, self.batch_size, self.steps_per_dispatch, self.mesh)
        everywhere = NamedSharding(self.mesh, P())
        span = jax.ShapeDtypeStruct((2,), np.int32, sharding=everywhere)
        seed = jax.ShapeDtypeStruct((), np.uint32, sharding=everywhere)
        return self.abstract_state(), arrays, batches, span, seed

    @functools.cache  # noqa: B019 — an experiment lives as long as its process
    def first_inputs(self, take: Take, count: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """What `make_inputs` gives for a stream's `take`, jitted."""
        return make_inputs(self.recipe, self.spec.num_classes, self.mesh, take, count)

    @functools.cache  # noqa: B019
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

    @functools.cached_property  # the net is traced once
    def _shapes(self) -> TrainState:
        ema = self.recipe.ema_decay is not None
        return state_shapes(self.model, self.optimizer, self.spec.image_shape, ema=ema)


def create_state(
    model: ResidualAttentionNetwork,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """The state of step 0 on the first device, weights drawn from the seed. image_shape, ema: as `state_shapes`."""
    shapes = state_shapes(model, optimizer, image_shape, ema=ema)
    return _fill(model, optimizer, shapes, seed, SingleDeviceSharding(jax.local_devices()[0]))


def state_shapes(
    model: ResidualAttentionNetwork,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    ema: bool,
) -> TrainState:
    """A state's shapes and dtypes. image_shape: (H, W, C); ema: with a moving average."""

    variables = variable_shapes(model, image_shape)
    return TrainState(
        step=jax.eval_shape(lambda: jnp.int32(0)),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=jax.eval_shape(optimizer.init, variables["params"]),
        ema=variables if ema else None,
    )


def _fill(
    model: ResidualAttentionNetwork,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    seed: int,
    sharding: Sharding,
) -> TrainState:
    """A state of these shapes, its weights drawn on the host, the same on every one, and put whole on every device."""

    def put(tree: Any) -> Any:  # each time into memory of its own
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i].copy()), tree)

    variables = first_variables(model, shapes.variables, seed)
    params = put(variables["params"])
    return TrainState(
        step=put(np.zeros((), np.int32)),
        params=params,
        batch_stats=put(variables["batch_stats"]),
        opt_state=jax.jit(optimizer.init, out_shardings=sharding)(params),
        ema=None if shapes.ema is None else put(variables),
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
    without_mixup = durations("augment.mixup_off_last")
    recipe = Recipe(
        seed=config.seed,
        mean=spec.mean,
        std=spec.std,
        augment=ml_collections.FrozenConfigDict(config.augment),
        mixup_until=durations.total - without_mixup if without_mixup else NEVER,
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
        sam_rho=config.sam.rho,
        sam_from=max(durations.total - durations("sam.last"), 0) if config.sam.rho else durations.total,
        pack=platform.packs and changes_value_by_value(config),
    )


def build_to_measure(config: ml_collections.ConfigDict, spec: DataSpec, mesh: Mesh) -> Experiment:
    """`build` for devices that train nothing, so that what the config says of a training batch need not fit them.

    spec: of the data that the net was trained on; config.eval may ask for another size and crop. Raises UsageError.
    """
    return build(for_measuring(config, mesh.size), for_evaluation(config, spec), mesh)


def build_model(config: ml_collections.ConfigDict, num_classes: int, platform: Platform) -> ResidualAttentionNetwork:
    """The net of config.model. Raises UsageError for options that do not go together."""
    options = {k: v for k, v in config.model.items() if k not in ("name", "dtype") and v is not None}
    try:
        return create_model(
            config.model.name,
            num_classes=num_classes,
            dtype=platform.dtype(config.model.dtype),
            axis_name="data" if config.sync_batch_norm or config.batch_norm_span else None,
            norm_span=config.batch_norm_span,
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
    share, span = size // devices // config.accumulate, config.batch_norm_span
    if span and share % span and (span % share or devices % (span // share)):
        micro = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        raise UsageError(
            f"config.batch_norm_span is {span}; it must divide the {share} images that each of the {devices} devices"
            f" has at once of a batch of {size}{micro}, or be that of a number of devices which divides {devices}"
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
    if channels not in (1, 3) and augment.trivialaugment:
        raise UsageError(f"trivialaugment is for grey and colour images; {config.data.name} has {channels} channels")
    for key in ("crop_padding", "cutout"):
        if augment[key] > min(height, width):
            raise UsageError(
                f"config.augment.{key} is {augment[key]}; the images are {height}x{width}, and it must be no larger"
            )
