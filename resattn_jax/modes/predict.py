"""--mode=predict: what a net says of pictures, to the console or to a file."""

from __future__ import annotations

import contextlib

import numpy as np
import rich.console
import rich.progress

from resattn_jax import runtime
from resattn_jax.classifier import Classifier, open_net
from resattn_jax.cli import Command
from resattn_jax.data.listing import list_pictures
from resattn_jax.errors import UsageError, printable, reason
from resattn_jax.report.predictions import Prediction, check_output, printing, writing


def run(command: Command) -> None:
    """Prints a line for each picture, or writes them to --output and prints where they are.

    A broken picture is told of and does not stop the others.
    """
    images = list_pictures(command.images)
    if command.output is not None:
        check_output(command.output)
    runtime.keep_programs()
    net = open_net(command.run, command.config, command.checkpoint)
    broken = predict_files(net, images, top=command.top, output=command.output)
    print(f"{len(images) - broken:,} of {len(images):,} pictures were read, by the net of {net}")
    if command.output is not None:
        print(f"what the net says of them is in {printable(command.output)}")


def predict_files(net: Classifier, images: list[str], *, top: int = 5, output: str | None = None) -> int:
    """Writes what a net says of the pictures to a file, .csv, .jsonl or .parquet, or None: prints it.

    Returns the number of broken pictures, each of which is told of. When all are broken there is no file, and a
    UsageError is raised.
    """
    broken, last = 0, ""
    count = min(top, len(net.labels))
    with contextlib.ExitStack() as stack:
        write = printing(images, net.labels) if output is None else stack.enter_context(writing(output, count))
        progress = stack.enter_context(_progress(shown=output is not None))
        for image, found in zip(images, progress.track(net.predict_each(images), total=len(images)), strict=True):
            if isinstance(found, UsageError):
                broken, last = broken + 1, str(found)
                write(Prediction(image, error=reason(found.__cause__ or found)))
                if output is not None:
                    progress.console.print(last, markup=False, soft_wrap=True)
            else:
                best = np.argsort(-found, kind="stable")[:count]
                write(Prediction(image, [(net.labels[i], float(found[i])) for i in best]))
        if broken == len(images):
            raise UsageError(f"none of the pictures could be read; the last: {last}")
    return broken


def _progress(*, shown: bool) -> rich.progress.Progress:
    console = rich.console.Console(stderr=True, highlight=False)
    return rich.progress.Progress(
        rich.progress.TextColumn("pictures"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )
