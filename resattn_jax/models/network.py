"""The Residual Attention Network (Wang et al., CVPR 2017), from the residual unit up.

A net is a `Spec`: plain data, one row of the table in nets.py. The modules below read it and hold no figures of
their own. Maps are [B, H, W, C]; parameters, batch statistics and logits are float32, everything between in `dtype`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resattn_jax.models.layers import BatchNorm, Conv, Linear, max_pool, upsample_bilinear, widen
from resattn_jax.models.nets import NETS, Pointwise, Pooling, Spec, Sums, Upsampling, check_choice, check_options

Layer = Callable[..., nn.Module]
Resampling = Callable[..., jax.Array]


class PreActivationUnit(nn.Module):
    """Pre-activation bottleneck; a shortcut convolution reads the pre-activated input (He et al., 2016)."""

    features: int
    conv: Layer
    norm: Layer
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pre = self.norm(name="norm1", relu=True)(x)
        y = self.conv(self.features // 4, 1, name="conv1")(pre)
        y = self.norm(name="norm2", relu=True)(y)
        y = self.conv(self.features // 4, 3, self.stride, name="conv2")(y)
        y = self.norm(name="norm3", relu=True)(y)
        y = self.conv(self.features, 1, name="conv3")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = self.conv(self.features, 1, self.stride, name="shortcut")(pre)
        return y + x


class ResNeXtUnit(nn.Module):
    """ResNeXt bottleneck with 32 groups; ReLU follows the sum (Caffe AttentionNeXt prototxt)."""

    features: int
    conv: Layer
    norm: Layer
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(name="norm1", relu=True)(self.conv(self.features // 2, 1, name="conv1")(x))
        y = self.conv(self.features // 2, 3, self.stride, groups=32, name="conv2")(y)
        y = self.norm(name="norm2", relu=True)(y)
        y = self.norm(name="norm3")(self.conv(self.features, 1, name="conv3")(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = self.norm(name="shortcut_norm")(self.conv(self.features, 1, self.stride, name="shortcut")(x))
        return nn.relu(y + x)


UNITS: dict[str, type[nn.Module]] = {"preact": PreActivationUnit, "resnext": ResNeXtUnit}


def attention_activation(x: jax.Array, kind: str) -> jax.Array:
    """Mask logits [B, H, W, C] to the mask (paper, section 3.3, equations 4-6): mixed, channel or spatial attention."""
    if kind == "mixed":
        return nn.sigmoid(x)
    x32 = widen(x)  # sums of squares over a map do not fit bfloat16
    if kind == "channel":
        x32 = x32 * jax.lax.rsqrt(jnp.sum(x32**2, axis=-1, keepdims=True) + 1e-12)
    else:
        mean, variance = jnp.mean(x32, (1, 2), keepdims=True), jnp.var(x32, (1, 2), keepdims=True)
        x32 = nn.sigmoid((x32 - mean) * jax.lax.rsqrt(variance + 1e-5))
    return x32.astype(x.dtype)


class SoftMaskBranch(nn.Module):
    """The soft mask M of an attention module (paper, section 3.2 and figure 2): `depth` poolings down, as many up."""

    spec: Spec
    depth: int
    unit: Layer
    conv: Layer
    norm: Layer
    pool: Resampling
    upsample: Resampling

    @nn.compact
    def __call__(self, x: jax.Array, trunk: jax.Array) -> jax.Array:
        """x: the module's input after its first p units; trunk: T. Both [B, H, W, C] -> M, the same shape."""
        spec, double_skip = self.spec, self.spec.wiring == "double_skip"
        if spec.mask == "local_convolutions":
            y = self._units(x, "local", 3)
        else:
            y, downs = x, []
            for level in range(1, self.depth + 1):
                y = self.pool(y, padding="both" if double_skip else "ceil")
                if level < self.depth:
                    y = self._units(y, f"down{level}_", spec.r)
                    downs.append(y)
            y = self._units(y, "bottom", 2 * spec.r)
            for level in range(self.depth - 1, 0, -1):
                down = downs[level - 1]
                y = self.upsample(y, down.shape[1:3])
                y = y + down if double_skip else y
                y = y + self.unit(name=f"skip{level}")(down)
                y = self._units(y, f"up{level}_", spec.r)
            if self.depth:
                y = self.upsample(y, x.shape[1:3])
                y = y + trunk if double_skip else y
        if spec.unit == "preact":  # the post-activation units have normalised already
            y = self.norm(name="norm1", relu=True)(y)
        y = self.conv(x.shape[-1], 1, name="conv1")(y)
        y = self.norm(name="norm2", relu=True)(y)
        y = self.conv(x.shape[-1], 1, name="conv2")(y)
        return attention_activation(y, spec.attention)

    def _units(self, y: jax.Array, name: str, count: int) -> jax.Array:
        for i in range(1, count + 1):
            y = self.unit(name=f"{name}{i}")(y)
        return y


class AttentionModule(nn.Module):
    """p units, then trunk branch and soft mask branch side by side, their product, and the last units (figure 2)."""

    spec: Spec
    depth: int
    unit: Layer
    conv: Layer
    norm: Layer
    pool: Resampling
    upsample: Resampling

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.spec.p + 1):
            x = self.unit(name=f"first{i}")(x)
        trunk = x
        for i in range(1, self.spec.t + 1):
            trunk = self.unit(name=f"trunk{i}")(trunk)
        layers = self.unit, self.conv, self.norm, self.pool, self.upsample
        mask = SoftMaskBranch(self.spec, self.depth, *layers, name="mask")(x, trunk)
        x = (1 + mask) * trunk if self.spec.learning == "arl" else mask * trunk
        self.sow("intermediates", "trunk", trunk)  # as every sow: nothing, unless that collection is asked for
        self.sow("intermediates", "product", x)
        for i in range(1, self.spec.last + 1):
            x = self.unit(name=f"last{i}")(x)
        return x


