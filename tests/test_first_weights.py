"""The first weights of a run: the distributions of the papers and of `model.init`, and a function of the seed alone."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import assert_same_bits, built

from resattn_jax.models import create_model
from resattn_jax.models.first_weights import first_variables, variable_shapes


@functools.cache
def net(init, name="ra_tiny"):
    """A net, and {name of a variable: its shape}."""
    model = create_model(name, num_classes=10, init=init)
    side = 32 if "tiny" in name else 224
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    return model, jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def drawn(init, seed=0, name="ra_tiny"):
    """{name of a variable: its first value}."""
    return flatten_dict(first_variables(*net(init, name), seed), sep="/")


def kernels(init, name="ra_tiny"):
    return {k: v for k, v in drawn(init, name=name).items() if k.endswith("/kernel")}


@pytest.mark.parametrize("name", ["ra56", "ranext56", "ra56_double_skip", "ra92_cifar_pooled"])
def test_shapes_are_those_of_flaxs_init_without_its_draws(name):
    model, shapes = net("pytorch", name)
    assert variable_shapes(model, (224, 224, 3)) == shapes


@pytest.mark.parametrize("init", ["he_fan_in", "he_fan_out", "pytorch"])
def test_they_are_the_tree_of_flax_with_its_constants(init):
    """Scales, biases and statistics are what the layers say; names, shapes and dtypes too."""
    model, shapes = net(init)

    def constants():
        variables = flatten_dict(
            model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False), sep="/"
        )
        return {k: v for k, v in variables.items() if not k.endswith("kernel") and k != "params/head/bias"}

    values = first_variables(model, shapes, 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), values) == jax.tree.map(
        lambda x: (x.shape, x.dtype), dict(shapes)
    )
    flat = flatten_dict(values, sep="/")
    expected = jax.device_get(jax.jit(constants)())
    assert len(expected) > 100
    assert_same_bits({k: flat[k] for k in expected}, expected)


@pytest.mark.parametrize(
    ("init", "reads", "kurtosis"),
    [("he_fan_in", slice(0, 3), 3), ("he_fan_out", None, 3), ("pytorch", slice(0, 3), 1.8)],
)
def test_each_kernel_has_the_variance_of_its_fan(init, reads, kurtosis):
    """He et al. (2015), equations 10 and 14: normal, 2 / fan. PyTorch: uniform within 1 / sqrt(fan_in)."""
    every = []
    for name, kernel in kernels(init).items():
        height, width, inputs, outputs = (1, 1, *kernel.shape)[-4:]
        fan = height * width * (outputs if reads is None else inputs)
        deviation = (1 / 3 if init == "pytorch" else 2) ** 0.5 / fan**0.5
        values = kernel.ravel() / deviation
        room = 6 / len(values) ** 0.5  # six standard errors
        assert np.mean(values) == pytest.approx(0, abs=room), name
        assert np.var(values) == pytest.approx(1, abs=room * (kurtosis - 1) ** 0.5), name
        every.append(values)
    pooled = np.concatenate(every).astype(np.float64)
    assert len(every) > 50
    assert np.mean(pooled**4) == pytest.approx(kurtosis, rel=0.03)
    if init == "pytorch":
        assert 0.999 * 3**0.5 < np.abs(pooled).max() <= 3**0.5 * (1 + 1e-6)
    else:
        assert np.abs(pooled).max() > 4  # a normal distribution is not cut off


def test_the_fan_of_a_grouped_convolution_is_that_of_a_group():
    kernel = kernels("pytorch", "ranext56")["params/stage1_unit1/conv2/kernel"]
    assert kernel.shape == (3, 3, 4, 128)
    assert np.abs(kernel).max() == pytest.approx(1 / 6, rel=1e-2)


def test_the_bias_of_the_head_is_pytorchs_where_the_kernels_are():
    bias, kernel = (drawn("pytorch")[f"params/head/{name}"] for name in ("bias", "kernel"))
    bound = kernel.shape[0] ** -0.5
    assert 0.5 * bound < np.abs(bias).max() <= bound
    assert not drawn("he_fan_in")["params/head/bias"].any()


def test_they_are_a_function_of_the_seed_and_of_the_name():
    first, again, other = kernels("pytorch"), kernels("pytorch"), drawn("pytorch", seed=1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert len({kernel.tobytes() for kernel in first.values()}) == len(first)


def test_a_run_begins_with_the_same_state_on_one_device_and_on_many(tiny_config):
    """Momentum and moving average too, which begin with zeros and with the weights."""
    tiny_config.ema_decay = 0.9
    one, many = (built(tiny_config, some).initial_state() for some in (jax.devices()[:1], jax.devices()))
    assert_same_bits(one, many)
    assert_same_bits(one.ema, one.variables)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(many))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(one.opt_state))
