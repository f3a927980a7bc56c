"""The layers the network is made of: convolution, norm, pooling, bilinear upsampling, initialisers.

All arrays are [B, H, W, C]. Nothing here knows what a residual unit is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from resattn_jax.models.nets import Pointwise, Pooling, Sums, Upsampling

# He et al., "Delving Deep into Rectifiers" (ICCV 2015): normal with variance 2/fan.
# "pytorch" is what torch.nn.Conv2d and torch.nn.Linear draw: uniform in ±1/sqrt(fan_in).
SCALINGS: dict[str, tuple[float, Literal["fan_in", "fan_out"], Literal["normal", "uniform"]]] = {
    "he_fan_in": (2.0, "fan_in", "normal"),
    "he_fan_out": (2.0, "fan_out", "normal"),
    "pytorch": (1 / 3, "fan_in", "uniform"),
}
SHAPES_ALONE = "shapes_alone"  # a key of this name asks `parameter` for no values
INITIALIZERS = {name: nn.initializers.variance_scaling(*scaling) for name, scaling in SCALINGS.items()}


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in its own dtype if that is wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def parameter(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """A float32 parameter of a module: what `module.param` gives, without tracing an initializer that is not used.

    Flax does that for the shape of each parameter, which takes nearly half of the time that tracing a net takes. With
    SHAPES_ALONE among the keys nothing is drawn either: a new parameter has a shape and no value.
    Raises flax.errors.ScopeParamShapeError where the variables have it in another shape, as `module.param` does.
    """
    if not module.has_variable("params", name):
        if not module.has_rng(SHAPES_ALONE):
            return module.param(name, initializer, shape, jnp.float32)
        module.put_variable("params", name, jax.lax.empty(shape, jnp.float32))
    value: jax.Array = module.get_variable("params", name)
    if jnp.shape(value) != shape:
        raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), jnp.shape(value), shape)
    return value


class Conv(nn.Module):
    """Convolution without bias, zero padding (kernel_size - 1) / 2 on both sides, as Caffe and PyTorch pad.

    Input [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features] in `dtype`;
    the kernel [k, k, C / groups, features] is float32.
    pointwise: a 1x1 kernel without groups is applied as a convolution, or as a matrix product over [B * H * W, C],
      which is a third faster on the CPU and slower on GPUs.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    initializer: str = "he_fan_in"
    dtype: DTypeLike = jnp.float32
    pointwise: Pointwise = "convolution"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, pad = self.kernel_size, (self.kernel_size - 1) // 2
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = parameter(self, "kernel", INITIALIZERS[self.initializer], shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if k == 1 and self.groups == 1 and self.pointwise == "product":
            x = x[:, :: self.stride, :: self.stride]
            return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], self.features)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class BatchNorm(nn.Module):
    """Batch normalisation over B, H and W (Ioffe and Szegedy, 2015), with the ReLU that follows it if there is one.

    [B, H, W, C] -> the same, in x's dtype; scale, bias and statistics are float32 [C]. With train=True the batch's own
    statistics are used, those of all shards of `axis_name` if given, and running = 0.9 * running + 0.1 * batch, of the
    biased variance; make "batch_stats" mutable then.
    span: so many images have their statistics together: a part of B (ghost batch norm, Hoffer et al., 2017, arXiv
    1705.08741), of which the running statistics get the average, or B on each of several neighbours along `axis_name`.
    sums: the two sums over a batch, and the two over its gradient, as two reductions each, "apart", or "together" as
      one of complex numbers: XLA makes a reduction on a GPU in two kernels, and the second is then one for both.
    """

    train: bool
    relu: bool = False
    axis_name: str | None = None
    span: int | None = None
    sums: Sums = "apart"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = parameter(self, "scale", nn.initializers.ones, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, shape)
        if not self.train:
            return _affine_once(x, mean.value, var.value, scale, bias, self.relu).astype(x.dtype)
        groups, over = _groups(len(x), self.axis_name, self.span)
        if groups == 1:
            y, batch_mean, batch_var = _normalize_batch_once(x, scale, bias, self.relu, over, self.sums)
        else:
            normalize = jax.vmap(lambda part: _normalize_batch_once(part, scale, bias, self.relu, over, self.sums))
            parts, means, variances = normalize(x.reshape(groups, -1, *x.shape[1:]))
            y, batch_mean, batch_var = parts.reshape(x.shape), jnp.mean(means, 0), jnp.mean(variances, 0)
        mean.value, var.value = _follow_once((mean.value, var.value), (batch_mean, batch_var))
        return y


# A mesh axis, and its indices in groups whose members are averaged over, or None for all together.
Over = tuple[str, tuple[tuple[int, ...], ...] | None]


