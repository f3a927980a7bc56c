"""State dicts of the public PyTorch code, in and out.

The names, shapes and key counts here are that code's (github.com/tengshaofeng/ResidualAttentionNetwork-pytorch), as its
classes report them.
"""

import functools
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from resattn_jax.convert import from_torch, to_torch
from resattn_jax.models import NETS, create_model
from resattn_jax.models.first_weights import variable_shapes

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

# Its shortcut convolutions that are never used: of its 45 units, 39 in attention modules, 4 change the shape.
DEAD = 45 - 4


@functools.cache
def shapes(name, classes=10, channels=3):
    return variable_shapes(create_model(name, num_classes=classes), (32, 32, channels))


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


def test_what_comes_out_shares_no_memory_with_what_went_in():
    variables = numbered(NAME)
    state = to_torch(variables, NAME)
    for array in jax.tree.leaves(from_torch(state, NAME)):
        array[...] = -1
    assert_equal_trees(from_torch(state, NAME), variables)
    for array in state.values():
        array[...] = -1
    assert_equal_trees(variables, numbered(NAME))


def test_variables_of_a_model_are_taken_as_they_are():
    """Those that `init` gives: what comes back has its tree, shapes and types."""
    expected = shapes(NAME, classes=100, channels=1)
    variables = from_torch(to_torch(numbered(NAME, classes=100, channels=1), NAME), NAME)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(variables))


# Names of the state dicts, and where in our parameters they belong.
PLACES = {
    "ra92_cifar": {
        "conv1.0.weight": "stem_conv/kernel",
        "conv1.1.bias": "stem_norm/bias",
        "residual_block2.conv4.weight": "stage2_unit1/shortcut/kernel",
        "residual_block6.conv3.weight": "tail_unit3/conv3/kernel",
        "attention_module1.first_residual_blocks.bn1.weight": "stage1_attention1/first1/norm1/scale",
        "attention_module2_2.trunk_branches.1.conv2.weight": "stage2_attention2/trunk2/conv2/kernel",
        "attention_module1.down_residual_blocks1.bn2.weight": "stage1_attention1/mask/down1_1/norm2/scale",
        "attention_module1.skip1_connection_residual_block.bn3.bias": "stage1_attention1/mask/skip1/norm3/bias",
        "attention_module3_3.middle_2r_blocks.1.conv1.weight": "stage3_attention3/mask/bottom2/conv1/kernel",
        "attention_module1.up_residual_blocks1.conv1.weight": "stage1_attention1/mask/up1_1/conv1/kernel",
        "attention_module1.conv1_1_blocks.2.weight": "stage1_attention1/mask/conv1/kernel",
        "attention_module1.conv1_1_blocks.3.weight": "stage1_attention1/mask/norm2/scale",
        "attention_module3.last_blocks.bn2.bias": "stage3_attention1/last1/norm2/bias",
        "mpool2.0.weight": "head_norm/scale",
        "fc.weight": "head/kernel",
        "fc.bias": "head/bias",
    },
    "ra56_double_skip": {
        "attention_module1.softmax1_blocks.bn1.bias": "stage1_attention1/mask/down1_1/norm1/bias",
        "attention_module1.softmax2_blocks.bn1.bias": "stage1_attention1/mask/down2_1/norm1/bias",
        "attention_module1.softmax3_blocks.1.bn1.bias": "stage1_attention1/mask/bottom2/norm1/bias",
        "attention_module1.softmax4_blocks.bn1.bias": "stage1_attention1/mask/up2_1/norm1/bias",
        "attention_module1.softmax5_blocks.bn1.bias": "stage1_attention1/mask/up1_1/norm1/bias",
        "attention_module1.softmax6_blocks.5.weight": "stage1_attention1/mask/conv2/kernel",
        "attention_module3.softmax1_blocks.0.bn1.bias": "stage3_attention1/mask/bottom1/norm1/bias",
        "attention_module3.softmax2_blocks.0.bias": "stage3_attention1/mask/norm1/bias",
    },
    "ra92_448": {
        "residual_block0.conv1.weight": "stage1_unit1/conv1/kernel",
        "attention_module0.softmax5_blocks.bn1.bias": "stage1_attention1/mask/up3_1/norm1/bias",
        "attention_module0.softmax8_blocks.0.bias": "stage1_attention1/mask/norm1/bias",
        "attention_module3_2.last_blocks.bn1.bias": "stage4_attention2/last1/norm1/bias",
        "residual_block4.bn1.weight": "tail_unit1/norm1/scale",
    },
}


