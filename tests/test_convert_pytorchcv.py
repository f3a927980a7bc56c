"""State dicts of pytorchcv's resattnet*, in and out, against that package's own modules and forward pass.

pytorchcv pools 7x7 maps at the end, those of 224 px; over the whole map, as here, that is the same, and any size works.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resattn_jax.convert import from_torch, read_torch, to_torch, write_torch
from resattn_jax.models import create_model, nets
from resattn_jax.models.first_weights import variable_shapes

torch = pytest.importorskip("torch")
resattnet = pytest.importorskip("pytorchcv.models.resattnet")
torch.set_num_threads(1)  # the maps are small: more threads wait for each other, and for those of JAX

# Their nets by our names, and how many arrays of weights and statistics they have, counters left out.
NETS = {
    "ra56_double_skip": ("resattnet56", 540),
    "ra92_double_skip": ("resattnet92", 885),
    "ra128": ("resattnet128", 1320),
    "ra164": ("resattnet164", 1755),
    "ra200": ("resattnet200", 2190),
    "ra236": ("resattnet236", 2625),
    "ra452": ("resattnet452", 5475),
}
NAME = "ra56_double_skip"


def pytorchcv_net(name):
    return randomized(getattr(resattnet, NETS[name][0])(num_classes=10))


def randomized(net):
    """The net in evaluation, with random weights and statistics, none of which is its initial value.

    The statistics are near those of a batch of noise: so maps stay of the order of one through hundreds of layers, and
    no mask is all 0 or 1, which would hide what lies before it.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    net.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.normal_(generator=generator).div_(weight[0].numel() ** 0.5)
        for norm in norms:
            norm.weight.normal_(1, 0.2, generator=generator)
            norm.bias.normal_(0, 0.2, generator=generator)
            norm.momentum = None  # the statistics are the first batch's
        net.output.bias.normal_(generator=generator)
        net.train()(torch.randn(4, 3, 64, 64, generator=generator))
        for norm in norms:
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features, generator=generator)
            norm.running_var *= torch.rand(norm.num_features, generator=generator) + 0.5
            norm.num_batches_tracked.zero_()
    return net.eval()


@functools.cache
def tree_shapes(name, classes=10, channels=3):
    return variable_shapes(create_model(name, num_classes=classes), (32, 32, channels))


@pytest.mark.parametrize("name", NETS)
def test_names_shapes_and_order_are_pytorchcvs(name):
    theirs, arrays = NETS[name]
    with torch.device("meta"):  # shapes only
        net = getattr(resattnet, theirs)(in_channels=1, num_classes=7)
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    zero = np.zeros((), np.float32)  # repeated without memory
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(zero, leaf.shape), tree_shapes(name, classes=7, channels=1))
    state = to_torch(zeros, name, "pytorchcv")
    assert {key: array.shape for key, array in state.items()} == expected
    assert list(state) == list(expected)
    assert sum(not key.endswith("num_batches_tracked") for key in state) == arrays


