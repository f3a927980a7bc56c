"""State dicts of the public PyTorch code, in and out.

The names, shapes and key counts here are that code's (github.com/tengshaofeng/ResidualAttentionNetwork-pytorch), as its
classes report them.
"""

import functools
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from resattn_jax.convert import from_torch, read_torch, to_torch, write_torch
from resattn_jax.models import NETS, create_model

# Entries of the state dict, of these `num_batches_tracked`, which a state dict from before PyTorch 0.4.1 has not, and
# values of the running statistics.
KEYS = {
    "ra56_double_skip": (676, 107, 72_704),
    "ra92_double_skip": (1111, 176, 133_632),
    "ra92_448": (1427, 226, 140_288),
    "ra92_cifar_pooled": (940, 149, 61_056),
    "ra92_cifar": (940, 149, 61_056),
}

# The smallest of the five, and quick to make.
NAME = "ra92_cifar"


@functools.cache
def shapes(name, classes=10, channels=3):
    model = create_model(name, num_classes=classes)
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))


def numbered(name, **sizes):
    """Variables in which every value of an array is another one, and no two arrays begin alike."""
    leaves, tree = jax.tree.flatten(shapes(name, **sizes))
    arrays = [
        np.arange(i, i + np.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


@pytest.fixture(scope="module")
def state():
    """A state dict of ra92_cifar. Tests copy it before they change it."""
    rng = np.random.default_rng(0)
    normal = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes(NAME))
    return to_torch(normal, NAME)


def assert_equal_trees(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# Out and in again.


@pytest.mark.parametrize("name", KEYS)
def test_out_and_in_again_is_the_identity(name):
    variables = numbered(name)
    state = to_torch(variables, name)
    assert_equal_trees(from_torch(state, name), variables)
    keys, counters, statistics = KEYS[name]
    assert len(state) == keys
    assert sum(key.endswith("num_batches_tracked") for key in state) == counters
    assert sum(array.size for key, array in state.items() if "running_" in key) == statistics
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32), np.dtype(np.int64)}


def test_variables_of_a_model_are_taken_as_they_are():
    """Those that `init` gives: what comes back has its tree, shapes and types."""
    expected = shapes(NAME, classes=100, channels=1)
    variables = from_torch(to_torch(numbered(NAME, classes=100, channels=1), NAME), NAME)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("ra92_cifar", "conv1.0.weight", "stem_conv/kernel"),
        ("ra92_cifar", "conv1.1.bias", "stem_norm/bias"),
        ("ra92_cifar", "residual_block2.conv4.weight", "stage2_unit1/shortcut/kernel"),
        ("ra92_cifar", "residual_block6.conv3.weight", "tail_unit3/conv3/kernel"),
        ("ra92_cifar", "attention_module1.first_residual_blocks.bn1.weight", "stage1_attention1/first1/norm1/scale"),
        ("ra92_cifar", "attention_module2_2.trunk_branches.1.conv2.weight", "stage2_attention2/trunk2/conv2/kernel"),
        (
            "ra92_cifar",
            "attention_module1.down_residual_blocks1.bn2.weight",
            "stage1_attention1/mask/down1_1/norm2/scale",
        ),
        (
            "ra92_cifar",
            "attention_module1.skip1_connection_residual_block.bn3.bias",
            "stage1_attention1/mask/skip1/norm3/bias",
        ),
        (
            "ra92_cifar",
            "attention_module3_3.middle_2r_blocks.1.conv1.weight",
            "stage3_attention3/mask/bottom2/conv1/kernel",
        ),
        (
            "ra92_cifar",
            "attention_module1.up_residual_blocks1.conv1.weight",
            "stage1_attention1/mask/up1_1/conv1/kernel",
        ),
        ("ra92_cifar", "attention_module1.conv1_1_blocks.2.weight", "stage1_attention1/mask/conv1/kernel"),
        ("ra92_cifar", "attention_module1.conv1_1_blocks.3.weight", "stage1_attention1/mask/norm2/scale"),
        ("ra92_cifar", "attention_module3.last_blocks.bn2.bias", "stage3_attention1/last1/norm2/bias"),
        ("ra92_cifar", "mpool2.0.weight", "head_norm/scale"),
        ("ra92_cifar", "fc.weight", "head/kernel"),
        ("ra92_cifar", "fc.bias", "head/bias"),
        ("ra56_double_skip", "attention_module1.softmax1_blocks.bn1.bias", "stage1_attention1/mask/down1_1/norm1/bias"),
        ("ra56_double_skip", "attention_module1.softmax2_blocks.bn1.bias", "stage1_attention1/mask/down2_1/norm1/bias"),
        (
            "ra56_double_skip",
            "attention_module1.softmax3_blocks.1.bn1.bias",
            "stage1_attention1/mask/bottom2/norm1/bias",
        ),
        ("ra56_double_skip", "attention_module1.softmax4_blocks.bn1.bias", "stage1_attention1/mask/up2_1/norm1/bias"),
        ("ra56_double_skip", "attention_module1.softmax5_blocks.bn1.bias", "stage1_attention1/mask/up1_1/norm1/bias"),
        ("ra56_double_skip", "attention_module1.softmax6_blocks.5.weight", "stage1_attention1/mask/conv2/kernel"),
        (
            "ra56_double_skip",
            "attention_module3.softmax1_blocks.0.bn1.bias",
            "stage3_attention1/mask/bottom1/norm1/bias",
        ),
        ("ra56_double_skip", "attention_module3.softmax2_blocks.0.bias", "stage3_attention1/mask/norm1/bias"),
        ("ra92_448", "residual_block0.conv1.weight", "stage1_unit1/conv1/kernel"),
        ("ra92_448", "attention_module0.softmax5_blocks.bn1.bias", "stage1_attention1/mask/up3_1/norm1/bias"),
        ("ra92_448", "attention_module0.softmax8_blocks.0.bias", "stage1_attention1/mask/norm1/bias"),
        ("ra92_448", "attention_module3_2.last_blocks.bn1.bias", "stage4_attention2/last1/norm1/bias"),
        ("ra92_448", "residual_block4.bn1.weight", "tail_unit1/norm1/scale"),
    ],
)
def test_weights_go_where_they_belong(name, theirs, ours):
    """One of each part. Kernels are [out, in, k, k] there and [k, k, in, out] here; linear ones are transposed."""
    variables = numbered(name)
    leaf = functools.reduce(dict.__getitem__, ours.split("/"), variables["params"])
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim]
    np.testing.assert_array_equal(_converted(name)[theirs], leaf.transpose(axes))


