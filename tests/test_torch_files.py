"""Files of PyTorch state dicts: as PyTorch and people write them, and what else lies where they should."""

import argparse
import os
import pickle
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from resattn_jax.convert import read_torch, to_torch, write_torch
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import variable_shapes

NAME = "ra92_cifar"
WRAPPERS = ["state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema"]


def test_safetensors_needs_no_torch(tmp_path):
    shapes = variable_shapes(create_model(NAME, num_classes=10), (32, 32, 3))
    rng = np.random.default_rng(0)
    state = to_torch(jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes), NAME)
    path = tmp_path / "model.safetensors"
    code = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from resattn_jax.convert import from_torch, read_torch, to_torch, write_torch
state = to_torch(from_torch(read_torch({str(path)!r}), {NAME!r}), {NAME!r})
write_torch({str(path.with_name("again.safetensors"))!r}, state)
"""
    write_torch(path, state)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    again = read_torch(path.with_name("again.safetensors"))
    assert sorted(again) == sorted(state)
    for key, array in state.items():
        assert again[key].dtype == array.dtype
        np.testing.assert_array_equal(again[key], array)


def test_safetensors_in_bfloat16(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.asarray([1, 0.5], ml_dtypes.bfloat16)}))
    array = read_torch(path)["a"]
    assert array.dtype == np.float32
    assert array.tolist() == [1, 0.5]


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt"])
def test_pytorch_reads_what_is_written_and_we_read_it_again(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.zeros((), np.int64)}
    write_torch(path, state)
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"].tolist() == state["a"].tolist()
    assert (loaded["b"].dtype, loaded["b"].shape) == (torch.int64, ())
    assert {key: array.tolist() for key, array in read_torch(path).items()} == {"a": state["a"].tolist(), "b": 0}


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_pytorch_are_read(tmp_path, new_format):
    """The public checkpoint model_92_sgd.pkl is in the format from before PyTorch 1.6."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pkl"
    state = {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.full((4,), 0.5, dtype=torch.bfloat16)}
    torch.save({"epoch": 3, "state_dict": state}, path, _use_new_zipfile_serialization=new_format)
    read = read_torch(path)
    assert {key: (array.dtype, array.tolist()) for key, array in read.items()} == {
        "a": (np.float32, [[1, 1, 1], [1, 1, 1]]),
        "b": (np.float32, [0.5] * 4),
    }


class Hostile:
    """Unpickled as usual, it makes a file."""

    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return open, (self.victim, "w")


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt"])
@pytest.mark.parametrize("saved_by", ["pickle", "torch", "old torch"])
def test_a_hostile_file_is_refused_and_not_executed(tmp_path, suffix, saved_by):
    torch = pytest.importorskip("torch")
    victim, path = tmp_path / "victim", tmp_path / f"model{suffix}"
    content = {"fc.weight": torch.zeros(3), "fc.bias": Hostile(victim)}
    if saved_by == "pickle":
        path.write_bytes(pickle.dumps(content["fc.bias"], protocol=2))
        pickle.loads(path.read_bytes()).close()
        assert victim.exists()  # the file does what it is meant to do
        victim.unlink()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=saved_by == "torch")
    with pytest.raises(ValueError, match=str(path)) as error:
        read_torch(path)
    assert not victim.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".pth.tar", ".tar", ".ckpt", ".bin", ".t7", ".PTH", ".Tar"])
def test_files_of_pytorch_are_read_under_the_suffixes_people_give_them(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.ones(2)}, path)
    assert read_torch(path)["a"].tolist() == [1, 1]
    write_torch(path, {"b": np.zeros(3, np.float32)})
    assert torch.load(path, weights_only=True)["b"].tolist() == [0, 0, 0]


