"""The nets are the published ones: against PyTorch (torch_reference.py), forward, backward and over training steps.

The reference computes in float64. Logits are ours in float32, as they are used. Training is compared in float64 on
both sides: in float32 rounding turns a ReLU close to its kink, in PyTorch as in ours, and part of the gradient with it.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
import torch_reference as reference  # noqa: E402

from resattn_jax.models import NETS  # noqa: E402
from resattn_jax.models.nets import Stage  # noqa: E402
from resattn_jax.models.network import ResidualAttentionNetwork  # noqa: E402

LOGITS = 1e-5  # relative error of logits in evaluation
TRAINING = 1e-8  # of whatever a training step gives, in float64


def spec(name, **options):
    return dataclasses.replace(NETS[name], **options)


def error(ours, theirs):
    """Relative error in the Euclidean norm."""
    return np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / np.linalg.norm(theirs)


def setup(spec, shape):
    model = ResidualAttentionNetwork(spec, num_classes=10)
    return model, reference.random_variables(model, shape[1:]), reference.images(shape)


def logits_of_both(spec, shape):
    model, variables, x = setup(spec, shape)
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    weights = reference.to_tensors(variables["params"]) | reference.to_tensors(variables["batch_stats"])
    with torch.no_grad():
        return np.asarray(ours), reference.logits(spec, weights, reference.to_nchw(x)).numpy()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ra92_cifar", (2, 32, 32, 3)),
        ("ra92_cifar_pooled", (2, 45, 33, 3)),
        ("ra56_cifar_slim", (2, 33, 45, 3)),
        ("ra56", (2, 64, 64, 3)),
        ("ra56_double_skip", (1, 97, 65, 3)),
        ("ranext56", (1, 64, 64, 3)),
    ],
)
def test_logits_of_the_named_nets(name, shape):
    ours, theirs = logits_of_both(NETS[name], shape)
    assert error(ours, theirs) < LOGITS


VARIANTS = {
    "paper": {},
    "double skip": {"wiring": "double_skip"},
    "the paper's 452": {"p": 2, "t": 4, "r": 3, "last": 2},
    "pytorchcv's 452": {"p": 2, "t": 4, "r": 3, "wiring": "double_skip"},
    "resnext, spatial, nal": {"unit": "resnext", "attention": "spatial", "learning": "nal"},
    "local convolutions, channel": {"mask": "local_convolutions", "attention": "channel"},
    "depth 4, as in 448": {"stages": (Stage(64, modules=1, depth=4, stride=1),), "wiring": "double_skip"},
    "two units, two modules": {"stages": (Stage(64, modules=2, depth=3, stride=2, units=2),), "tail": (128, 2, 2)},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_of_every_variant(options):
    """On maps of odd sizes, whose halves are no halves."""
    ours, theirs = logits_of_both(spec("ra_tiny", **options), (2, 33, 22, 3))
    assert error(ours, theirs) < LOGITS


def test_the_error_would_show_another_wiring():
    """The bound on the error means something: with the other wiring the same weights give other logits."""
    ours, _ = logits_of_both(spec("ra_tiny", wiring="double_skip"), (2, 33, 22, 3))
    _, theirs = logits_of_both(spec("ra_tiny", wiring="paper"), (2, 33, 22, 3))
    assert error(ours, theirs) > 1e3 * LOGITS


def training_step(model):
    """Compiled: (params, x, statistics, labels) -> (loss, (logits, new statistics)), (gradients, gradient of x)."""

    def loss(params, x, statistics, labels):
        variables = {"params": params, "batch_stats": statistics}
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, new["batch_stats"])

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


STEPS = {
    "ra_tiny": (NETS["ra_tiny"], (4, 8, 8, 3)),
    "double skip, channel, nal": (
        spec("ra_tiny", wiring="double_skip", attention="channel", learning="nal"),
        (4, 9, 7, 3),
    ),
    "resnext, spatial": (spec("ra_tiny", unit="resnext", attention="spatial"), (4, 8, 8, 3)),
    "ra92_cifar": (NETS["ra92_cifar"], (4, 16, 16, 3)),
}


@pytest.mark.parametrize(("spec", "shape"), STEPS.values(), ids=STEPS)
def test_a_training_step(spec, shape):
    """Logits by the batch's own statistics, the loss, the gradient of every weight and pixel, the new statistics."""
    model = ResidualAttentionNetwork(spec, num_classes=10, dtype=np.float64)
    x, labels = reference.images(shape), np.arange(shape[0]) % 10
    with jax.enable_x64(True):
        variables = reference.random_variables(model, shape[1:])
        ours = jax.tree.map(np.float64, variables)
        (loss, (logits, statistics)), (gradients, x_gradient) = training_step(model)(
            ours["params"], np.float64(x), ours["batch_stats"], labels
        )

    params = {k: v.requires_grad_() for k, v in reference.to_tensors(variables["params"]).items()}
    their_x = reference.to_nchw(x).requires_grad_()
    weights = params | reference.to_tensors(variables["batch_stats"])
    their_logits = reference.logits(spec, weights, their_x, train=True)
    their_loss = F.cross_entropy(their_logits, torch.from_numpy(labels))
    their_loss.backward()

    pairs = {
        "logits": (logits, their_logits.detach()),
        "loss": (loss, their_loss.detach()),
        "gradient of the images": (np.transpose(x_gradient, (0, 3, 1, 2)), their_x.grad),
    }
    pairs |= {f"gradient of {name}": (g, params[name].grad) for name, g in reference.to_tensors(gradients).items()}
    pairs |= {f"new {name}": (value, weights[name]) for name, value in reference.to_tensors(statistics).items()}
    errors = {name: error(*pair) for name, pair in pairs.items()}
    assert {name: value for name, value in errors.items() if not value < TRAINING} == {}


