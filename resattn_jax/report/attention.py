"""What attention modules do to single pictures, as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resattn_jax.classifier import Classifier, Image
from resattn_jax.report import colours
from resattn_jax.report.colours import EVIDENCE, MASK, SIGNAL, SPREAD, Shown, draw, limits, number, symmetric
from resattn_jax.report.page import render

CHANNELS = 2  # of a module that are drawn by each rule


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Look:
    """What a net makes of one picture.

    name: of the picture. label: its true class, None where it is not known. pixels: what the net sees, uint8
    [H, W, C]. top: (class, probability), the most probable first. cam: the first's class activation map, float32
    [h, w]. modules: {name: (T, M, product)}, each float32 [H, W, C].
    """

    name: str
    label: str | None
    pixels: np.ndarray
    top: list[tuple[str, float]]
    cam: np.ndarray
    modules: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Channel:
    """A channel that is worth looking at, and why."""

    number: int
    why: str


def look(net: Classifier, image: Image, name: str, label: str | None = None) -> Look:
    """Looks at one picture; everything comes out of one pass of the net. Raises UsageError when it cannot be read."""
    parts = [f"{module}/{part}" for module in net.modules for part in ("trunk", "mask", "product")]
    found = {layer: maps[0] for layer, maps in net.maps(image, ["last_map", "head", *parts]).items()}
    logits = found["head"]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")[:5]
    return Look(
        name=name,
        label=label,
        pixels=net.shown(image),
        top=[(net.labels[i], float(shares[i])) for i in best],
        cam=net.activation_maps(found["last_map"][None], best[:1])[0],
        modules={
            module: (found[f"{module}/trunk"], found[f"{module}/mask"], found[f"{module}/product"])
            for module in net.modules
        },
    )


def chosen_channels(mask: np.ndarray, cam: np.ndarray, count: int = CHANNELS) -> list[Channel]:
    """The channels of a mask [H, W, C] that are drawn, by two rules.

    The `count` with the highest variance over the positions, and of the others the `count` with the highest correlation
    with the class activation map [h, w], for which the mask is averaged to h x w. A constant has no correlation.
    """
    variances = mask.var((0, 1), dtype=np.float64)
    varied = np.argsort(-variances, kind="stable")[:count]
    rows, columns = (_averages(mask.shape[axis], cam.shape[axis]) for axis in (0, 1))
    small = np.einsum("hH,wW,HWc->hwc", rows, columns, mask.astype(np.float64))
    small, evidence = small - small.mean((0, 1)), cam.astype(np.float64) - cam.mean(dtype=np.float64)
    spreads = np.sqrt((small**2).sum((0, 1)) * (evidence**2).sum())
    defined = spreads > 1e-9 * max(float(np.abs(mask).max()) * float(np.abs(cam).max()), 1e-30)
    products = (small * evidence[..., None]).sum((0, 1))
    correlations = np.where(defined, products / np.where(defined, spreads, 1.0), -np.inf)
    correlations[varied] = -np.inf
    alike = [i for i in np.argsort(-correlations, kind="stable")[:count] if np.isfinite(correlations[i])]
    return [
        *(Channel(int(i), f"variance {number(variances[i])}") for i in varied),
        *(Channel(int(i), f"correlation {number(correlations[i])}") for i in alike),
    ]


def _averages(size: int, out: int) -> np.ndarray:
    """[out, size]: row i averages the i-th of `out` equal parts of `size` positions."""
    edges = np.arange(out + 1) * (size / out)
    start, end = edges[:-1, None], edges[1:, None]
    place = np.arange(size)[None]
    shares = np.clip(np.minimum(end, place + 1) - np.maximum(start, place), 0, None)
    return shares / shares.sum(1, keepdims=True)


def attention_page(net: Classifier, looks: Sequence[Mapping[str, Any]]) -> bytes:
    """The page of all pictures, each as `drawn_look` gives it."""
    return render(
        "attention.html",
        net=str(net),
        model=net.config.model.name,
        kind=net.model.spec.attention,
        product=product_of(net),
        gradients=colours.gradients(),
        looks=looks,
    )


def product_of(net: Classifier) -> str:
    """How the net joins T and M, as people read it."""
    return "(1 + M) · T" if net.model.spec.learning == "arl" else "M · T"


def drawn_look(one: Look, file: str) -> dict[str, Any]:
    """A picture as the page shows it; small, as the maps of all channels are not kept. file: the name of its figure."""
    height, width = one.pixels.shape[:2]
    return {
        "file": file,
        "name": one.name,
        "label": one.label,
        "top": one.top,
        "picture": colours.picture(one.pixels),
        "aspect": f"{width} / {height}",
        "cam": draw(one.cam, EVIDENCE, symmetric(one.cam)),
        "modules": [_drawn_module(name, *maps, one.cam) for name, maps in one.modules.items()],
    }


def _drawn_module(
    name: str, trunk: np.ndarray, mask: np.ndarray, product: np.ndarray, cam: np.ndarray
) -> dict[str, Any]:
    least, most = limits(mask)
    return {
        "name": name,
        "shape": mask.shape,
        "least": number(least),
        "most": number(most),
        **drawn_means(trunk, mask, product),
        "channels": [
            {"number": c.number, "why": c.why, **drawn_channel(trunk, mask, product, c.number)}
            for c in chosen_channels(mask, cam)
        ],
    }


def drawn_means(trunk: np.ndarray, mask: np.ndarray, product: np.ndarray) -> dict[str, Shown]:
    """T, M and the product as means over channels, the first and the last on one scale, and the spread of M."""
    before, after = trunk.mean(-1), product.mean(-1)
    shared = limits(before, after)
    return {
        "trunk": draw(before, SIGNAL, shared),
        "mask": draw(mask.mean(-1), MASK),
        "spread": draw(mask.std(-1), SPREAD),
        "product": draw(after, SIGNAL, shared),
    }


def drawn_channel(trunk: np.ndarray, mask: np.ndarray, product: np.ndarray, channel: int) -> dict[str, Shown]:
    """T, M and the product of one channel."""
    before, after = trunk[..., channel], product[..., channel]
    shared = limits(before, after)
    return {
        "trunk": draw(before, SIGNAL, shared),
        "mask": draw(mask[..., channel], MASK),
        "product": draw(after, SIGNAL, shared),
    }
