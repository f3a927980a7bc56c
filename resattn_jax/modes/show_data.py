"""--mode=show_data: a picture of a training batch as the net sees it, the first thing to look at when data is new."""

from __future__ import annotations

import io
import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from resattn_jax import runtime
from resattn_jax.cli import Command
from resattn_jax.data.order import batch_rows
from resattn_jax.data.pipelines import TrainingData
from resattn_jax.experiment import build
from resattn_jax.run import Run
from resattn_jax.train_step import network_inputs

log = logging.getLogger("resattn_jax")

IMAGES = 64  # no more than these are shown
_COLUMNS, _SMALLEST, _TEXT = 8, 128, 32  # images a row; pixels: the least side of an image, the lines under it


def run(command: Command) -> None:
    """Prints where the picture lies."""
    runtime.initialize(*command.cluster)
    print(f"a training batch as the net sees it: {write_contact_sheet(command.config, command.run.path)}")


def write_contact_sheet(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, devices: list[jax.Device] | None = None
) -> epath.Path:
    """Writes data.png into the workdir: the images of the first batch after all augmentation, each over its classes.

    Colours are those of the file again (standardising undone, cut off at black and white). A mixed image has its two
    largest shares under it. Returns the path. Raises UsageError for faults of the config or the data.
    """
    run = Run(workdir)
    data, mesh = TrainingData(config), runtime.make_mesh(devices)
    experiment = build(config, data.spec, mesh)
    train = data.train_stream(mesh, experiment.platform, batch_size=config.batch_size, steps_per_dispatch=1)
    recipe, names = experiment.recipe, data.spec.class_names

    def inputs(arrays: Any, batches: Any) -> tuple[jax.Array, jax.Array]:
        images, labels = train.take(arrays, jax.tree.map(lambda x: x[0], batches))
        return network_inputs(recipe, jnp.int32(0), images, labels, len(names))

    spread = jax.shard_map(inputs, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P("data"), check_vma=False)
    rows = batch_rows(config.seed, 0, config.batch_size, data.spec.examples)[:IMAGES].tolist()
    if not config.data.exif_orientation and (turned := data.turned(rows)):
        log.warning(
            "%d of the first %d pictures are to be turned by their EXIF orientation, which is not applied;"
            " config.data.exif_orientation=True applies it",
            turned,
            len(rows),
        )
    images, targets = multihost_utils.process_allgather(jax.jit(spread)(train.arrays, train.batches(0, 1)), tiled=True)
    train.close()
    pixels = np.clip((images * recipe.std + recipe.mean) * 255 + 0.5, 0, 255).astype(np.uint8)[:IMAGES]
    if jax.process_index() == 0:
        captions = [_caption(target, names, config.label_smoothing) for target in targets[:IMAGES]]
        file = io.BytesIO()
        _draw(pixels, captions).save(file, "PNG")
        run.make()
        run.write_bytes("data.png", file.getvalue())
    return run.path / "data.png"


def _caption(target: np.ndarray, names: tuple[str, ...], smoothing: float) -> str:
    shares = (target - smoothing / len(names)) / max(1 - smoothing, 1e-6)  # before they were smoothed
    best = [i for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0.005]
    if len(best) < 2:
        return names[int(np.argmax(target))]
    return "\n".join(f"{shares[i]:.0%} {names[i]}" for i in best)


def _draw(pixels: np.ndarray, captions: list[str]) -> PIL.Image.Image:
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
