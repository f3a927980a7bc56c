"""Maps as pictures: numbers through a colour scale, a position as a square."""

from __future__ import annotations

import dataclasses

import matplotlib
import numpy as np
import PIL.Image

# What is drawn and the scale of it. Evidence for and against a class has its zero in the middle.
SIGNAL, MASK, SPREAD, EVIDENCE = "viridis", "magma", "cividis", "RdBu_r"
SCALES = (SIGNAL, MASK, SPREAD, EVIDENCE)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A map [H, W] as an image, and its colour scale from `low` to `high`, as they are printed."""

    image: PIL.Image.Image
    colours: str
    low: str
    high: str


def limits(*maps: np.ndarray) -> tuple[float, float]:
    """The least and the largest value of maps that share a scale."""
    return float(min(map(np.min, maps))), float(max(map(np.max, maps)))


def symmetric(values: np.ndarray) -> tuple[float, float]:
    """Limits with zero in the middle."""
    most = float(np.abs(values).max())
    return -most, most


def draw(values: np.ndarray, colours: str, between: tuple[float, float] | None = None) -> Shown:
    """A map [H, W] through a scale, one pixel a position. between: the limits; None for the map's own."""
    low, high = between or limits(values)
    share = (values.astype(np.float64) - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    image = PIL.Image.fromarray(np.round(share * 255).clip(0, 255).astype(np.uint8)).convert("P")
    image.putpalette(palette(colours).tobytes())
    return Shown(image, colours, number(low), number(high))


def palette(colours: str) -> np.ndarray:
    """The 256 colours of a scale, uint8 [256, 3]."""
    return matplotlib.colormaps[colours](np.arange(256), bytes=True)[:, :3]


def gradients() -> dict[str, list[str]]:
    """{scale: some of its colours from low to high, as a style sheet has them}"""
    places = np.linspace(0, 255, 12).round().astype(int)
    return {name: [f"#{bytes(colour).hex()}" for colour in palette(name)[places]] for name in SCALES}


def number(value: float) -> str:
    """Three digits of a number, of a small one two, with a minus sign where there is one."""
    return f"{value:.{3 if abs(value) >= 0.1 else 2}g}".replace("-", "−")


def picture(pixels: np.ndarray) -> PIL.Image.Image:
    """uint8 [H, W, C], one channel or three."""
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