@pytest.mark.parametrize(
    ("name", "theirs", "ours"), [(name, *place) for name, places in PLACES.items() for place in places.items()]
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


def test_a_state_dict_gives_the_logits_of_the_public_net():
    """Weights under the public names, through PyTorch's functions and, converted, through our net.

    The shortcut convolutions that are not used hold NaN, so that a use would show.
    """
    torch = pytest.importorskip("torch")
    import public_net
    import torch_reference as reference

    model = create_model(NAME, num_classes=10)
    state = to_torch(reference.random_variables(model, (32, 32, 3)), NAME)  # only for shapes and sensible values
    for key, array in state.items():
        if key.endswith("conv4.weight") and array.shape[0] == array.shape[1]:
            array[...] = np.nan
    x = reference.images((2, 32, 32, 3))
    tensors = {key: torch.from_numpy(array).double() for key, array in state.items()}
    theirs = public_net.logits(tensors, reference.to_nchw(x)).numpy()
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(from_torch(state, NAME), x)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


# What a state dict may look like.


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "_orig_mod.module.", "net.module._orig_mod.model.", "1.", "a.fc."],
)
def test_names_may_all_begin_alike(state, prefix):
    prefixed = {f"{prefix}{key}": array for key, array in state.items()}
    assert_equal_trees(from_torch(prefixed, NAME), from_torch(state, NAME))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_names_may_begin_as_pytorch_leaves_them(state):
    """DataParallel and torch.compile around a module with the names of the net, and what people build around that."""
    torch = pytest.importorskip("torch")
    net = torch.nn.Module()
    for key, array in state.items():
        *parents, leaf = key.split(".")
        module = net
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module._modules[parent]
        module.register_buffer(leaf, torch.from_numpy(array))
    wrapped = torch.nn.Sequential(torch.nn.Identity(), torch.compile(torch.nn.DataParallel(net))).state_dict()
    assert next(iter(wrapped)) == "1._orig_mod.module.conv1.0.weight"
    assert_equal_trees(from_torch(wrapped, NAME), from_torch(state, NAME))


def test_a_prefix_that_some_names_have_not_stays(state):
    other = {"loss.weight": np.zeros(3, np.float32), **{f"net.{key}": array for key, array in state.items()}}
    with pytest.raises(ValueError, match=r"unknown: loss\.weight, net\.conv1\.0\.weight, .* and 936 more$"):
        from_torch(other, NAME)
    with pytest.raises(ValueError, match=r"unknown: net\.x\.weight, net\.y\.weight$"):
        from_torch({"net.x.weight": np.zeros(3), "net.y.weight": np.zeros(3)}, NAME)
    with pytest.raises(ValueError, match=r"unknown: net\.fc\.weight, weight$"):
        from_torch({"net.fc.weight": state["fc.weight"], "weight": np.zeros(3)}, NAME)


