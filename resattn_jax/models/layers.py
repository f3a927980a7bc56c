"""The layers the network is made of: convolution, pooling, bilinear upsampling, initialisers.

All arrays are [B, H, W, C]. Nothing here knows what a residual unit is.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# He et al., "Delving Deep into Rectifiers" (ICCV 2015): normal with variance 2/fan.
# "pytorch" is what torch.nn.Conv2d and torch.nn.Linear draw: uniform in ±1/sqrt(fan_in).
INITIALIZERS = {
    "he_fan_in": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    "he_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "pytorch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


class Conv(nn.Module):
    """Convolution without bias, zero padding (kernel_size - 1) / 2 on both sides, as Caffe and PyTorch pad.

    Input [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features] in `dtype`;
    the kernel [k, k, C / groups, features] is float32.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    initializer: str = "he_fan_in"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, pad = self.kernel_size, (self.kernel_size - 1) // 2
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", INITIALIZERS[self.initializer], shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if k == 1 and self.groups == 1:  # a matrix product: on the CPU faster than a convolution, elsewhere equal
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class Linear(nn.Module):
    """Fully connected layer in float32: [B, C] -> [B, features]. The bias starts at zero, or as PyTorch's does."""

    features: int
    initializer: str = "he_fan_in"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = x.shape[-1] ** -0.5 if self.initializer == "pytorch" else 0.0

        def bias_init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound) if bound else jnp.zeros(shape, dtype)

        kernel = self.param("kernel", INITIALIZERS[self.initializer], (x.shape[-1], self.features), jnp.float32)
        return x @ kernel + self.param("bias", bias_init, (self.features,), jnp.float32)[None]


def max_pool(x: jax.Array, *, window: int = 3, padding: str) -> jax.Array:
    """Max-pooling with stride 2.

    padding: "ceil" is Caffe's, no padding on the left and as much on the right as a last, partial window needs
      (on even sizes (0, 1) for a window of 3); "both" is PyTorch's padding=1, (1, 1); "valid" pads nothing.
    [B, H, W, C] -> [B, h, w, C]. Raises ValueError when nothing would be left of the map.
    """
    height, width = x.shape[1:3]
    pads = [(0, 0)] * 4
    for axis, size in (1, height), (2, width):
        if padding == "ceil":
            out = -(-(size - window) // 2) + 1
            pads[axis] = (0, max((out - 1) * 2 + window - size, 0))
        else:
            pads[axis] = (1, 1) if padding == "both" else (0, 0)
            out = (size + 2 * pads[axis][0] - window) // 2 + 1
        if out < 1:
            raise ValueError(f"the input is too small for this net: a {height}x{width} map cannot be pooled")
    # On TPUs slices move more of the map to memory and back: 37 % more bytes in the first stage of ra92_cifar.
    return jax.lax.platform_dependent(
        x,
        tpu=functools.partial(max_pool_by_window, window=window, pads=pads),
        default=functools.partial(max_pool_by_slices, window=window, pads=pads),
    )


def max_pool_by_window(x: jax.Array, *, window: int, pads: list[tuple[int, int]]) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), pads)


def max_pool_by_slices(x: jax.Array, *, window: int, pads: list[tuple[int, int]]) -> jax.Array:
    """A maximum of strided slices, one axis after the other.

    The gradient of reduce_window, a select-and-scatter, takes four times as long on the CPU.
    """
    for axis in 1, 2:
        x = jnp.pad(x, [pad if a == axis else (0, 0) for a, pad in enumerate(pads)], constant_values=-jnp.inf)
        end = x.shape[axis] - window + 1  # behind the last place where a window may begin
        slices = [jax.lax.slice_in_dim(x, i, i + end, stride=2, axis=axis) for i in range(window)]
        x = functools.reduce(jnp.maximum, slices)
    return x


def _interpolation_matrix(size: int, out: int) -> np.ndarray:
    """[out, size] float64: row i holds the weights of output i with align_corners, i * (size - 1) / (out - 1)."""
    position = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0.0)
    low = np.minimum(position.astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = position - low
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out), low), 1 - fraction)
    np.add.at(matrix, (np.arange(out), high), fraction)
    return matrix


def upsample_bilinear(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Bilinear interpolation with align_corners, as Caffe's Interp and PyTorch's UpsamplingBilinear2d.

    [B, h, w, C] -> [B, *shape, C] in x's dtype. jax.image.resize has no align_corners, so this is two small matrices.
    """
    rows = jnp.asarray(_interpolation_matrix(x.shape[1], shape[0]), x.dtype)
    cols = jnp.asarray(_interpolation_matrix(x.shape[2], shape[1]), x.dtype)
    return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, cols)
