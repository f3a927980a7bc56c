"""--mode=show_data: a picture of a training batch as the net sees it, the first thing to look at when data is new."""

from __future__ import annotations

import io
import logging

import jax
import ml_collections
from etils import epath

from resattn_jax import runtime
from resattn_jax.cli import Command
from resattn_jax.data.order import batch_rows
from resattn_jax.data.pipelines import TrainingData
from resattn_jax.experiment import build
from resattn_jax.report.contact_sheet import contact_sheet
from resattn_jax.run import Run

log = logging.getLogger("resattn_jax")

IMAGES = 64  # no more than these are shown


def run(command: Command) -> None:
    """Prints where the picture lies."""
    runtime.initialize(*command.cluster)
    print(f"a training batch as the net sees it: {write_contact_sheet(command.config, command.run.path)}")


def write_contact_sheet(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, devices: list[jax.Device] | None = None
) -> epath.Path:
    """Writes data.png into the workdir: the images of the first batch after all augmentation, each over its classes.

    Returns the path. Raises UsageError for faults of the config or the data.
    """
    run = Run(workdir)
    data, mesh = TrainingData(config), runtime.make_mesh(devices)
    experiment = build(config, data.spec, mesh)
    train = data.train_stream(mesh, experiment.platform, batch_size=config.batch_size, steps_per_dispatch=1)
    rows = batch_rows(config.seed, 0, config.batch_size, data.spec.examples)[:IMAGES].tolist()
    if not config.data.exif_orientation and (turned := data.turned(rows)):
        log.warning(
            "%d of the first %d pictures are to be turned by their EXIF orientation, which is not applied;"
            " config.data.exif_orientation=True applies it",
            turned,
            len(rows),
        )
    sheet = contact_sheet(experiment, train, train.batches(0, 1), IMAGES)
    train.close()
    if jax.process_index() == 0:
        file = io.BytesIO()
        sheet.save(file, "PNG")
        run.make()
        run.write_bytes("data.png", file.getvalue())
    return run.path / "data.png"
