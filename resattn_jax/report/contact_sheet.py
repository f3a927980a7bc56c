"""A training batch as the net sees it, as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from resattn_jax.data.pipelines import TrainStream
from resattn_jax.experiment import Experiment

_COLUMNS, _SMALLEST, _TEXT = 8, 128, 32  # images a row; pixels: the least side of an image, the lines under it


def contact_sheet(experiment: Experiment, train: TrainStream, batches: Any, count: int) -> PIL.Image.Image:
    """The first `count` images of the first batch after all augmentation, each over its classes.

    batches: what `train.batches` gives from step 0 on. Colours are those of the file again (standardising undone, cut
    off at black and white). A mixed image has its two largest shares under it. Every host of a run has to call it.
    """
    recipe, names = experiment.recipe, experiment.spec.class_names
    found = experiment.first_inputs(train.take, count)(train.arrays, batches, np.uint32(recipe.seed))
    images, targets = map(np.asarray, found)
    pixels = np.clip((images * recipe.std + recipe.mean) * 255 + 0.5, 0, 255).astype(np.uint8)
    return _drawn(pixels, [_caption(target, names, recipe.label_smoothing) for target in targets])


def _caption(target: np.ndarray, names: tuple[str, ...], smoothing: float) -> str:
    shares = (target - smoothing / len(names)) / max(1 - smoothing, 1e-6)  # before they were smoothed
    best = [i for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0.005]
    if len(best) < 2:
        return names[int(np.argmax(target))]
    return "\n".join(f"{shares[i]:.0%} {names[i]}" for i in best)


def _drawn(pixels: np.ndarray, captions: list[str]) -> PIL.Image.Image:
    """pixels uint8 [N, H, W, C]; small images are shown larger, each pixel as a square."""
    scale = max(-(-_SMALLEST // min(pixels.shape[1:3])), 1)
    height, width = pixels.shape[1] * scale, pixels.shape[2] * scale
    columns = min(_COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    sheet = PIL.Image.new("RGB", (columns * (width + 4), rows * (height + _TEXT)), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        x, y = i % columns * (width + 4), i // columns * (height + _TEXT)
        tile = PIL.Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        sheet.paste(tile.resize((width, height), PIL.Image.Resampling.NEAREST), (x, y))
        for line, text in enumerate(caption.split("\n")):
            while font.getlength(text) > width:
                text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
            draw.text((x, y + height + 1 + 14 * line), text, "black", font)
    return sheet
