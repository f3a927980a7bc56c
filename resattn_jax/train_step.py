"""One training step, one evaluation step, and how they are spread over the devices.

Everything runs inside `jax.shard_map` over one mesh axis, "data": a device computes on its own shard of the batch with
its own batch statistics, and gradients, running statistics and metrics are averaged in one all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax.augment import augment, mix, normalize, recolor
from resattn_jax.metrics import Sums, sums
from resattn_jax.optimizer import global_norm
from resattn_jax.packed import PackedState
from resattn_jax.runtime import Platform, compiler_options
from resattn_jax.state import TrainState, random_key

Take = Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # (arrays, batch) -> images uint8, labels int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step does to a batch.

    seed: a number, or a uint32 scalar in a program that takes it as an argument. mean, std: as `normalize` takes them.
    augment: the section config.augment as it is. mixup_until: the first step without mixup. accumulate: the number of
    micro-batches that a device's batch is split into, and which divides it. sam_rho: how far from the weights the
    gradient is taken, 0: at them. mirror: an evaluation sees every image in the mirror too. skip_not_finite: a step
    whose loss or gradient is not finite counts as done; otherwise no step is done after it. all_reduce_dtype: what
    devices send gradients in.
    """

    seed: int | jax.Array
    mean: np.ndarray
    std: np.ndarray
    augment: ml_collections.FrozenConfigDict
    mixup_until: int = 0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    accumulate: int = 1
    sam_rho: float = 0.0
    mirror: bool = False
    skip_not_finite: bool = False
    all_reduce_dtype: str = "float32"


def network_inputs(
    recipe: Recipe, step: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """What the network sees of a training batch: float32 images [B, H, W, C] and targets [B, num_classes].

    images uint8 [B, H, W, C] and labels int32 [B] are this device's shard. Runs inside shard_map.
    """
    key = random_key(recipe.seed, "augment", step)
    positions = jax.lax.axis_index("data") * len(labels) + jnp.arange(len(labels))
    images = recolor(recipe.augment, key, positions, images)
    images = normalize(images, recipe.mean, recipe.std)  # before the crop, whose padding is zeros
    images = augment(recipe.augment, key, positions, images)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), recipe.label_smoothing)
    return mix(recipe.augment, random_key(recipe.seed, "mixup", step), images, targets, step < recipe.mixup_until)