def _groups(images: int, axis_name: str | None, span: int | None) -> tuple[int, Over | None]:
    """How many groups a device's images are in for their statistics, and which devices are averaged over.

    Raises ValueError where the images or the devices cannot be divided so.
    """
    if span is None:
        return 1, (axis_name, None) if axis_name else None
    if images % span == 0:
        return images // span, None
    devices = jax.lax.axis_size(axis_name) if axis_name else 1
    together = span // images
    if span % images or devices % together:
        raise ValueError(f"statistics of {span} images: neither {images} nor {devices} devices of {images} divide so")
    if together == devices:
        return 1, (str(axis_name), None)
    return 1, (str(axis_name), tuple(tuple(range(i, i + together)) for i in range(0, devices, together)))


def _mean_over(values: Any, over: Over) -> Any:
    """The average of each value over the devices of a group."""
    return jax.lax.pmean(values, over[0], axis_index_groups=over[1])


def _follow(running: tuple[jax.Array, ...], batch: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Running statistics after a batch."""
    return tuple(0.9 * old + 0.1 * new.astype(old.dtype) for old, new in zip(running, batch, strict=True))


_follow_once = jax.jit(_follow, inline=True)  # of each shape it is traced once, and then copied


def _affine(x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool) -> jax.Array:
    """(x - mean) / std * scale + bias as one multiplication and one addition for each value, in float32 or wider."""
    x = widen(x)
    mean, var, scale, bias = (v.astype(x.dtype) for v in (mean, var, scale, bias))
    scale = scale * jax.lax.rsqrt(var + 1e-5)
    y = x * _channels(scale) + _channels(bias - mean * scale)
    return jnp.maximum(y, 0) if relu else y


_affine_once = jax.jit(_affine, static_argnums=5, inline=True)


def _channels(x: jax.Array) -> jax.Array:
    """[C] -> [1, 1, 1, C]"""
    return x[None, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalize_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool, over: Over | None, sums: Sums
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised x, and the mean and variance of the batch [C], through which no gradient flows.

    Autodiff keeps x - mean and more for the backward pass. This one keeps x, which the convolution before has written
    anyway, and computes the rest again.
    """
    wide = widen(x)
    mean, square = (total / (x.size // x.shape[-1]) for total in _both_sums(wide, wide**2, sums))
    if over:
        mean, square = _mean_over((mean, square), over)
    var = jnp.maximum(square - mean**2, 0)
    return _affine(x, mean, var, scale, bias, relu).astype(x.dtype), mean, var


def _both_sums(a: jax.Array, b: jax.Array, sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The sums of two maps [B, H, W, C] over all but the channels, [C] each."""
    axes = (0, 1, 2)
    if sums == "apart":
        return jnp.sum(a, axes), jnp.sum(b, axes)
    pairs = jnp.sum(jax.lax.complex(a, b), axes)  # a reduction of two operands would also write which of x are over 0
    return jnp.real(pairs), jnp.imag(pairs)


def _normalize_batch_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool, over: Over | None, sums: Sums
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    y, mean, var = _normalize_batch(x, scale, bias, relu, over, sums)
    return (y, mean, var), (x, mean, var, scale, bias)


def _normalize_batch_backward(
    relu: bool, over: Over | None, sums: Sums, saved: tuple[jax.Array, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, var, scale, bias = saved
    wide, gradient = widen(x), widen(gradients[0])
    if relu:
        gradient = jnp.where(_affine(x, mean, var, scale, bias, False) > 0, gradient, 0)
    inverse = jax.lax.rsqrt(var + 1e-5)
    for_bias, product = _both_sums(gradient, gradient * wide, sums)
    for_scale = (product - mean * for_bias) * inverse
    means = for_bias * (x.shape[-1] / x.size), for_scale * (x.shape[-1] / x.size)
    if over:
        means = _mean_over(means, over)
    # scale * inverse * (gradient - means[0] - (x - mean) * inverse * means[1]), a product and a sum for each value
    slope = -means[1] * inverse
    factor = scale.astype(wide.dtype) * inverse
    for_x = _channels(factor) * (gradient + wide * _channels(slope) - _channels(means[0] + mean * slope))
    return for_x.astype(x.dtype), for_scale.astype(scale.dtype), for_bias.astype(bias.dtype)


_normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)

# A net has many norms of few shapes. Under jit each of these is traced and differentiated once.
_normalize_batch_once = jax.jit(_normalize_batch, static_argnums=(3, 4, 5))


class Linear(nn.Module):
    """Fully connected layer in float32 or wider: [B, C] -> [B, features]; kernel [C, features] and bias are float32.

    The bias starts at zero, or as PyTorch's does.
    """

    features: int
    initializer: str = "he_fan_in"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = x.shape[-1] ** -0.5 if self.initializer == "pytorch" else 0.0

        def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound) if bound else jnp.zeros(shape, dtype)

        kernel = parameter(self, "kernel", INITIALIZERS[self.initializer], (x.shape[-1], self.features))
        bias = parameter(self, "bias", bias_init, (self.features,))
        x = widen(x)
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None]


def max_pool(x: jax.Array, *, window: int = 3, padding: str, pooling: Pooling = "window") -> jax.Array:
    """Max-pooling with stride 2.

    padding: "ceil" is Caffe's, no padding on the left and as much on the right as a last, partial window needs
      (on even sizes (0, 1) for a window of 3); "both" is PyTorch's padding=1, (1, 1); "valid" pads nothing.
    pooling: "window", one reduction over windows, or "slices", maxima of strided slices. The gradient of the former, a
      select-and-scatter, takes four times as long on the CPU; the latter moves more of the map to memory and back on
      TPUs, 37 % more bytes in the first stage of ra92_cifar. Of equal maxima "window" gives the gradient to the first,
      "slices" shares it.
    [B, H, W, C] -> [B, h, w, C] in x's dtype. Raises ValueError when nothing would be left of the map.
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
    program = max_pool_by_slices if pooling == "slices" else max_pool_by_window
    return program(x, window=window, pads=pads)


def max_pool_by_window(x: jax.Array, *, window: int, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """A reduction over windows of x [B, H, W, C]; pads: (before, after) of each axis, with minus infinity."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), pads)


def max_pool_by_slices(x: jax.Array, *, window: int, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """A maximum of strided slices of x [B, H, W, C], one axis after the other; pads: as above."""
    for axis in 1, 2:
        x = jnp.pad(x, [pad if a == axis else (0, 0) for a, pad in enumerate(pads)], constant_values=-jnp.inf)
        end = x.shape[axis] - window + 1  # behind the last place where a window may begin
        slices = [jax.lax.slice_in_dim(x, i, i + end, stride=2, axis=axis) for i in range(window)]
        x = functools.reduce(jnp.maximum, slices)
    return x


def _interpolation(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `out` outputs, with align_corners at i * (size - 1) / (out - 1): the input below, the one above, and
    the weight of the latter. int32, int32, float64; each [out].
    """
    position = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0.0)
    low = np.minimum(position.astype(np.int32), size - 1)
    return low, np.minimum(low + 1, size - 1), position - low


def _interpolation_matrix(size: int, out: int) -> np.ndarray:
    """[out, size] float64: row i holds the weights of output i."""
    low, high, fraction = _interpolation(size, out)
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out), low), 1 - fraction)
    np.add.at(matrix, (np.arange(out), high), fraction)
    return matrix


def upsample_bilinear(x: jax.Array, shape: tuple[int, int], *, upsampling: Upsampling = "gathers") -> jax.Array:
    """Bilinear interpolation with align_corners, as Caffe's Interp and PyTorch's UpsamplingBilinear2d.

    jax.image.resize has no align_corners.
    upsampling: "gathers", two static gathers and their weighted sum, one axis after the other, or "products", two small
      matrices.
    [B, h, w, C] -> [B, *shape, C] in x's dtype.
    """
    return upsample_by_products(x, shape) if upsampling == "products" else upsample_by_gathers(x, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def upsample_by_gathers(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Weighted sums of neighbours: [B, h, w, C] -> [B, *shape, C], in float32 or wider between.

    Its gradient is made of gathers too, where autodiff would scatter.
    """
    return _combine(x, [_interpolation_matrix(*sizes) for sizes in zip(x.shape[1:3], shape, strict=True)])


def _upsample_forward(x: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, tuple[int, ...]]:
    return upsample_by_gathers(x, shape), x.shape[1:3]


def _upsample_backward(shape: tuple[int, int], sizes: tuple[int, ...], gradient: jax.Array) -> tuple[jax.Array]:
    return (_combine(gradient, [_interpolation_matrix(*s).T for s in zip(sizes, shape, strict=True)]),)


upsample_by_gathers.defvjp(_upsample_forward, _upsample_backward)


def _combine(x: jax.Array, matrices: Sequence[np.ndarray]) -> jax.Array:
    """x times a matrix of few values a row along H, then along W, as sums of gathers."""
    wide = widen(x)
    for axis, matrix in enumerate(matrices, start=1):
        most = int((matrix != 0).sum(1).max(initial=1))
        columns = np.argsort(matrix == 0, axis=1, kind="stable")[:, :most]  # a row's values, and zeros if it has fewer
        weights = jnp.asarray(np.take_along_axis(matrix, columns, axis=1), wide.dtype)
        along = [-1 if a == axis else 1 for a in range(4)]
        parts = [_take(wide, columns[:, i], axis) * weights[:, i].reshape(along) for i in range(most)]
        wide = functools.reduce(jnp.add, parts)
    return wide.astype(x.dtype)


def _take(x: jax.Array, indices: np.ndarray, axis: int) -> jax.Array:
    """x at `indices`, within bounds, of one axis."""
    where = (slice(None),) * axis + (indices,)
    return x.at[where].get(mode="promise_in_bounds", wrap_negative_indices=False)


def upsample_by_products(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Products with the interpolation matrices, in x's dtype: [B, h, w, C] -> [B, *shape, C]."""
    rows = jnp.asarray(_interpolation_matrix(x.shape[1], shape[0]), x.dtype)
    cols = jnp.asarray(_interpolation_matrix(x.shape[2], shape[1]), x.dtype)
    return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, cols)
