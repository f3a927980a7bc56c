"""PyTorch state dicts in and out, for the five nets of the public PyTorch code.

That code is github.com/tengshaofeng/ResidualAttentionNetwork-pytorch, model/*.py; a state dict maps its names to
arrays: convolutions [out, in, k, k], linear layers [out, in]. Ours lie [k, k, in, out] and [in, out]. PyTorch itself is
needed only to read and write its own files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from resattn_jax.models import NETS

_SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors")


class _MaskNames(NamedTuple):
    """What the public code calls the parts of a soft mask branch; `downs` and `ups` by level, the highest first."""

    downs: list[str]
    bottom: str
    ups: list[str]
    head: str


def _imagenet_mask(depth: int) -> _MaskNames:
    """AttentionModule_stage0 to _stage3: one running number, down, through the bottom and up again."""
    softmax = [f"softmax{i}_blocks" for i in range(1, 2 * depth + 1)]
    return _MaskNames(softmax[: depth - 1], softmax[depth - 1], softmax[depth:-1][::-1], softmax[-1])


def _cifar_mask(depth: int) -> _MaskNames:
    """AttentionModule_stage1_cifar to _stage3_cifar."""
    downs, ups = ([f"{way}_residual_blocks{i}" for i in range(1, depth)] for way in ("down", "up"))
    return _MaskNames(downs, "middle_2r_blocks", ups, "conv1_1_blocks")


# The class of each net, of which the state dicts are, and how its attention modules name their parts.
_TORCH_NETS = {
    "ra56_double_skip": ("ResidualAttentionModel_56", _imagenet_mask),
    "ra92_double_skip": ("ResidualAttentionModel_92", _imagenet_mask),
    "ra92_448": ("ResidualAttentionModel_448input", _imagenet_mask),
    "ra92_cifar_pooled": ("ResidualAttentionModel_92_32input", _cifar_mask),
    "ra92_cifar": ("ResidualAttentionModel_92_32input_update", _cifar_mask),
}


class _Entry(NamedTuple):
    """An array, or a layer and the shape of its weight: PyTorch name, path in our trees (None: dead), PyTorch shape."""

    torch: str
    path: tuple[str, ...] | None
    shape: tuple[int, ...]


def _unit_layers(torch: str, path: tuple[str, ...], inputs: int, features: int, stride: int = 1) -> Iterator[_Entry]:
    """A residual unit. PyTorch's has a fourth convolution always, and uses it only where the shape changes."""
    narrow = features // 4
    shapes = (narrow, inputs, 1, 1), (narrow, narrow, 3, 3), (features, narrow, 1, 1)
    for i, shape in enumerate(shapes, start=1):
        yield _Entry(f"{torch}.bn{i}", (*path, f"norm{i}"), shape[1:2])
        yield _Entry(f"{torch}.conv{i}", (*path, f"conv{i}"), shape)
    live = inputs != features or stride != 1
    yield _Entry(f"{torch}.conv4", (*path, "shortcut") if live else None, (features, inputs, 1, 1))


def _attention_layers(
    torch: str, path: tuple[str, ...], features: int, depth: int, names: _MaskNames
) -> Iterator[_Entry]:
    """An attention module with the public code's p, t, r = 1, 2, 1."""
    units = [("first_residual_blocks", "first1"), ("trunk_branches.0", "trunk1"), ("trunk_branches.1", "trunk2")]
    for level in range(1, depth):
        units.append((names.downs[level - 1], f"mask/down{level}_1"))
        units.append((f"skip{level}_connection_residual_block", f"mask/skip{level}"))
    units += [(f"{names.bottom}.{i}", f"mask/bottom{i + 1}") for i in range(2)]
    units += [(names.ups[level - 1], f"mask/up{level}_1") for level in range(depth - 1, 0, -1)]
    for theirs, ours in units:
        yield from _unit_layers(f"{torch}.{theirs}", (*path, *ours.split("/")), features, features)
    for i, theirs in (1, 0), (2, 3):  # places in a Sequential of BN, ReLU, convolution, twice
        yield _Entry(f"{torch}.{names.head}.{theirs}", (*path, "mask", f"norm{i}"), (features,))
        yield _Entry(f"{torch}.{names.head}.{theirs + 2}", (*path, "mask", f"conv{i}"), (features, features, 1, 1))
    yield from _unit_layers(f"{torch}.last_blocks", (*path, "last1"), features, features)


