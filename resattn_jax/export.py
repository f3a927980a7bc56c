"""A trained net as a folder of its own: weights, config and what it has to know of its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import ml_collections
import numpy as np
import safetensors.numpy

from resattn_jax.data.spec import DataSpec
from resattn_jax.errors import UsageError, reason
from resattn_jax.run import Run

WEIGHTS = "model.safetensors"


def write_folder(
    folder: Run,
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    variables: Mapping[str, Any],
    dtype: type[np.floating[Any]] = np.float32,
) -> None:
    """Writes model.safetensors (our names, such as params/stem_conv/kernel), config.json, data.json, classes.

    Raises UsageError when the folder is a run's workdir or cannot be written.
    """
    if folder.checkpoints.exists():
        raise UsageError(f"{folder} is the workdir of a run; choose another --output")
    arrays = {
        name: np.ascontiguousarray(array, dtype)
        for name, array in flax.traverse_util.flatten_dict(dict(variables), sep="/").items()
    }
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write("config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        folder.write_spec(spec)
        folder.write_bytes(WEIGHTS, safetensors.numpy.save(arrays))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {reason(error)}; choose another --output") from error


def read_weights(folder: Run) -> dict[str, Any]:
    """The variables in a folder that `write_folder` wrote, in float32. Raises UsageError when the file is damaged."""
    path = folder.path / WEIGHTS
    try:
        arrays = {
            name: np.asarray(array, np.float32) for name, array in safetensors.numpy.load(path.read_bytes()).items()
        }
        return flax.traverse_util.unflatten_dict(arrays, sep="/")
    except Exception as error:  # safetensors raises a kind of its own, and whatever reading does
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error
