"""--mode=evaluate: restore a checkpoint and measure it."""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
from etils import epath

from resattn_jax import runtime
from resattn_jax.checkpoint import Reader
from resattn_jax.cli import Command
from resattn_jax.data.pipelines import describe
from resattn_jax.experiment import build_to_measure
from resattn_jax.report.console import print_evaluation
from resattn_jax.run import Run


def run(command: Command) -> None:
    """Prints the metrics and each class's accuracy."""
    runtime.initialize(*command.cluster)
    print_evaluation(evaluate_checkpoint(command.config, command.run.path, command.checkpoint))


def evaluate_checkpoint(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    which: str = "newest",
    devices: list[jax.Device] | None = None,
) -> dict[str, Any]:
    """Restores a checkpoint of a run and measures it on config.data.eval_split, the only split that is opened.

    config: the run's, with what may differ for measuring. which: "newest", "best" or a step. The devices need not be
    those it was trained on. Returns what `Experiment.evaluate` does, the step, and the classes' names. Raises
    UsageError when there is no such checkpoint, it does not fit the config's model, or the data has other classes.
    """
    run = Run(workdir)
    with Reader(run.checkpoints) as checkpoints:
        steps = checkpoints.find(which)
        spec = run.spec
        if spec is None:  # a run older than the file, or an imported net
            spec = describe(config)
            run.check_data(spec)
        experiment = build_to_measure(config, spec, runtime.make_mesh(devices))
        stream = experiment.open_eval(config)
        like = experiment.abstract_state().variables
        step, variables = checkpoints.first_readable(steps, lambda s: checkpoints.read_eval_variables(s, like))
    return {"step": step, **experiment.evaluate(variables, stream), "class_names": spec.class_names}
