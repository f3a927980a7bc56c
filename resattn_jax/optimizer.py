"""Learning-rate schedules, the weight-decay mask and the optax chain."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from resattn_jax.config import Durations


def make_schedule(config: ml_collections.ConfigDict, durations: Durations) -> optax.Schedule:
    """config.schedule as a function: number of steps done -> learning rate of the next.

    After a linear warm-up from 0, "step" multiplies by `factor` at each boundary (counted from the run's start),
    "cosine" and "linear" fall to 0 at the run's end.
    """
    s = config.schedule
    warmup = durations("schedule.warmup")
    rest = max(durations.total - warmup, 1)
    if s.name == "step":
        scales: dict[int, float] = {}
        for boundary in durations("schedule.boundaries"):
            scales[boundary - warmup] = scales.get(boundary - warmup, 1.0) * s.factor
        main = optax.piecewise_constant_schedule(s.learning_rate, scales)
    elif s.name == "cosine":
        main = optax.cosine_decay_schedule(s.learning_rate, rest)
    elif s.name == "linear":
        main = optax.linear_schedule(s.learning_rate, 0.0, rest)
    else:
        main = optax.constant_schedule(s.learning_rate)
    if warmup:
        main = optax.join_schedules([optax.linear_schedule(0.0, s.learning_rate, warmup), main], [warmup])
    # A barrier: XLA for the CPU would work out the rate anew in each of the hundreds of kernels that use it.
    return lambda step: jax.lax.optimization_barrier(main(jnp.asarray(step, jnp.float32)))  # optax adds floats to it


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """config.optimizer: clip the gradients, then "sgd" or "lars".

    sgd is PyTorch's: add the weight decay to the gradient, momentum (Nesterov), learning rate. lars scales each
    kernel's step by the ratio of its norm to its gradient's (You et al., 2017, arXiv 1708.03888), for batches beyond
    8,192. Kernels, the parameters of more than one axis, have weight decay; scales and biases as decay_norms_and_biases
    says, and the scales of norms as decay_norm_scales says instead unless that is None.
    """
    o = config.optimizer
    scales = o.decay_norms_and_biases if o.decay_norm_scales is None else o.decay_norm_scales
    mask = functools.partial(_decayed, scales=scales, biases=o.decay_norms_and_biases)
    chain = [clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    if o.name == "lars":
        return optax.chain(*chain, optax.lars(
            schedule, o.weight_decay, mask, trust_ratio_mask=_kernels, momentum=o.momentum, nesterov=o.nesterov
        ))  # fmt: skip
    if o.weight_decay:
        everything = scales and o.decay_norms_and_biases
        chain.append(optax.add_decayed_weights(o.weight_decay, None if everything else mask))
    return optax.chain(*chain, optax.sgd(schedule, momentum=o.momentum or None, nesterov=o.nesterov))


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all values of a tree together, a float32 scalar for float32 arrays.

    Scales and biases are joined first: a sum is up to three kernels on the CPU, and a net has hundreds of them.
    """
    leaves = jax.tree.leaves(tree)
    vectors = [leaf for leaf in leaves if leaf.ndim == 1]
    joined = [jnp.concatenate(vectors)] if vectors else []
    return optax.tree.norm([*joined, *(leaf for leaf in leaves if leaf.ndim != 1)])


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of `most` where theirs is larger.

    What optax's does, by the norm that is also logged, so that a step computes it once. It has no state either.
    """

    def clip(gradients: Any, params: Any) -> Any:
        scale = jnp.minimum(1, most / global_norm(gradients))
        return jax.tree.map(lambda g: g * scale, gradients)

    return optax.stateless(clip)


def _decayed(params: Any, *, scales: bool, biases: bool) -> Any:
    """True for kernels, and for the scales and the biases if asked for."""

    def decayed(path: tuple[Any, ...], p: jax.Array) -> bool:
        return p.ndim > 1 or (scales if path[-1].key == "scale" else biases)

    return jax.tree_util.tree_map_with_path(decayed, params)


def changes_value_by_value(config: ml_collections.ConfigDict) -> bool:
    """Whether the optimizer gives the same numbers for arrays that are joined; lars has a norm for each of them."""
    return config.optimizer.name == "sgd"


def _kernels(params: Any) -> Any:
    """True for parameters of more than one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)