@functools.lru_cache(maxsize=1)  # some hundred MB each
def _converted(name):
    return to_torch(numbered(name), name)


def test_running_statistics_go_where_they_belong():
    state, statistics = _converted(NAME), numbered(NAME)["batch_stats"]
    np.testing.assert_array_equal(state["conv1.1.running_mean"], statistics["stem_norm"]["mean"])
    np.testing.assert_array_equal(state["conv1.1.running_var"], statistics["stem_norm"]["var"])


@pytest.mark.parametrize("name", KEYS)
def test_shortcuts_that_pytorch_does_not_use_are_zeros(name):
    """They have a convolution in every unit and use it where channels or stride change: 4 or 5 first units."""
    state = _converted(name)
    live = {key for key, array in state.items() if key.endswith("conv4.weight") and array.any()}
    stages = range(len(NETS[name].stages) + 1)
    assert live == {f"residual_block{4 - i}.conv4.weight" for i in stages}
    dead = [array for key, array in state.items() if key.endswith("conv4.weight") and key not in live]
    assert all(array.shape == (array.shape[0], array.shape[0], 1, 1) for array in dead)


def test_shortcuts_that_pytorch_does_not_use_are_dropped(state):
    dead = "attention_module1.last_blocks.conv4.weight"
    changed = {**state, dead: np.full_like(state[dead], 7)}
    assert_equal_trees(from_torch(changed, NAME), from_torch(state, NAME))


