"""The training state, one training step, one evaluation step, and how they are spread over the devices.

Everything runs inside `jax.shard_map` over one mesh axis, "data": a device computes on its own shard of the batch with
its own batch statistics, and gradients, running statistics and metrics are averaged in one all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resattn_jax.data.augment import augment, mix, normalize, recolor
from resattn_jax.metrics import Metrics
from resattn_jax.runtime import compiler_options


@flax.struct.dataclass
class TrainState:
    """All that a step changes. step: int32 scalar, the number of steps done; ema: as `variables`, or None."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that are measured: the moving average where there is one."""
        return self.variables if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step does to a batch. mean, std: as `normalize` takes them; mixup_until: the first step without mixup.

    accumulate is the number of micro-batches that a device's batch is split into, and which must divide it.
    mirror is for evaluation: every image is also seen in the mirror.
    """

    seed: int
    mean: np.ndarray
    std: np.ndarray
    crop_padding: int
    flip: bool
    mixup_alpha: float
    mixup_until: int
    label_smoothing: float
    ema_decay: float | None
    cutmix_alpha: float = 0.0
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pca_lighting: float = 0.0
    random_erasing: float = 0.0
    cutout: int = 0
    accumulate: int = 1
    mirror: bool = False


def random_key(seed: int, name: str, step: jax.Array | int = 0) -> jax.Array:
    """Randomness is a function of (seed, name, step); there is no generator whose state could be lost."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, recipe: Recipe, image_shape: tuple[int, int, int]
) -> TrainState:
    """The state of step 0, weights drawn from the seed. image_shape: (H, W, C)."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(random_key(recipe.seed, "init"), images, train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, dict(variables)),
    )


def network_inputs(
    recipe: Recipe, step: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """What the network sees of a training batch: float32 images [B, H, W, C] and targets [B, num_classes].

    images uint8 [B, H, W, C] and labels int32 [B] are this device's shard. Runs inside shard_map.
    """
    key = random_key(recipe.seed, "augment", step)
    positions = jax.lax.axis_index("data") * len(labels) + jnp.arange(len(labels))
    images = recolor(key, positions, images, jitter=recipe.color_jitter, lighting=recipe.pca_lighting)
    images = normalize(images, recipe.mean, recipe.std)  # before the crop, whose padding is zeros
    images = augment(
        key,
        positions,
        images,
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        erasing=recipe.random_erasing,
        cutout_size=recipe.cutout,
    )
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), recipe.label_smoothing)
    key = random_key(recipe.seed, "mixup", step)
    return mix(key, images, targets, recipe.mixup_alpha, recipe.cutmix_alpha, step < recipe.mixup_until)


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of SGD on this device's shard: images uint8 [B, H, W, C], labels int32 [B]. Runs inside shard_map.

    With recipe.accumulate the net sees the shard in micro-batches, one after the other, and a micro-batch is to it what
    a device is: it has batch statistics of its own, and gradients and new running statistics are the average over all.
    The batch itself, its augmentation and its mixup pairs are the same with any number of them.
    Returns the new state, the same on all devices, and the global batch's loss (nats), top1 and gradient norm.
    """
    images, targets = network_inputs(recipe, state.step, images, labels, model.num_classes)

    def loss_fn(params, images, targets):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        top1 = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(targets, -1), dtype=jnp.float32)
        return optax.softmax_cross_entropy(logits, targets).mean(), (new["batch_stats"], top1)

    def micro_batch(sums, batch):
        (loss, (batch_stats, top1)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *batch)
        return jax.tree.map(jnp.add, sums, (grads, batch_stats)), (loss, top1)

    n = recipe.accumulate
    micro_batches = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), (images, targets))
    zeros = jax.tree.map(jnp.zeros_like, (state.params, state.batch_stats))
    if n == 1 or jax.default_backend() == "cpu":  # there the body of a loop runs on one core, that of `unroll` too
        sums, metrics = zeros, []
        for i in range(n):
            sums, new = micro_batch(sums, jax.tree.map(lambda x, i=i: x[i], micro_batches))
            metrics.append(new)
        metrics = jax.tree.map(lambda *values: jnp.stack(values), *metrics)
    else:
        sums, metrics = jax.lax.scan(micro_batch, zeros, micro_batches)
    means = jax.tree.map(lambda x: x / n, sums), jax.tree.map(jnp.mean, metrics)
    (grads, batch_stats), (loss, top1) = jax.lax.pmean(means, "data")

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        done = state.step + 1  # a young average follows closely, else it would be made of the first, random weights
        decay = jnp.minimum(recipe.ema_decay, done / (done + 9.0))
        ema = optax.incremental_update({"params": params, "batch_stats": batch_stats}, ema, 1 - decay)
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    return state, {"loss": loss, "top1": top1, "gradient_norm": optax.tree.norm(grads)}


def make_train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    mesh: Mesh,
    take: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    room: int,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles up to `room` steps into one dispatch: (state, arrays, batches, count) -> state, metrics.

    `take(arrays, batch)` gives images and labels. arrays lie whole on every device; every leaf of batches is
    [room, B, …], B sharded. Metrics are float32 [room], of which the first `count` are filled. The state is donated.
    The count is no constant of the program: a run cut at other steps executes the same code and gets the same bits.
    """
    one_step = functools.partial(train_step, model, optimizer, recipe)

    def steps(state, arrays, batches, count):
        def body(i, carry):
            state, metrics = carry
            state, new = one_step(state, *take(arrays, jax.tree.map(lambda x: x[i], batches)))
            return state, jax.tree.map(lambda buffer, value: buffer.at[i].set(value), metrics, new)

        metrics = {name: jnp.zeros(room) for name in ("loss", "top1", "gradient_norm")}
        if room == 1:  # on the CPU the body of a loop runs on one core (a step took ten times as long)
            return body(0, (state, metrics))
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    # check_vma=False: gradients stay those of the device's own shard until the pmean above averages them.
    spread = jax.shard_map(
        steps, mesh=mesh, in_specs=(P(), P(), P(None, "data"), P()), out_specs=(P(), P()), check_vma=False
    )
    return jax.jit(spread, donate_argnums=0, compiler_options=compiler_options(mesh))


def predict(model: nn.Module, recipe: Recipe, variables: Any, images: jax.Array) -> jax.Array:
    """Logits float32 [B, num_classes] of uint8 images [B, H, W, C] or of views of them, [B, views, H, W, C].

    Of several views it is the logarithm of the mean of their probabilities (Krizhevsky et al., 2012, section 4.1).
    """
    views = images if images.ndim == 5 else images[:, None]
    if recipe.mirror:
        views = jnp.concatenate([views, views[..., ::-1, :]], axis=1)
    flat = views.reshape(-1, *views.shape[2:])
    logits = model.apply(variables, normalize(flat, recipe.mean, recipe.std), train=False)
    if views.shape[1] == 1:
        return logits
    logits = jax.nn.log_softmax(logits).reshape(*views.shape[:2], -1)
    return jax.nn.logsumexp(logits, axis=1) - jnp.log(views.shape[1])


def make_eval_step(
    model: nn.Module, recipe: Recipe, mesh: Mesh, take: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
) -> Callable[..., Metrics]:
    """Compiles one evaluation step: (variables, arrays, batch [B, …], mask bool [B]) -> Metrics over all devices."""

    def step(variables, arrays, batch, mask):
        images, labels = take(arrays, batch)
        logits = predict(model, recipe, variables, images)
        return jax.lax.psum(Metrics.from_logits(logits, labels, mask), "data")

    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(), check_vma=False)
    return jax.jit(spread, compiler_options=compiler_options(mesh))
