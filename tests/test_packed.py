"""A state whose arrays are a few long ones: nothing is lost, and steps give the numbers that they give without."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_bits, plain_recipe

from configs import digits
from resattn_jax.models.layers import BatchNorm, Conv, Linear
from resattn_jax.optimizer import changes_value_by_value, make_optimizer
from resattn_jax.packed import MOST, PackedState, Packing
from resattn_jax.runtime import CPU, make_mesh
from resattn_jax.state import TrainState
from resattn_jax.train_step import make_train_steps

STEPS, BATCH = 4, 8
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (STEPS, BATCH, 8, 8, 1), np.uint8), RNG.integers(0, 10, (STEPS, BATCH), np.int32)


class Net(nn.Module):
    """Two convolutions, a norm each, a linear layer."""

    num_classes: int = 10
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        x = Conv(4, 3, 2, dtype=self.dtype, name="conv1")(images)
        x = BatchNorm(train, relu=True, name="norm1")(x)
        x = BatchNorm(train, relu=True, name="norm2")(Conv(6, 1, dtype=self.dtype, name="conv2")(x))
        return Linear(self.num_classes, name="head")(x.mean((1, 2)))


def config(**optimizer):
    c = digits.get_config()
    c.optimizer.update(optimizer)
    return c


def first_state(model, optimizer):
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    ema = jax.tree.map(jnp.copy, dict(variables))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), ema)


def trained(pack, c, images=IMAGES, **recipe):
    """The states before and after a dispatch of STEPS steps, and its metrics."""
    model, mesh, optimizer = (
        Net(),
        make_mesh(jax.devices()[:1]),
        make_optimizer(c, optax.exponential_decay(0.1, 1, 0.5)),
    )
    state = first_state(model, optimizer)
    recipe = plain_recipe(ema_decay=0.9, **recipe)
    steps = make_train_steps(model, optimizer, recipe, mesh, CPU, lambda _, batch: batch, STEPS, pack=pack)
    before = jax.device_get(state)
    after, metrics = steps(state, {}, (images, LABELS), np.array([0, STEPS], np.int32), np.uint32(0))
    return before, jax.device_get(after), jax.device_get(metrics)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "decay_norms_and_biases": False},
        {"momentum": 0.9, "weight_decay": 0.1, "decay_norm_scales": False},
        {"momentum": 0.0, "nesterov": False, "weight_decay": 0.1, "clip_norm": 0.5},
    ],
)
def test_steps_on_a_packed_state_give_the_same_numbers(optimizer):
    """Weights, statistics, momentum and moving average; decay of kernels, of all but scales; clipped gradients."""
    before, plain, metrics = trained(False, config(**optimizer), accumulate=2)
    _, packed, packed_metrics = trained(True, config(**optimizer), accumulate=2)
    assert jax.tree.structure(plain) == jax.tree.structure(packed)
    for (path, a), b, first in zip(
        jax.tree_util.tree_leaves_with_path(plain), *map(jax.tree.leaves, (packed, before)), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert not np.array_equal(a, first), name
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)
    for name, values in metrics.items():
        np.testing.assert_allclose(values, packed_metrics[name], rtol=1e-5, err_msg=name)


def test_a_packed_state_is_left_as_it_is_by_a_step_that_is_not_finite():
    c = config(momentum=1e-3)
    mean = np.full(1, np.nan, np.float32)
    before, after, metrics = trained(True, c, mean=mean)
    assert_same_bits(before, after)
    assert np.isnan(metrics["loss"]).all()


def test_packing_a_state_loses_nothing():
    optimizer = make_optimizer(config(momentum=0.9), optax.constant_schedule(0.1))
    shapes = jax.eval_shape(lambda: first_state(Net(), optimizer))
    state = jax.tree.map(lambda x: RNG.standard_normal(x.shape).astype(x.dtype), shapes)
    form = PackedState.of(state, jnp.float32)
    packed = form.pack(state)
    assert [len(jax.tree.leaves(part)) for part in (packed.params, packed.batch_stats, packed.ema)] == [3, 2, 5]
    assert_same_bits(form.unpack(packed), state)


def test_a_long_array_holds_no_more_than_a_kernel_may_read():
    tree = {f"{i}": {"bias": np.full(2, i, np.float32)} for i in range(2 * MOST + 1)}
    packing = Packing.of(tree)
    packed = packing.pack(tree)
    assert sorted(x.size for x in jax.tree.leaves(packed)) == [2, 2 * MOST, 2 * MOST]
    assert_same_bits(packing.unpack(packed), tree)


def test_names_and_kernels_lie_apart_and_outputs_come_first():
    kernel = np.arange(2 * 1 * 3 * 2, dtype=np.float32).reshape(2, 1, 3, 2)  # [H, W, I, O]
    norms = [{"scale": np.array([i], np.float32), "bias": np.array([10 * i], np.float32)} for i in range(2)]
    tree = {"a": {"kernel": kernel, "bias": np.array([7, 8], np.float32)}, "b": norms[0], "c": norms[1]}
    packing = Packing.of(tree)
    packed = jax.device_get(packing.pack(tree))
    assert packed.keys() == {"long0", "long1", "long2"}
    np.testing.assert_array_equal(packed["long0"]["bias"], [7, 8, 0, 10])
    np.testing.assert_array_equal(packed["long1"]["scale"], [0, 1])
    np.testing.assert_array_equal(packed["long2"]["kernel"], [[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]])
    assert_same_bits(packing.unpack(packed), tree)


def test_only_what_changes_values_one_by_one_is_packed():
    """LARS has a norm for each array: joined ones would have one."""
    assert changes_value_by_value(config(name="sgd"))
    assert not changes_value_by_value(config(name="lars"))
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.full((3, 2), 2.0)}, "bias": jnp.ones(2)}
    gradients = jax.tree.map(lambda x: x**3 + 0.1, params)
    packing = Packing.of(params)
    for name, same in ("sgd", True), ("lars", False):
        optimizer = make_optimizer(config(name=name, momentum=0.9), optax.constant_schedule(0.1))
        plain, _ = optimizer.update(gradients, optimizer.init(params), params)
        long = packing.pack(params)
        updates, _ = optimizer.update(packing.pack(gradients), optimizer.init(long), long)
        close = [
            np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (plain, packing.unpack(updates))), strict=True)
        ]
        assert all(close) == same
