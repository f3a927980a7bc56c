"""Layers by another code's names, and the residual unit, which all codes have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """An array, or a layer and the shape of its weight: their name, path in our trees (None: dead), their shape."""

    theirs: str
    path: tuple[str, ...] | None
    shape: tuple[int, ...]


class UnitNames(NamedTuple):
    """What a residual unit calls its parts, with the place of each; `spare`: it has a shortcut that it does not use."""

    norm: str
    conv: str
    shortcut: str
    spare: bool


def unit_layers(
    names: UnitNames, theirs: str, path: tuple[str, ...], inputs: int, features: int, stride: int = 1
) -> Iterator[Entry]:
    """A residual unit, whose shortcut has a convolution of use only where the shape changes."""
    narrow = features // 4
    shapes = (narrow, inputs, 1, 1), (narrow, narrow, 3, 3), (features, narrow, 1, 1)
    for i, shape in enumerate(shapes, start=1):
        yield Entry(f"{theirs}.{names.norm.format(i)}", (*path, f"norm{i}"), shape[1:2])
        yield Entry(f"{theirs}.{names.conv.format(i)}", (*path, f"conv{i}"), shape)
    live = inputs != features or stride != 1
    if live or names.spare:
        yield Entry(f"{theirs}.{names.shortcut}", (*path, "shortcut") if live else None, (features, inputs, 1, 1))
