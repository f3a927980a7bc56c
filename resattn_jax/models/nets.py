"""The named nets: what a net is, as plain data, and the table of them. Importing this imports neither JAX nor Flax."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

# Programs for one layer, which give the same numbers at different speeds; see layers.py.
Pointwise = Literal["convolution", "product"]
Pooling = Literal["window", "slices"]
Upsampling = Literal["gathers", "products"]
Sums = Literal["apart", "together"]

MOST_UNITS = 64  # of p, t, r and last


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


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def _imagenet(modules: tuple[int, int, int], **options: Any) -> Spec:
    """Paper, table 2: a 7x7/2 stem and 3x3/2 pool, three stages, three units of 2048."""
    one, two, three = modules
    return Spec(
        stem=Stem(64, 7, stride=2, pool=3),
        stages=(
            Stage(256, modules=one, depth=3, stride=1),
            Stage(512, modules=two, depth=2, stride=2),
            Stage(1024, modules=three, depth=1, stride=2),
        ),
        tail=(2048, 3, 2),
        **options,
    )


def _cifar(modules: tuple[int, int, int], stem: Stem = Stem(32, 3)) -> Spec:
    """Public PyTorch code, ResidualAttentionModel_92_32input_update: half the width, one mask level less."""
    one, two, three = modules
    return Spec(
        stem=stem,
        stages=(
            Stage(128, modules=one, depth=2, stride=1),
            Stage(256, modules=two, depth=1, stride=2),
            Stage(512, modules=three, depth=0, stride=2),
        ),
        tail=(1024, 3, 1),
        wiring="double_skip",
        init="pytorch",
    )


def _cifar_slim(modules: int, **options: Any) -> Spec:
    """The paper's CIFAR nets, whose widths it does not print: fitted to its parameter counts (section 4.1)."""
    return Spec(
        stem=Stem(16, 3),
        stages=(
            Stage(64, modules=modules, depth=3, stride=1, units=2),
            Stage(128, modules=modules, depth=2, stride=2, units=2),
            Stage(256, modules=modules, depth=1, stride=2, units=2),
        ),
        **options,
    )


_RA452 = dict(p=2, t=4, r=3)

NETS: dict[str, Spec] = {
    # The authors' Caffe nets (imagenet_model/*-deploy.prototxt), 224 px.
    "ra56": _imagenet((1, 1, 1)),
    "ra92": _imagenet((1, 2, 3)),
    "ranext56": _imagenet((1, 1, 1), unit="resnext"),
    "ranext92": _imagenet((1, 2, 3), unit="resnext"),
    # The deeper ImageNet nets of GluonCV and pytorchcv, 224 px.
    "ra128": _imagenet((2, 3, 4), wiring="double_skip"),
    "ra164": _imagenet((3, 4, 5), wiring="double_skip"),
    "ra200": _imagenet((4, 5, 6), wiring="double_skip"),
    "ra236": _imagenet((5, 6, 7), wiring="double_skip"),
    "ra452": _imagenet((5, 6, 7), wiring="double_skip", **_RA452),  # one unit, not p, after the mask product
    # The public PyTorch code: 224, 448 and 32 px.
    "ra56_double_skip": _imagenet((1, 1, 1), wiring="double_skip", init="pytorch"),
    "ra92_double_skip": _imagenet((1, 2, 3), wiring="double_skip", init="pytorch"),
    "ra92_448": Spec(
        stem=Stem(64, 7, stride=2, pool=3),
        stages=(
            Stage(128, modules=1, depth=4, stride=1),
            Stage(256, modules=1, depth=3, stride=2),
            Stage(512, modules=2, depth=2, stride=2),
            Stage(1024, modules=3, depth=1, stride=2),
        ),
        tail=(2048, 3, 2),
        wiring="double_skip",
        init="pytorch",
    ),
    "ra92_cifar": _cifar((1, 2, 3)),
    "ra92_cifar_pooled": _cifar((1, 2, 3), stem=Stem(32, 5, pool=2)),
    # The same design at other depths.
    "ra56_cifar": _cifar((1, 1, 1)),
    "ra128_cifar": _cifar((2, 3, 4)),
    "ra164_cifar": _cifar((3, 4, 5)),
    "ra236_cifar": _cifar((5, 6, 7)),
    # The paper's CIFAR nets, 32 px.
    "ra56_cifar_slim": _cifar_slim(1),
    "ra92_cifar_slim": _cifar_slim(2),
    "ra128_cifar_slim": _cifar_slim(3),
    "ra164_cifar_slim": _cifar_slim(4),
    "ra236_cifar_slim": _cifar_slim(6),
    "ra452_cifar_slim": _cifar_slim(6, **_RA452, last=2),
    # A small net of the same blocks for 8 px digits, first tries and tests.
    "ra_tiny": Spec(
        stem=Stem(32, 3),
        stages=(Stage(64, modules=1, depth=2, stride=1), Stage(128, modules=1, depth=1, stride=2)),
    ),
}

_OPTIONS = {f.name: f.type for f in dataclasses.fields(Spec) if f.name not in ("stem", "stages", "tail")}


def model_names() -> list[str]:
    """The names `create_model` knows."""
    return list(NETS)


def smallest_side(name: str, wiring: str | None = None, mask: str | None = None) -> int:
    """The height and width of the smallest images that the poolings of a net leave anything of.

    name: one of `model_names()`. wiring, mask: as options of `create_model`, or None for the net's own.
    """
    spec = NETS[name]
    double_skip, pools = (wiring or spec.wiring) == "double_skip", (mask or spec.mask) == "encoder_decoder"

    def smallest_map(side: int) -> int:
        side = -(-side // spec.stem.stride)
        if spec.stem.pool:
            side = (side + (double_skip and spec.stem.pool == 3)) // 2
        smallest = side
        for stage in spec.stages:
            side = bottom = -(-side // stage.stride)
            for _ in range(stage.depth if pools else 0):
                bottom = (bottom + double_skip) // 2  # PyTorch's padding keeps the last pixel, Caffe's does not
            smallest = min(smallest, bottom)
        return smallest

    return next(side for side in itertools.count(1) if smallest_map(side))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuses what `create_model` would refuse, without JAX.

    name: one of `model_names()`. options: {field of `Spec` that is no shape: value}.
    Raises ValueError: the name, an option or its value is not known; the message lists what is.
    """
    if name not in NETS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, NETS)}; there are {', '.join(NETS)}")
    types = typing.get_type_hints(Spec)
    for key, value in options.items():
        if key not in _OPTIONS:
            raise ValueError(f"unknown model option {key!r}{_nearest(key, _OPTIONS)}; there are {', '.join(_OPTIONS)}")
        allowed = typing.get_args(types[key])
        if allowed:
            check_choice(key, value, allowed)
        elif type(value) is not int or not 0 <= value <= MOST_UNITS:
            raise ValueError(f"{key} is {value!r}; it must be a number of units, 0 to {MOST_UNITS}")


def check_choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError when a value is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
