"""--mode=export: a checkpoint taken out of its run, as a folder of its own or as a PyTorch state dict."""

from __future__ import annotations

import ml_collections
from etils import epath

from resattn_jax import runtime
from resattn_jax.checkpoint import Reader
from resattn_jax.cli import Command
from resattn_jax.convert import to_torch, write_torch
from resattn_jax.data.pipelines import describe
from resattn_jax.errors import UsageError
from resattn_jax.export import write_folder
from resattn_jax.modes.import_ import check_plain
from resattn_jax.run import Run


def run(command: Command) -> None:
    """Prints what was done."""
    runtime.initialize(*command.cluster)
    if command.output is not None:
        print(export_folder(command.config, command.run.path, command.checkpoint, command.output))
    elif command.torch_checkpoint is not None:
        print(export_torch(command.config, command.run.path, command.checkpoint, command.torch_checkpoint))


def export_folder(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, which: str, output: epath.PathLike
) -> str:
    """Writes a checkpoint of a run ("newest", "best" or a step) with all that `resattn_jax.load` needs to a folder.

    Returns a sentence about what was done. Raises UsageError when there is no such checkpoint.
    """
    run, folder = Run(workdir), Run(output)
    with Reader(run.checkpoints) as checkpoints:
        step, variables = checkpoints.eval_variables(which)
    write_folder(folder, config, run.spec or describe(config), variables)
    return f"the checkpoint of step {step} in {run} is now in {folder}"


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