def test_the_content_of_a_file_decides_and_not_its_suffix(tmp_path):
    torch = pytest.importorskip("torch")
    content = safetensors.numpy.save({"a": np.ones(2, np.float32)})
    for suffix in ".bin", ".pt", ".SafeTensors":
        (tmp_path / f"model{suffix}").write_bytes(content)
        assert read_torch(tmp_path / f"model{suffix}")["a"].tolist() == [1, 1]
    for new_format in True, False:
        path = tmp_path / "model.safetensors"
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=new_format)
        assert read_torch(path)["a"].tolist() == [1, 1]
    write_torch(tmp_path / "new.SAFETENSORS", {"a": np.ones(2, np.float32)})
    assert (tmp_path / "new.SAFETENSORS").read_bytes() == content


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_torch("~/model.safetensors", {"a": np.ones(2, np.float32)})
    assert (tmp_path / "model.safetensors").is_file()
    assert read_torch("~/model.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_checkpoints_of_training_scripts_are_read(tmp_path, wrapper):
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {"epoch": 3, "best": 0.5, "arch": "linear", wrapper: net.state_dict(), "opt": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "model.pth.tar")
    read = read_torch(tmp_path / "model.pth.tar")
    assert {key: array.tolist() for key, array in read.items()} == {k: v.tolist() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("beside", "refused"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (np.ones(3), "numpy._core.multiarray._reconstruct"),
    ],
    ids=["namespace", "scalar", "array"],
)
def test_other_objects_in_a_file_are_refused_with_the_reason_and_advice(tmp_path, beside, refused, new_format):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({"args": beside, "state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_torch(path)
    assert str(error.value) == (
        f"{path} holds other objects than names and their tensors; save net.state_dict() alone"
        f" (Unsupported global: GLOBAL {refused} was not an allowed global by default)"
    )


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"epoch": 3, "net": net}], ids=["bare", "wrapped"])
def test_a_whole_pickled_module_is_told(tmp_path, wrap, new_format):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    torch.save(wrap(net), path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"holds a whole pickled module, which is code; save net\.state_dict") as error:
        read_torch(path)
    assert "Unsupported global: GLOBAL torch.nn.modules.container.Sequential was not" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_an_archive_of_torchscript_is_refused_with_pytorchs_reason(tmp_path):
    torch = pytest.importorskip("torch")
    torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2)).save(tmp_path / "model.pt")
    with (
        pytest.warns(UserWarning, match="TorchScript"),
        pytest.raises(ValueError, match=r"with TorchScript archives passed to ``torch\.load``$"),
    ):
        read_torch(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"is a git-lfs pointer.*git lfs pull"),
        ("<html>not found</html>", "is an HTML or XML page"),
        ("\n <!DOCTYPE html>\n<html lang=en>", "is an HTML or XML page"),
        ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an HTML or XML page"),
    ],
    ids=["empty", "git-lfs", "html", "doctype", "xml"],
)
def test_what_lies_where_a_file_should_is_told_without_torch(tmp_path, monkeypatch, suffix, content, kind):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / f"model{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} {kind}") as error:
        read_torch(path)
    assert "\n" not in str(error.value)


def test_a_folder_is_told(tmp_path):
    (tmp_path / "model.pth").mkdir()
    for path in tmp_path / "model.pth", tmp_path:
        with pytest.raises(ValueError, match=f"^{path} is a folder, not a file$"):
            read_torch(path)


def test_what_else_a_file_holds_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    for content, what in [
        ([torch.ones(3)], "it is of type list"),
        ({"epoch": 3, "weights": {"a": torch.ones(3)}}, "it has the keys epoch, weights"),
        ({"a": torch.ones(3), "epoch": 3}, "epoch is of type int, not a tensor"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"holds something else than names and their tensors: {what}$"):
            read_torch(path)


def test_damaged_files_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a": torch.ones(100, 100)}
    paths = {format: tmp_path / f"{format}.pth" for format in ("new", "old", "text", "list", "numbers")}
    torch.save(state, paths["new"])
    torch.save(state, paths["old"], _use_new_zipfile_serialization=False)
    for path in paths["new"], paths["old"]:
        path.write_bytes(path.read_bytes()[:-5000])
    paths["text"].write_text("not found")
    torch.save([torch.ones(3)], paths["list"])
    torch.save({"epoch": 3}, paths["numbers"])
    for path in paths.values():
        with pytest.raises(ValueError, match=f"{path} is damaged, or holds something else"):
            read_torch(path)


@pytest.mark.parametrize("content", [b"{}", b"\xff" * 100], ids=["text", "bytes"])
def test_damaged_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_torch(path)
    whole = safetensors.numpy.save({"a": np.ones(100, np.float32)})
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_torch(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*model\.pth"):
        read_torch(tmp_path / "model.pth")


def test_a_file_of_another_kind_is_told(tmp_path):
    for act in read_torch, lambda path: write_torch(path, {}):
        with pytest.raises(ValueError, match=r"model\.onnx.* must end in \.pkl, \.pth, \.pt, \.safetensors"):
            act(tmp_path / "model.onnx")


def test_without_torch_its_files_are_refused_with_advice(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    for act in read_torch, lambda path: write_torch(path, {}):
        with pytest.raises(ValueError, match=r"model\.pth needs PyTorch.*pip install -e '\.\[torch\]'"):
            act(path)


def test_the_module_does_not_import_torch():
    code = "import sys, resattn_jax.convert; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
