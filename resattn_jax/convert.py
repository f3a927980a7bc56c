"""Weights of others in and out, by the names of the public PyTorch code, of pytorchcv and of GluonCV.

A state dict maps such names to arrays: convolutions [out, in, k, k], linear layers [out, in]. Ours lie [k, k, in, out]
and [in, out]. `naming` has the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from resattn_jax.naming import NAMES, Names, arrays_of
from resattn_jax.naming.layers import Entry
from resattn_jax.torch_files import encode_torch, find_state_dict, listed, read_torch, to_numpy, write_torch

__all__ = ["encode_torch", "from_torch", "read_torch", "their_net", "to_torch", "write_torch"]


def from_torch(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The variables of the net `name` from a state dict of the public PyTorch code, of pytorchcv or of GluonCV.

    Which of them, and how many classes and input channels, the names and shapes of the state dict tell. The running
    variance is taken as it is, though PyTorch's is the unbiased one and Flax's the biased.

    Args:
      state_dict: {their name: torch tensor or array of any float type}. The names may all begin alike, as wrappers of
        a net leave them ("module.", "_orig_mod.model."), and the whole may lie under "state_dict" or what else
        `read_torch` knows. The shortcut convolutions that the public code has and does not use, and
        `num_batches_tracked`, are dropped, and may be missing.
      name: ra56_double_skip or ra92_double_skip; ra92_448, ra92_cifar_pooled or ra92_cifar by the public code's names;
        ra128, ra164, ra200, ra236 or ra452 by pytorchcv's and GluonCV's; ra56_cifar or ra92_cifar by GluonCV's.

    Returns:
      {"params": ..., "batch_stats": ...} of float32 numpy arrays, the tree that `model.init` gives.

    Raises:
      ValueError: the names' code has no such net; or entries are missing, unknown, misshapen or no finite real
        numbers: the first ones are named, the others counted.
    """
    try:
        state = {str(key): value for key, value in find_state_dict(state_dict).items()}
    except ValueError as error:
        raise ValueError(f"a state dict for {name} is a mapping of names to arrays; {error}") from error
    names = _names_in(state, name)
    _check_name(names, name)
    state = _without_prefix(state, {entry.theirs for entry in arrays_of(names, name, 3, 10)})
    channels = _dimension(state.get(f"{names.stem}.weight"), 1, default=3)
    entries = list(arrays_of(names, name, channels, _dimension(state.get(f"{names.head}.weight"), 0, default=10)))
    counters = {e.theirs for e in entries if e.theirs.endswith("num_batches_tracked")}
    what = f"the state dict does not fit {names.nets[name]} ({name})"
    _check_shapes(
        what,
        {key: _shape(value) for key, value in state.items() if key not in counters},
        {e.theirs: e.shape for e in entries if e.path or e.theirs in state.keys() - counters},
    )
    arrays = _to_float32(what, {e.theirs: to_numpy(e.theirs, state[e.theirs]) for e in entries if e.path})
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for entry in entries:
        if entry.path:
            tree = variables
            for key in entry.path[:-1]:
                tree = tree.setdefault(key, {})
            tree[entry.path[-1]] = _to_flax(arrays[entry.theirs].reshape(_bare(entry)))
    return variables


