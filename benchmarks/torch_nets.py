"""The double-skip nets in PyTorch: an independent implementation to measure against, made of pytorchcv's blocks.

pytorchcv itself has the ImageNet nets only; the 32-pixel ones are built here from the same blocks. The number of
parameters is checked, so that what is timed is the net of that name.
"""

from __future__ import annotations

import torch
from pytorchcv.models.resattnet import (
    AttBlock,
    MiddleAttBlock,
    PreActivation,
    ResAttInitBlock,
    ResBlock,
    ResBlockSequence,
)
from torch import nn

from resattn_jax.models.nets import Spec


class FlatAttention(nn.Module):
    """An attention module of depth 0, which pytorchcv lacks: its mask branch keeps the size of the map."""

    def __init__(self, features: int, spec: Spec):
        super().__init__()
        self.first = ResBlockSequence(features, features, spec.p)
        self.trunk = ResBlockSequence(features, features, spec.t)
        self.mask = nn.Sequential(ResBlockSequence(features, features, 2 * spec.r), MiddleAttBlock(features))
        self.last = ResBlock(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        trunk = self.trunk(x)
        return self.last((1 + self.mask(x)) * trunk)


def torch_net(spec: Spec, num_classes: int, parameters: int) -> nn.Module:
    """The net of `spec`: images [B, 3, H, W] -> logits [B, num_classes]. parameters: the number it must have.

    Raises ValueError for a spec that pytorchcv's blocks cannot build.
    """
    if (spec.wiring, spec.unit, spec.last) != ("double_skip", "preact", 1):
        raise ValueError(
            "pytorchcv's nets have the double-skip wiring, pre-activation units and one unit at the end, as "
            "ra56_double_skip has"
        )
    stem, features = spec.stem, spec.stem.features
    if stem.pool == 3:
        layers = [ResAttInitBlock(3, features)]
    else:
        convolution = nn.Conv2d(3, features, stem.kernel_size, stem.stride, stem.kernel_size // 2, bias=False)
        layers = [convolution, nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(stem.pool)] if stem.pool else []
    for stage in spec.stages:
        for i in range(stage.units):
            layers.append(ResBlock(features, stage.features, stage.stride if i == 0 else 1))
            features = stage.features
        for _ in range(stage.modules):
            if stage.depth:
                layers.append(AttBlock(features, features, stage.depth, [spec.p, spec.t, spec.r]))
            else:
                layers.append(FlatAttention(features, spec))
    if spec.tail:
        width, units, stride = spec.tail
        for i in range(units):
            layers.append(ResBlock(features, width, stride if i == 0 else 1))
            features = width
    layers += [PreActivation(features), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes)]
    net = nn.Sequential(*layers)
    count = sum(p.numel() for p in net.parameters())
    if count != parameters:
        raise ValueError(f"the PyTorch net has {count:,} parameters, ours {parameters:,}")
    return net


def train_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Does one step of SGD, with autocast for bfloat16, and returns the loss on the device."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    return loss