def public_logits(state, x):
    """What the public net ra92_cifar computes, said in the names of its own state dict: [B, 3, 32, 32] -> [B, 10]."""
    import torch
    import torch.nn.functional as F

    def conv(at, x, stride=1):
        weight = state[f"{at}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm_relu(at, x):
        mean, var, weight, bias = (state[f"{at}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    def unit(at, x, stride=1):
        pre = norm_relu(f"{at}.bn1", x)
        y = conv(f"{at}.conv2", norm_relu(f"{at}.bn2", conv(f"{at}.conv1", pre)), stride)
        y = conv(f"{at}.conv3", norm_relu(f"{at}.bn3", y))
        return y + (x if x.shape == y.shape else conv(f"{at}.conv4", pre, stride))

    def half(x):
        return F.max_pool2d(x, 3, 2, 1)

    def resize(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

    def attention(at, x, depth):
        x = unit(f"{at}.first_residual_blocks", x)
        trunk = unit(f"{at}.trunk_branches.1", unit(f"{at}.trunk_branches.0", x))
        y = half(x) if depth else x
        if depth == 2:
            down = unit(f"{at}.down_residual_blocks1", y)
            y = half(down)
        y = unit(f"{at}.middle_2r_blocks.1", unit(f"{at}.middle_2r_blocks.0", y))
        if depth == 2:
            y = resize(y, down) + down + unit(f"{at}.skip1_connection_residual_block", down)
            y = unit(f"{at}.up_residual_blocks1", y)
        if depth:
            y = resize(y, trunk) + trunk
        y = conv(f"{at}.conv1_1_blocks.2", norm_relu(f"{at}.conv1_1_blocks.0", y))
        y = conv(f"{at}.conv1_1_blocks.5", norm_relu(f"{at}.conv1_1_blocks.3", y))
        return unit(f"{at}.last_blocks", trunk + torch.sigmoid(y) * trunk)

    x = norm_relu("conv1.1", conv("conv1.0", x))
    x = attention("attention_module1", unit("residual_block1", x), depth=2)
    x = attention("attention_module2", unit("residual_block2", x, stride=2), depth=1)
    x = attention("attention_module2_2", x, depth=1)
    x = attention("attention_module3", unit("residual_block3", x, stride=2), depth=0)
    x = attention("attention_module3_3", attention("attention_module3_2", x, depth=0), depth=0)
    x = unit("residual_block6", unit("residual_block5", unit("residual_block4", x)))
    return F.linear(norm_relu("mpool2.0", x).mean((2, 3)), state["fc.weight"], state["fc.bias"])


def test_a_state_dict_gives_the_logits_of_the_public_net():
    """Weights under the public names, through PyTorch's functions and, converted, through our net.

    The shortcut convolutions that are not used hold NaN, so that a use would show.
    """
    torch = pytest.importorskip("torch")
    import torch_reference as reference

    model = create_model(NAME, num_classes=10)
    state = to_torch(reference.random_variables(model, (32, 32, 3)), NAME)  # only for shapes and sensible values
    for key, array in state.items():
        if key.endswith("conv4.weight") and array.shape[0] == array.shape[1]:
            array[...] = np.nan
    x = reference.images((2, 32, 32, 3))
    tensors = {key: torch.from_numpy(array).double() for key, array in state.items()}
    theirs = public_logits(tensors, reference.to_nchw(x)).numpy()
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(from_torch(state, NAME), x)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


# What a state dict may look like.


def test_names_may_begin_with_module(state):
    prefixed = {f"module.{key}": array for key, array in state.items()}
    assert_equal_trees(from_torch(prefixed, NAME), from_torch(state, NAME))


def test_a_state_dict_may_lie_in_a_checkpoint(state):
    assert_equal_trees(from_torch({"epoch": 300, "state_dict": state}, NAME), from_torch(state, NAME))


def test_counters_of_batches_may_be_missing(state):
    old = {key: array for key, array in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) == 940 - 149
    assert_equal_trees(from_torch(old, NAME), from_torch(state, NAME))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_become_float32(state, dtype):
    """As numpy arrays; each value survives exactly what its own type holds of it."""
    other = {key: array.astype(dtype) for key, array in state.items()}
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), from_torch(state, NAME))
    variables = from_torch(other, NAME)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert_equal_trees(variables, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_tensors_become_float32(state, dtype):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(array).to(getattr(torch, dtype)) for key, array in state.items()}
    tensors["fc.weight"].requires_grad_()
    variables = from_torch(tensors, NAME)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], tensors["fc.weight"].detach().float().T)


def test_variables_do_not_share_memory_with_the_state_dict(state):
    copied = {key: array.copy() for key, array in state.items()}
    variables = from_torch(copied, NAME)
    for array in copied.values():
        array[...] = 0
    assert_equal_trees(variables, from_torch(state, NAME))


# Refusals: one error that names everything.


