"""The masks of a few evaluation pictures, always the same, as they change while a net is trained."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from resattn_jax.data.pipelines import TrainingData
from resattn_jax.experiment import Experiment
from resattn_jax.intermediates import attention_modules, maps

PICTURES = 8
_CELL, _GAP, _HEAD, _BAR = 88, 4, 58, 128  # pixels: a cell's sides, between two, above all, the width of the scale


class MaskSheet:
    """Draws the first pictures of the evaluation split, each with the mean of every module's mask over its channels.

    One device of one host computes it, so that a host may draw alone. Its program, a forward pass of eight pictures, is
    none of the run's: it is compiled at the first drawing. Until then this costs nothing.
    """

    def __init__(self, experiment: Experiment, data: TrainingData):
        self._experiment, self._data = experiment, data
        self._modules = attention_modules(experiment.model.spec)

    def draw(self, variables: Any) -> np.ndarray | None:
        """uint8 [H, W, 3]: a row for each picture, the net's view of it and then a column for each module.

        variables: whole on every device. The colours of all masks go from 0 to 1; a channel attention's may be less
        than 0 and are drawn as 0. None where there is no picture that can be read, or no module.
        """
        if not len(self._pictures) or not self._modules:
            return None
        here = jax.tree.map(lambda x: x.addressable_data(0), variables)
        return _drawn(self._pictures, jax.device_get(self._masks(here, self._pictures)))

    @functools.cached_property
    def _pictures(self) -> np.ndarray:
        return self._data.eval_pictures(PICTURES)

    @functools.cached_property
    def _masks(self) -> Any:
        def masks(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
            found = maps(self._experiment.model, self._experiment.recipe, variables, images)
            return {name: found[f"{name}/mask"].mean(-1) for name in self._modules}

        return jax.jit(masks)


def _drawn(pictures: np.ndarray, masks: dict[str, np.ndarray]) -> np.ndarray:
    """pictures: uint8 [N, H, W, C]; masks: float32 [N, h, w] of each module. Every value is a square of one colour."""
    from resattn_jax.report.colours import MASK, draw, palette, picture  # Matplotlib, which training else is without

    step = _CELL + _GAP
    sheet = PIL.Image.new("RGB", (step * (1 + len(masks)), _HEAD + step * len(pictures)), "white")
    pen, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(11)
    bar = PIL.Image.fromarray(palette(MASK)[None]).resize((_BAR, 12))
    sheet.paste(bar, (14, 4))
    pen.text((2, 3), "0", "black", font)
    pen.text((18 + _BAR, 3), "1   mean of the mask over its channels", "black", font)
    for column, name in enumerate(("the net's view", *masks)):
        pen.text((column * step + 2, 26), name.replace("_", "\n"), "black", font)
    for row, pixels in enumerate(pictures):
        tiles = [picture(pixels), *(draw(maps[row], MASK, (0.0, 1.0)).image for maps in masks.values())]
        for column, tile in enumerate(tiles):
            shown = tile.convert("RGB").resize((_CELL, _CELL), PIL.Image.Resampling.NEAREST)
            sheet.paste(shown, (column * step, _HEAD + row * step))
    return np.asarray(sheet)
