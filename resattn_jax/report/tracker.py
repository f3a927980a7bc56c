"""A run in Weights & Biases, where config.tracker asks for it. wandb is an extra, imported here alone."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping
from typing import Any

import ml_collections

from resattn_jax import buckets
from resattn_jax.config import flatten
from resattn_jax.errors import Interrupted, UsageError, reason
from resattn_jax.run import Run


def check_installed(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError where config.tracker names what is not installed."""
    if config.tracker:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # the latter where a folder has the name, as wandb's own has
            raise UsageError("config.tracker is 'wandb', which is not installed: pip install '.[wandb]'")


class Tracker:
    """One run there, under one id, which the workdir keeps; only the first host has it.

    wandb gets what metrics.jsonl has, a row for each step, in the order of the steps and no step twice. What it lacks
    of the rows that a start finds there it gets at that start, so that nothing is lost with a process that was killed,
    and a run that was not tracked until then is there from its first step. Offline (WANDB_MODE=offline), where wandb
    does not know what it had, each start writes a folder of its own with the whole run.
    """

    def __init__(self, run: Run, config: ml_collections.ConfigDict):
        """Raises UsageError when wandb refuses the run, or cannot be reached."""
        import wandb

        place = None if buckets.is_url(run.path) else str(run.path)
        try:
            self._there = wandb.init(
                id=_id(run),
                resume="allow",
                name=run.path.name,
                project=os.environ.get("WANDB_PROJECT", "resattn_jax"),
                dir=os.environ.get("WANDB_DIR", place),
                config=flatten(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.errors.Error, OSError, ValueError) as error:  # the last for settings that cannot be
            raise UsageError(
                f"wandb does not begin: {reason(error)}; WANDB_MODE=offline keeps the run on the disk, and"
                " config.tracker=None goes without"
            ) from error
        self._had = self._there.step  # it has all steps before this one
        self._row: dict[str, Any] = {}  # of the newest step, which may get more
        for row in run.metrics:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row of metrics.jsonl. It is sent with the first one of a later step, as a step is sent once."""
        if row["step"] < self._had:
            return
        if row["step"] != self._row.get("step"):
            self._send()
        self._row |= {name: value for name, value in row.items() if isinstance(value, int | float)}

    def result(self, result: Mapping[str, Any]) -> None:
        """Sends what result.json holds as the run's summary: "final/top1", "best/step" and the others."""
        self._send()
        self._there.summary.update(
            {
                "train_images_per_second": result["train_images_per_second"],
                **{f"{which}/{name}": value for which in ("final", "best") for name, value in result[which].items()},
            }
        )

    def close(self, error: BaseException | None) -> None:
        """Ends it as complete, stopped (it goes on), or failed, by what ended the run. Returns when all is sent."""
        if isinstance(error, Interrupted):
            self._there.mark_preempting()
        if error is None or isinstance(error, Interrupted):
            self._send()  # else the step has perhaps not all of its metrics, and is logged again
        self._there.finish(exit_code=0 if error is None else 1)

    def _send(self) -> None:
        values, self._row = self._row, {}
        if values:
            self._there.log(values, step=values.pop("step"), commit=True)


def _id(run: Run) -> str:
    """The run's id there. It is on the disk before it is used."""
    if run.tracker_id is None:
        run.write("wandb.txt", secrets.token_hex(4) + "\n")
    known = run.tracker_id
    assert known
    return known
