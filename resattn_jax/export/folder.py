"""A trained net as a folder of its own: weights, config, what it has to know of its data, and other programs' files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from resattn_jax import buckets
from resattn_jax.convert import encode_torch, to_torch
from resattn_jax.errors import UsageError, reason
from resattn_jax.export import FILES
from resattn_jax.export.model_card import model_card, preprocessing
from resattn_jax.export.portable import TrainedNet, to_stablehlo
from resattn_jax.run import Run
from resattn_jax.runtime import PORTABLE

WEIGHTS = FILES["safetensors"]


def write_folder(
    folder: Run, net: TrainedNet, formats: Collection[str] = (), dtype: type[np.floating[Any]] = np.float32
) -> None:
    """Writes what `resattn_jax.load` opens, a model card and preprocessing.json, and the net in other formats.

    That is model.safetensors (in `dtype`, our names, such as params/stem_conv/kernel), config.json, data.json and
    classes.txt. formats: of `FILES`; files of other formats, from an earlier export, are deleted. Everything is made
    before anything is written. Raises UsageError when a format cannot have this net or needs a package that is not
    here, and when the folder is a run's workdir or cannot be written.
    """
    if folder.checkpoints.exists():
        raise UsageError(f"{folder} is the workdir of a run; choose another --output")
    formats = {"safetensors", *formats}
    files = {name: _ENCODERS[format](net) for format, name in FILES.items() if format in formats}
    files[WEIGHTS] = _safetensors(net, dtype)
    files["preprocessing.json"] = (json.dumps(preprocessing(net), indent=2) + "\n").encode()
    files["README.md"] = model_card(net, formats).encode()
    try:
        folder.make()
        folder.write("config.json", json.dumps(net.config.to_dict(), indent=2) + "\n")
        folder.write_spec(net.spec)
        for name, content in files.items():
            folder.write_bytes(name, content)
        for name in set(FILES.values()) - files.keys():
            (folder.path / name).unlink(missing_ok=True)
    except buckets.faults() as error:
        raise UsageError(f"{folder} cannot be written: {reason(error)}; choose another --output") from error


def read_weights(folder: Run) -> dict[str, Any]:
    """The variables in a folder that `write_folder` wrote, in float32. Raises UsageError when the file is damaged."""
    path = folder.path / WEIGHTS
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
        return flax.traverse_util.unflatten_dict({k: np.asarray(v, np.float32) for k, v in arrays.items()}, sep="/")
    except Exception as error:  # safetensors raises a kind of its own, and whatever reading does
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error


def _safetensors(net: TrainedNet, dtype: type[np.floating[Any]] = np.float32) -> bytes:
    named = flax.traverse_util.flatten_dict(dict(net.variables), sep="/")
    return safetensors.numpy.save({name: np.ascontiguousarray(array, dtype) for name, array in named.items()})


def _torch(net: TrainedNet) -> bytes:
    try:
        return encode_torch(FILES["torch"], to_torch(net.variables, net.config.model.name))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _onnx(net: TrainedNet) -> bytes:
    try:
        from resattn_jax.export.onnx_graph import to_onnx  # which imports onnx
    except ImportError as error:
        raise UsageError("ONNX needs the package onnx, which is not installed: pip install -e '.[onnx]'") from error
    # An interpolation by gathers would be ten nodes, two products are two.
    function = net.function(dataclasses.replace(PORTABLE, upsampling="products"))
    return to_onnx(function, net.measured_on.eval_shape, ("images", "logits")).SerializeToString()


_ENCODERS: dict[str, Callable[[TrainedNet], bytes]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "stablehlo": to_stablehlo,
    "onnx": _onnx,
}
