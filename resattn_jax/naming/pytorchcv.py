"""The names of pytorchcv 0.0.74, resattnet*."""

from __future__ import annotations

from collections.abc import Iterator

from resattn_jax.models.nets import NETS, Spec, Stage
from resattn_jax.naming.layers import Entry, UnitNames, unit_layers

_UNIT = UnitNames("body.conv{}.bn", "body.conv{}.conv", "identity_conv", spare=False)


def _attention(torch: str, path: tuple[str, ...], stage: Stage, spec: Spec) -> Iterator[Entry]:
    """An attention module: an hourglass whose first skip is the trunk, and whose bottom is r units down and r up."""

    def blocks(theirs: str, ours: str, count: int, before: int = 0) -> list[tuple[str, str]]:
        return [(f"{theirs}.blocks.block{i}", f"{ours}{before + i}") for i in range(1, count + 1)]

    depth, r = stage.depth, spec.r
    units = blocks("init_blocks", "first", spec.p)
    for level in range(1, depth):
        units += blocks(f"hg.down_seq.down{level}.res_blocks", f"mask/down{level}_", r)
    units += blocks(f"hg.down_seq.down{depth}.res_blocks", "mask/bottom", r)
    for level in range(1, depth):
        units += blocks(f"hg.up_seq.up{level}.res_blocks", f"mask/up{level}_", r)
    units += blocks(f"hg.up_seq.up{depth}.res_blocks", "mask/bottom", r, before=r)
    units += blocks("hg.skip_seq.skip1", "trunk", spec.t)
    units += [(f"hg.skip_seq.skip{level + 1}.skip1", f"mask/skip{level}") for level in range(1, depth)]
    width = stage.features
    for theirs, ours in units:
        yield from unit_layers(_UNIT, f"{torch}.{theirs}", (*path, *ours.split("/")), width, width)
    for i in 1, 2:
        yield Entry(f"{torch}.middle_block.conv{i}.bn", (*path, "mask", f"norm{i}"), (width,))
        yield Entry(f"{torch}.middle_block.conv{i}.conv", (*path, "mask", f"conv{i}"), (width, width, 1, 1))
    yield from unit_layers(_UNIT, f"{torch}.final_block", (*path, "last1"), width, width)


def layers(name: str, channels: int, num_classes: int) -> Iterator[Entry]:
    """All layers of a net of pytorchcv, in the order of its state dict."""
    spec = NETS[name]
    width, kernel = spec.stem.features, spec.stem.kernel_size
    yield Entry("features.init_block.conv.conv", ("stem_conv",), (width, channels, kernel, kernel))
    yield Entry("features.init_block.conv.bn", ("stem_norm",), (width,))
    for s, stage in enumerate(spec.stages, start=1):
        torch, path = f"features.stage{s}", (f"stage{s}_unit1",)
        yield from unit_layers(_UNIT, f"{torch}.unit1", path, width, stage.features, stage.stride)
        width = stage.features
        for i in range(1, stage.modules + 1):
            yield from _attention(f"{torch}.unit{i + 1}", (f"stage{s}_attention{i}",), stage, spec)
    assert spec.tail  # each of these nets has one
    features, units, stride = spec.tail
    for i in range(1, units + 1):
        torch, path = f"features.stage{len(spec.stages) + 1}.unit{i}", (f"tail_unit{i}",)
        yield from unit_layers(_UNIT, torch, path, width, features, stride if i == 1 else 1)
        width = features
    yield Entry("features.post_activ.bn", ("head_norm",), (width,))
    yield Entry("output", ("head",), (num_classes, width))