def _layers(name: str, channels: int, num_classes: int) -> Iterator[_Entry]:
    """All layers of a net, in the order of the PyTorch state dict."""
    spec, mask_names = NETS[name], _TORCH_NETS[name][1]
    width = spec.stem.features
    yield _Entry("conv1.0", ("stem_conv",), (width, channels, spec.stem.kernel_size, spec.stem.kernel_size))
    yield _Entry("conv1.1", ("stem_norm",), (width,))
    for s, stage in enumerate(spec.stages, start=1):
        number = s + 3 - len(spec.stages)  # a stage before the usual three has the number 0
        yield from _unit_layers(f"residual_block{number}", (f"stage{s}_unit1",), width, stage.features, stage.stride)
        width = stage.features
        for i in range(1, stage.modules + 1):
            torch = f"attention_module{number}" + (f"_{i}" if i > 1 else "")
            names = mask_names(stage.depth)
            yield from _attention_layers(torch, (f"stage{s}_attention{i}",), width, stage.depth, names)
    features, units, stride = spec.tail
    for i in range(1, units + 1):
        yield from _unit_layers(f"residual_block{3 + i}", (f"tail_unit{i}",), width, features, stride if i == 1 else 1)
        width = features
    yield _Entry("mpool2.0", ("head_norm",), (width,))
    yield _Entry("fc", ("head",), (num_classes, width))


def _entries(name: str, channels: int, num_classes: int) -> Iterator[_Entry]:
    """All arrays of a net, in the order of the PyTorch state dict."""
    for torch, path, shape in _layers(name, channels, num_classes):
        if len(shape) == 1:
            yield _Entry(f"{torch}.weight", ("params", *path, "scale"), shape)
            yield _Entry(f"{torch}.bias", ("params", *path, "bias"), shape)
            yield _Entry(f"{torch}.running_mean", ("batch_stats", *path, "mean"), shape)
            yield _Entry(f"{torch}.running_var", ("batch_stats", *path, "var"), shape)
            yield _Entry(f"{torch}.num_batches_tracked", None, ())
        else:
            yield _Entry(f"{torch}.weight", path and ("params", *path, "kernel"), shape)
            if len(shape) == 2:
                yield _Entry(f"{torch}.bias", ("params", *path, "bias"), shape[:1])


