"""Weights from one place to another: PyTorch files in and out, and the start of one run from another's checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import ml_collections

from resattn_jax.checkpoint import Checkpoints
from resattn_jax.convert import from_torch, read_torch, to_torch, write_torch
from resattn_jax.errors import UsageError
from resattn_jax.models import NETS
from resattn_jax.models.count import count_parameters
from resattn_jax.train_step import TrainState

SMALLEST_SHARE = 0.5  # of the parameters; a checkpoint that gives less is of another net


def import_torch(config: ml_collections.ConfigDict, workdir: pathlib.Path, path: str) -> str:
    """Writes the PyTorch checkpoint `path` as checkpoint 0 of `workdir`, for --mode=evaluate and config.init_from.

    Returns a sentence about what was done. Raises UsageError when the file is no checkpoint of config.model.name, or
    the workdir has checkpoints already.
    """
    _check_plain(config)
    try:
        variables = from_torch(read_torch(path), config.model.name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.steps():
            raise UsageError(f"{checkpoints.folder} has checkpoints already; choose another --workdir")
        checkpoints.save_model(0, variables)
    return f"{path}: {count_parameters(variables['params']):,} parameters of {config.model.name} are now in {workdir}"


def export_torch(config: ml_collections.ConfigDict, workdir: pathlib.Path, which: str, path: str) -> str:
    """Writes a checkpoint of `workdir` ("newest", "best" or a step) as a PyTorch state dict, .pth or .safetensors.

    Returns a sentence about what was done. Raises UsageError when the checkpoint is not of config.model.name or that
    net is none of the public PyTorch code's.
    """
    _check_plain(config)
    with Checkpoints(workdir, must_exist=True) as checkpoints:
        step = checkpoints.find(which)
        variables = checkpoints.read_eval_variables(step)
    try:
        write_torch(path, to_torch(variables, config.model.name))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return f"the checkpoint of step {step} in {workdir} is now in {path}"


def start_from(state: TrainState, source: str) -> tuple[TrainState, list[str]]:
    """Takes from another run's checkpoint into `state` what fits: the same name and shape.

    Args:
      state: the fresh state of step 0.
      source: a workdir, with ":best" or ":STEP" for another than its newest checkpoint.

    Returns:
      The state, and a sentence for each weight that was not taken and starts fresh, the head of a net for other
      classes for instance.

    Raises:
      UsageError: there is no such checkpoint, or it fits less than half of the parameters.
    """
    folder, _, which = source.rpartition(":")
    if not re.fullmatch(r"newest|best|\d+", which):
        folder, which = source, "newest"
    with Checkpoints(pathlib.Path(folder), must_exist=True) as checkpoints:
        given = flax.traverse_util.flatten_dict(checkpoints.read_eval_variables(checkpoints.find(which)))
    wanted = flax.traverse_util.flatten_dict(dict(state.variables))
    fits = {path: path in given and given[path].shape == value.shape for path, value in wanted.items()}
    taken = {path: given[path] if fits[path] else value for path, value in wanted.items()}
    share = count_parameters([v for path, v in wanted.items() if path[0] == "params" and fits[path]])
    share /= count_parameters(state.params)
    fresh = [_fresh(path, given, wanted) for path, fit in fits.items() if not fit]
    if share < SMALLEST_SHARE:
        raise UsageError(f"only {share:.0%} of the parameters are in {source}: it is of another net; {fresh[0]}")

    def placed(new: Any, old: jax.Array) -> jax.Array:
        return jax.device_put(new, old.sharding)

    variables = jax.tree.map(placed, flax.traverse_util.unflatten_dict(taken), dict(state.variables))
    ema = None if state.ema is None else jax.tree.map(lambda x: x + 0, variables)  # its own buffers: both are donated
    return state.replace(params=variables["params"], batch_stats=variables["batch_stats"], ema=ema), fresh


def _fresh(path: tuple[str, ...], given: dict, wanted: dict) -> str:
    there = given[path].shape if path in given else "absent"
    return f"{'/'.join(path)} starts fresh: {wanted[path].shape} here, {there} there"


def _check_plain(config: ml_collections.ConfigDict) -> None:
    """PyTorch's net of this name has the wiring of its source, whatever its weights' shapes would allow."""
    spec = NETS.get(config.model.name)
    shapes = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)} if spec else {}
    for key, value in config.model.items():
        if key in shapes and key != "init" and value not in (None, shapes[key]):
            raise UsageError(f"config.model.{key} is {value!r}, but the PyTorch net has {shapes[key]!r}; leave it out")
