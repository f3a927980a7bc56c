"""Tables and lines on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table
from rich.text import Text


class Startup:
    """Where the time goes until the first step is done. began: `time.perf_counter()` at the start of the command."""

    def __init__(self, began: float):
        self._began = self._last = began
        self._parts: dict[str, float] = {}

    def done(self, what: str) -> None:
        """Ends a part that began where the one before ended. A part may come in pieces."""
        seconds, self._last = time.perf_counter() - self._last, time.perf_counter()
        self._parts[what] = self._parts.get(what, 0.0) + seconds

    def __str__(self) -> str:
        parts = ", ".join(f"{seconds:.1f} s {what}" for what, seconds in self._parts.items())
        return f"first step after {self._last - self._began:.1f} s: {parts}"


def metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """A table of {name: {"step", "top1", "top5", "loss"}}, accuracies in percent."""
    table = rich.table.Table("", "step", "top-1", "top-5", "loss")
    for name, row in rows.items():
        table.add_row(name, str(row["step"]), f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['loss']:.4f}")
    return table


def print_evaluation(metrics: Mapping[str, Any]) -> None:
    """Prints what `evaluate_checkpoint` returns: the metrics and each class's accuracy."""
    console = rich.console.Console(highlight=False, file=sys.stdout)
    console.print(metrics_table({f"{metrics['examples']:,} examples": metrics}))
    table = rich.table.Table("class", "top-1")
    for name, accuracy in zip(metrics["class_names"], metrics["class_top1"], strict=True):
        table.add_row(Text(name), "no example" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)
