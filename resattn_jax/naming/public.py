"""The names of the public PyTorch code, and those of GluonCV 0.11, whose nets were made of it.

The public code is github.com/tengshaofeng/ResidualAttentionNetwork-pytorch, model/*.py. GluonCV's names are those that
`net.save_parameters` writes, of gluoncv/model_zoo/residual_attentionnet.py. There, whatever comes several times has a
number from 0 on, also where it comes once; convolutions that are not used are left out; a 1x1 convolution is the last
layer; and the CIFAR nets call the parts of a mask as the ImageNet nets do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from resattn_jax.models.nets import NETS, Spec, Stage
from resattn_jax.naming.layers import Entry, UnitNames, unit_layers


class _MaskNames(NamedTuple):
    """What the parts of a soft mask branch are called; `downs` and `ups` by level, the highest first."""

    downs: list[str]
    bottom: str
    ups: list[str]
    head: str


def _imagenet_mask(depth: int) -> _MaskNames:
    """AttentionModule_stage0 to _stage3, GluonCV's _stage1 to _stage4: one running number, down and up again."""
    depth = max(depth, 1)  # without a pooling there are a bottom and a head still
    softmax = [f"softmax{i}_blocks" for i in range(1, 2 * depth + 1)]
    return _MaskNames(softmax[: depth - 1], softmax[depth - 1], softmax[depth:-1][::-1], softmax[-1])


def _cifar_mask(depth: int) -> _MaskNames:
    """AttentionModule_stage1_cifar to _stage3_cifar."""
    downs, ups = ([f"{way}_residual_blocks{i}" for i in range(1, depth)] for way in ("down", "up"))
    return _MaskNames(downs, "middle_2r_blocks", ups, "conv1_1_blocks")


_PUBLIC_UNIT = UnitNames("bn{}", "conv{}", "conv4", spare=True)
_GLUONCV_UNIT = UnitNames("bn{}", "conv{}", "conv4", spare=False)


def _attention(
    prefix: str, path: tuple[str, ...], stage: Stage, spec: Spec, names: _MaskNames, *, gluoncv: bool
) -> Iterator[Entry]:
    """An attention module. The public code's have p, t, r = 1, 2, 1, and no number on what there is one of."""

    def many(theirs: str, ours: str, count: int) -> list[tuple[str, str]]:
        if count == 1 and not gluoncv:
            return [(theirs, f"{ours}1")]
        return [(f"{theirs}.{i}", f"{ours}{i + 1}") for i in range(count)]

    units = many("first_residual_blocks", "first", spec.p) + many("trunk_branches", "trunk", spec.t)
    for level in range(1, stage.depth):
        units += many(names.downs[level - 1], f"mask/down{level}_", spec.r)
        units.append((f"skip{level}_connection_residual_block", f"mask/skip{level}"))
    units += many(names.bottom, "mask/bottom", 2 * spec.r)
    for level in range(stage.depth - 1, 0, -1):
        units += many(names.ups[level - 1], f"mask/up{level}_", spec.r)
    unit, width = _GLUONCV_UNIT if gluoncv else _PUBLIC_UNIT, stage.features
    for theirs, ours in units:
        yield from unit_layers(unit, f"{prefix}.{theirs}", (*path, *ours.split("/")), width, width)
    for i, position in (1, 0), (2, 3):  # in a Sequential of BN, ReLU, convolution, twice
        yield Entry(f"{prefix}.{names.head}.{position}", (*path, "mask", f"norm{i}"), (width,))
        yield Entry(f"{prefix}.{names.head}.{position + 2}", (*path, "mask", f"conv{i}"), (width, width, 1, 1))
    yield from unit_layers(unit, f"{prefix}.last_blocks", (*path, "last1"), width, width)


def _layers(name: str, channels: int, num_classes: int, *, gluoncv: bool) -> Iterator[Entry]:
    """All layers of a net, in the order of its files."""
    spec, unit = NETS[name], _GLUONCV_UNIT if gluoncv else _PUBLIC_UNIT
    mask_names = _cifar_mask if "cifar" in name and not gluoncv else _imagenet_mask
    width = spec.stem.features
    yield Entry("conv1.0", ("stem_conv",), (width, channels, spec.stem.kernel_size, spec.stem.kernel_size))
    yield Entry("conv1.1", ("stem_norm",), (width,))
    for s, stage in enumerate(spec.stages, start=1):
        number = s + 3 - len(spec.stages)  # a stage before the usual three has the number 0
        path = (f"stage{s}_unit1",)
        yield from unit_layers(unit, f"residual_block{number}", path, width, stage.features, stage.stride)
        width = stage.features
        for i in range(1, stage.modules + 1):
            which = f".{i - 1}" if gluoncv else f"_{i}" if i > 1 else ""
            prefix, path = f"attention_module{number}{which}", (f"stage{s}_attention{i}",)
            yield from _attention(prefix, path, stage, spec, mask_names(stage.depth), gluoncv=gluoncv)
    assert spec.tail  # each of these nets has one
    features, units, stride = spec.tail
    for i in range(1, units + 1):
        path = (f"tail_unit{i}",)
        yield from unit_layers(unit, f"residual_block{3 + i}", path, width, features, stride if i == 1 else 1)
        width = features
    yield Entry("mpool2.0", ("head_norm",), (width,))
    yield Entry("fc", ("head",), (num_classes, width, 1, 1) if gluoncv else (num_classes, width))


public_layers = functools.partial(_layers, gluoncv=False)
gluoncv_layers = functools.partial(_layers, gluoncv=True)
