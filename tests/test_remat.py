"""Rematerialisation: the same net and the same numbers, with less kept for the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import built, images, random_variables

from resattn_jax.convert import from_torch, to_torch
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import variable_shapes


def loss(model, batch_stats, images, params):
    """A scalar of the logits, and the new running statistics."""
    logits, new = model.apply({"params": params, "batch_stats": batch_stats}, images, train=True, mutable="batch_stats")
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 3]), new["batch_stats"]


def assert_close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + tolerance / 100, jax.tree_util.keystr(path)


@pytest.mark.parametrize("unit", ["preact", "resnext"])
def test_loss_gradients_and_statistics_are_the_same(unit):
    """With strides, shortcuts and a skip unit, in both kinds of unit."""
    plain, remat = (
        create_model("ra_tiny", num_classes=10, unit=unit, p=0, t=1, last=0, remat=remat) for remat in (False, True)
    )
    variables, batch = random_variables(plain, (8, 8, 1)), images(8, 8, 8, 1)
    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, model, variables["batch_stats"], batch), has_aux=True))(
            variables["params"]
        )
        for model in (plain, remat)
    ]
    assert_close(*jax.device_get(results), 1e-4)


def test_pytorchs_weights_go_in_and_out_of_it():
    """The converter goes by names: those of the rematerialised net are the plain one's."""
    model = create_model("ra92_cifar", num_classes=10, remat=True)
    shapes = variable_shapes(model, (32, 32, 3))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    back = from_torch(to_torch(variables, "ra92_cifar"), "ra92_cifar")
    assert_close(back, variables, 0)


def test_the_backward_pass_is_given_less_than_half():
    """Of maps of the batch, as JAX traces what the forward pass hands on.

    XLA's CPU compiler does not use the freedom that this gives it, so its memory analysis cannot show it.
    """

    def kept_bytes(remat):
        model, pictures = create_model("ra56_cifar", num_classes=10, remat=remat), jnp.zeros((2, 32, 32, 3))
        variables = variable_shapes(model, (32, 32, 3))

        def backward(params, batch_stats):
            return jax.vjp(functools.partial(loss, model, batch_stats, pictures), params, has_aux=True)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, **variables))
        weights = {x.shape for x in jax.tree.leaves(variables)}
        return sum(x.size * x.dtype.itemsize for x in kept if x.shape not in weights)

    assert 0 < kept_bytes(True) < 0.5 * kept_bytes(False)


def test_the_config_asks_for_it_and_a_run_starts_from_the_same_weights(tiny_config, one_device):
    plain = built(tiny_config, one_device)
    tiny_config.model.remat = True
    remat = built(tiny_config, one_device)
    assert (plain.model.remat, remat.model.remat) == (False, True)
    assert_close(plain.initial_state().variables, remat.initial_state().variables, 0)
