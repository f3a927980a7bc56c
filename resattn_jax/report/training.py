"""What a person sees of a run as it goes, and what is kept of it: console, metrics.jsonl, TensorBoard, a tracker.

One process of a run reports; on the other hosts of a cluster every method does nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import clu.parameter_overview
import jax
import ml_collections
import numpy as np
import PIL.Image
import rich.console
import rich.progress
import rich.table

from resattn_jax.report.console import metrics_table
from resattn_jax.report.mask_sheet import MaskSheet
from resattn_jax.report.tensorboard import EventFile, confusion_picture, hyper_parameters
from resattn_jax.report.tracker import Tracker
from resattn_jax.run import Run

_FORMATS = {"top1": "{:.2%}", "top5": "{:.2%}", "ece": "{:.2%}", "images_per_second": "{:,.0f}", "examples": "{:,}"}


class Report:
    """Console and log files of one run. Use it as a context manager; `total_steps` is where the progress line ends."""

    def __init__(self, run: Run, total_steps: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._console = rich.console.Console(highlight=False)
        self._run, self._total = run, total_steps
        self._size: dict[str, int] = {}
        self._confusion: tuple[int, list[list[int]]] | None = None  # of the newest evaluation
        self._events: EventFile | None = None
        self._tracker: Tracker | None = None
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[metrics]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=total_steps, metrics="")

    def __enter__(self) -> Report:
        if self._active:
            self._progress.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._active:
            self._progress.stop()
            if self._events:
                self._events.close()
            if self._tracker:
                self._tracker.close(error)

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if self._active:
            self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, step: int, config: ml_collections.ConfigDict, about: Mapping[str, Any]) -> None:
        """Begins after `step`, the one a run goes on from: what was logged after it is logged again, so it goes.

        config: the hyper-parameters that TensorBoard compares runs by. about: kept in started.jsonl, with the time and
        the size of the net.
        """
        if self._active:
            self._run.forget_after(step)
            if not (self._run.path / "result.json").exists():  # else TensorBoard has them already
                for row in self._run.metrics:
                    if "eval/confusion" in row:
                        self._confusion = row["step"], row["eval/confusion"]
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            self._run.start({"step": step, "date": now, **about, **self._size})
            self._events = EventFile(self._run.logs, purge_step=step + 1)
            experiment, start, self._end = hyper_parameters(config)
            for summary in (experiment, start):
                self._events.add(summary)
            if config.tracker:
                self._tracker = Tracker(self._run, config)
            self._progress.update(self._task, completed=step)

    def batch(self, sheet: PIL.Image.Image) -> None:
        """Shows TensorBoard the first training batch as the net sees it."""
        if self._active:
            assert self._events
            self._events.image("train/batch", np.asarray(sheet), 0)
            self._events.flush()  # a run that goes on does not draw it again

    def masks(self, step: int, sheet: MaskSheet, variables: Any) -> None:
        """Shows TensorBoard the masks of a few evaluation pictures."""
        if self._active:
            assert self._events
            drawn = sheet.draw(variables)
            if drawn is not None:
                self._events.image("eval/masks", drawn, step)
                self._events.flush()

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        """Moves the progress line."""
        if self._active:
            speed = "" if images_per_second is None else f" · {images_per_second:,.0f} images/s"
            self._progress.update(self._task, completed=step, metrics=f"loss {loss:.4f}{speed}")

    def log(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics as `split/name` to metrics.jsonl and TensorBoard, and prints a line of them.

        `begin` comes first. On a terminal the lines of "train" are left to the progress line.
        """
        if not self._active:
            return
        assert self._events
        if "confusion" in metrics:
            self._confusion = step, metrics["confusion"]
        row = {"step": step, **{f"{split}/{k}": v for k, v in metrics.items()}}
        self._run.log(row)
        if self._tracker:
            self._tracker.add(row)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self._events.scalar(f"{split}/{name}", value, step)
        self._events.flush()
        self._run.logged()
        if split != "train" or not self._console.is_terminal:
            shown = "  ".join(f"{name} {_FORMATS.get(name, '{:.4g}').format(v)}" for name, v in numbers.items())
            self.say(f"step {step}/{self._total}  {split}:  {shown}")

    def not_finite(self, step: int, metrics: Mapping[str, float], rows: list[int]) -> None:
        """Keeps what a step was made of whose loss or gradient was not finite: its rows of the training split."""
        if self._active:
            values = {name: str(value) for name, value in metrics.items()}  # JSON has no nan
            self._run.log({"step": step, **values, "rows": rows}, "not_finite.jsonl")

    def model(self, params: Any, multiply_adds: int) -> None:
        """Prints parameters per block, the total and the multiply-adds; writes every single one to parameters.txt."""
        if not self._active:
            return
        overview = clu.parameter_overview.get_parameter_overview(params, include_stats=False)
        self._run.write("parameters.txt", overview + "\n")
        blocks = {name: {"parameters": tree} for name, tree in params.items()}
        table = rich.table.Table("block", "parameters", title=None)
        table.columns[1].justify = "right"
        for name, block in blocks.items():
            table.add_row(name, f"{clu.parameter_overview.count_parameters(block):,}")
        total = int(clu.parameter_overview.count_parameters(params))
        self._size = {"parameters": total, "multiply_adds": multiply_adds}
        table.add_row("total", f"{total:,}", style="bold")
        self._console.print(table)
        listed = self._run.path / "parameters.txt"
        self.say(f"multiply-adds an image: {multiply_adds / 1e9:.3f} G; every parameter is listed in {listed}")

    def result(self, result: dict[str, Any], class_names: Sequence[str]) -> None:
        """Writes result.json and prints the table at the end: the last step's metrics and the best's.

        TensorBoard gets the confusion matrix, where there are no more than 40 classes.
        """
        if self._active:
            assert self._events
            if self._confusion:
                step, counts = self._confusion
                self._events.image("eval/confusion", confusion_picture(counts, class_names), step)
            self._events.add(self._end)
            self._events.flush()
            self._run.write_result(result)
            if self._tracker:
                self._tracker.result(result)
            rows = {"last": {"step": result["step"], **result["final"]}, "best top-1": result["best"]}
            self._console.print(metrics_table(rows))
