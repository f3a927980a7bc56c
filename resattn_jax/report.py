"""What a person sees of a run, and what is kept of it: console, metrics.jsonl, TensorBoard.

One process of a run reports; on the other hosts of a cluster every method does nothing.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from typing import Any

import clu.parameter_overview
import jax
import rich.console
import rich.progress
import rich.table
import tensorboardX

_FORMATS = {"top1": "{:.2%}", "top5": "{:.2%}", "images_per_second": "{:,.0f}", "examples": "{:,}"}


class Report:
    """Console and log files of one run. Use it as a context manager; `total_steps` is where the progress line ends."""

    def __init__(self, workdir: pathlib.Path, total_steps: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._console = rich.console.Console(highlight=False)
        self._jsonl = workdir / "metrics.jsonl"
        self._events = tensorboardX.SummaryWriter(str(workdir))
        self._total = total_steps
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=total_steps, figures="")

    def __enter__(self) -> Report:
        if self._active:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            self._progress.stop()
            self._events.close()

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if self._active:
            self._console.print(text, markup=False, soft_wrap=True)

    def resume(self, step: int) -> None:
        """Forgets what was logged after `step`, the one a run goes on from, and moves the progress line there."""
        if not self._active:
            return
        self._progress.update(self._task, completed=step)
        if self._jsonl.exists():
            kept = [line for line in self._jsonl.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            self._jsonl.write_text("".join(kept))

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        """Moves the progress line."""
        if self._active:
            speed = "" if images_per_second is None else f" · {images_per_second:,.0f} images/s"
            self._progress.update(self._task, completed=step, figures=f"loss {loss:.4f}{speed}")

    def log(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """Writes metrics as `split/name` to metrics.jsonl and TensorBoard, and prints a line of them.

        On a terminal the lines of "train" are left to the progress line.
        """
        if not self._active:
            return
        with self._jsonl.open("a") as file:
            file.write(json.dumps({"step": step, **{f"{split}/{k}": v for k, v in metrics.items()}}) + "\n")
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        self._events.flush()
        if split != "train" or not self._console.is_terminal:
            figures = "  ".join(f"{name} {_FORMATS.get(name, '{:.4g}').format(v)}" for name, v in numbers.items())
            self.say(f"step {step}/{self._total}  {split}:  {figures}")

    def model(self, params: Any, multiply_adds: int, path: pathlib.Path) -> None:
        """Prints parameters per block, the total and the multiply-adds; writes every single one to `path`."""
        if not self._active:
            return
        path.write_text(clu.parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
        blocks = {name: {"parameters": tree} for name, tree in params.items()}
        table = rich.table.Table("block", "parameters", title=None)
        table.columns[1].justify = "right"
        for name, block in blocks.items():
            table.add_row(name, f"{clu.parameter_overview.count_parameters(block):,}")
        table.add_row("total", f"{clu.parameter_overview.count_parameters(params):,}", style="bold")
        self._console.print(table)
        self.say(f"multiply-adds an image: {multiply_adds / 1e9:.3f} G; every parameter is listed in {path}")

    def result(self, result: dict[str, Any]) -> None:
        """The table at the end: the last step's figures and the best's."""
        if self._active:
            rows = {"last": {"step": result["step"], **result["final"]}, "best top-1": result["best"]}
            self._console.print(figures_table(rows))


class Startup:
    """Where the time goes until the first step is done. began: `time.perf_counter()` at the start of the command."""

    def __init__(self, began: float):
        self._began = self._last = began
        self._parts: list[str] = []

    def done(self, what: str) -> float:
        """Ends a part that began where the one before ended, and returns its seconds."""
        seconds, self._last = time.perf_counter() - self._last, time.perf_counter()
        self._parts.append(f"{seconds:.1f} s {what}")
        return seconds

    def __str__(self) -> str:
        return f"first step after {self._last - self._began:.1f} s: {', '.join(self._parts)}"


def figures_table(rows: dict[str, dict[str, Any]]) -> rich.table.Table:
    """A table of {name: {"step", "top1", "top5", "loss"}}, accuracies in percent."""
    table = rich.table.Table("", "step", "top-1", "top-5", "loss")
    for name, row in rows.items():
        table.add_row(name, str(row["step"]), f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['loss']:.4f}")
    return table


def print_evaluation(figures: dict[str, Any]) -> None:
    """Prints what `evaluate.evaluate_checkpoint` returns: the figures and each class's accuracy."""
    console = rich.console.Console(highlight=False, file=sys.stdout)
    console.print(figures_table({f"{figures['examples']:,} examples": figures}))
    table = rich.table.Table("class", "top-1")
    for name, accuracy in zip(figures["class_names"], figures["class_top1"], strict=True):
        table.add_row(name, "no example" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the half line of a run that was killed while writing
        return math.inf
