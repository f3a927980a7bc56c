"""How many images have their batch statistics together: a part of a device's share, or those of several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import built
from jax.sharding import PartitionSpec as P

from resattn_jax.errors import UsageError
from resattn_jax.models.layers import BatchNorm
from resattn_jax.runtime import make_mesh


def by_hand(x, scale, bias, span):
    """ReLU of what each `span` images are when normalised by their own mean and variance, and the means of these."""
    groups = x.reshape(-1, span, *x.shape[1:])
    mean, var = groups.mean((1, 2, 3), keepdims=True), groups.var((1, 2, 3), keepdims=True)
    y = jax.nn.relu(
        (groups - mean) / jnp.sqrt(var + 1e-5) * scale[None, None, None, None] + bias[None, None, None, None]
    )
    return y.reshape(x.shape), mean.mean(0).ravel(), var.mean(0).ravel()


@pytest.mark.parametrize("span", [2, 4, 8, 32])
def test_outputs_statistics_and_gradients_are_those_of_each_group_by_itself(span):
    """In float64, of 32 images on eight devices, with the gradients that autodiff finds for the plain formula."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((32, 3, 2, 5)) * 2 + 1)
        scale, bias, weights = (jnp.asarray(rng.standard_normal(s)) for s in (5, 5, x.shape))
        norm = BatchNorm(train=True, relu=True, axis_name="data", span=span)

        def ours(x, scale, bias, weights):
            def loss(x, scale, bias):
                state = {"mean": jnp.zeros(5), "var": jnp.zeros(5)}
                variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
                y, new = norm.apply(variables, x, mutable=["batch_stats"])
                return (y * weights).sum(), (y, new["batch_stats"])

            (_, (y, stats)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
            summed = jax.lax.psum(grads[1:], "data")
            return y, jax.lax.pmean(stats, "data"), grads[0], summed

        specs = P("data"), P(), P(), P("data")
        spread = jax.shard_map(
            ours, mesh=make_mesh(), in_specs=specs, out_specs=(P("data"), P(), P("data"), P()), check_vma=False
        )
        y, stats, for_x, for_params = jax.jit(spread)(x, scale, bias, weights)

        def loss(x, scale, bias):
            y, mean, var = by_hand(x, scale, bias, span)
            return (y * weights).sum(), (y, mean, var)

        (_, (expected, mean, var)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        for got, wanted in zip((y, for_x, *for_params), (expected, *grads), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-9)
        np.testing.assert_allclose(stats["var"], 0.1 * var, rtol=1e-9)


def program(config, devices):
    experiment = built(config, devices)
    return experiment.train_steps.lower(*experiment.train_shapes()).as_text()


def test_a_devices_share_is_the_default_and_the_whole_batch_is_sync_batch_norm(tiny_config):
    """The same programs, for four devices with 8 images each."""
    devices = jax.devices()[:4]
    own = program(tiny_config, devices)
    tiny_config.batch_norm_span = 8
    assert program(tiny_config, devices) == own
    tiny_config.batch_norm_span = 32
    whole = program(tiny_config, devices)
    tiny_config.batch_norm_span, tiny_config.sync_batch_norm = None, True
    assert program(tiny_config, devices) == whole != own


def test_neighbouring_devices_speak_to_each_other_and_micro_batches_are_what_counts(tiny_config):
    """Spans of 8 of 32 images are those of two of eight devices, or of two of four with two micro-batches each."""
    tiny_config.batch_norm_span = 8
    assert "dense<[[0, 1], [2, 3], [4, 5], [6, 7]]>" in program(tiny_config, jax.devices())
    tiny_config.accumulate = 2
    assert "dense<[[0, 1], [2, 3]]>" in program(tiny_config, jax.devices()[:4])


@pytest.mark.parametrize("span", [3, 6, 12])
def test_a_span_that_does_not_divide_is_refused(tiny_config, span):
    """Of 32 images on eight devices, 4 each."""
    tiny_config.batch_norm_span = span
    said = rf"config.batch_norm_span is {span}; it must divide the 4 images that each of the 8 devices has at once"
    with pytest.raises(UsageError, match=said):
        built(tiny_config)
