"""Learning-rate schedules, the weight-decay mask and the optax chain."""

from __future__ import annotations

import jax
import ml_collections
import optax

from resattn_jax.config import Durations, choose


def make_schedule(config: ml_collections.ConfigDict, durations: Durations) -> optax.Schedule:
    """config.schedule as a function: number of steps done -> learning rate of the next.

    After a linear warm-up from 0, "step" multiplies by `factor` at each boundary (counted from the run's start),
    "cosine" and "linear" fall to 0 at the run's end. Raises UsageError for an unknown name or duration.
    """
    s = config.schedule
    name = choose("schedule.name", s.name, ("step", "cosine", "linear", "constant"))
    warmup = durations("schedule.warmup")
    rest = max(durations.total - warmup, 1)
    if name == "step":
        scales = {}
        for boundary in durations("schedule.boundaries"):
            scales[boundary - warmup] = scales.get(boundary - warmup, 1.0) * s.factor
        main = optax.piecewise_constant_schedule(s.learning_rate, scales)
    elif name == "cosine":
        main = optax.cosine_decay_schedule(s.learning_rate, rest)
    elif name == "linear":
        main = optax.linear_schedule(s.learning_rate, 0.0, rest)
    else:
        main = optax.constant_schedule(s.learning_rate)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, s.learning_rate, warmup), main], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD as PyTorch has it: clip, add the weight decay to the gradient, momentum (Nesterov), learning rate.

    decay_norms_and_biases=False leaves weight decay to kernels, the parameters of more than one axis.
    """
    o = config.optimizer
    chain = []
    if o.clip_norm:
        chain.append(optax.clip_by_global_norm(o.clip_norm))
    if o.weight_decay:
        mask = None if o.decay_norms_and_biases else lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        chain.append(optax.add_decayed_weights(o.weight_decay, mask))
    chain.append(optax.sgd(schedule, momentum=o.momentum or None, nesterov=o.nesterov))
    return optax.chain(*chain)