def ascend(params: Any, gradients: Any, rho: float) -> Any:
    """The weights where SAM takes its gradient, `rho` away up the gradient (Foret et al., 2021, arXiv 2010.01412)."""
    scale = rho / (global_norm(gradients) + 1e-12)
    return jax.tree.map(lambda p, g: p + scale * g, params, gradients)


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    loops: bool,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    packed: PackedState | None = None,
    kernels: Sequence[jax.Array] = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of SGD on this device's shard: images uint8 [B, H, W, C], labels int32 [B]. Runs inside shard_map.

    With recipe.accumulate the net sees the shard in micro-batches, one after the other, and a micro-batch is to it what
    a device is: it has batch statistics of its own, and gradients and new running statistics are the average over all.
    The batch itself, its augmentation and its mixup pairs are the same with any number of them. loops: whether the
    micro-batches may be a loop, which needs less memory. packed, kernels: how a packed state lies, and its kernels.
    With recipe.sam_rho a device, or a micro-batch, goes up its own gradient, without a word to others (m-sharpness),
    and the average is of the gradients found there. Loss, top-1 and running statistics are those of the weights.
    Returns the new state, the same on all devices, its moving average the old one, and the global batch's loss (nats),
    top1 and gradient norm.
    """
    images, targets = network_inputs(recipe, state.step, images, labels, model.num_classes)
    variables = packed.variables(state, kernels) if packed else state.variables

    def loss_fn(params: Any, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        inputs = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, new = model.apply(inputs, images, train=True, mutable=["batch_stats"])
        top1 = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(targets, -1), dtype=jnp.float32)
        return optax.softmax_cross_entropy(logits, targets).mean(), (new["batch_stats"], top1)

    def micro_batch(batch: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        params = variables["params"]
        (loss, (batch_stats, top1)), grads = gradient(params, *batch)
        if recipe.sam_rho:
            grads = gradient(ascend(params, grads, recipe.sam_rho), *batch)[1]
        new = packed.pack_variables(grads, batch_stats).values() if packed else (grads, batch_stats)
        return *new, loss, top1

    gradient, n = jax.value_and_grad(loss_fn, has_aux=True), recipe.accumulate
    micro_batches = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), (images, targets))
    add = functools.partial(jax.tree.map, jnp.add)
    if n == 1 or not loops:
        parts = [micro_batch(jax.tree.map(lambda x, i=i: x[i], micro_batches)) for i in range(n)]
        sums = functools.reduce(add, parts)
    else:
        zeros = jax.tree.map(jnp.zeros_like, (state.params, state.batch_stats, np.float32(0), np.float32(0)))
        sums, _ = jax.lax.scan(lambda so_far, batch: (add(so_far, micro_batch(batch)), None), zeros, micro_batches)
    grads, *rest = sums if n == 1 else jax.tree.map(lambda x: x / n, sums)
    grads, (batch_stats, loss, top1) = mean_over_devices(grads, rest, recipe.all_reduce_dtype)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, batch_stats, opt_state, state.ema)
    return state, {"loss": loss, "top1": top1, "gradient_norm": global_norm(grads)}


def choose(
    good: jax.Array, after: TrainState, before: TrainState, ema_decay: float | None, computes_anew: bool
) -> TrainState:
    """The state after a step that is good, with a moving average that has followed it, and before one that is not.

    computes_anew: as of a `Platform`.
    """
    pick = functools.partial(jax.tree.map, functools.partial(jax.lax.select, good))
    ema = before.ema
    state = cast(TrainState, pick(*(dataclasses.replace(s, ema=None) for s in (after, before))))
    if ema is None:
        return state
    new = jax.lax.optimization_barrier(state.variables) if computes_anew else state.variables
    return dataclasses.replace(state, ema=pick(follow(ema, new, after.step, ema_decay), ema))


def follow(ema: Any, variables: Any, step: jax.Array, decay: float | None) -> Any:
    """The moving average after `step`. A young one follows closely, else it would be of the first, random weights."""
    assert decay is not None
    done = step.astype(jnp.float32)
    return optax.incremental_update(variables, ema, 1 - jnp.minimum(decay, done / (done + 9.0)))


def mean_over_devices(gradients: Any, rest: Any, dtype: str) -> tuple[Any, Any]:
    """The means of two trees over the devices, in the dtypes they have. dtype: what gradients are sent in.

    Runs inside shard_map. bfloat16 rounds each device's gradient, and their mean, by up to 2^-9 of it.
    """
    sent = jax.tree.map(lambda g: g.astype(dtype), gradients) if dtype != "float32" else gradients
    if jax.lax.axis_size("data") > 1:  # XLA for the CPU would copy everything
        sent, rest = jax.lax.pmean((sent, rest), "data")
    return jax.tree.map(lambda mean, g: mean.astype(g.dtype), sent, gradients), rest


def make_train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    mesh: Mesh,
    platform: Platform,
    take: Take,
    steps_per_dispatch: int,
    *,
    pack: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles up to `steps_per_dispatch` steps into one program: (state, arrays, batches, span, seed) -> state,
    metrics.

    `take(arrays, batch)` gives images and labels. arrays lie whole on every device; every leaf of batches is
    [steps_per_dispatch, B, …], B sharded. span is int32 [2]: the number of steps done before, and after. Metrics are
    float32 [steps_per_dispatch], of which as many as there are steps are filled. The state is donated. The span is an
    argument of the program, so that a run that is cut at other steps executes the same code and gets the same bits. So
    is the seed, uint32, which takes the place of the recipe's: runs of other seeds find the program in the cache.

    A step whose loss or gradient is not finite changes neither weights nor statistics. Unless recipe.skip_not_finite
    it does not count as done, and no step after it changes anything.
    pack: during a dispatch of many steps the arrays of the state are a few long ones (packed.py).
    """

    def steps(
        state: TrainState, arrays: Any, batches: Any, span: jax.Array, seed: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        seeded = dataclasses.replace(recipe, seed=seed)
        one_step = functools.partial(train_step, model, optimizer, seeded, platform.loops)
        packed = PackedState.of(state, model.dtype) if pack and steps_per_dispatch > 1 else None

        def body(i: Any, carry: tuple[TrainState, Any, Any]) -> tuple[TrainState, Any, Any]:
            before, kernels, metrics = carry
            after, new = one_step(before, *take(arrays, jax.tree.map(lambda x: x[i], batches)), packed, kernels)
            good = jnp.isfinite(new["loss"]) & jnp.isfinite(new["gradient_norm"]) & (before.step == span[0] + i)
            good = jax.lax.optimization_barrier(good)  # as in make_schedule
            if recipe.skip_not_finite:
                before = dataclasses.replace(before, step=after.step)
            state = choose(good, after, before, recipe.ema_decay, platform.computes_anew)
            metrics = jax.tree.map(lambda buffer, value: buffer.at[i].set(value), metrics, new)
            return state, packed.kernels(state) if packed else (), metrics

        metrics = {name: jnp.zeros(steps_per_dispatch) for name in ("loss", "top1", "gradient_norm")}
        if steps_per_dispatch == 1:
            state, _, metrics = body(0, (state, (), metrics))
            return state, metrics
        state = packed.pack(state) if packed else state
        carry = state, packed.kernels(state) if packed else (), metrics
        state, _, metrics = jax.lax.fori_loop(0, span[1] - span[0], body, carry)
        return packed.unpack(state) if packed else state, metrics

    # check_vma=False: gradients stay those of the device's own shard until the pmean above averages them.
    spread = jax.shard_map(
        steps, mesh=mesh, in_specs=(P(), P(), P(None, "data"), P(), P()), out_specs=(P(), P()), check_vma=False
    )
    return jax.jit(spread, donate_argnums=0, compiler_options=compiler_options(platform, mesh))


def make_inputs(
    recipe: Recipe, num_classes: int, mesh: Mesh, take: Take, count: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiles what the first training step shows its net: (arrays, batches, seed) -> the first `count` images of the
    batch after all augmentation, float32 [count, H, W, C], and their targets, float32 [count, num_classes], whole on
    every device. arrays, batches, seed: as `make_train_steps` takes them.
    """

    def inputs(arrays: Any, batches: Any, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        images, labels = take(arrays, jax.tree.map(lambda x: x[0], batches))
        return network_inputs(dataclasses.replace(recipe, seed=seed), jnp.int32(0), images, labels, num_classes)

    specs = (P(), P(None, "data"), P())
    spread = jax.shard_map(inputs, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)

    def first(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[:count], spread(*arguments))  # no host may have room for the whole batch

    return jax.jit(first, out_shardings=NamedSharding(mesh, P()))


def predict(model: nn.Module, recipe: Recipe, variables: Any, images: jax.Array) -> jax.Array:
    """Logits float32 [B, num_classes] of uint8 images [B, H, W, C] or of views of them, [B, views, H, W, C].

    Of several views it is the logarithm of the mean of their probabilities (Krizhevsky et al., 2012, section 4.1).
    """
    views = images if images.ndim == 5 else images[:, None]
    if recipe.mirror:
        views = jnp.concatenate([views, views[..., ::-1, :]], axis=1)
    flat = views.reshape(-1, *views.shape[2:])
    logits = cast(jax.Array, model.apply(variables, normalize(flat, recipe.mean, recipe.std), train=False))
    if views.shape[1] == 1:
        return logits
    logits = jax.nn.log_softmax(logits).reshape(*views.shape[:2], -1)
    return jax.nn.logsumexp(logits, axis=1) - jnp.log(views.shape[1])


def make_eval_step(model: nn.Module, recipe: Recipe, mesh: Mesh, platform: Platform, take: Take) -> Callable[..., Sums]:
    """Compiles one evaluation step: (variables, arrays, batch [B, …], mask bool [B]) -> sums over all devices."""

    def step(variables: Any, arrays: Any, batch: Any, mask: jax.Array) -> Sums:
        images, labels = take(arrays, batch)
        logits = predict(model, recipe, variables, images)
        return jax.lax.psum(sums(logits, labels, mask), "data")

    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(), check_vma=False)
    return jax.jit(spread, compiler_options=compiler_options(platform, mesh))
