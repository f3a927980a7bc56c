"""--mode=export: a checkpoint taken out of its run, as a folder of its own or as a PyTorch state dict alone."""

from __future__ import annotations

from collections.abc import Collection

import ml_collections
from etils import epath

from resattn_jax import runtime
from resattn_jax.checkpoint import Reader
from resattn_jax.classifier import spec_of_run
from resattn_jax.cli import Command
from resattn_jax.config import differences
from resattn_jax.convert import to_torch, write_torch
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.modes.import_ import check_plain
from resattn_jax.run import Run


def run(command: Command) -> None:
    """Prints what was done."""
    runtime.initialize(*command.cluster)
    if command.output is not None:
        net = command.config, command.run.path, command.checkpoint
        print(export_folder(*net, command.output, command.formats))
    elif command.torch_checkpoint is not None:
        print(export_torch(command.config, command.run.path, command.checkpoint, command.torch_checkpoint))


def export_folder(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    which: str,
    output: epath.PathLike,
    formats: Collection[str] = (),
) -> str:
    """Writes a checkpoint of a run ("newest", "best" or a step) with all that `resattn_jax.load` needs to a folder.

    formats: what else to write, as `write_folder` takes it. Returns a sentence about what was done. Raises UsageError
    when there is no such checkpoint, and as `write_folder` does.
    """
    run, folder = Run(workdir), Run(output)
    if "torch" in formats:
        check_plain(config)
    with Reader(run.checkpoints) as checkpoints:
        step, variables = checkpoints.eval_variables(which)
    net = TrainedNet(
        config=config,
        spec=spec_of_run(run, config, variables),
        variables=variables,
        step=step,
        metrics={} if _measured_otherwise(run, config) else run.measured(step),
    )
    write_folder(folder, net, formats)
    return f"the checkpoint of step {step} in {run} is now in {folder}"


def _measured_otherwise(run: Run, config: ml_collections.ConfigDict) -> bool:
    """Whether what the run logged is of other images, or other views of them, than the config asks for."""
    return run.config is None or any(key.startswith(("data.", "eval.")) for key in differences(run.config, config))


def export_torch(config: ml_collections.ConfigDict, workdir: epath.PathLike, which: str, path: str) -> str:
    """Writes a checkpoint of a run as a PyTorch state dict, .pth or .safetensors.

    Returns a sentence about what was done. Raises UsageError when the checkpoint is not of config.model.name or that
    net is none of the public PyTorch code's.
    """
    run = Run(workdir)
    check_plain(config)
    with Reader(run.checkpoints) as checkpoints:
        step, variables = checkpoints.eval_variables(which)
    try:
        write_torch(path, to_torch(variables, config.model.name))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return f"the checkpoint of step {step} in {run} is now in {path}"
