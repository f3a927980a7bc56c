"""The page of one run, and that of several beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from resattn_jax.config import flatten
from resattn_jax.configs import default
from resattn_jax.metrics import Confusion
from resattn_jax.mistakes import Assessment
from resattn_jax.report import figures
from resattn_jax.report.colours import Shown
from resattn_jax.report.figures import Line, curves
from resattn_jax.report.page import render
from resattn_jax.report.record import Points, Record
from resattn_jax.rules import RULES, shown

LARGEST_MATRIX = Confusion.MOST  # classes; of more the most confused pairs are listed, and the worst classes
PAIRS = 40
_CURVES = (  # title, and what is drawn; of two the first stands behind
    ("loss", ("train/loss", "eval/loss")),
    ("top-1", ("train/top1", "eval/top1")),
    ("learning rate", ("train/learning_rate",)),
    ("images/s", ("train/images_per_second",)),
    ("gradient norm", ("train/gradient_norm",)),
)
_WHAT_IS_MEASURED = (
    "data.name",
    "data.eval_split",
    "eval.max_examples",
    "eval.views",
    "eval.image_size",
    "eval.crop_fraction",
)
_UNITS = {"hours": 3600, "minutes": 60}
_COLUMNS = 6  # keys that stand in the table of results; more have a table of their own

Axis = Callable[[Record, np.ndarray], np.ndarray | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mistake:
    """A picture that is taken for another class. masks: {module: the mean of its mask over the channels}."""

    name: str
    label: str
    predicted: str
    confidence: float
    picture: PIL.Image.Image
    masks: dict[str, Shown]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What a net was found to do over the evaluation split. net: which checkpoint it is."""

    net: str
    labels: tuple[str, ...]
    assessment: Assessment
    mistakes: list[Mistake]


def run_page(record: Record, measured: Measured | None, now: dict[str, str]) -> bytes:
    """The page of one run. measured: None where there is no checkpoint or no data, as `record.notes` says.

    now: the devices and versions of this process.
    """
    labels = measured.labels if measured else record.spec.class_names if record.spec else ()
    confusion = measured.assessment.confusion(len(labels)) if measured else _logged_confusion(record, len(labels))
    return render(
        "report.html",
        record=record,
        config=marked(record),
        sections=[(over, _drawn([record], x, over)) for over, x in _axes([record])],
        labels=labels,
        classes=_classes(record, measured, labels, confusion),
        measured=measured,
        confusion=confusion if confusion is not None and len(confusion) <= LARGEST_MATRIX else None,
        pairs=[] if confusion is None else most_confused(confusion),
        reliability=measured and figures.reliability("reliability", measured.assessment.bins),
        now=now,
    )


def runs_page(records: Sequence[Record]) -> bytes:
    """The page of several runs beside each other."""
    keys = differing(records)
    return render(
        "report_runs.html",
        records=records,
        names=names(records),
        sections=[(over, _drawn(records, x, over)) for over, x in _axes(records)],
        keys=keys,
        in_results=len(keys) <= _COLUMNS,
        notes=not_comparable(records),
    )


def marked(record: Record) -> list[tuple[str, str, str | None]]:
    """(key, value, the value of configs/default.py where that is another, else None) of a run's config."""
    ours, theirs = flatten(record.config), flatten(default.get_config())
    return [(key, shown(ours[key]), None if ours[key] == theirs[key] else shown(theirs[key])) for key in RULES]


def differing(records: Sequence[Record]) -> dict[str, list[str]]:
    """{key: its value in each run} of what is not the same in all."""
    flat = [flatten(record.config) for record in records]
    return {key: [shown(f[key]) for f in flat] for key in RULES if any(f[key] != flat[0][key] for f in flat)}


def names(records: Sequence[Record]) -> list[str]:
    """The last part of each run's path, or the whole paths where those are the same."""
    last = [record.run.path.name for record in records]
    return last if len(set(last)) == len(last) else [str(record.run) for record in records]


