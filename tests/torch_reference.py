"""A Residual Attention Network in plain torch.nn.functional calls, for tests alone.

Written from the paper and the published definitions, not from the Flax modules: of the project it uses only `Spec`,
the figures of a net. Weights are one flat dictionary {path: tensor}, our parameters and batch statistics in PyTorch's
layout; maps are [B, C, H, W].
"""

from __future__ import annotations

import jax
import numpy as np
import torch
import torch.nn.functional as F

from resattn_jax.models.first_weights import variable_shapes

torch.set_num_threads(1)  # the maps are small: more threads wait for each other, and for those of JAX


def random_variables(model, image_shape, seed=0):
    """Variables of the net, float32 numpy, with statistics, scales and biases that are not their initial values.

    Kernels have the variance 1/fan_in, so that logits stay of the order of one and no sigmoid saturates.
    """
    rng = np.random.default_rng(seed)
    shapes = variable_shapes(model, image_shape)

    def draw(path, leaf):
        normal = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return normal / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        if kind == "var":
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        return 0.2 * normal + (kind == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(shape, seed=0):
    """Random images [B, H, W, C], float32 numpy."""
    return np.random.default_rng(seed + 100).standard_normal(shape).astype(np.float32)


def to_tensors(tree, dtype=torch.float64):
    """{"a/b/kernel": tensor} of one of our trees, kernels as PyTorch has them: [out, in, k, k] and [out, in]."""
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    return {
        "/".join(key.key for key in path): torch.from_numpy(np.array(leaf).transpose(axes[np.ndim(leaf)])).to(dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def to_nchw(x, dtype=torch.float64):
    """Our images [B, H, W, C] as PyTorch's [B, C, H, W]."""
    return torch.from_numpy(x.transpose(0, 3, 1, 2)).to(dtype)


def logits(spec, weights, x, *, train=False):
    """The logits of a whole net, [B, num_classes], from x [B, C, H, W].

    With train=True the batch's statistics are used and the running ones in `weights` are replaced by
    0.9 * running + 0.1 * batch. Their variance is the biased one, Flax's rule; PyTorch's would be n / (n - 1) of it.
    """
    stem = spec.stem
    x = _conv(weights, "stem_conv", x, stride=stem.stride)
    x = F.relu(_norm(weights, "stem_norm", x, train))
    if stem.pool == 3:
        x = _pool(spec, x)
    if stem.pool == 2:
        x = F.max_pool2d(x, 2)
    for s, stage in enumerate(spec.stages, 1):
        for i in range(1, stage.units + 1):
            x = _unit(spec, weights, f"stage{s}_unit{i}", x, train, stage.stride if i == 1 else 1)
        for i in range(1, stage.modules + 1):
            x = _attention(spec, weights, f"stage{s}_attention{i}", x, train, stage.depth)
    if spec.tail:
        _, units, stride = spec.tail
        for i in range(1, units + 1):
            x = _unit(spec, weights, f"tail_unit{i}", x, train, stride if i == 1 else 1)
    if spec.unit == "preact":
        x = F.relu(_norm(weights, "head_norm", x, train))
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return F.linear(x, weights["head/kernel"], weights["head/bias"])


def _conv(weights, at, x, stride=1):
    kernel = weights[f"{at}/kernel"]
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=x.shape[1] // kernel.shape[1])


def _norm(weights, at, x, train):
    mean, var = weights[f"{at}/mean"], weights[f"{at}/var"]
    if train:
        batch = x.detach()
        weights[f"{at}/mean"] = 0.9 * mean + 0.1 * batch.mean((0, 2, 3))
        weights[f"{at}/var"] = 0.9 * var + 0.1 * batch.var((0, 2, 3), unbiased=False)
    return F.batch_norm(x, mean, var, weights[f"{at}/scale"], weights[f"{at}/bias"], training=train, momentum=0.0)


def _pool(spec, x):
    if spec.wiring == "double_skip":
        return F.max_pool2d(x, 3, 2, padding=1)
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


def _upsample(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


def _unit(spec, weights, at, x, train, stride=1):
    def conv(name, y, stride=1):
        return _conv(weights, f"{at}/{name}", y, stride)

    def norm(name, y):
        return _norm(weights, f"{at}/{name}", y, train)

    reshapes = f"{at}/shortcut/kernel" in weights
    if spec.unit == "resnext":
        y = F.relu(norm("norm1", conv("conv1", x)))
        y = F.relu(norm("norm2", conv("conv2", y, stride)))
        y = norm("norm3", conv("conv3", y))
        return F.relu(y + (norm("shortcut_norm", conv("shortcut", x, stride)) if reshapes else x))
    pre = F.relu(norm("norm1", x))
    y = F.relu(norm("norm2", conv("conv1", pre)))
    y = F.relu(norm("norm3", conv("conv2", y, stride)))
    return conv("conv3", y) + (conv("shortcut", pre, stride) if reshapes else x)


def _units(spec, weights, at, x, train, count):
    for i in range(1, count + 1):
        x = _unit(spec, weights, f"{at}{i}", x, train)
    return x


def _attention(spec, weights, at, x, train, depth):
    x = _units(spec, weights, f"{at}/first", x, train, spec.p)
    trunk = _units(spec, weights, f"{at}/trunk", x, train, spec.t)
    mask = _mask(spec, weights, f"{at}/mask", x, trunk, train, depth)
    x = mask * trunk
    if spec.learning == "arl":
        x = trunk + x
    return _units(spec, weights, f"{at}/last", x, train, spec.last)


def _mask(spec, weights, at, x, trunk, train, depth):
    if spec.mask == "local_convolutions":
        y = _units(spec, weights, f"{at}/local", x, train, 3)
    else:
        y = _hourglass(spec, weights, at, x, trunk, train, 1, depth)
    if spec.unit == "preact":
        y = F.relu(_norm(weights, f"{at}/norm1", y, train))
    y = F.relu(_norm(weights, f"{at}/norm2", _conv(weights, f"{at}/conv1", y), train))
    y = _conv(weights, f"{at}/conv2", y)
    if spec.attention == "channel":
        return F.normalize(y, dim=1)
    return torch.sigmoid(F.instance_norm(y) if spec.attention == "spatial" else y)


def _hourglass(spec, weights, at, x, trunk, train, level, depth):
    """From the map x of the level above back to its size: one level, within which lie the deeper ones."""
    if depth == 0:
        return _units(spec, weights, f"{at}/bottom", x, train, 2 * spec.r)
    y = _pool(spec, x)
    if level == depth:
        y = _units(spec, weights, f"{at}/bottom", y, train, 2 * spec.r)
    else:
        down = _units(spec, weights, f"{at}/down{level}_", y, train, spec.r)
        y = _hourglass(spec, weights, at, down, trunk, train, level + 1, depth)
        y = y + _unit(spec, weights, f"{at}/skip{level}", down, train)
        y = _units(spec, weights, f"{at}/up{level}_", y, train, spec.r)
    y = _upsample(y, x)
    if spec.wiring == "double_skip":
        y = y + (trunk if level == 1 else x)
    return y
