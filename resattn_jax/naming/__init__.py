"""What other codes call the arrays of our nets: a table of codes, and every array of a net by a code's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from resattn_jax.naming import public, pytorchcv
from resattn_jax.naming.layers import Entry


class Names(NamedTuple):
    """The names of one code.

    nets: what it calls those of our nets that it has. stem: its first layer, head: its last. norm: the arrays of a
    normalisation, in the order scale, bias, mean, variance. pytorch: whether it is PyTorch's, where a normalisation
    counts its batches too. known_by: arrays of which a file of these names has one at least. layers: (our net, input
    channels, classes) -> its layers.
    """

    code: str
    nets: dict[str, str]
    stem: str
    head: str
    known_by: tuple[str, ...]
    norm: tuple[str, str, str, str]
    pytorch: bool
    layers: Callable[[str, int, int], Iterator[Entry]]


# Our nets of the ImageNet depths that pytorchcv and GluonCV have.
_IMAGENET = {
    "ra56_double_skip": 56,
    "ra92_double_skip": 92,
    "ra128": 128,
    "ra164": 164,
    "ra200": 200,
    "ra236": 236,
    "ra452": 452,
}
_TORCH_NORM = ("weight", "bias", "running_mean", "running_var")

# A file may have what several are known by; then it is of the last of them.
NAMES = {
    "public": Names(
        "the public PyTorch code",
        {
            "ra56_double_skip": "ResidualAttentionModel_56",
            "ra92_double_skip": "ResidualAttentionModel_92",
            "ra92_448": "ResidualAttentionModel_448input",
            "ra92_cifar_pooled": "ResidualAttentionModel_92_32input",
            "ra92_cifar": "ResidualAttentionModel_92_32input_update",
        },
        stem="conv1.0",
        head="fc",
        known_by=("conv1.0.weight", "fc.weight"),
        norm=_TORCH_NORM,
        pytorch=True,
        layers=public.public_layers,
    ),
    "pytorchcv": Names(
        "pytorchcv",
        {name: f"resattnet{depth}" for name, depth in _IMAGENET.items()},
        stem="features.init_block.conv.conv",
        head="output",
        known_by=("features.init_block.conv.conv.weight", "output.weight"),
        norm=_TORCH_NORM,
        pytorch=True,
        layers=pytorchcv.layers,
    ),
    "gluoncv": Names(
        "GluonCV",
        {name: f"residualattentionnet{depth}" for name, depth in _IMAGENET.items()}
        | {
            "ra56_cifar": "cifar_residualattentionnet56",
            "ra92_cifar": "cifar_residualattentionnet92",
        },
        stem="conv1.0",
        head="fc",
        known_by=("conv1.1.gamma", "mpool2.0.gamma"),
        norm=("gamma", "beta", "running_mean", "running_var"),
        pytorch=False,
        layers=public.gluoncv_layers,
    ),
}


def arrays_of(names: Names, name: str, channels: int, num_classes: int) -> Iterator[Entry]:
    """All arrays of a net by the names of a code, in the order of its files."""
    kinds = ("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var")
    for layer, path, shape in names.layers(name, channels, num_classes):
        if path is None:
            yield Entry(f"{layer}.weight", None, shape)
        elif len(shape) == 1:
            for suffix, (collection, kind) in zip(names.norm, kinds, strict=True):
                yield Entry(f"{layer}.{suffix}", (collection, *path, kind), shape)
            if names.pytorch:
                yield Entry(f"{layer}.num_batches_tracked", None, ())
        else:
            yield Entry(f"{layer}.weight", ("params", *path, "kernel"), shape)
            if layer == names.head:
                yield Entry(f"{layer}.bias", ("params", *path, "bias"), shape[:1])
