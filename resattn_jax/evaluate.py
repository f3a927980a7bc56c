"""Measuring a net on every example of a split."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections

from resattn_jax.checkpoint import Checkpoints
from resattn_jax.config import save_or_compare_classes
from resattn_jax.data.pipelines import Pipeline
from resattn_jax.errors import UsageError
from resattn_jax.experiment import build
from resattn_jax.metrics import Metrics
from resattn_jax.runtime import device_faults
from resattn_jax.train_step import make_eval_step


def evaluate(eval_step, variables: Any, split: Pipeline, batch_size: int, max_examples: int | None) -> dict[str, Any]:
    """Runs `eval_step` over the split, each example once, and returns `Metrics.summarize`'s figures.

    Broken pictures that were skipped are counted in "broken_pictures_skipped", where there are any.
    Raises UsageError when no example is left, and RunError when a device is out of memory.
    """
    parts = []
    with device_faults(f"evaluating {batch_size} images at a time; lower config.eval.batch_size"):
        for batch, mask in split.eval_batches(batch_size, max_examples):
            if parts:
                jax.block_until_ready(parts[-1])  # two batches at a time: streamed ones would fill the device's memory
            parts.append(eval_step(variables, split.arrays, batch, mask))
        figures = Metrics.summarize(parts)
    if not figures["examples"]:
        raise UsageError("not one example of the evaluation split could be read")
    return {**figures, "broken_pictures_skipped": split.skipped} if split.skipped else figures


def evaluate_checkpoint(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    which: str = "newest",
    devices: list[jax.Device] | None = None,
) -> dict[str, Any]:
    """Restores a checkpoint of workdir and measures it on config.data.eval_split.

    which: "newest", "best" or a step. The devices need not be those it was trained on. Returns the figures of
    `Metrics.summarize`, the step, and the classes' names. Raises UsageError when there is no such checkpoint or it
    does not fit the config's model.
    """
    with Checkpoints(workdir, must_exist=True) as checkpoints:
        step = checkpoints.find(which)
        experiment = build(config, devices)
        save_or_compare_classes(experiment.test.class_names, workdir)
        variables = checkpoints.read_eval_variables(step, experiment.abstract_state().variables)
    test = experiment.test
    eval_step = make_eval_step(experiment.model, experiment.recipe, experiment.mesh, test.take)
    metrics = evaluate(eval_step, variables, test, experiment.eval_batch_size, config.eval.max_examples)
    return {"step": step, **metrics, "class_names": test.class_names}
