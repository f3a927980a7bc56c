"""What the attention modules of a net do over a whole split: responses, masks, and what is lost without each.

Statistics are sums and counts, as metrics are, so that any split of the examples over batches and devices gives the
same values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from resattn_jax import metrics
from resattn_jax.augment import normalize
from resattn_jax.data.pipelines import EvalStream
from resattn_jax.errors import UsageError
from resattn_jax.experiment import Experiment
from resattn_jax.intermediates import attention_modules, given_mask, maps, stage_outputs
from resattn_jax.runtime import compiler_options, device_faults

NEAR = 0.1  # a value of a mask lies near 0 when it is less than this from it, and near 1 likewise

Sums = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleStatistics:
    """Of one attention module over all examples, positions and channels.

    shape: of its maps, (H, W, C). trunk, product, output: mean absolute values of T, of (1 + M) * T or M * T, and of
    what leaves the module. mask_mean, mask_std: of M. mask_std_over_examples: how much M depends on the picture, the
    root of its mean variance over the examples at a position. near_zero, near_one: shares of M with |M| < 0.1 and
    |1 - M| < 0.1. top1_mean_mask, loss_mean_mask: of the net when this module has, for every picture, the mean of its
    masks, [H, W, C]: what is lost when it no longer looks at the picture.
    """

    shape: tuple[int, int, int]
    trunk: float
    product: float
    output: float
    mask_mean: float
    mask_std: float
    mask_std_over_examples: float
    near_zero: float
    near_one: float
    top1_mean_mask: float
    loss_mean_mask: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """responses: {"stage1": mean absolute value of what leaves the stage} (paper, figure 4). top1, loss: of the net."""

    examples: int
    top1: float
    loss: float
    responses: dict[str, float]
    modules: dict[str, ModuleStatistics]


def summarise(
    experiment: Experiment, variables: Any, stream: EvalStream, say: Callable[[str], None] = lambda _: None
) -> Summary:
    """Measures a net over a stream of single views: one pass for the statistics, one for each module's mean mask.

    All passes of the second kind are one compiled program. say: told what is done next. Raises UsageError when no
    example can be read, and RunError when a device is out of memory.
    """
    names = attention_modules(experiment.model.spec)
    advice = f"looking into the net, {experiment.eval_batch_size} images at a time; lower config.eval.batch_size"
    with device_faults(advice):
        say("statistics of the masks")
        total = _total(experiment, _statistics_step(experiment, stream), variables, stream)
        count = total["metrics"]["Accuracy"]["examples"]
        if not count:
            raise UsageError("not one example of the evaluation split could be read")
        measured = metrics.compute([total["metrics"]])
        masks = {name: np.asarray(total["modules"][name]["mask_sum"] / count, np.float32) for name in names}
        step = _mean_mask_step(experiment, stream)
        without = {}
        for place, name in enumerate(names):
            say(f"top-1 with the mean mask of {name} ({place + 1} of {len(names)})")
            sums = _total(experiment, step, variables, stream, masks, np.int32(place))
            without[name] = metrics.compute([sums["metrics"]])
    return Summary(
        examples=measured["examples"],
        top1=measured["top1"],
        loss=measured["loss"],
        responses={stage: float(value / count) for stage, value in total["responses"].items()},
        modules={name: _module(total["modules"][name], masks[name], count, without[name]) for name in names},
    )


def _module(
    sums: Mapping[str, Any], mean_mask: np.ndarray, count: float, without: Mapping[str, Any]
) -> ModuleStatistics:
    of = {name: float(value / count) for name, value in sums.items() if name != "mask_sum"}
    square_of_means = float(np.mean(np.square(mean_mask, dtype=np.float64)))
    height, width, channels = mean_mask.shape
    return ModuleStatistics(
        shape=(height, width, channels),
        **{name: of[name] for name in ("trunk", "product", "output", "mask_mean", "near_zero", "near_one")},
        mask_std=max(of["mask_square"] - of["mask_mean"] ** 2, 0.0) ** 0.5,
        mask_std_over_examples=max(of["mask_square"] - square_of_means, 0.0) ** 0.5,
        top1_mean_mask=without["top1"],
        loss_mean_mask=without["loss"],
    )


def _statistics_step(experiment: Experiment, stream: EvalStream) -> Callable[..., Sums]:
    """(variables, arrays, batch, mask bool [B]) -> sums over the examples of all devices."""
    model, recipe = experiment.model, experiment.recipe
    names, stages = attention_modules(model.spec), stage_outputs(model.spec)

    def step(variables: Any, arrays: Any, batch: Any, counts: jax.Array) -> Sums:
        images, labels = stream.take(arrays, batch)
        found = maps(model, recipe, variables, images)

        def total(values: jax.Array) -> jax.Array:
            """The sum over the examples of their means."""
            return jnp.sum(jnp.where(counts, jnp.mean(values, axis=(1, 2, 3)), 0.0))

        def of_module(name: str) -> dict[str, jax.Array]:
            trunk, mask, product = (found[f"{name}/{part}"] for part in ("trunk", "mask", "product"))
            return {
                "trunk": total(jnp.abs(trunk)),
                "product": total(jnp.abs(product)),
                "output": total(jnp.abs(found[name])),
                "mask_mean": total(mask),
                "mask_square": total(mask**2),
                "near_zero": total(jnp.float32(jnp.abs(mask) < NEAR)),
                "near_one": total(jnp.float32(jnp.abs(1 - mask) < NEAR)),
                "mask_sum": jnp.sum(jnp.where(counts[:, None, None, None], mask, 0.0), axis=0),
            }

        sums = {
            "metrics": metrics.sums(found["head"], labels, counts),
            "responses": {stage: total(jnp.abs(found[name])) for stage, name in stages.items()},
            "modules": {name: of_module(name) for name in names},
        }
        return jax.lax.psum(sums, "data")

    return _spread(experiment, step, arguments=0)


def _mean_mask_step(experiment: Experiment, stream: EvalStream) -> Callable[..., Sums]:
    """(variables, arrays, batch, mask bool [B], {module: mask [H, W, C]}, which of them is used) -> sums."""
    model, recipe = experiment.model, experiment.recipe

    def step(variables: Any, arrays: Any, batch: Any, counts: jax.Array, masks: Any, which: jax.Array) -> Sums:
        images, labels = stream.take(arrays, batch)
        with given_mask(masks, which):
            logits = cast(jax.Array, model.apply(variables, normalize(images, recipe.mean, recipe.std), train=False))
        return jax.lax.psum({"metrics": metrics.sums(logits, labels, counts)}, "data")

    return _spread(experiment, step, arguments=2)


def _spread(experiment: Experiment, step: Callable[..., Sums], arguments: int) -> Callable[..., Sums]:
    """The step compiled for the mesh; it has so many arguments more, the same on every device."""
    specs = (P(), P(), P("data"), P("data"), *[P()] * arguments)
    spread = jax.shard_map(step, mesh=experiment.mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(spread, compiler_options=compiler_options(experiment.platform, experiment.mesh))


def _total(
    experiment: Experiment, step: Callable[..., Sums], variables: Any, stream: EvalStream, *arguments: Any
) -> Sums:
    """The sums over all batches, added up in float64 on the host."""
    total: Any = None
    for batch, counts in stream:
        part = jax.tree.map(np.float64, jax.device_get(step(variables, stream.arrays, batch, counts, *arguments)))
        total = part if total is None else jax.tree.map(np.add, total, part)
    if total is None:
        raise UsageError("the evaluation split has no example")
    return total