def assert_same_logits(net, name):
    """Their weights, converted, in our net; both compute in float64. And their weights come back to the bit."""
    state = {key: value.numpy().copy() for key, value in net.state_dict().items()}
    variables = from_torch(state, name)
    back = to_torch(variables, name, "pytorchcv")
    assert back.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)

    x = np.random.default_rng(1).standard_normal((1, 64, 64, 3))
    with torch.no_grad():
        theirs = net.double()(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    with jax.enable_x64(True):
        model = create_model(name, num_classes=10, dtype=jnp.float64)
        ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(jax.tree.map(np.float64, variables), x)
        ours = np.asarray(ours)
    assert np.linalg.norm(ours - theirs) < 1e-10 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", ["ra56_double_skip", "ra92_double_skip", "ra128"])
def test_logits_are_pytorchcvs(name):
    assert_same_logits(pytorchcv_net(name), name)


def test_logits_are_pytorchcvs_with_the_units_of_resattnet452(monkeypatch):
    """Its p, t, r of 2, 4, 3, in a net of one attention module a stage."""
    stages = tuple(dataclasses.replace(stage, modules=1) for stage in nets.NETS["ra452"].stages)
    monkeypatch.setitem(nets.NETS, "ra452", dataclasses.replace(nets.NETS["ra452"], stages=stages))
    channels = [[256] * 2, [512] * 2, [1024] * 2, [2048] * 3]
    attentions = [[0, 1], [0, 1], [0, 1], [0, 0, 0]]
    net = resattnet.ResAttNet(channels, 64, attentions, att_scales=[2, 4, 3], num_classes=10)
    assert_same_logits(randomized(net), "ra452")


@pytest.fixture(scope="module")
def state():
    """A state dict of resattnet56. Tests copy it before they change it."""
    return {key: value.numpy() for key, value in pytorchcv_net(NAME).state_dict().items()}


def assert_equal_trees(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_model_out_and_in_again_is_the_same():
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree_shapes(NAME))
    assert_equal_trees(from_torch(to_torch(variables, NAME, names="pytorchcv"), NAME), variables)


def test_from_one_codes_names_to_the_others(state):
    """The two have the same net, so that a file of one becomes a file of the other."""
    public = to_torch(from_torch(state, NAME), NAME, names="public")
    theirs = "features.stage1.unit2.hg.down_seq.down1.res_blocks.blocks.block1.body.conv1.conv.weight"
    np.testing.assert_array_equal(public["attention_module1.softmax1_blocks.conv1.weight"], state[theirs])
    np.testing.assert_array_equal(public["fc.weight"], state["output.weight"])
    again = to_torch(from_torch(public, NAME), NAME, names="pytorchcv")
    for key, array in state.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


def test_a_file_of_pytorchcv_is_read_and_its_net_loads_what_is_written(state, tmp_path):
    net = pytorchcv_net(NAME)
    wrapped = torch.nn.DataParallel(net)  # whose names begin with "module."
    others = {"epoch": 3, "arch": "resattnet56", "best_acc1": torch.tensor(77.0)}
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1).state_dict()
    torch.save({**others, "state_dict": wrapped.state_dict(), "optimizer": optimizer}, tmp_path / "in.pth.tar")
    variables = from_torch(read_torch(tmp_path / "in.pth.tar"), NAME)
    assert_equal_trees(variables, from_torch(state, NAME))
    write_torch(tmp_path / "out.pth", to_torch(variables, NAME, "pytorchcv"))
    fresh = resattnet.resattnet56(num_classes=10)
    fresh.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    for key, value in fresh.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key], err_msg=key)


def test_what_does_not_fit_is_named(state):
    wrong = {key: array for key, array in state.items() if key != "features.post_activ.bn.bias"}
    wrong["output.wheight"] = np.zeros(3)
    with pytest.raises(ValueError, match="does not fit resattnet56") as error:
        from_torch(wrong, NAME)
    assert str(error.value).endswith("; missing: features.post_activ.bn.bias; unknown: output.wheight")
    with pytest.raises(ValueError, match=r"does not fit resattnet92 \(ra92_double_skip\); missing: features\.stage2"):
        from_torch(state, "ra92_double_skip")
    with pytest.raises(ValueError, match=r"does not fit resattnet128 \(ra128\); missing: features\.init_block\.conv"):
        from_torch({}, "ra128")


@pytest.mark.parametrize("name", ["ra92_cifar", "ra92_448", "ra56", "ra92", "resnet50"])
def test_nets_that_pytorchcv_has_not_are_refused_with_the_seven_there_are(state, name):
    for convert in from_torch, functools.partial(to_torch, names="pytorchcv"):
        with pytest.raises(ValueError, match=f"^pytorchcv has no net {name!r}; it has {', '.join(NETS)}"):
            convert(state, name)


def test_whose_names_a_net_has_is_told(state):
    told = r"^the public PyTorch code has no net 'ra128'; it has .*; pytorchcv has it; GluonCV has it$"
    with pytest.raises(ValueError, match=told):
        to_torch(state, "ra128", "public")
    with pytest.raises(ValueError, match=r"^names is 'timm'; it must be one of public, pytorchcv, gluoncv$"):
        to_torch(state, NAME, "timm")
