"""A net's variables before it is trained: their shapes, and first weights drawn on the host.

What `model.init` gives, without tracing or compiling a program of all draws.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from resattn_jax.models.layers import SCALINGS, SHAPES_ALONE
from resattn_jax.models.network import ResidualAttentionNetwork


def variable_shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """{"params": …, "batch_stats": …} as shapes and dtypes: what `jax.eval_shape` gives of `model.init`, in half the
    time. image_shape: (H, W, C).
    """

    def init(images: jax.Array) -> Any:
        return model.init({name: jax.random.key(0) for name in ("params", SHAPES_ALONE)}, images, train=False)

    shapes: dict[str, Any] = jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return shapes


def first_variables(model: ResidualAttentionNetwork, shapes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Values for `shapes`, as `variable_shapes` gives them: float32 numpy arrays.

    They have the distributions of `model.init` and other bits. Each array is a function of the seed and of its name, so
    that it is the same on any number of devices and in every net that has such a layer.
    """
    leaves = flax.traverse_util.flatten_dict(dict(shapes), sep="/")
    scaling = SCALINGS[model.spec.init]
    values = {}
    for name, leaf in leaves.items():
        kind = name.rpartition("/")[2]
        if kind == "kernel":
            values[name] = _draw(_generator(seed, name), leaf.shape, _variance(leaf.shape, *scaling[:2]), scaling[2])
        elif kind in ("scale", "var"):
            values[name] = np.ones(leaf.shape, np.float32)
        else:
            values[name] = np.zeros(leaf.shape, np.float32)
    if model.spec.init == "pytorch":  # the bias too, as torch.nn.Linear's
        name, fan_in = "params/head/bias", leaves["params/head/kernel"].shape[0]
        values[name] = _draw(_generator(seed, name), leaves[name].shape, 1 / (3 * fan_in), "uniform")
    tree: dict[str, Any] = flax.traverse_util.unflatten_dict(values, sep="/")
    return tree


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox([seed, zlib.crc32(name.encode())]))


def _variance(shape: tuple[int, ...], scale: float, fan: str) -> float:
    """scale / fan, for a kernel [..., in, out]."""
    return scale / (math.prod(shape[:-1]) if fan == "fan_in" else math.prod(shape) / shape[-2])


def _draw(rng: np.random.Generator, shape: tuple[int, ...], variance: float, distribution: str) -> np.ndarray:
    if distribution == "normal":
        return rng.standard_normal(shape, np.float32) * np.float32(variance**0.5)
    bound = np.float32((3 * variance) ** 0.5)
    return (rng.random(shape, np.float32) * 2 - 1) * bound
