"""Weights by GluonCV's names, in and out. MXNet is not here: what its nets have is worked out from their definition.

gluoncv/model_zoo/residual_attentionnet.py 0.11. A unit has three norms of four arrays and three convolutions, and a
fourth convolution where the shape changes. A module with d poolings has p + t + 1 units around its mask and in it, of
each pooling but the last, r down, one that skips and r up, and 2r at the bottom; then twice a norm and a convolution.
"""

import re
import struct

import jax
import numpy as np
import pytest
from helpers import random_variables

from resattn_jax.convert import from_torch, to_torch
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.naming import NAMES, arrays_of
from resattn_jax.torch_files import read_torch, write_torch

# Our name: (modules of the three stages, their poolings, p, t, r).
NETS = {
    "ra56_double_skip": ((1, 1, 1), (3, 2, 1), (1, 2, 1)),
    "ra92_double_skip": ((1, 2, 3), (3, 2, 1), (1, 2, 1)),
    "ra128": ((2, 3, 4), (3, 2, 1), (1, 2, 1)),
    "ra164": ((3, 4, 5), (3, 2, 1), (1, 2, 1)),
    "ra200": ((4, 5, 6), (3, 2, 1), (1, 2, 1)),
    "ra236": ((5, 6, 7), (3, 2, 1), (1, 2, 1)),
    "ra452": ((5, 6, 7), (3, 2, 1), (2, 4, 3)),
    "ra56_cifar": ((1, 1, 1), (2, 1, 0), (1, 2, 1)),
    "ra92_cifar": ((1, 2, 3), (2, 1, 0), (1, 2, 1)),
}
NAME = "ra56_double_skip"
UNIT, HEAD = 3 * 4 + 3, 2 * (4 + 1)


def counted(name):
    """The number of arrays of a net."""
    modules, poolings, (p, t, r) = NETS[name]
    units = [p + t + 1 + max(d - 1, 0) * (2 * r + 1) + 2 * r for d in poolings]
    of_modules = sum(count * (UNIT * n + HEAD) for count, n in zip(modules, units, strict=True))
    return 1 + 4 + of_modules + 6 * UNIT + 4 + 4 + 2  # stem, modules, other units, four shortcuts, norm, last layer


def state_of(name):
    """What a file has of a net of grey pictures and seven classes: {name: shape}, in its order."""
    return {entry.theirs: entry.shape for entry in arrays_of(NAMES["gluoncv"], name, 1, 7)}


@pytest.mark.parametrize("name", NETS)
def test_numbers_of_arrays_are_those_of_the_definition(name):
    state = state_of(name)
    assert len(state) == counted(name)
    assert not [key for key in state if "num_batches" in key]
    assert {key.rpartition(".")[2] for key in state} == {
        "weight", "bias", "gamma", "beta", "running_mean", "running_var"
    }  # fmt: skip
    assert [key for key in state if key.endswith("bias")] == ["fc.bias"]


def test_names_and_shapes_are_those_of_the_definition():
    """By hand, of the first and the last arrays, a shortcut, and a module without a pooling."""
    state = state_of("ra92_cifar")
    assert list(state.items())[:8] == [
        ("conv1.0.weight", (32, 1, 3, 3)),
        ("conv1.1.gamma", (32,)),
        ("conv1.1.beta", (32,)),
        ("conv1.1.running_mean", (32,)),
        ("conv1.1.running_var", (32,)),
        ("residual_block1.bn1.gamma", (32,)),
        ("residual_block1.bn1.beta", (32,)),
        ("residual_block1.bn1.running_mean", (32,)),
    ]
    assert list(state.items())[-3:] == [
        ("mpool2.0.running_var", (1024,)), ("fc.weight", (7, 1024, 1, 1)), ("fc.bias", (7,))
    ]  # fmt: skip
    assert state["residual_block3.conv4.weight"] == (512, 256, 1, 1)
    assert "residual_block5.conv4.weight" not in state
    module = [key.removeprefix("attention_module3.2.") for key in state if key.startswith("attention_module3.2.")]
    parts = list(dict.fromkeys(re.sub(r"\.(bn|conv)\d\..*|\.(weight|gamma|beta|running.*)", "", key) for key in module))
    assert parts == [
        "first_residual_blocks.0", "trunk_branches.0", "trunk_branches.1", "softmax1_blocks.0", "softmax1_blocks.1",
        "softmax2_blocks.0", "softmax2_blocks.2", "softmax2_blocks.3", "softmax2_blocks.5", "last_blocks",
    ]  # fmt: skip
    assert state["attention_module1.0.skip1_connection_residual_block.conv2.weight"] == (32, 32, 3, 3)


def renamed(key):
    """The public PyTorch code's name of one of GluonCV's arrays of a net that both have."""
    key = re.sub(r"^(attention_module\d)\.(\d)", lambda m: m[1] + f"_{int(m[2]) + 1}" * (m[2] != "0"), key)
    stage = re.match(r"attention_module(\d)", key)
    bottom = f"softmax{4 - int(stage[1])}_blocks" if stage else ""  # of two units, so that the first has its number
    single = r"(first_residual_blocks|softmax\d_blocks)\.0\.(?=bn|conv)"
    key = re.sub(single, lambda m: m[0] if m[1] == bottom else f"{m[1]}.", key)
    return key.replace("gamma", "weight").replace("beta", "bias")


@pytest.fixture(scope="module")
def net():
    """(variables, GluonCV's state) of the 56 at random."""
    variables = random_variables(create_model(NAME, num_classes=10), (64, 64, 3))
    return variables, to_torch(variables, NAME, "gluoncv")


