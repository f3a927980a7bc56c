"""What is timed, and how: steps of a net, in a process of their own that takes turns with others.

Times are taken on the host, from a call to the moment its result is there.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from resattn_jax.models import create_model
from resattn_jax.models.count import count_multiply_adds, count_parameters
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.models.network import ResidualAttentionNetwork
from resattn_jax.runtime import make_mesh, platform_of

CLASSES = {32: 10}  # by the size of the images; 1000 for any other


@dataclasses.dataclass(frozen=True)
class Net:
    """A net for square images. multiply_adds: those of a forward pass over one image."""

    model: ResidualAttentionNetwork
    size: int
    parameters: int
    multiply_adds: int

    def flops(self, what: str, images: int) -> int:
        """Operations of one step: 2 for a multiply-add, three times as many for training as for inference."""
        passes = {"inference": 1, "train": 3}[what]
        return 2 * passes * self.multiply_adds * images


def load_net(name: str, size: int, dtype: str) -> Net:
    """The net of that name, and what is counted of it."""
    platform = platform_of(make_mesh(jax.devices()[:1]))
    classes = CLASSES.get(size, 1000)
    model = create_model(name, num_classes=classes, dtype=platform.dtype(dtype), **platform.layers)
    shape = (size, size, 3)
    variables = variable_shapes(model, shape)
    return Net(model, size, count_parameters(variables["params"]), count_multiply_adds(model, shape, variables))


@dataclasses.dataclass
class Timed:
    """A call that does `steps` steps, each on `images` images, and waits for their result.

    flops: of one step. further: gives more figures for a number of steps per second. seconds: of the calls so far.
    """

    implementation: str
    what: str
    call: Callable[[], Any]
    steps: int
    images: int
    flops: int
    compile_seconds: float
    further: Callable[[float], dict[str, Any]]
    seconds: list[float] = dataclasses.field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """The JSON fields of the median call."""
        steps_per_second = self.steps / statistics.median(self.seconds)
        return {
            "implementation": self.implementation,
            "what": self.what,
            "images_per_second": self.images * steps_per_second,
            "step_seconds": 1 / steps_per_second,
            "compile_seconds": self.compile_seconds,
            "flops": self.flops * steps_per_second,
            **self.further(steps_per_second),
        }


def time_calls(call: Callable[[], Any], seconds: float, at_least: int = 2) -> list[float]:
    """The seconds of each call. Calls for `seconds`, and `at_least` times, after one call that is not timed."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < at_least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def median_seconds(call: Callable[[], Any], seconds: float) -> float:
    """The seconds of the median call, out of the calls that `seconds` leave time for."""
    return statistics.median(time_calls(call, seconds, at_least=5))


def take_turns(everything: Iterable[Timed]) -> None:
    """Takes a turn for each line of standard input, which holds its seconds; prints the figures at the input's end.

    Prints "ready" when everything is compiled, and after each turn.
    """
    everything = list(everything)
    print("ready", flush=True)
    for line in sys.stdin:
        for timed in everything:
            timed.seconds += time_calls(timed.call, float(line))
        print("ready", flush=True)
    for timed in everything:
        print(json.dumps(timed.figures()), flush=True)
