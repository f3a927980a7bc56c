"""--mode=import: a run made of a PyTorch checkpoint, to measure, to start another run from, to export."""

from __future__ import annotations

import dataclasses

import jax
import ml_collections
from etils import epath

from resattn_jax import runtime
from resattn_jax.checkpoint import Writer
from resattn_jax.cli import Command
from resattn_jax.convert import from_torch, read_torch
from resattn_jax.data.pipelines import describe
from resattn_jax.data.spec import DataSpec
from resattn_jax.errors import UsageError
from resattn_jax.models import NETS
from resattn_jax.models.count import count_parameters
from resattn_jax.run import Run


def run(command: Command) -> None:
    """Prints what was done."""
    assert command.torch_checkpoint is not None  # `cli.parse` sees to it
    runtime.initialize(*command.cluster)
    print(import_torch(command.config, command.run.path, command.torch_checkpoint))


def import_torch(config: ml_collections.ConfigDict, workdir: epath.PathLike, path: str) -> str:
    """Writes the PyTorch checkpoint `path` as checkpoint 0 of `workdir`, with the config and what it says of the data.

    Returns a sentence about what was done. Raises UsageError when the file is no checkpoint of config.model.name, or
    the run has checkpoints already.
    """
    run = Run(workdir)
    check_plain(config)
    try:
        variables = from_torch(read_torch(path), config.model.name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if run.checkpoints.exists():
        raise UsageError(f"{run.checkpoints} is there already; choose another --workdir")
    with (
        run.writing(config, _spec(config), first_host=jax.process_index() == 0),
        Writer(run.checkpoints) as checkpoints,
    ):
        checkpoints.save_model(0, variables)
    return f"{path}: {count_parameters(variables['params']):,} parameters of {config.model.name} are now in {run}"


def check_plain(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError where config.model asks for another net than PyTorch's of this name, which has one wiring."""
    spec = NETS[config.model.name]
    fixed = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    for key, value in config.model.items():
        if key in fixed and key != "init" and value not in (None, fixed[key]):
            raise UsageError(f"config.model.{key} is {value!r}, but the PyTorch net has {fixed[key]!r}; leave it out")


def _spec(config: ml_collections.ConfigDict) -> DataSpec | None:
    """What the net has to know of its data; None where the set is not here, and an evaluation will find out."""
    try:
        return describe(config)
    except UsageError:
        return None
