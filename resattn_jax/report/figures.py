"""Figures of a report as SVG inside of a page: in the page's letters and colours, whether light or dark.

Names of runs and classes are the page's; a figure holds words of this module and numbers alone.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = 8  # that the page has for lines; after these they begin again, with other dashes
_DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_FEW = 30  # points of a line that are marked

# What stands for a colour of the page until the figure is SVG.
_INK, _LINE, _BAR = "#01fe00", "#01fe01", "#01fe02"
_PAGE = {_INK: "currentColor", _LINE: "var(--line)", _BAR: "var(--bar)"}
_PAGE |= {f"#01fd{i:02x}": f"var(--line{i})" for i in range(COLOURS)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text is text
    "font.size": 10,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """Points x, y, each float [N], in the colour of a number. faint: what stands behind."""

    x: np.ndarray
    y: np.ndarray
    colour: int
    faint: bool = False


def curves(name: str, title: str, x_label: str, lines: Sequence[Line], *, percent: bool = False) -> markupsafe.Markup:
    """Lines over one axis. name: of the figure, another for each on a page; percent: y are fractions of 1."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=f"#01fd{line.colour % COLOURS:02x}",
                linestyle=_DASHES[line.colour // COLOURS % len(_DASHES)],
                linewidth=1.1 if line.faint else 1.8,
                alpha=0.55 if line.faint else 1,
                marker="o" if len(line.x) <= _FEW and not line.faint else "",
                markersize=3,
            )
        axes.set_title(title, loc="left")
        axes.set_xlabel(x_label)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_major_formatter(FuncFormatter(_share if percent else _short))
        return _inside(figure, name, f"{title} over {x_label}")


def reliability(name: str, bins: Mapping[str, np.ndarray]) -> markupsafe.Markup:
    """Accuracy over confidence, in the bins of the expected calibration error: "count", "right" and "confidence"."""
    count = bins["count"]
    there = count > 0
    edges = np.arange(len(count) + 1) / len(count)
    accuracy, confidence = bins["right"][there] / count[there], bins["confidence"][there] / count[there]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 4.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=_INK, linestyle="dotted", linewidth=1)
        above.bar(edges[:-1][there], accuracy, 1 / len(count), align="edge", color=_BAR, edgecolor=_LINE)
        above.plot(confidence, accuracy, color="#01fd00", marker="o", markersize=4, linewidth=1.5)
        above.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="accuracy")
        below.bar(edges[:-1], count, 1 / len(count), align="edge", color=_BAR, edgecolor=_LINE)
        below.set(xlabel="confidence", ylabel="examples")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        below.yaxis.set_major_formatter(FuncFormatter(_short))
        return _inside(figure, name, "accuracy over confidence")


def _inside(figure: Figure, name: str, label: str) -> markupsafe.Markup:
    """A figure as an element of a page. name: begins its ids, so that they are no other figure's."""
    FigureCanvasSVG(figure)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    inner = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inner = re.sub(r"<!--.*?-->|<style.*?</style>", "", inner, flags=re.DOTALL)  # its style would be the whole page's
    inner = re.sub(r"\bid=\"", f'id="{name}-', inner)
    inner = re.sub(r"url\(#", f"url(#{name}-", inner)
    inner = re.sub(r"xlink:href=\"#", f'href="#{name}-', inner)
    inner = re.sub(r" font-family: [^;\"]*;?", "", inner)
    inner = re.sub("|".join(_PAGE), lambda found: _PAGE[found[0]], inner)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    head = f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return markupsafe.Markup(f"{head}{inner}</svg>")


def _short(value: float, _: object = None) -> str:
    """A number at an axis: 20k for 20,000."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _share(value: float, _: object = None) -> str:
    return f"{100 * value:g} %"
