"""Schedules and SGD, against values worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import steps_of

from configs import cifar10_ra92, cifar10_ra92_mixup, default
from resattn_jax.config import Durations, check
from resattn_jax.errors import UsageError
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.optimizer import global_norm, make_optimizer, make_schedule


def schedule(examples=1000, **values):
    c = default.get_config()
    c.batch_size, c.total_steps = 10, values.pop("total_steps", 100)
    c.schedule.update(values)
    check(c)
    return make_schedule(c, Durations(c, examples))


def test_step_divides_at_fractions_of_the_run():
    s = schedule(name="step", learning_rate=0.1, boundaries=("30%", "60%", "90%"), factor=0.1)
    got = [float(s(step)) for step in (0, 29, 30, 59, 60, 89, 90, 99)]
    np.testing.assert_allclose(got, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001], rtol=1e-5)


def test_step_boundaries_may_be_steps_and_epochs_and_are_counted_from_the_start_of_the_run():
    s = schedule(name="step", boundaries=("50 steps", "0.8 epochs"), warmup="10 steps")
    got = [float(s(step)) for step in (0, 5, 10, 49, 50, 79, 80)]
    np.testing.assert_allclose(got, [0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-5, atol=1e-9)


def test_cosine_linear_and_constant():
    np.testing.assert_allclose(
        [float(schedule(name="cosine", learning_rate=0.2)(step)) for step in (0, 25, 50, 100)],
        [0.2, 0.1 * (1 + 2**-0.5), 0.1, 0.0],
        rtol=1e-5,
        atol=1e-8,
    )
    linear = schedule(name="linear", learning_rate=0.2, warmup="20 steps")
    np.testing.assert_allclose([float(linear(step)) for step in (10, 20, 60, 100)], [0.1, 0.2, 0.1, 0], atol=1e-7)
    assert float(schedule(name="constant", learning_rate=0.3)(77)) == pytest.approx(0.3)


def test_the_public_recipes_have_their_published_lengths():
    """PyTorch train.py: 300 epochs, divided after epochs 90, 180, 270; train_mixup.py: 320, mixup in the first 300."""
    plain = cifar10_ra92.get_config()
    durations = Durations(plain, 50_000)
    assert durations.total == 300 * 50_000 / 64
    assert durations("schedule.boundaries") == tuple(round(e * 50_000 / 64) for e in (90, 180, 270))
    mixup = cifar10_ra92_mixup.get_config()
    durations = Durations(mixup, 50_000)
    assert durations.total - durations("augment.mixup_off_last") == 300 * 50_000 / 64


@pytest.mark.parametrize("text", ["5", "five epochs", "5 epoch s", "-3 steps", ""])
def test_a_duration_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match=r"config\.schedule\.warmup is .*; write '500 steps', '5 epochs' or '30%'"):
        schedule(warmup=text)


def test_exactly_one_total_must_be_set():
    c = default.get_config()
    with pytest.raises(UsageError, match="exactly one"):
        check(c)
    c.total_steps, c.total_epochs = 3, 3.0
    with pytest.raises(UsageError, match="exactly one"):
        check(c)


def updates(gradients, **values):
    """The parameters {w: [[1]], b: [1]} after SGD steps with these gradients, learning rate 0.1."""
    c = default.get_config()
    c.total_steps = 100
    c.optimizer.update(values)
    optimizer = make_optimizer(c, lambda step: 0.1)
    params = {"w": jnp.ones((1, 1)), "b": jnp.ones(1)}
    state = optimizer.init(params)
    for g in gradients:
        step, state = optimizer.update({"w": jnp.full((1, 1), g), "b": jnp.full(1, g)}, state, params)
        params = {name: params[name] + step[name] for name in params}
    return float(params["w"][0, 0]), float(params["b"][0])


def test_nesterov_momentum_is_pytorchs():
    """v = 0.9 v + g; w -= 0.1 (g + 0.9 v): by hand, with g = 1 twice, 1 - 0.19 = 0.81, then 0.81 - 0.271 = 0.539."""
    w, _ = updates([1.0, 1.0], weight_decay=0.0)
    assert w == pytest.approx(0.539, rel=1e-5)
    w, _ = updates([1.0, 1.0], weight_decay=0.0, nesterov=False)  # 1 - 0.1 - 0.19
    assert w == pytest.approx(0.71, rel=1e-5)


def test_weight_decay_is_added_to_the_gradient_of_all_or_of_kernels_alone():
    assert updates([0.0], weight_decay=0.5, momentum=0.0) == pytest.approx((0.95, 0.95))
    kernels_only = updates([0.0], weight_decay=0.5, momentum=0.0, decay_norms_and_biases=False)
    assert kernels_only == pytest.approx((0.95, 1.0))


@pytest.mark.parametrize("name", ["sgd", "lars"])
@pytest.mark.parametrize(
    ("norms_and_biases", "scales", "decayed"),
    [
        (True, None, {"kernel", "scale", "bias"}), (False, None, {"kernel"}),
        (True, True, {"kernel", "scale", "bias"}), (False, False, {"kernel"}),
        (True, False, {"kernel", "bias"}), (False, True, {"kernel", "scale"}),
    ],
)  # fmt: skip
def test_weight_decay_of_norms_scales_may_be_decided_apart(name, norms_and_biases, scales, decayed):
    """Of ra_tiny with gradients of zero, where weight decay alone moves a parameter; a norm's bias is a bias."""
    c = default.get_config()
    c.optimizer.update(name=name, weight_decay=0.5, decay_norms_and_biases=norms_and_biases, decay_norm_scales=scales)
    optimizer = make_optimizer(c, lambda step: 0.1)
    shapes = variable_shapes(create_model("ra_tiny", num_classes=10), (8, 8, 1))["params"]
    params = jax.tree.map(lambda p: jnp.ones((1,) * p.ndim), shapes)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {
        "/".join(key.key for key in path): bool(u.any()) for path, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {"head/bias", "head/kernel", "stem_norm/scale", "stem_norm/bias", "stem_conv/kernel"} < moved.keys()
    assert moved == {path: path.rpartition("/")[2] in decayed for path in moved}


def test_clipping_bounds_the_global_norm():
    """A gradient (3, 3) has norm 3 sqrt(2); clipped to 1 each part is 1 / sqrt(2)."""
    w, b = updates([3.0], weight_decay=0.0, momentum=0.0, clip_norm=1.0)
    assert w == b == pytest.approx(1 - 0.1 / 2**0.5, rel=1e-5)


def test_the_global_norm_is_of_all_values_together():
    """1 + 4 + 9 + 16 + 25 + 36 = 91, of a scalar, two vectors and a matrix."""
    kernel = jnp.array([[4.0], [-5.0]])
    tree = {
        "scalar": jnp.array(1.0),
        "bias": jnp.array([2.0, -3.0]),
        "layer": {"kernel": kernel, "scale": jnp.array([6.0])},
    }
    assert float(global_norm(tree)) == pytest.approx(91**0.5, rel=1e-6)
    assert float(global_norm({"kernel": kernel})) == pytest.approx(41**0.5, rel=1e-6)


def test_lars_scales_a_kernels_step_by_the_ratio_of_its_norm_to_its_gradients():
    """You et al. (2017): 0.001 |w| / |g| times g, so 0.1 * 0.001 * 1 for a weight of 1, whatever the gradient.

    A bias has no ratio: 0.1 * g.
    """
    for g in (1.0, 4.0):
        w, b = updates([g], name="lars", weight_decay=0.0, momentum=0.0, nesterov=False)
        assert w == pytest.approx(1 - 1e-4, rel=1e-6)
        assert b == pytest.approx(1 - 0.1 * g, rel=1e-6)


def test_the_moving_average_by_hand(tiny_config, one_device):
    """After n steps its decay is n / (n + 9), or config.ema_decay where that is less: 1/10, 2/11 and 0.2."""
    tiny_config.ema_decay = 0.2
    states = steps_of(tiny_config, one_device, 3)
    state, _ = next(states)
    expected = jax.tree.map(np.float64, state.variables)
    for (state, _), decay in zip(states, (1 / 10, 2 / 11, 0.2), strict=True):
        expected = jax.tree.map(lambda ema, new, d=decay: d * ema + (1 - d) * new, expected, state.variables)
        for (path, ours), theirs in zip(
            jax.tree_util.tree_flatten_with_path(state.ema)[0], jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=jax.tree_util.keystr(path))
