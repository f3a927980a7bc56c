"""PyTorch state dicts in and out, by the names of the public PyTorch code and by those of pytorchcv.

The public code is github.com/tengshaofeng/ResidualAttentionNetwork-pytorch, model/*.py, and has five nets; pytorchcv
0.0.74 has seven, resattnet*. A state dict maps such names to arrays: convolutions [out, in, k, k], linear layers
[out, in]. Ours lie [k, k, in, out] and [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from resattn_jax.models import NETS
from resattn_jax.models.nets import Spec, Stage
from resattn_jax.torch_files import encode_torch, find_state_dict, listed, read_torch, to_numpy, write_torch

__all__ = ["encode_torch", "from_torch", "read_torch", "their_net", "to_torch", "write_torch"]


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


class _Entry(NamedTuple):
    """An array, or a layer and the shape of its weight: PyTorch name, path in our trees (None: dead), PyTorch shape."""

    torch: str
    path: tuple[str, ...] | None
    shape: tuple[int, ...]


class _UnitNames(NamedTuple):
    """What a residual unit calls its parts, with the place of each; `spare`: it has a shortcut that it does not use."""

    norm: str
    conv: str
    shortcut: str
    spare: bool


_PUBLIC_UNIT = _UnitNames("bn{}", "conv{}", "conv4", spare=True)
_PYTORCHCV_UNIT = _UnitNames("body.conv{}.bn", "body.conv{}.conv", "identity_conv", spare=False)


def _unit_layers(
    names: _UnitNames, torch: str, path: tuple[str, ...], inputs: int, features: int, stride: int = 1
) -> Iterator[_Entry]:
    """A residual unit, whose shortcut has a convolution of use only where the shape changes."""
    narrow = features // 4
    shapes = (narrow, inputs, 1, 1), (narrow, narrow, 3, 3), (features, narrow, 1, 1)
    for i, shape in enumerate(shapes, start=1):
        yield _Entry(f"{torch}.{names.norm.format(i)}", (*path, f"norm{i}"), shape[1:2])
        yield _Entry(f"{torch}.{names.conv.format(i)}", (*path, f"conv{i}"), shape)
    live = inputs != features or stride != 1
    if live or names.spare:
        yield _Entry(f"{torch}.{names.shortcut}", (*path, "shortcut") if live else None, (features, inputs, 1, 1))


def _public_attention(
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
        yield from _unit_layers(_PUBLIC_UNIT, f"{torch}.{theirs}", (*path, *ours.split("/")), features, features)
    for i, position in (1, 0), (2, 3):  # in a Sequential of BN, ReLU, convolution, twice
        yield _Entry(f"{torch}.{names.head}.{position}", (*path, "mask", f"norm{i}"), (features,))
        yield _Entry(f"{torch}.{names.head}.{position + 2}", (*path, "mask", f"conv{i}"), (features, features, 1, 1))
    yield from _unit_layers(_PUBLIC_UNIT, f"{torch}.last_blocks", (*path, "last1"), features, features)


def _public_layers(name: str, channels: int, num_classes: int) -> Iterator[_Entry]:
    """All layers of a net of the public code, in the order of its state dict."""
    spec, mask_names = NETS[name], _cifar_mask if "cifar" in name else _imagenet_mask
    width = spec.stem.features
    yield _Entry("conv1.0", ("stem_conv",), (width, channels, spec.stem.kernel_size, spec.stem.kernel_size))
    yield _Entry("conv1.1", ("stem_norm",), (width,))
    for s, stage in enumerate(spec.stages, start=1):
        number = s + 3 - len(spec.stages)  # a stage before the usual three has the number 0
        unit = f"residual_block{number}"
        yield from _unit_layers(_PUBLIC_UNIT, unit, (f"stage{s}_unit1",), width, stage.features, stage.stride)
        width = stage.features
        for i in range(1, stage.modules + 1):
            torch = f"attention_module{number}" + (f"_{i}" if i > 1 else "")
            names = mask_names(stage.depth)
            yield from _public_attention(torch, (f"stage{s}_attention{i}",), width, stage.depth, names)
    assert spec.tail  # each of these nets has one
    features, units, stride = spec.tail
    for i in range(1, units + 1):
        unit, path = f"residual_block{3 + i}", (f"tail_unit{i}",)
        yield from _unit_layers(_PUBLIC_UNIT, unit, path, width, features, stride if i == 1 else 1)
        width = features
    yield _Entry("mpool2.0", ("head_norm",), (width,))
    yield _Entry("fc", ("head",), (num_classes, width))


def _pytorchcv_attention(torch: str, path: tuple[str, ...], stage: Stage, spec: Spec) -> Iterator[_Entry]:
    """An attention module: an hourglass whose first skip is the trunk, and whose bottom is r units down and r up."""

    def blocks(theirs: str, ours: str, count: int, before: int = 0) -> list[tuple[str, str]]:
        return [(f"{theirs}.blocks.block{i}", f"{ours}{before + i}") for i in range(1, count + 1)]

    depth, r = stage.depth, spec.r
    units = blocks("init_blocks", "first", spec.p)
    for level in range(1, depth):
        units += blocks(f"hg.down_seq.down{level}.res_blocks", f"mask/down{level}_", r)
    units += blocks(f"hg.down_seq.down{depth}.res_blocks", "mask/bottom", r)
    for level in range(1, depth):
        units += blocks(f"hg.up_seq.up{level}.res_blocks", f"mask/up{level}_", r)
    units += blocks(f"hg.up_seq.up{depth}.res_blocks", "mask/bottom", r, before=r)
    units += blocks("hg.skip_seq.skip1", "trunk", spec.t)
    units += [(f"hg.skip_seq.skip{level + 1}.skip1", f"mask/skip{level}") for level in range(1, depth)]
    width = stage.features
    for theirs, ours in units:
        yield from _unit_layers(_PYTORCHCV_UNIT, f"{torch}.{theirs}", (*path, *ours.split("/")), width, width)
    for i in 1, 2:
        yield _Entry(f"{torch}.middle_block.conv{i}.bn", (*path, "mask", f"norm{i}"), (width,))
        yield _Entry(f"{torch}.middle_block.conv{i}.conv", (*path, "mask", f"conv{i}"), (width, width, 1, 1))
    yield from _unit_layers(_PYTORCHCV_UNIT, f"{torch}.final_block", (*path, "last1"), width, width)


def _pytorchcv_layers(name: str, channels: int, num_classes: int) -> Iterator[_Entry]:
    """All layers of a net of pytorchcv, in the order of its state dict."""
    spec = NETS[name]
    width, kernel = spec.stem.features, spec.stem.kernel_size
    yield _Entry("features.init_block.conv.conv", ("stem_conv",), (width, channels, kernel, kernel))
    yield _Entry("features.init_block.conv.bn", ("stem_norm",), (width,))
    for s, stage in enumerate(spec.stages, start=1):
        torch, path = f"features.stage{s}", (f"stage{s}_unit1",)
        yield from _unit_layers(_PYTORCHCV_UNIT, f"{torch}.unit1", path, width, stage.features, stage.stride)
        width = stage.features
        for i in range(1, stage.modules + 1):
            yield from _pytorchcv_attention(f"{torch}.unit{i + 1}", (f"stage{s}_attention{i}",), stage, spec)
    assert spec.tail  # each of these nets has one
    features, units, stride = spec.tail
    for i in range(1, units + 1):
        torch, path = f"features.stage{len(spec.stages) + 1}.unit{i}", (f"tail_unit{i}",)
        yield from _unit_layers(_PYTORCHCV_UNIT, torch, path, width, features, stride if i == 1 else 1)
        width = features
    yield _Entry("features.post_activ.bn", ("head_norm",), (width,))
    yield _Entry("output", ("head",), (num_classes, width))


class _Names(NamedTuple):
    """The names of one code: of our nets, of the first and the last layer, by which a file is known, and of all."""

    code: str
    nets: dict[str, str]
    stem: str
    head: str
    layers: Callable[[str, int, int], Iterator[_Entry]]


_NAMES = {
    "public": _Names(
        "the public PyTorch code",
        {
            "ra56_double_skip": "ResidualAttentionModel_56",
            "ra92_double_skip": "ResidualAttentionModel_92",
            "ra92_448": "ResidualAttentionModel_448input",
            "ra92_cifar_pooled": "ResidualAttentionModel_92_32input",
            "ra92_cifar": "ResidualAttentionModel_92_32input_update",
        },
        "conv1.0",
        "fc",
        _public_layers,
    ),
    "pytorchcv": _Names(
        "pytorchcv",
        {
            "ra56_double_skip": "resattnet56",
            "ra92_double_skip": "resattnet92",
            "ra128": "resattnet128",
            "ra164": "resattnet164",
            "ra200": "resattnet200",
            "ra236": "resattnet236",
            "ra452": "resattnet452",
        },
        "features.init_block.conv.conv",
        "output",
        _pytorchcv_layers,
    ),
}


def _entries(names: _Names, name: str, channels: int, num_classes: int) -> Iterator[_Entry]:
    """All arrays of a net, in the order of the PyTorch state dict."""
    for torch, path, shape in names.layers(name, channels, num_classes):
        if path is None:
            yield _Entry(f"{torch}.weight", None, shape)
        elif len(shape) == 1:
            yield _Entry(f"{torch}.weight", ("params", *path, "scale"), shape)
            yield _Entry(f"{torch}.bias", ("params", *path, "bias"), shape)
            yield _Entry(f"{torch}.running_mean", ("batch_stats", *path, "mean"), shape)
            yield _Entry(f"{torch}.running_var", ("batch_stats", *path, "var"), shape)
            yield _Entry(f"{torch}.num_batches_tracked", None, ())
        else:
            yield _Entry(f"{torch}.weight", ("params", *path, "kernel"), shape)
            if len(shape) == 2:
                yield _Entry(f"{torch}.bias", ("params", *path, "bias"), shape[:1])


def from_torch(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The variables of the net `name` from a state dict of the public PyTorch code or of pytorchcv.

    Which of the two, and how many classes and input channels, the names and shapes of the state dict tell. The running
    variance is taken as it is, though PyTorch's is the unbiased one and Flax's the biased.

    Args:
      state_dict: {PyTorch name: torch tensor or array of any float type}. The names may all begin alike, as wrappers of
        a net leave them ("module.", "_orig_mod.model."), and the whole may lie under "state_dict" or what else
        `read_torch` knows. The shortcut convolutions that the public code has and does not use, and
        `num_batches_tracked`, are dropped, and may be missing.
      name: ra56_double_skip or ra92_double_skip; ra92_448, ra92_cifar_pooled or ra92_cifar by the public code's names;
        ra128, ra164, ra200, ra236 or ra452 by pytorchcv's.

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
    state = _without_prefix(state, {entry.torch for entry in _entries(names, name, 3, 10)})
    channels = _dimension(state.get(f"{names.stem}.weight"), 1, default=3)
    entries = list(_entries(names, name, channels, _dimension(state.get(f"{names.head}.weight"), 0, default=10)))
    counters = {e.torch for e in entries if e.torch.endswith("num_batches_tracked")}
    what = f"the state dict does not fit {names.nets[name]} ({name})"
    _check_shapes(
        what,
        {key: _shape(value) for key, value in state.items() if key not in counters},
        {e.torch: e.shape for e in entries if e.path or e.torch in state.keys() - counters},
    )
    arrays = _to_float32(what, {e.torch: to_numpy(e.torch, state[e.torch]) for e in entries if e.path})
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for entry in entries:
        if entry.path:
            tree = variables
            for key in entry.path[:-1]:
                tree = tree.setdefault(key, {})
            tree[entry.path[-1]] = _to_flax(arrays[entry.torch])
    return variables


def to_torch(variables: Mapping[str, Any], name: str, names: str | None = None) -> dict[str, np.ndarray]:
    """A state dict that the net of the public PyTorch code or of pytorchcv loads with strict=True.

    `from_torch` undoes it.

    Args:
      variables: {"params": ..., "batch_stats": ...} of the net `name`.
      name: as in `from_torch`.
      names: "public" for the names of the public PyTorch code, "pytorchcv" for pytorchcv's. None: the public
        code's, where that has the net.

    Returns:
      {PyTorch name: float32 array} in PyTorch's order. The shortcut convolutions that the public code has and does
      not use are zeros, and so is `num_batches_tracked` (int64, no dimensions), which PyTorch counts and does not use
      either.

    Raises:
      ValueError: there are no such names, their code has no such net, or variables are missing, unknown or misshapen:
        the first ones are named, the others counted.
    """
    names = names or _first_with(name)
    if names not in _NAMES:
        raise ValueError(f"names is {names!r}; it must be one of {', '.join(_NAMES)}")
    theirs = _NAMES[names]
    _check_name(theirs, name)
    leaves = {path: np.array(leaf, np.float32) for path, leaf in _leaves(variables)}
    channels = _dimension(leaves.get(("params", "stem_conv", "kernel")), 2, default=3)
    classes = _dimension(leaves.get(("params", "head", "kernel")), 1, default=10)
    entries = list(_entries(theirs, name, channels, classes))
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


def their_net(name: str) -> tuple[str, str]:
    """Whose names `to_torch` gives the net `name`, "public" or "pytorchcv", and what the net is called there."""
    names = _first_with(name)
    return names, _NAMES[names].nets[name]


def _first_with(name: str) -> str:
    """The first of the codes that has the net; where none has, the one whose fault it is told as."""
    return next((names for names, theirs in _NAMES.items() if name in theirs.nets), "public")


def _check_name(names: _Names, name: str) -> None:
    if name not in names.nets:
        others = "".join(f"; {other.code} has it" for other in _NAMES.values() if name in other.nets)
        raise ValueError(f"{names.code} has no net {name!r}; it has {', '.join(names.nets)}{others}")


def _names_in(state: dict[str, Any], name: str) -> _Names:
    """The code whose stem or head is among the names, after whatever prefix; where none is, one that has the net."""
    for names in _NAMES.values():
        if any(f".{key}".endswith((f".{names.stem}.weight", f".{names.head}.weight")) for key in state):
            return names
    return _NAMES[_first_with(name)]


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
        arrays = {key: array.astype(np.float32) for key, array in arrays.items()}
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
    return np.ascontiguousarray(array.transpose(_AXES_TO_FLAX[array.ndim]))


def _to_torch(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(_AXES_TO_TORCH[array.ndim]))


_AXES_TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_AXES_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def _flax_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _AXES_TO_FLAX[len(shape)])
