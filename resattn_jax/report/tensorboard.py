"""What TensorBoard has of a run beside its curves: hyper-parameters, so that it compares runs, and pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from resattn_jax.config import flatten
from resattn_jax.errors import printable
from resattn_jax.report.lean_tensorboardx import Event, EventsWriter, SessionLog, summary

COMPARED = ("eval/top1", "eval/top5", "eval/loss", "eval/ece", "train/images_per_second")  # scalars that are logged

_CELL, _NAMES, _LETTERS = 34, 120, 18  # pixels of a cell and of the names at its side; letters of a name


class EventFile:
    """What TensorBoard reads of a run, written at once and in order.

    tensorboardX's SummaryWriter keeps what was added in a queue, which a process that is killed takes with it.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int):
        """TensorBoard forgets what other files in the folder have from `purge_step` on. Raises OSError."""
        suffix = f".{os.getpid()}.{purge_step}"  # its name else has the second alone
        self._writer = EventsWriter(os.path.join(folder, "events"), suffix)
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, added: Any, step: int = 0) -> None:
        """Adds a summary of a step. It is on the disk after `flush`."""
        self._write(Event(step=step, summary=added))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self.add(summary.scalar(name, value), step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Adds a picture, uint8 [H, W, 3]."""
        self.add(summary.image(name, pixels, dataformats="HWC"), step)

    def flush(self) -> None:
        """Returns when all that was added is on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and ends the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def hyper_parameters(config: ml_collections.ConfigDict) -> tuple[Any, Any, Any]:
    """Three summaries: which keys and metrics the tab HPARAMS has, the values at the start of a run, and its end.

    Written into the event file of the run itself they make a row of it, beside those of other runs below a folder.
    """
    values = {key: _plain(value) for key, value in flatten(config).items()}
    experiment, start, end = summary.hparams(values, dict.fromkeys(COMPARED, 0.0))
    return experiment, start, end


def _plain(value: Any) -> Any:
    """A value that has a type there: None and tuples as texts."""
    return value if isinstance(value, bool | int | float) else printable(str(value))


def confusion_picture(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> np.ndarray:
    """uint8 [H, W, 3]: a row for each class, with its name; darker is a larger share of the row; counts in the cells.

    A column is the class of the row with its number.
    """
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    sheet = PIL.Image.new("RGB", (_NAMES + _CELL * len(counts) + 1, _CELL * (len(counts) + 1) + 1), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(11)
    for i, name in enumerate(names):
        y = _CELL * (i + 1)
        draw.text((4, y + 10), f"{i} {printable(name)[:_LETTERS]}", "black", font)
        draw.text((_NAMES + _CELL * i + 10, 10), str(i), "black", font)
        for j in range(len(counts)):
            x, share = _NAMES + _CELL * j, float(shares[i, j])
            full = np.array((26, 127, 75) if i == j else (179, 54, 31))
            red, green, blue = (int(value) for value in np.round(255 + share * (full - 255)))
            draw.rectangle((x, y, x + _CELL, y + _CELL), (red, green, blue), "#dddddd")
            if counts[i, j]:
                draw.text((x + 4, y + 10), str(counts[i, j]), "white" if share > 0.5 else "black", font)
    return np.asarray(sheet)
