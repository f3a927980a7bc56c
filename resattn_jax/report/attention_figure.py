"""What attention modules do to one picture, as a figure for a paper or a slide."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resattn_jax.errors import printable
from resattn_jax.report import colours
from resattn_jax.report.attention import Look, chosen_channels, drawn_channel, drawn_means
from resattn_jax.report.colours import EVIDENCE, Shown, draw, symmetric

_SIDE = 1.25  # inches that a map takes
_COLUMNS = 11


def attention_figure(one: Look, product: str) -> bytes:
    """A PNG: the picture and its class activation map, then a row for each module.

    A row has T, M, M over the picture, the spread of M over its channels and the product, then T, M and the product of
    the first channel by each rule. product: how T and M are joined. Limits of the colour scales are printed.
    """
    rows = 1 + len(one.modules)
    height = rows * (_SIDE + 0.35) + 0.2
    figure = Figure(figsize=(_COLUMNS * _SIDE + 0.6, height))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows, _COLUMNS, left=0.045, right=0.995, top=1 - 0.25 / height, bottom=0.25 / height, hspace=0.35, wspace=0.08
    )

    def place(row: int, column: int, title: str, shown: Shown | None = None, *, over: bool = False) -> Any:
        axes = figure.add_subplot(grid[row, column])
        axes.set_xticks([])
        axes.set_yticks([])
        if shown is None or over:
            _show(axes, colours.picture(one.pixels).convert("RGB"), one.pixels)
        if shown is not None:
            _show(axes, shown.image.convert("RGB"), one.pixels, alpha=0.6 if over else 1.0)
            axes.set_xlabel(f"{shown.low} … {shown.high}", fontsize=6, labelpad=2, parse_math=False)
        axes.set_title(title, fontsize=7, pad=2, parse_math=False)
        return axes

    cam = draw(one.cam, EVIDENCE, symmetric(one.cam))
    place(0, 0, "the picture")
    place(0, 1, f"evidence for {_letters(one.top[0][0])[:20]}", cam)
    place(0, 2, "over the picture", cam, over=True)
    lines = [f"{share:6.1%}  {_letters(name)}" for name, share in one.top]
    figure.add_subplot(grid[0, 3:]).axis("off")
    figure.axes[-1].text(0, 0.95, "\n".join(lines), fontsize=9, va="top", family="monospace", parse_math=False)
    for row, (name, maps) in enumerate(one.modules.items(), 1):
        means = drawn_means(*maps)
        first = place(row, 0, "T", means["trunk"])
        first.set_ylabel(name, fontsize=6, parse_math=False)
        place(row, 1, "M", means["mask"])
        place(row, 2, "M over the picture", means["mask"], over=True)
        place(row, 3, "spread of M", means["spread"])
        place(row, 4, product, means["product"])
        column = 5
        for why in ("variance", "correlation"):
            found = [c for c in chosen_channels(maps[1], one.cam) if c.why.startswith(why)][:1]
            for channel in found:
                drawn = drawn_channel(*maps, channel.number)
                place(row, column, f"T, channel {channel.number}", drawn["trunk"])
                place(row, column + 1, f"M, {channel.why}", drawn["mask"])
                place(row, column + 2, product, drawn["product"])
            column += 3
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _show(axes: Any, image: Any, pixels: np.ndarray, alpha: float = 1.0) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(np.asarray(image), interpolation="nearest", extent=(0, width, height, 0), alpha=alpha)


def _letters(name: str) -> str:
    """A class's name in letters that the figure's font has."""
    return "".join(c if ord(c) < 0x250 else c.encode("unicode_escape").decode() for c in printable(name))
