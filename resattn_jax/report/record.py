"""What a run has kept, read for people: as far as it is there, with a sentence on what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from resattn_jax.config import Durations
from resattn_jax.data.spec import DataSpec
from resattn_jax.errors import UsageError
from resattn_jax.metrics import best_step
from resattn_jax.run import Run

Points = tuple[np.ndarray, np.ndarray]  # x and y, each float64 [N]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A run as it was found.

    spec: None where it is not known. series: {"train/loss": (steps, values)} of what was logged. seconds: (steps,
    seconds of training until then), None where no images_per_second was logged. final, best: metrics with their "step",
    None before the first evaluation. logged: everything of the newest evaluation. step: the newest that is known of.
    total: of the whole run, None where it is not known. ended: whether it is complete. rate: images/s of all its
    training. starts: what was kept of each. notes: sentences on what is missing.
    """

    run: Run
    config: ml_collections.ConfigDict
    spec: DataSpec | None
    series: dict[str, Points]
    seconds: Points | None
    final: dict[str, Any] | None
    best: dict[str, Any] | None
    logged: dict[str, Any]
    step: int
    total: int | None
    ended: bool
    rate: float | None
    starts: list[dict[str, Any]]
    notes: list[str]

    @property
    def newest_start(self) -> dict[str, Any]:
        """{} in runs older than the file."""
        return self.starts[-1] if self.starts else {}


def read_record(run: Run) -> Record:
    """Reads a run, one that is being written too. Raises UsageError when there is none, or its config is damaged."""
    config = run.config
    if config is None:
        raise UsageError(f"{run} holds no config.json: it is no workdir of a run, and no exported net")
    notes: list[str] = []
    spec, result, logged, starts = (_tried(run, name, notes) for name in ("spec", "result", "metrics", "starts"))
    rows = [row for row in logged or [] if isinstance(row.get("step"), int) and row["step"] > 0]
    step = max((row["step"] for row in rows), default=0)
    newest: dict[str, Any] = next((row for row in reversed(rows) if "eval/top1" in row), {})
    final: dict[str, Any] | None
    ended = result is not None and _is_of(result, step)
    if result is not None and ended:
        step, final, best = result["step"], {"step": result["step"], **result["final"]}, result.get("best")
    else:
        final, best = _last_and_best(rows)
    if not rows:
        notes.append("No metrics were logged, so there are no curves.")
    if not starts:
        notes.append("Hardware and versions were not kept: an older version began this run, or it was imported.")
    total, rate = _total(config, spec), result.get("train_images_per_second") if result and ended else None
    if rows and not ended:
        until = f"{total:,}" if total else "an unknown number"
        notes.append(f"It has not ended: step {step:,} of {until} when this page was written.")
    return Record(
        run=run,
        config=config,
        spec=spec,
        series=series_of(rows),
        seconds=train_seconds(rows, config.batch_size, rate),
        final=final,
        best=best if isinstance(best, dict) else None,
        logged={key.removeprefix("eval/"): value for key, value in newest.items()},
        step=step,
        total=total,
        ended=ended,
        rate=rate,
        starts=starts or [],
        notes=notes,
    )


def series_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """{key: (steps, values)} of the numbers that were logged, by step; of one step the last counts."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and "/" in key:
                found.setdefault(key, {})[row["step"]] = float(value)
    return {key: _points(values) for key, values in found.items()}


def train_seconds(rows: Sequence[Mapping[str, Any]], batch_size: int, rate: float | None = None) -> Points | None:
    """(steps, seconds of training until then) at each row, from the logged images/s; None where there are none.

    A row's images/s are of the steps since the row before, for the clock stops at each; where a row has none, as those
    of evaluations, the steps before it were as fast as the others on the average. rate: images/s of the whole run,
    which sets the time of the last row. The time is of training alone, and goes on where a run was cut.
    """
    speeds = dict(zip(*series_of(rows).get("train/images_per_second", ((), ())), strict=True))
    steps = np.array(sorted({0, *(row["step"] for row in rows)}), np.float64)
    images = np.diff(steps) * batch_size
    speed = np.array([speeds.get(step, np.nan) for step in steps[1:]])
    known = np.isfinite(speed) & (speed > 0)
    if not known.any():
        return None
    speed[~known] = images[known].sum() / (images[known] / speed[known]).sum()
    seconds = np.concatenate([[0], np.cumsum(images / speed)])
    if rate:
        seconds *= images.sum() / rate / seconds[-1]
    return steps, seconds


def _points(values: Mapping[int, float]) -> Points:
    steps = sorted(values)
    return np.array(steps, np.float64), np.array([values[step] for step in steps], np.float64)


def _is_of(result: Mapping[str, Any], step: int) -> bool:
    """Whether a result is of a run whose newest row is of `step`, which may have gone on since."""
    reached = result.get("step")
    return isinstance(reached, int) and reached >= step and isinstance(result.get("final"), dict)


def _last_and_best(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    measured = {
        row["step"]: {"step": row["step"], **{k.removeprefix("eval/"): v for k, v in row.items() if k != "step"}}
        for row in rows
        if isinstance(row.get("eval/top1"), float)
    }
    best = best_step(measured.items())
    return (measured[max(measured)] if measured else None), (None if best is None else measured[best])


def _total(config: ml_collections.ConfigDict, spec: DataSpec | None) -> int | None:
    return Durations(config, spec.examples).total if spec else config.total_steps


def _tried(run: Run, what: str, notes: list[str]) -> Any:
    """What a file of the run holds, None with a note when it is damaged."""
    try:
        return getattr(run, what)
    except UsageError as error:
        notes.append(f"{error}; it is left out.")
        return None
