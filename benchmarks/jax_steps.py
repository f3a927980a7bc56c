"""This project's training and inference steps, compiled and ready to be timed."""

from __future__ import annotations

import functools
import itertools
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks.timed import Net, Timed, median_seconds
from configs import default
from resattn_jax.data.resident import take
from resattn_jax.experiment import create_state
from resattn_jax.runtime import compile_timed, make_mesh, platform_of
from resattn_jax.train_step import Recipe, make_eval_step, make_train_steps


def steps_to_time(implementation: str, net: Net, batch: int, what: Sequence[str]) -> Iterator[Timed]:
    """The steps of the first device: inference, then training, as far as `what` names them."""
    steps = JaxSteps(implementation, net, batch)
    if "inference" in what:
        yield steps.inference()
    if "train" in what:
        yield steps.train()


class JaxSteps:
    """The data, the state and the recipe that both steps use. Training moves the state on."""

    def __init__(self, implementation: str, net: Net, batch: int):
        shape = (net.size, net.size, 3)
        rng = np.random.default_rng(0)
        self.implementation, self.net, self.batch = implementation, net, batch
        self.mesh = make_mesh(jax.devices()[:1])
        self.platform = platform_of(self.mesh)
        section = ml_collections.FrozenConfigDict(default.get_config().augment)  # none of them in use
        self.recipe = Recipe(seed=0, mean=np.zeros(1, np.float32), std=np.ones(1, np.float32), augment=section)
        self.optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9, nesterov=True))
        self.arrays = {
            "image": jnp.asarray(rng.integers(0, 256, (batch, *shape), np.uint8)),
            "label": jnp.asarray(rng.integers(0, net.model.num_classes, batch), jnp.int32),
        }
        self.state = create_state(net.model, self.optimizer, shape, seed=0, ema=False)
        self.peak_flops, self.peak_bytes_per_second = machine_peaks(jnp.dtype(net.model.dtype))

    def inference(self) -> Timed:
        """One evaluation step."""
        step = make_eval_step(self.net.model, self.recipe, self.mesh, self.platform, take)
        arguments = (self.arrays, jnp.arange(self.batch, dtype=jnp.int32), jnp.ones(self.batch, bool))
        compiled = compile_timed(step, self.state.variables, *arguments)

        def step_once() -> None:
            jax.block_until_ready(compiled.program(self.state.variables, *arguments))

        return self._timed("inference", step_once, 1, compiled.program, compiled.seconds)

    def train(self) -> Timed:
        """A dispatch of training steps: 1 on the CPU, 10 elsewhere."""
        count = min(self.platform.steps_per_dispatch, 10)
        steps = make_train_steps(self.net.model, self.optimizer, self.recipe, self.mesh, self.platform, take, count)
        rows = jnp.tile(jnp.arange(self.batch, dtype=jnp.int32), (count, 1))
        compiled = compile_timed(steps, self.state, self.arrays, rows, np.zeros(2, np.int32), np.uint32(0))
        dones = itertools.count(0, count)

        def dispatch() -> None:
            done = next(dones)
            span = np.array([done, done + count], np.int32)
            self.state, metrics = compiled.program(self.state, self.arrays, rows, span, np.uint32(0))
            jax.block_until_ready(metrics)

        return self._timed("train", dispatch, count, compiled.program, compiled.seconds)

    def _timed(
        self, what: str, call: Callable[[], Any], steps: int, compiled: jax.stages.Compiled, compile_seconds: float
    ) -> Timed:
        flops = self.net.flops(what, self.batch)
        further = functools.partial(self._further, compiled)
        return Timed(self.implementation, what, call, steps, self.batch, flops, compile_seconds, further)

    def _further(self, compiled: jax.stages.Compiled, steps_per_second: float) -> dict[str, Any]:
        """The figures of `Timed.further`. XLA counts the bytes of a loop's body once, which are those of a step."""
        device = jax.devices()[0]
        moved = (compiled.cost_analysis() or {}).get("bytes accessed", float("nan"))
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "peak_flops": self.peak_flops,
            "bytes_per_image": moved / self.batch,
            "bytes_per_second": moved * steps_per_second,
            "peak_bytes_per_second": self.peak_bytes_per_second,
            "memory_bytes": memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device": device.device_kind,
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
        }


def machine_peaks(dtype: jnp.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product in `dtype`, and bytes/s that a large copy reads and writes."""
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    flops = 2 * size**3 / median_seconds(lambda: jax.block_until_ready(product(matrix)), 1.0)
    array = jnp.zeros((64 if on_cpu else 512) << 20, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return flops, 2 * array.nbytes / median_seconds(lambda: jax.block_until_ready(copy(array)), 1.0)