def from_torch(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The variables of the net `name` from a state dict of the public PyTorch code.

    The number of classes is that of `fc.weight`, the number of input channels that of `conv1.0.weight`. The running
    variance is taken as it is, though PyTorch's is the unbiased one and Flax's the biased.

    Args:
      state_dict: {PyTorch name: torch tensor or array of any float type}; the names may all begin with "module.", as
        DataParallel leaves them, and the whole may lie under "state_dict". The shortcut convolutions that the public
        code has and does not use, and `num_batches_tracked`, are dropped; the latter may be missing.
      name: ra56_double_skip, ra92_double_skip, ra92_448, ra92_cifar_pooled or ra92_cifar.

    Returns:
      {"params": ..., "batch_stats": ...} of float32 numpy arrays, the tree that `model.init` gives.

    Raises:
      ValueError: there is no PyTorch net for the name, or entries are missing, unknown or misshapen; all are named.
    """
    _check_name(name)
    state = _unwrap(state_dict)
    if not isinstance(state, Mapping):
        raise ValueError(f"a state dict for {name} is a mapping of names to arrays, not a {type(state).__name__}")
    state = {str(key): value for key, value in state.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    channels = _dimension(state.get("conv1.0.weight"), 1, default=3)
    entries = list(_entries(name, channels, _dimension(state.get("fc.weight"), 0, default=10)))
    counters = {e.torch for e in entries if e.torch.endswith("num_batches_tracked")}
    _check_shapes(
        f"the state dict does not fit {_TORCH_NETS[name][0]} ({name})",
        {key: _shape(value) for key, value in state.items() if key not in counters},
        {e.torch: e.shape for e in entries if e.torch not in counters},
    )
    variables = {"params": {}, "batch_stats": {}}
    for entry in entries:
        if entry.path:
            tree = variables
            for key in entry.path[:-1]:
                tree = tree.setdefault(key, {})
            tree[entry.path[-1]] = _to_flax(_to_numpy(state[entry.torch]).astype(np.float32))
    return variables


def to_torch(variables: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """A state dict that the net's class in the public PyTorch code loads with strict=True; `from_torch` undoes it.

    Args:
      variables: {"params": ..., "batch_stats": ...} of the net `name`.
      name: ra56_double_skip, ra92_double_skip, ra92_448, ra92_cifar_pooled or ra92_cifar.

    Returns:
      {PyTorch name: float32 array} in PyTorch's order. The shortcut convolutions that the public code has and does
      not use are zeros, and so is `num_batches_tracked` (int64, no dimensions), which PyTorch counts and does not use
      either.

    Raises:
      ValueError: there is no PyTorch net for the name, or variables are missing, unknown or misshapen; all are named.
    """
    _check_name(name)
    leaves = {path: np.array(leaf, np.float32) for path, leaf in _leaves(variables)}
    channels = _dimension(leaves.get(("params", "stem_conv", "kernel")), 2, default=3)
    entries = list(_entries(name, channels, _dimension(leaves.get(("params", "head", "kernel")), 1, default=10)))
    _check_shapes(
        f"the variables do not fit {name}",
        {"/".join(path): leaf.shape for path, leaf in leaves.items()},
        {"/".join(e.path): _flax_shape(e.shape) for e in entries if e.path},
    )
    state_dict = {}
    for entry in entries:
        if entry.path:
            state_dict[entry.torch] = _to_torch(leaves[entry.path])
        else:
            state_dict[entry.torch] = np.zeros(entry.shape, np.float32 if entry.shape else np.int64)
    return state_dict


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict from a file, executing nothing that is in it.

    Args:
      path: .pkl, .pth or .pt as torch.save writes it, in today's or the old format, or .safetensors, which needs no
        PyTorch. The state dict may lie under "state_dict".

    Returns:
      {name: array}; bfloat16 is made float32, other types stay.

    Raises:
      ValueError: the file is not there, is no checkpoint or is damaged, or PyTorch is needed and not installed.
    """
    path = _check_path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    load = safetensors.numpy.load_file
    if path.suffix != ".safetensors":
        load = functools.partial(_import_torch(path).load, map_location="cpu", weights_only=True)
    try:
        return {str(name): _to_numpy(value) for name, value in _unwrap(load(path)).items()}
    except Exception as error:  # readers raise nearly everything on a broken file, and so do we on no state dict
        raise ValueError(f"{path} is damaged, or holds something else than names and their tensors") from error


def write_torch(path: str | os.PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes what `to_torch` gives: .pkl, .pth and .pt with torch.save, .safetensors without PyTorch.

    Raises ValueError for another suffix, or when PyTorch is needed and not installed; OSError as `open` does.
    """
    path = _check_path(path)
    arrays = {name: np.array(array, order="C") for name, array in state_dict.items()}
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.numpy.save(arrays))
    else:
        torch = _import_torch(path)
        with path.open("wb") as file:
            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)


def _import_torch(path: Path):
    """PyTorch is an extra, and importing it takes seconds: only where a file needs it."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path} needs PyTorch, which is not installed: pip install -e '.[torch]'") from error
    return torch


def _check_name(name: str) -> None:
    if name not in _TORCH_NETS:
        raise ValueError(f"the public PyTorch code has no net {name!r}; it has {', '.join(_TORCH_NETS)}")


def _check_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} is no PyTorch checkpoint by its name, which must end in {', '.join(_SUFFIXES)}")
    return path


def _check_shapes(what: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises one ValueError that names everything that is missing, unknown or misshapen."""
    faults = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "misshapen": [f"{k} {found[k]}, not {v}" for k, v in expected.items() if found.get(k, v) != v],
    }
    if any(faults.values()):
        raise ValueError(f"{what}; " + "; ".join(f"{fault}: {', '.join(k)}" for fault, k in faults.items() if k))


def _unwrap(state: Any) -> Any:
    return state["state_dict"] if isinstance(state, Mapping) and "state_dict" in state else state


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _dimension(value: Any, axis: int, *, default: int) -> int:
    """The size of an axis, or the default where a missing or misshapen array, to be told of later, has none."""
    shape = _shape(value)
    return shape[axis] if len(shape) > axis else default


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _to_numpy(value: Any) -> np.ndarray:
    """A torch tensor, known without importing torch, or an array; bfloat16, which numpy has not, becomes float32."""
    is_bfloat16 = str(value.dtype).endswith("bfloat16")
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return (value.float() if is_bfloat16 else value).numpy()
    return np.asarray(value, np.float32 if is_bfloat16 else None)


def _to_flax(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(_AXES_TO_FLAX[array.ndim]))


def _to_torch(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(_AXES_TO_TORCH[array.ndim]))


_AXES_TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_AXES_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def _flax_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _AXES_TO_FLAX[len(shape)])
