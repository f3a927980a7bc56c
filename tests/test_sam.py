"""Sharpness-aware minimisation for the last part of a run."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_bits, final_state, lines, plain_recipe
from jax.sharding import PartitionSpec as P
from test_train import stop_at

import resattn_jax.train_step
from resattn_jax.errors import Interrupted
from resattn_jax.experiment import create_state
from resattn_jax.models import create_model
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.runtime import make_mesh
from resattn_jax.train_step import ascend, train_step

RHO = 0.05


def test_the_ascent_is_of_length_rho_along_the_gradient():
    """Of f(w) = w1^2 + 3 w2^2 at (2, 1): the gradient (4, 6) has length root 52, so w goes to w + rho (4, 6) / root 52,
    and the gradient there is (2 w1, 6 w2).
    """
    weights = {"a": jnp.array([2.0]), "b": jnp.array([1.0])}
    gradient = jax.grad(lambda w: (w["a"] ** 2 + 3 * w["b"] ** 2)[0])
    there = ascend(weights, gradient(weights), 0.5)
    np.testing.assert_allclose([there["a"][0], there["b"][0]], [2 + 2 / 52**0.5, 1 + 3 / 52**0.5], rtol=1e-6)
    nowhere = ascend(weights, jax.tree.map(jnp.zeros_like, weights), 0.5)
    np.testing.assert_array_equal([nowhere["a"][0], nowhere["b"][0]], [2, 1])


def by_hand(model, state, images, labels, parts):
    """(mean gradient at the perturbed weights, mean new statistics, mean loss) of `parts` parts of a batch."""

    def loss(params, images, labels):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean(), new["batch_stats"]

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = []
    for x, y in zip(np.split(images, parts), np.split(labels, parts), strict=True):
        (value, statistics), first = gradient(state.params, x, y)
        length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(first)))
        up = jax.tree.map(lambda g, length=length: RHO * np.asarray(g) / length, first)
        there = jax.tree.map(np.add, state.params, up)
        found.append((gradient(there, x, y)[1], statistics, value))
    return jax.tree.map(lambda *values: sum(map(np.asarray, values)) / parts, *found)


@pytest.mark.parametrize(("devices", "accumulate"), [(2, 1), (1, 2)])
def test_a_step_takes_the_gradient_where_each_device_or_micro_batch_came_up_its_own(
    tiny_config, monkeypatch, devices, accumulate
):
    """In float64. Loss and statistics are those of the weights themselves."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        resattn_jax.train_step, "network_inputs", lambda _, __, x, labels, n: (x, jax.nn.one_hot(labels, n))
    )
    with jax.enable_x64(True):
        images, labels = jnp.asarray(rng.standard_normal((16, 8, 8, 1))), jnp.asarray(rng.integers(0, 10, 16))
        model, optimizer = create_model("ra_micro", num_classes=10, dtype="float64"), optax.sgd(1.0)
        state = jax.device_get(create_state(model, optimizer, (8, 8, 1), seed=0, ema=False))
        wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
        state = state.replace(params=wide(state.params), batch_stats=wide(state.batch_stats))
        step = functools.partial(train_step, model, optimizer, plain_recipe(sam_rho=RHO, accumulate=accumulate), False)
        specs, mesh = (P(), P("data"), P("data")), make_mesh(jax.devices()[:devices])
        spread = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        after, metrics = jax.jit(spread)(state, images, labels)
        gradients, statistics, loss = by_hand(model, state, images, labels, devices * accumulate)
        moved = jax.tree.map(jnp.subtract, state.params, after.params)
        for got, expected in ((moved, gradients), (after.batch_stats, statistics)):
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=jax.tree_util.keystr(path))
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-9)


def metrics_of(workdir):
    return [{k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines(workdir)]


@pytest.mark.usefixtures("shared_programs")
def test_a_run_that_was_cut_at_the_switch_and_beside_it_has_the_same_bits(
    tiny_config, one_device, tmp_path, monkeypatch, capsys
):
    """Steps 8 to 12 are with SAM; dispatches of three steps end at the switch. The run that is cut began without SAM:
    it may be asked for when a run goes on. With the checkpoint behind the switch damaged it goes on before it.
    """
    tiny_config.update(steps_per_dispatch=3, on_nan="skip")
    tiny_config.augment.update(flip=False, alternating_flip=True)
    tiny_config.sam.update(rho=0.1, last="5 steps")
    train_and_evaluate(tiny_config, tmp_path / "straight", one_device)
    said = capsys.readouterr().out
    assert said.index("compiling the train step …") < said.index("compiling the train step with SAM, which begins")

    for cut, rho in (6, 0.0), (7, 0.1), (8, 0.1):
        tiny_config.sam.rho = rho
        with monkeypatch.context() as patch:
            stop_at(patch, cut)
            with pytest.raises(Interrupted, match=f"stopped at step {cut} of 12"):
                train_and_evaluate(tiny_config, tmp_path / "cut", one_device)
        if cut == 7:
            shutil.rmtree(tmp_path / "cut/checkpoints/7/model")
            capsys.readouterr()
    said = capsys.readouterr().out
    assert said.index("going on from the checkpoint of step 6") < said.index("compiling the train step …")
    train_and_evaluate(tiny_config, tmp_path / "cut", one_device)
    assert "compiling the train step …" not in capsys.readouterr().out
    straight, cut = (final_state(tiny_config, tmp_path / name, one_device) for name in ("straight", "cut"))
    assert_same_bits(straight, cut)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "cut")