def test_arrays_have_the_places_of_the_public_codes(net):
    """GluonCV's net is the public code's, so an array goes where that code's of the same part goes."""
    variables, state = net
    public = to_torch(variables, NAME, "public")
    mine = {renamed(key): array for key, array in state.items()}
    unused = {key for key in public.keys() - mine.keys() if not key.endswith("num_batches_tracked")}
    assert all(re.search(r"conv4\.weight$", key) and not public[key].any() for key in unused)
    assert mine.keys() <= public.keys()
    for key, array in mine.items():
        np.testing.assert_array_equal(array.reshape(public[key].shape), public[key], err_msg=key)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_there_and_back_is_the_same():
    shapes = variable_shapes(create_model("ra56_cifar", num_classes=10), (32, 32, 3))
    variables = jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape, np.float32), shapes)
    assert_same(from_torch(to_torch(variables, "ra56_cifar", "gluoncv"), "ra56_cifar"), variables)


@pytest.mark.parametrize("name", [name for name in NETS if "cifar" not in name])
def test_arrays_are_those_that_pytorchcv_has_of_the_same_net(name):
    """Their places in our trees, of which test_convert_pytorchcv.py shows that they are the right ones."""
    ours, theirs = (
        {e.path: e.shape[:2] if e.path[1] == "head" else e.shape for e in arrays_of(NAMES[code], name, 3, 10) if e.path}
        for code in ("gluoncv", "pytorchcv")
    )
    assert ours == theirs


def test_a_net_that_it_does_not_have_or_another_depth_is_told(net):
    _, state = net
    with pytest.raises(ValueError, match=r"^GluonCV has no net 'ra92_448'; it has .*; the public PyTorch code has it$"):
        from_torch(state, "ra92_448")
    with pytest.raises(ValueError, match=r"does not fit residualattentionnet92 .*missing: attention_module2\.1\.first"):
        from_torch(state, "ra92_double_skip")
    with pytest.raises(ValueError, match=r"^the public PyTorch code has no net 'ra56_cifar'.*; GluonCV has it$"):
        to_torch({}, "ra56_cifar")


# ---- Files.


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_that_need_no_mxnet(net, kind, tmp_path):
    _, state = net
    some = {key: state[key] for key in ("conv1.0.weight", "conv1.1.gamma", "fc.bias")}
    write_torch(tmp_path / f"net.{kind}", some)
    assert_same(read_torch(tmp_path / f"net.{kind}"), some)


def test_params_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"net\.params is read alone; write \.npz"):
        write_torch(tmp_path / "net.params", {})


def params_file(arrays, magic=0xF993FAC9):
    """What `save_parameters` writes, from src/ndarray/ndarray.cc of MXNet 1.9: little-endian, no padding."""
    data = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for array in arrays.values():
        if magic == 0xF993FAC9:  # storage type, dense; number of axes; axes
            data += struct.pack(f"<Iii{array.ndim}q", magic, 0, array.ndim, *array.shape)
        elif magic == 0xF993FAC8:
            data += struct.pack(f"<Ii{array.ndim}q", magic, array.ndim, *array.shape)
        else:  # the oldest, which begins with the number of axes
            data += struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape)
        kind = {"float32": 0, "float64": 1, "float16": 2, "int64": 6}[str(array.dtype)]
        data += struct.pack("<iii", 1, 0, kind) + array.tobytes()  # on the CPU, the first
    data += struct.pack("<Q", len(arrays))
    for name in arrays:
        data += struct.pack("<Q", len(name.encode())) + name.encode()
    return data


@pytest.mark.parametrize("magic", [0xF993FAC9, 0xF993FAC8, 0])
def test_mxnets_own_files(magic, tmp_path):
    arrays = {"a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1), "größe": np.array([1, 2], np.float16)}
    path = tmp_path / "net.params"
    path.write_bytes(params_file(arrays, magic))
    found = read_torch(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        found[name] += 1  # it may be written


def test_a_file_of_mxnet_worked_by_hand(tmp_path):
    """One array, [[1, 2]] of float32, called b."""
    data = bytes.fromhex(
        "1201000000000000" "0000000000000000" "0100000000000000"  # what it is, nothing, one array
        "c9fa93f9" "00000000" "02000000" "0100000000000000" "0200000000000000"  # version, dense, two axes of 1 and 2
        "01000000" "00000000" "00000000" "0000803f" "00000040"  # CPU 0, float32, 1.0, 2.0
        "0100000000000000" "0100000000000000" "62"  # one name, of one letter
    )  # fmt: skip
    (tmp_path / "net.params").write_bytes(data)
    [(name, array)] = read_torch(tmp_path / "net.params").items()
    assert name == "b"
    np.testing.assert_array_equal(array, np.array([[1, 2]], np.float32))


def test_a_damaged_file_of_mxnet_is_one_line(tmp_path):
    whole = params_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float64)})
    path = tmp_path / "net.params"
    for size in range(8, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"net\.params is damaged") as told:
            read_torch(path)
        assert "\n" not in str(told.value)
    for at, byte in ((24, 0), (28, 1), (32, 200), (36, 255), (60, 9)):  # version, storage, axes, an axis, type
        path.write_bytes(whole[:at] + bytes([byte]) * 4 + whole[at + 4 :])
        with pytest.raises(ValueError, match=r"net\.params is damaged"):
            read_torch(path)


def test_a_broken_npz_or_one_with_objects_is_one_line(tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"net\.npz is damaged.*"):
        read_torch(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"net\.npz is damaged"):
        read_torch(path)
