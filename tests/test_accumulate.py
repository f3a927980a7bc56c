"""Gradient accumulation: a batch seen in micro-batches, one update. A micro-batch is to the net what a device is."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import built, plain_recipe, run_steps
from jax.sharding import PartitionSpec as P

from resattn_jax.data.resident import put
from resattn_jax.errors import UsageError
from resattn_jax.experiment import create_state
from resattn_jax.models import create_model
from resattn_jax.runtime import CPU, TPU, make_mesh
from resattn_jax.state import TrainState
from resattn_jax.train_step import make_train_steps, network_inputs

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (16, 8, 8, 1), np.uint8), RNG.integers(0, 10, 16, np.int32)


def recipe(accumulate):
    """Crop, flip and mixup."""
    return plain_recipe(
        crop_padding=1, flip=True, mixup_alpha=0.3, mixup_until=9, label_smoothing=0.1, accumulate=accumulate
    )


def first_state(model, optimizer):
    """The state of step 0; that of a module of this file as Flax makes it."""
    if not isinstance(model, NoBatchNorm):
        return create_state(model, optimizer, IMAGES.shape[1:], seed=0, ema=False)
    variables = model.init(jax.random.key(0), np.zeros((1, *IMAGES.shape[1:]), np.float32), train=False)
    params, zero = variables["params"], jnp.zeros((), jnp.int32)
    return TrainState(zero, params, variables["batch_stats"], optimizer.init(params), ema=None)


def lower(model, accumulate, devices, optimizer, platform=CPU):
    """One step on IMAGES and LABELS, lowered, and its arguments."""
    mesh = make_mesh(devices)
    state = first_state(model, optimizer)
    batch = put(IMAGES[None], mesh, P(None, "data")), put(LABELS[None], mesh, P(None, "data"))
    steps = make_train_steps(model, optimizer, recipe(accumulate), mesh, platform, lambda arrays, batch: batch, 1)
    arguments = (
        jax.device_put(state, jax.NamedSharding(mesh, P())),
        {},
        batch,
        put(np.array([0, 1], np.int32), mesh, P()),
        put(np.array(0, np.uint32), mesh, P()),
    )
    return steps.lower(*arguments), arguments


def one_step(model, accumulate, devices, platform=CPU):
    """The state before, the state after and the metrics of one step of gradient descent with a rate of 1."""
    lowered, arguments = lower(model, accumulate, devices, optax.sgd(1.0), platform)
    before = jax.device_get(arguments[0])
    after, metrics = lowered.compile()(*arguments)
    return before, jax.device_get(after), {name: float(value[0]) for name, value in metrics.items()}


@functools.cache
def one_straight_step(name, accumulate):
    """`one_step` on one device of a net of this name, without a loop. What several tests compare with."""
    model = NoBatchNorm() if name == "NoBatchNorm" else create_model(name, num_classes=10)
    return one_step(model, accumulate, jax.devices()[:1])


def assert_close(a, b, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        difference = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        assert difference <= tolerance * np.linalg.norm(y) + 1e-6, jax.tree_util.keystr(path)


SEEN = []  # the batch sizes that NoBatchNorm was shown


class NoBatchNorm(nn.Module):
    """A net whose images know nothing of each other."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train):
        SEEN.append(len(images))
        self.variable("batch_stats", "none", lambda: jnp.zeros(()))
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_without_batch_statistics_it_is_the_large_batch(accumulate, one_device):
    """The same crops, flips, mixup pairs and targets, and so the same loss and gradients, within rounding."""
    _, large, large_metrics = one_straight_step("NoBatchNorm", 1)
    SEEN.clear()
    _, small, small_metrics = one_step(NoBatchNorm(), accumulate, one_device)
    assert set(SEEN) - {1} <= {16 // accumulate}  # and 1 where the state is made
    assert_close(small.params, large.params, 1e-6)
    for name in ("loss", "top1", "gradient_norm"):
        assert small_metrics[name] == pytest.approx(large_metrics[name], rel=1e-5)


def test_with_them_it_is_the_average_over_the_micro_batches(tiny_config, one_device):
    """Gradients and running statistics of 4 images at a time, worked out one after the other and averaged here."""
    model = create_model("ra_micro", num_classes=10)
    before, after, metrics = one_straight_step("ra_micro", 4)
    _, large, _ = one_straight_step("ra_micro", 1)

    def inputs(images, labels):
        return network_inputs(recipe(1), 0, images, labels, 10)

    mesh = make_mesh(one_device)
    inputs = jax.shard_map(inputs, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    images, targets = jax.device_get(jax.jit(inputs)(IMAGES, LABELS))

    @jax.jit
    def loss_and_gradients(params, images, targets):
        def loss(params):
            variables = {"params": params, "batch_stats": before.batch_stats}
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return -(targets * jax.nn.log_softmax(logits)).sum() / len(images), new["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    parts = [loss_and_gradients(before.params, images[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8, 12)]
    (loss, statistics), gradients = jax.tree.map(lambda *x: sum(map(np.float64, x)) / 4, *parts)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(jax.tree.map(np.subtract, before.params, after.params), gradients, 1e-4)
    assert_close(after.batch_stats, statistics, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(after.params, large.params, 1e-4)


def test_micro_batches_are_what_devices_are(tiny_config):
    """Three steps on one device in four micro-batches and on four devices: weights, statistics, moving average."""
    four, four_metrics = run_steps(tiny_config, jax.devices()[:4], 3)
    tiny_config.accumulate = 4
    one, one_metrics = run_steps(tiny_config, jax.devices()[:1], 3)
    assert_close(jax.device_get(one), jax.device_get(four), 1e-4)
    for a, b in zip(one_metrics, four_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["top1"] == b["top1"]


def test_accelerators_run_them_in_a_loop_that_needs_less_memory(tiny_config, one_device):
    """The CPU has them one after the other without a loop, to the same result."""
    model = create_model("ra_micro", num_classes=10)
    _, straight, _ = one_straight_step("ra_micro", 4)
    loops = dataclasses.replace(CPU, loops=TPU.loops)
    _, looped, _ = one_step(model, 4, one_device, loops)
    assert_close(looped.params, straight.params, 1e-5)

    def temporaries(accumulate):
        lowered, _ = lower(model, accumulate, one_device, optax.sgd(1.0), loops)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.6 * temporaries(1)


def test_the_devices_speak_as_often_as_without(tiny_config):
    """Each gradient and each running statistic is averaged over the devices once a step."""
    model = create_model("ra_micro", num_classes=10)
    reduced = [
        lower(model, n, jax.devices()[:2], optax.sgd(1.0))[0].as_text().count("stablehlo.all_reduce") for n in (1, 4)
    ]
    assert reduced[0] == reduced[1] > 0


@pytest.mark.parametrize("accumulate", [3, 64])
def test_a_number_that_does_not_divide_a_devices_batch_is_refused(tiny_config, one_device, accumulate):
    tiny_config.accumulate = accumulate
    with pytest.raises(UsageError, match=rf"config.accumulate is {accumulate}; it must be .* divide the 32 images"):
        built(tiny_config, one_device)