def not_comparable(records: Sequence[Record]) -> list[str]:
    """Sentences on what of the runs cannot be compared, and what is missing of each."""
    notes, keys = [], differing(records)
    if others := [key for key in _WHAT_IS_MEASURED if key in keys]:
        notes.append(f"Top-1 and loss are not comparable: the runs were measured by different {', '.join(others)}.")
    if len({record.spec.class_names for record in records if record.spec}) > 1:
        notes.append("The runs have different classes.")
    devices = {record.newest_start.get("devices") for record in records}
    if len(devices) > 1 or None in devices:
        why = "some runs have not kept what they were trained on" if None in devices else "they were on other devices"
        notes.append(f"Images/s and times are not comparable: {why}.")
    return notes + [f"{name}: {note}" for name, one in zip(names(records), records, strict=True) for note in one.notes]


def most_confused(confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
    """(class, what it is taken for, how often, as a share of the class) of the pairs, the most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    best = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = (tuple(map(int, np.unravel_index(i, wrong.shape))) for i in best)
    return [(i, j, int(wrong[i, j]), float(wrong[i, j] / confusion[i].sum())) for i, j in pairs if wrong[i, j]]


def _logged_confusion(record: Record, classes: int) -> np.ndarray | None:
    """That of the newest evaluation, None where none was logged."""
    try:
        found = np.array(record.logged.get("confusion"))
    except ValueError:  # the rows of another length
        return None
    fits = found.shape == (classes, classes) and found.dtype.kind == "i" and found.min(initial=0) >= 0
    return found if fits else None


def _classes(
    record: Record, measured: Measured | None, labels: Sequence[str], confusion: np.ndarray | None
) -> dict[str, Any] | None:
    """The bars of the classes: (name, top-1, number of examples or None), and how many more there are."""
    top1 = measured.assessment.metrics["class_top1"] if measured else record.logged.get("class_top1")
    if not isinstance(top1, list) or len(top1) != len(labels):
        return None
    counts = [None] * len(labels) if confusion is None else confusion.sum(1).tolist()
    bars = [row for row in zip(labels, top1, counts, strict=True) if isinstance(row[1], float)]
    many = len(bars) > LARGEST_MATRIX
    if many:
        bars = sorted(bars, key=lambda row: row[1])[:LARGEST_MATRIX]
    return {"bars": bars, "worst": many, "all": len(labels)}


# ---- Curves.


def _axes(records: Sequence[Record]) -> list[tuple[str, Axis]]:
    """(what is on the x axis, what makes it of a run and steps), of as many as there are."""
    found: list[tuple[str, Axis]] = []
    if any(record.series for record in records):
        found.append(("steps", lambda record, steps: steps))
    longest = max((record.seconds[1][-1] for record in records if record.seconds), default=0.0)
    if longest:
        unit, size = next(((unit, size) for unit, size in _UNITS.items() if longest >= 2 * size), ("seconds", 1))
        found.append((f"{unit} of training", lambda record, steps: _at(record.seconds, steps, size)))
    return found


def _at(seconds: Points | None, steps: np.ndarray, unit: float) -> np.ndarray | None:
    """When steps were done; None where it is not known."""
    return None if seconds is None else np.interp(steps, *seconds) / unit


def _drawn(records: Sequence[Record], x: Axis, over: str) -> list[Any]:
    """The figures of one axis."""
    found = []
    for title, keys in _CURVES:
        lines = []
        for number, record in enumerate(records):
            for place, key in enumerate(keys):
                steps, values = record.series.get(key, (np.zeros(0), np.zeros(0)))
                where = x(record, steps)
                if where is not None and len(steps):
                    colour = place if len(records) == 1 else number
                    lines.append(Line(where, values, colour, faint=len(keys) == 2 and place == 0))
        if lines:
            name = f"{title}-{over}".replace(" ", "-").replace("/", "-")
            found.append(curves(name, title, over, lines, percent=title == "top-1"))
    return found