class ResidualAttentionNetwork(nn.Module):
    """A whole net: stem, stages of residual units and attention modules, tail units, global pooling, linear head.

    dtype: what convolutions compute in. axis_name: the mesh axis over which batch statistics are synchronised inside
    `jax.shard_map`; None keeps them local to a device. norm_span: as `BatchNorm.span`. remat: the backward pass
    computes the inside of a residual unit anew from the unit's input instead of keeping it, for less memory and one
    more forward pass. pointwise, pooling, upsampling, sums: which program computes a 1x1 convolution, a max-pooling, an
    upsampling and a norm's sums; see `create_model`.
    """

    spec: Spec
    num_classes: int
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    norm_span: int | None = None
    remat: bool = False
    pointwise: Pointwise = "convolution"
    pooling: Pooling = "window"
    upsampling: Upsampling = "gathers"
    sums: Sums = "apart"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: float [B, H, W, channels], normalised -> logits float32 [B, num_classes].

        With train=True the batch's own statistics are used; pass mutable=["batch_stats"] to get the new running ones.
        Raises ValueError when the input is too small for the poolings.
        """
        spec = self.spec
        conv = functools.partial(Conv, initializer=spec.init, dtype=self.dtype, pointwise=self.pointwise)
        norm = functools.partial(BatchNorm, train=train, axis_name=self.axis_name, span=self.norm_span, sums=self.sums)
        kind = nn.remat(UNITS[spec.unit]) if self.remat else UNITS[spec.unit]
        unit: Layer = functools.partial(kind, conv=conv, norm=norm)
        pool = functools.partial(max_pool, pooling=self.pooling)
        upsample = functools.partial(upsample_bilinear, upsampling=self.upsampling)

        x = images.astype(self.dtype)
        x = conv(spec.stem.features, spec.stem.kernel_size, spec.stem.stride, name="stem_conv")(x)
        x = norm(name="stem_norm", relu=True)(x)
        if spec.stem.pool == 3:
            x = pool(x, padding="both" if spec.wiring == "double_skip" else "ceil")
        elif spec.stem.pool:
            x = pool(x, window=spec.stem.pool, padding="valid")

        for s, stage in enumerate(spec.stages, start=1):
            for i in range(1, stage.units + 1):
                stride = stage.stride if i == 1 else 1
                x = unit(stage.features, stride=stride, name=f"stage{s}_unit{i}")(x)
            for i in range(1, stage.modules + 1):
                layers = functools.partial(unit, stage.features), conv, norm, pool, upsample
                x = AttentionModule(spec, stage.depth, *layers, name=f"stage{s}_attention{i}")(x)

        if spec.tail:
            features, units, stride = spec.tail
            for i in range(1, units + 1):
                x = unit(features, stride=stride if i == 1 else 1, name=f"tail_unit{i}")(x)
        if spec.unit == "preact":
            x = norm(name="head_norm", relu=True)(x)
        self.sow("intermediates", "last_map", x)
        x = jnp.mean(widen(x), axis=(1, 2))
        self.sow("intermediates", "embedding", x)
        return Linear(self.num_classes, initializer=spec.init, name="head")(x)


def create_model(
    name: str,
    *,
    num_classes: int,
    dtype: DTypeLike = "float32",
    axis_name: str | None = None,
    norm_span: int | None = None,
    remat: bool = False,
    pointwise: Pointwise = "convolution",
    pooling: Pooling = "window",
    upsampling: Upsampling = "gathers",
    sums: Sums = "apart",
    **options: Any,
) -> ResidualAttentionNetwork:
    """The net called `name`, as a Flax module.

    Args:
      name: one of `model_names()`.
      num_classes: length of the logits.
      dtype: what the net computes in; parameters, statistics and logits stay float32.
      axis_name: mesh axis over which batch statistics are synchronised inside `jax.shard_map`, or None.
      norm_span: so many images have their statistics together, a part of a device's or those of several devices; None
        for a device's, or with axis_name for all.
      remat: compute the inside of each residual unit anew in the backward pass, for less memory. Weights and results
        stay what they are.
      pointwise: 1x1 convolutions as convolutions, or as matrix products over [B * H * W, C].
      pooling: max-pooling as a reduction over windows, or as maxima of strided slices.
      upsampling: bilinear interpolation as gathers, one axis after the other, or as two small matrices.
      sums: the two sums of a norm as two reductions, or as one.
        Of these four, the defaults are the form that other frameworks' converters take; results are equal up to
        rounding, and which is faster depends on the device.
      **options: overrides of the fields of `Spec` that are no shapes: wiring, attention, learning, mask, init,
        p, t, r, last.

    Raises:
      ValueError: the name, an option or its value is not known; the message lists what is.
      TypeError: dtype is none.
    """
    check_options(name, options)
    check_choice("pointwise", pointwise, typing.get_args(Pointwise))
    check_choice("pooling", pooling, typing.get_args(Pooling))
    check_choice("upsampling", upsampling, typing.get_args(Upsampling))
    check_choice("sums", sums, typing.get_args(Sums))

    return ResidualAttentionNetwork(
        dataclasses.replace(NETS[name], **options),
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        axis_name=axis_name,
        norm_span=norm_span,
        remat=remat,
        pointwise=pointwise,
        pooling=pooling,
        upsampling=upsampling,
        sums=sums,
    )
