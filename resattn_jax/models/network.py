"""The Residual Attention Network (Wang et al., CVPR 2017), from the residual unit up.

A net is a `Spec`: plain data, one row of the table in nets.py. The modules below read it and hold no figures of
their own. Maps are [B, H, W, C]; parameters, batch statistics and logits are float32, everything between in `dtype`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from resattn_jax.models.layers import BatchNorm, Conv, Linear, max_pool, upsample_bilinear


@dataclasses.dataclass(frozen=True)
class Stem:
    """Convolution -> BN -> ReLU -> max-pool: `pool` is the window of the stride-2 pool, 0 for none."""

    features: int
    kernel_size: int
    stride: int = 1
    pool: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """`units` residual units, the first with the stride, then `modules` attention modules of mask depth `depth`."""

    features: int
    modules: int
    depth: int
    stride: int
    units: int = 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a Residual Attention Network is. The letters p, t, r are the paper's (section 3, figure 2).

    p: units before the trunk splits off; last: units after the mask product (the paper's p again);
    t: units of the trunk branch; r: units between two poolings of the soft mask branch.
    tail: (features, units, stride) of the units after the last stage, or None.
    unit: "preact" (pre-activation bottleneck) or "resnext" (post-activation, 32 groups).
    wiring: "paper" (and the authors' Caffe nets) or "double_skip" (public PyTorch code, GluonCV, pytorchcv):
      the latter adds, beside the skip unit's output, its input, and the trunk to the last upsampling.
    attention: "mixed", "channel" or "spatial" (paper, equations 4-6).
    learning: "arl", (1 + M) * T (equation 3), or "nal", M * T (equation 1).
    mask: "encoder_decoder" or "local_convolutions", the ablation without resampling (paper, table 4).
    init: a key of layers.INITIALIZERS.
    """

    stem: Stem
    stages: tuple[Stage, ...]
    tail: tuple[int, int, int] | None = None
    p: int = 1
    t: int = 2
    r: int = 1
    last: int = 1
    unit: Literal["preact", "resnext"] = "preact"
    wiring: Literal["paper", "double_skip"] = "paper"
    attention: Literal["mixed", "channel", "spatial"] = "mixed"
    learning: Literal["arl", "nal"] = "arl"
    mask: Literal["encoder_decoder", "local_convolutions"] = "encoder_decoder"
    init: Literal["he_fan_in", "he_fan_out", "pytorch"] = "he_fan_in"


class PreActivationUnit(nn.Module):
    """Pre-activation bottleneck; a shortcut convolution reads the pre-activated input (He et al., 2016)."""

    features: int
    conv: Any
    norm: Any
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
    conv: Any
    norm: Any
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


UNITS = {"preact": PreActivationUnit, "resnext": ResNeXtUnit}


def attention_activation(x: jax.Array, kind: str) -> jax.Array:
    """Mask logits [B, H, W, C] to the mask (paper, section 3.3, equations 4-6): mixed, channel or spatial attention."""
    if kind == "mixed":
        return nn.sigmoid(x)
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # sums of squares over a map do not fit bfloat16
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
    unit: Any
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, trunk: jax.Array) -> jax.Array:
        """x: the module's input after its first p units; trunk: T. Both [B, H, W, C] -> M, the same shape."""
        spec, double_skip = self.spec, self.spec.wiring == "double_skip"
        if spec.mask == "local_convolutions":
            y = self._units(x, "local", 3)
        else:
            y, downs = x, []
            for level in range(1, self.depth + 1):
                y = max_pool(y, padding="both" if double_skip else "ceil")
                if level < self.depth:
                    y = self._units(y, f"down{level}_", spec.r)
                    downs.append(y)
            y = self._units(y, "bottom", 2 * spec.r)
            for level in range(self.depth - 1, 0, -1):
                down = downs[level - 1]
                y = upsample_bilinear(y, down.shape[1:3])
                y = y + down if double_skip else y
                y = y + self.unit(name=f"skip{level}")(down)
                y = self._units(y, f"up{level}_", spec.r)
            if self.depth:
                y = upsample_bilinear(y, x.shape[1:3])
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
    unit: Any
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.spec.p + 1):
            x = self.unit(name=f"first{i}")(x)
        trunk = x
        for i in range(1, self.spec.t + 1):
            trunk = self.unit(name=f"trunk{i}")(trunk)
        mask = SoftMaskBranch(self.spec, self.depth, self.unit, self.conv, self.norm, name="mask")(x, trunk)
        x = (1 + mask) * trunk if self.spec.learning == "arl" else mask * trunk
        for i in range(1, self.spec.last + 1):
            x = self.unit(name=f"last{i}")(x)
        return x


class ResidualAttentionNetwork(nn.Module):
    """A whole net: stem, stages of residual units and attention modules, tail units, global pooling, linear head.

    dtype: what convolutions compute in. axis_name: the mesh axis over which batch statistics are synchronised inside
    `jax.shard_map`; None keeps them local to a device. remat: the backward pass computes the inside of a residual unit
    anew from the unit's input instead of keeping it, for less memory and one more forward pass.
    """

    spec: Spec
    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """images: float [B, H, W, channels], normalised -> logits float32 [B, num_classes].

        With train=True the batch's own statistics are used; pass mutable=["batch_stats"] to get the new running ones.
        Raises ValueError when the input is too small for the poolings.
        """
        spec = self.spec
        conv = functools.partial(Conv, initializer=spec.init, dtype=self.dtype)
        norm = functools.partial(BatchNorm, train=train, axis_name=self.axis_name)
        unit = nn.remat(UNITS[spec.unit]) if self.remat else UNITS[spec.unit]
        unit = functools.partial(unit, conv=conv, norm=norm)

        x = images.astype(self.dtype)
        x = conv(spec.stem.features, spec.stem.kernel_size, spec.stem.stride, name="stem_conv")(x)
        x = norm(name="stem_norm", relu=True)(x)
        if spec.stem.pool == 3:
            x = max_pool(x, padding="both" if spec.wiring == "double_skip" else "ceil")
        elif spec.stem.pool:
            x = max_pool(x, window=spec.stem.pool, padding="valid")

        for s, stage in enumerate(spec.stages, start=1):
            for i in range(1, stage.units + 1):
                stride = stage.stride if i == 1 else 1
                x = unit(stage.features, stride=stride, name=f"stage{s}_unit{i}")(x)
            for i in range(1, stage.modules + 1):
                same = functools.partial(unit, stage.features)
                x = AttentionModule(spec, stage.depth, same, conv, norm, name=f"stage{s}_attention{i}")(x)

        if spec.tail:
            features, units, stride = spec.tail
            for i in range(1, units + 1):
                x = unit(features, stride=stride if i == 1 else 1, name=f"tail_unit{i}")(x)
        if spec.unit == "preact":
            x = norm(name="head_norm", relu=True)(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return Linear(self.num_classes, initializer=spec.init, name="head")(x)
