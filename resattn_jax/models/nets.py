"""The named nets: a table of specs, and `create_model`, which builds one."""

from __future__ import annotations

import dataclasses
import difflib
import typing

import jax.numpy as jnp

from resattn_jax.models.network import ResidualAttentionNetwork, Spec, Stage, Stem


def _imagenet(modules: tuple[int, int, int], **options) -> Spec:
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


def _cifar_slim(modules: int, **options) -> Spec:
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


def create_model(
    name: str,
    *,
    num_classes: int,
    dtype=jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
    **options,
) -> ResidualAttentionNetwork:
    """Builds the net called `name`.

    Args:
      name: one of `model_names()`.
      num_classes: length of the logits.
      dtype: what the net computes in; parameters, statistics and logits stay float32.
      axis_name: mesh axis over which batch statistics are synchronised inside `jax.shard_map`, or None.
      remat: compute the inside of each residual unit anew in the backward pass, for less memory. Weights and results
        stay what they are.
      **options: overrides of the fields of `Spec` that are no shapes: wiring, attention, learning, mask, init,
        p, t, r, last.

    Raises:
      ValueError: the name, an option or its value is not known; the message lists what is.
    """
    if name not in NETS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, NETS)}; there are {', '.join(NETS)}")
    types = typing.get_type_hints(Spec)
    for key, value in options.items():
        if key not in _OPTIONS:
            raise ValueError(f"unknown model option {key!r}{_nearest(key, _OPTIONS)}; there are {', '.join(_OPTIONS)}")
        allowed = typing.get_args(types[key])
        if allowed and value not in allowed:
            raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")
        if not allowed and not (isinstance(value, int) and value >= 0):
            raise ValueError(f"{key} is {value!r}; it must be a number of units, 0 or more")
    spec = dataclasses.replace(NETS[name], **options)
    return ResidualAttentionNetwork(spec, num_classes=num_classes, dtype=dtype, axis_name=axis_name, remat=remat)


def _nearest(word: str, words) -> str:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