def test_everything_wrong_with_a_state_dict_is_named(state):
    wrong = dict(state)
    del wrong["conv1.0.weight"], wrong["attention_module1.last_blocks.conv4.weight"], wrong["mpool2.0.running_var"]
    wrong["fc.wheight"] = wrong["extra.num_batches_tracked"] = np.zeros(3)
    wrong["residual_block1.conv2.weight"] = np.zeros((32, 32, 1, 1))
    wrong["fc.bias"] = "ten"
    with pytest.raises(ValueError, match="ResidualAttentionModel_92_32input_update") as error:
        from_torch(wrong, NAME)
    missing, unknown, misshapen = str(error.value).split(";")[1:]
    assert missing.split(":")[0].strip() == "missing"
    assert set(missing.split(":")[1].replace(" ", "").split(",")) == {
        "conv1.0.weight",
        "attention_module1.last_blocks.conv4.weight",
        "mpool2.0.running_var",
    }
    assert unknown.strip() == "unknown: fc.wheight, extra.num_batches_tracked"
    assert misshapen.strip() == (
        "misshapen: residual_block1.conv2.weight (32, 32, 1, 1), not (32, 32, 3, 3), fc.bias (), not (10,)"
    )


def test_everything_wrong_with_variables_is_named(state):
    variables = from_torch(state, NAME)
    variables["params"]["stem"] = variables["params"].pop("stem_conv")
    variables["batch_stats"]["head_norm"]["mean"] = np.zeros(3)
    with pytest.raises(ValueError, match="do not fit ra92_cifar") as error:
        to_torch(variables, NAME)
    assert str(error.value).endswith(
        "; missing: params/stem_conv/kernel; unknown: params/stem/kernel"
        "; misshapen: batch_stats/head_norm/mean (3,), not (1024,)"
    )


def test_a_state_dict_of_another_net_is_refused(state):
    with pytest.raises(ValueError, match=r"conv1\.0\.weight \(32, 3, 3, 3\), not \(32, 3, 5, 5\)"):
        from_torch(state, "ra92_cifar_pooled")
    with pytest.raises(ValueError, match=r"missing: .*attention_module1\.softmax6_blocks\.2\.weight"):
        from_torch(state, "ra92_double_skip")


@pytest.mark.parametrize("nothing", [{}, {"state_dict": {}}])
def test_an_empty_state_dict_misses_everything(nothing):
    with pytest.raises(ValueError, match="missing") as error:
        from_torch(nothing, NAME)
    assert str(error.value).count(",") == 940 - 149 - 1


@pytest.mark.parametrize("other", [None, [1, 2], np.zeros(3), {"state_dict": 5}])
def test_what_is_no_state_dict_is_refused(other):
    with pytest.raises(ValueError, match="mapping of names to arrays"):
        from_torch(other, NAME)


@pytest.mark.parametrize("name", ["ra56", "ra56_cifar", "ra128", "resnet50"])
def test_other_nets_are_refused_with_the_five_there_are(state, name):
    for convert in from_torch, to_torch:
        with pytest.raises(ValueError, match=f"{name!r}; it has {', '.join(KEYS)}"):
            convert(state, name)


# Files.


def test_safetensors_needs_no_torch(state, tmp_path):
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


def test_damaged_files_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a": torch.ones(100, 100)}
    paths = {format: tmp_path / f"{format}.pth" for format in ("new", "old", "text", "empty", "list", "numbers")}
    torch.save(state, paths["new"])
    torch.save(state, paths["old"], _use_new_zipfile_serialization=False)
    for path in paths["new"], paths["old"]:
        path.write_bytes(path.read_bytes()[:-5000])
    paths["text"].write_text("<html>not found</html>")
    paths["empty"].touch()
    torch.save([torch.ones(3)], paths["list"])
    torch.save({"epoch": 3}, paths["numbers"])
    for path in paths.values():
        with pytest.raises(ValueError, match=f"{path} is damaged, or holds something else"):
            read_torch(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100], ids=["empty", "text", "bytes"])
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
        with pytest.raises(ValueError, match=r"model\.npz.* must end in \.pkl, \.pth, \.pt, \.safetensors"):
            act(tmp_path / "model.npz")


def test_without_torch_its_files_are_refused_with_advice(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    path.touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    for act in read_torch, lambda path: write_torch(path, {}):
        with pytest.raises(ValueError, match=r"model\.pth needs PyTorch.*pip install -e '\.\[torch\]'"):
            act(path)


def test_the_module_does_not_import_torch():
    code = "import sys, resattn_jax.convert; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