def to_torch(variables: Mapping[str, Any], name: str, names: str | None = None) -> dict[str, np.ndarray]:
    """A state dict that the net of the public PyTorch code or of pytorchcv loads with strict=True, or GluonCV's.

    `from_torch` undoes it.

    Args:
      variables: {"params": ..., "batch_stats": ...} of the net `name`.
      name: as in `from_torch`.
      names: "public" for the names of the public PyTorch code, "pytorchcv" or "gluoncv". None: the public code's where
        that has the net, else pytorchcv's.

    Returns:
      {their name: float32 array} in their order. The shortcut convolutions that the public code has and does
      not use are zeros, and so is `num_batches_tracked` (int64, no dimensions), which PyTorch counts and does not use
      either.

    Raises:
      ValueError: there are no such names, their code has no such net, or variables are missing, unknown or misshapen:
        the first ones are named, the others counted.
    """
    names = names or _first_with(name)
    if names not in NAMES:
        raise ValueError(f"names is {names!r}; it must be one of {', '.join(NAMES)}")
    theirs = NAMES[names]
    _check_name(theirs, name)
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in _leaves(variables)}
    channels = _dimension(leaves.get(("params", "stem_conv", "kernel")), 2, default=3)
    classes = _dimension(leaves.get(("params", "head", "kernel")), 1, default=10)
    entries = list(arrays_of(theirs, name, channels, classes))
    _check_shapes(
        f"the variables do not fit {name}",
        {"/".join(path): leaf.shape for path, leaf in leaves.items()},
        {"/".join(e.path): _flax_shape(_bare(e)) for e in entries if e.path},
    )
    state_dict = {}
    for entry in entries:
        if entry.path:
            state_dict[entry.theirs] = _to_torch(leaves[entry.path]).reshape(entry.shape)
        else:
            state_dict[entry.theirs] = np.zeros(entry.shape, np.float32 if entry.shape else np.int64)
    return state_dict


def their_net(name: str) -> tuple[str, str]:
    """Whose names `to_torch` gives the net `name`, "public" or "pytorchcv", and what the net is called there."""
    names = _first_with(name)
    return names, NAMES[names].nets[name]


def _first_with(name: str) -> str:
    """The first of the PyTorch codes that has the net; where none has, the one whose fault it is told as."""
    return next((names for names, theirs in NAMES.items() if theirs.pytorch and name in theirs.nets), "public")


def _check_name(names: Names, name: str) -> None:
    if name not in names.nets:
        others = "".join(f"; {other.code} has it" for other in NAMES.values() if name in other.nets)
        raise ValueError(f"{names.code} has no net {name!r}; it has {', '.join(names.nets)}{others}")


def _names_in(state: dict[str, Any], name: str) -> Names:
    """The code by whose arrays the file is known, after whatever prefix; if by none's, one that has the net."""
    for names in reversed(NAMES.values()):
        if any(f".{key}".endswith(tuple(f".{known}" for known in names.known_by)) for key in state):
            return names
    return NAMES[_first_with(name)]


def _without_prefix(state: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Takes off what all names begin with, up to a dot, as often as it needs until some are known; else nothing."""
    bare = state
    while bare and not known & bare.keys():
        if len({key.partition(".")[0] for key in bare}) > 1 or not all("." in key for key in bare):
            return state
        bare = {key.partition(".")[2]: value for key, value in bare.items()}
    return bare


def _check_shapes(what: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises one ValueError that names what is missing, unknown or misshapen, five of each at most."""
    faults = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "misshapen": [f"{k} {found[k]}, not {v}" for k, v in expected.items() if found.get(k, v) != v],
    }
    if any(faults.values()):
        raise ValueError(f"{what}; " + "; ".join(f"{fault}: {listed(k)}" for fault, k in faults.items() if k))


def _to_float32(what: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in float32. Raises ValueError for types that are no floats, and for NaN or infinity in float32."""
    types = {key: str(array.dtype) for key, array in arrays.items() if array.dtype.kind != "f"}
    if types:
        key = next(iter(types))
        raise ValueError(f"{what}; {len(types)} of its {len(arrays)} arrays are no floats, first {key}: {types[key]}")
    with np.errstate(over="ignore"):  # infinite then, and told of
        arrays = {key: array.astype(np.float32, copy=False) for key, array in arrays.items()}
    bad = [key for key, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        raise ValueError(f"{what}; {len(bad)} of its {len(arrays)} arrays hold NaN or infinity, first {bad[0]}")
    return arrays


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


def _to_flax(array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(_AXES_TO_FLAX[array.ndim]), order="C")  # a copy in any case


def _to_torch(array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(_AXES_TO_TORCH[array.ndim]), order="C")


_AXES_TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_AXES_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def _bare(entry: Entry) -> tuple[int, ...]:
    """Their shape, of a last layer that is a 1x1 convolution that of a linear one."""
    return entry.shape[:2] if entry.path and entry.path[1:] == ("head", "kernel") else entry.shape


def _flax_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _AXES_TO_FLAX[len(shape)])