WRAPPERS = ["state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict_may_lie_in_a_checkpoint(state, wrapper, caplog):
    checkpoint = {"epoch": 300, "arch": "resattn", wrapper: state, "optimizer": {"state": {}}, "best": None}
    assert_equal_trees(from_torch(checkpoint, NAME), from_torch(state, NAME))
    assert_equal_trees(from_torch({"model": checkpoint}, NAME), from_torch(state, NAME))
    assert not caplog.messages


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model_state_dict", "model", "net"])
def test_of_weights_and_their_average_the_weights_are_taken_and_that_is_told(state, plain, average, caplog):
    zeros = {key: np.zeros_like(array) for key, array in state.items()}
    variables = from_torch({average: zeros, "epoch": 3, plain: state}, NAME)
    assert_equal_trees(variables, from_torch(state, NAME))
    assert caplog.messages == [f"there are {plain} and {average}; {plain} is taken"]


def test_a_wrapper_may_have_the_name_of_something_else(state):
    checkpoint = {"state_dict": state, "model": "ra92_cifar", "net": None}
    assert_equal_trees(from_torch(checkpoint, NAME), from_torch(state, NAME))


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


def dead_shortcuts(state):
    """The names of the shortcut convolutions that no forward pass reads: those of units which keep their shape."""
    names = [key for key in state if key.endswith("conv4.weight")]
    return [key for key in names if state[key].shape[0] == state[key].shape[1]]


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_shortcuts_that_pytorch_does_not_use_may_be_missing(state, kept):
    """All of them, or some: the public net computes the same without."""
    dead = dead_shortcuts(state)
    assert len(dead) == DEAD
    lean = {key: array for key, array in state.items() if key not in dead[kept:]}
    assert len(lean) == 940 - DEAD + kept
    assert_equal_trees(from_torch(lean, NAME), from_torch(state, NAME))


def test_shortcuts_that_pytorch_does_not_use_must_have_their_shape(state):
    dead = dead_shortcuts(state)[0]
    wrong = {**state, dead: np.zeros((7, 7, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=rf"misshapen: {re.escape(dead)} \(7, 7, 1, 1\), not \(128, 128, 1, 1\)$"):
        from_torch(wrong, NAME)


def test_shortcuts_that_pytorch_uses_must_be_there(state):
    lean = {key: array for key, array in state.items() if not key.endswith("conv4.weight")}
    with pytest.raises(ValueError, match="missing") as error:
        from_torch(lean, NAME)
    assert str(error.value).endswith("; missing: " + ", ".join(f"residual_block{i}.conv4.weight" for i in range(1, 5)))


# Refusals: one error, on one line, that names everything, or the first few of many.


def test_everything_wrong_with_a_state_dict_is_named(state):
    wrong = dict(state)
    del wrong["conv1.0.weight"], wrong["residual_block1.conv4.weight"], wrong["mpool2.0.running_var"]
    wrong["fc.wheight"] = wrong["extra.num_batches_tracked"] = np.zeros(3)
    wrong["residual_block1.conv2.weight"] = np.zeros((32, 32, 1, 1))
    wrong["fc.bias"] = "ten"
    with pytest.raises(ValueError, match="ResidualAttentionModel_92_32input_update") as error:
        from_torch(wrong, NAME)
    missing, unknown, misshapen = str(error.value).split(";")[1:]
    assert missing.split(":")[0].strip() == "missing"
    assert set(missing.split(":")[1].replace(" ", "").split(",")) == {
        "conv1.0.weight",
        "residual_block1.conv4.weight",
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
    with pytest.raises(ValueError, match=r"missing: attention_module1\.softmax1_blocks\.bn1\.weight, .* and \d+ more;"):
        from_torch(state, "ra92_double_skip")


@pytest.mark.parametrize("nothing", [{}, {"state_dict": {}}])
def test_an_empty_state_dict_misses_everything(nothing):
    with pytest.raises(ValueError, match="missing") as error:
        from_torch(nothing, NAME)
    named, others = str(error.value).split(": ")[1].split(" and ")
    assert named.split(", ")[:2] == ["conv1.0.weight", "conv1.1.weight"]
    assert len(named.split(", ")) == 5
    assert others == f"{940 - 149 - DEAD - 5} more"


@pytest.mark.parametrize("other", [None, [1, 2], np.zeros(3), {"state_dict": 5}])
def test_what_is_no_state_dict_is_refused(other):
    with pytest.raises(ValueError, match="mapping of names to arrays"):
        from_torch(other, NAME)


def endless():
    """A mapping that contains itself, which a pickle can hold."""
    mapping = {}
    mapping["model"] = mapping
    return mapping


@pytest.mark.parametrize(
    ("other", "keys"),
    [
        ({"epoch": 3, "weights": {"fc.weight": np.zeros(3)}}, "epoch, weights"),
        ({"epoch": np.zeros(()), "weights": {"fc.weight": np.zeros(3)}}, "weights, epoch"),
        ({"state_dict": None, "epoch": 3}, "state_dict, epoch"),
        ({"model": {"name": "ra92_cifar"}}, "name"),
        ({f"key{i}": i for i in range(1000)}, "key0, key1, key2, key3, key4 and 995 more"),
        (endless(), "model"),
    ],
    ids=["unknown", "with a tensor", "no mapping", "settings", "many", "endless"],
)
def test_what_wraps_no_state_dict_is_refused_with_its_keys(other, keys):
    with pytest.raises(ValueError, match=f"mapping of names to arrays; it has the keys {keys}$"):
        from_torch(other, NAME)


def test_an_error_about_names_is_short_and_on_one_line(state):
    """Whatever the names are: 900 that are missing, 900 that are not known, long ones and ones of several lines."""
    renamed = {f"block{i}.{key}": array for i, (key, array) in enumerate(state.items())}
    with pytest.raises(ValueError, match=r"missing: .* and 745 more; unknown: .* and 935 more$") as error:
        from_torch(renamed, NAME)
    assert len(str(error.value)) < 700
    wild = {f"{i}{'x' * 10_000}\n\x1b[2J": array for i, array in enumerate(state.values())}
    with pytest.raises(ValueError, match="unknown: '0xxx") as error:
        from_torch(wild, NAME)
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(state, value):
    bad = ["conv1.1.running_var", "attention_module2.last_blocks.conv3.weight", "fc.bias"]
    changed = {**state, **{key: state[key].copy() for key in bad}}
    for key in bad:
        changed[key].flat[-1] = value
    total = 940 - 149 - DEAD
    with pytest.raises(ValueError, match=f"; 3 of its {total} arrays hold NaN or infinity, first {re.escape(bad[0])}$"):
        from_torch(changed, NAME)


def test_weights_that_float32_cannot_hold_are_refused(state):
    with pytest.raises(ValueError, match=r"1 of its 750 arrays hold NaN or infinity, first fc\.bias$"):
        from_torch({**state, "fc.bias": np.full(10, 1e39)}, NAME)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64"])
def test_weights_that_are_no_floats_are_refused(state, dtype):
    changed = {**state, **{key: state[key].astype(dtype) for key in ("mpool2.0.weight", "fc.weight")}}
    with pytest.raises(ValueError, match=rf"; 2 of its 750 arrays are no floats, first mpool2\.0\.weight: {dtype}$"):
        from_torch(changed, NAME)


def test_tensors_that_numpy_has_not_are_refused(state):
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(state["fc.weight"])
    for kind in weight.to_sparse(), weight.to("meta"), weight.to(torch.float8_e5m2):
        with pytest.raises(ValueError, match=r"^fc\.weight is no array for numpy: ") as error:
            from_torch({**state, "fc.weight": kind}, NAME)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ra56", "ra56_cifar", "ra128", "resnet50"])
def test_other_nets_are_refused_with_the_five_there_are(state, name):
    for convert in from_torch, functools.partial(to_torch, names="public"):
        with pytest.raises(ValueError, match=f"{name!r}; it has {', '.join(KEYS)}"):
            convert(state, name)