def test_running_variance_is_that_of_flax():
    """0.9 * running + 0.1 * batch, of the biased variance: PyTorch's own rule would be larger by n / (n - 1)."""
    model, variables, x = setup(NETS["ra_tiny"], (2, 8, 8, 3))
    weights = reference.to_tensors(variables)
    y = F.conv2d(reference.to_nchw(x), weights["params/stem_conv/kernel"], padding=1)
    old, mean = weights["batch_stats/stem_norm/var"], weights["batch_stats/stem_norm/mean"].clone()
    pytorch = old.clone()
    F.batch_norm(y, mean, pytorch, training=True, momentum=0.1)
    n = 2 * 8 * 8
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]["stem_norm"])
    ours = train(variables, x)
    np.testing.assert_allclose(ours["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours["var"] - 0.9 * old.numpy(), (pytorch - 0.9 * old) * (n - 1) / n, rtol=1e-4)


def test_five_steps_of_sgd():
    """Nesterov momentum and weight decay on every parameter, as torch.optim.SGD does it, from the same start.

    That is the whole of the public recipe's optimiser: a run here is a run there, up to rounding.
    """
    net = NETS["ra_tiny"]
    model = ResidualAttentionNetwork(net, num_classes=10, dtype=np.float64)
    labels = np.arange(4)
    batches = [reference.images((4, 8, 8, 3), i) for i in range(5)]

    with jax.enable_x64(True):
        start = reference.random_variables(model, (8, 8, 3))
        step = training_step(model)
        optimizer = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.01, momentum=0.9, nesterov=True))
        variables = jax.tree.map(np.float64, start)
        params, statistics = variables["params"], variables["batch_stats"]
        state = optimizer.init(params)
        for x in batches:
            (_, (_, statistics)), (gradients, _) = step(params, np.float64(x), statistics, labels)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)

    their_params = {k: v.requires_grad_() for k, v in reference.to_tensors(start["params"]).items()}
    weights = their_params | reference.to_tensors(start["batch_stats"])
    sgd = torch.optim.SGD(their_params.values(), lr=0.01, momentum=0.9, weight_decay=0.05, nesterov=True)
    for x in batches:
        sgd.zero_grad()
        logits = reference.logits(net, weights, reference.to_nchw(x), train=True)
        F.cross_entropy(logits, torch.from_numpy(labels)).backward()
        sgd.step()

    ours = reference.to_tensors(params) | reference.to_tensors(statistics)
    assert {name for name, value in ours.items() if not error(value, weights[name].detach()) < TRAINING} == set()
