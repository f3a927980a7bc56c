"""One program for any number of devices, here eight CPU devices."""

import jax
import numpy as np
import pytest
from helpers import built, run_steps
from jax.sharding import PartitionSpec as P

from resattn_jax.checkpoint import Reader
from resattn_jax.classifier import load
from resattn_jax.errors import UsageError
from resattn_jax.modes.attention import summarise_net
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.report import measure
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.runtime import make_mesh
from resattn_jax.train_step import mean_over_devices

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_eight_devices_with_synchronised_statistics_train_as_one_does(tiny_config):
    """Crop, mixup, loss, gradients, running statistics and moving average, in float32, after three steps."""
    tiny_config.sync_batch_norm = True
    one, one_metrics = run_steps(tiny_config, jax.devices()[:1], 3)
    eight, eight_metrics = run_steps(tiny_config, jax.devices(), 3)
    for a, b in zip(one_metrics, eight_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["top1"] == b["top1"]
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(eight), strict=True):
        difference = np.linalg.norm(np.asarray(a) - np.asarray(b))
        assert difference <= 1e-4 * np.linalg.norm(a) + 1e-6, jax.tree_util.keystr(path)


def test_without_it_every_device_has_its_own_statistics(tiny_config):
    """The loss of the same weights and batch differs, and the new running statistics are the devices' mean."""
    tiny_config.schedule.name, tiny_config.augment.mixup_off_last = "constant", "0 steps"
    _, one = run_steps(tiny_config, jax.devices()[:1], 1)
    state, eight = run_steps(tiny_config, jax.devices(), 1)
    assert abs(one[0]["loss"] - eight[0]["loss"]) > 1e-4
    for leaf in jax.tree.leaves(state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 8
        for shard in shards[1:]:
            np.testing.assert_array_equal(shards[0], shard)


def test_gradients_sent_in_bfloat16_are_those_of_float32_to_its_eight_bits(tiny_config):
    """Each device's gradient and the mean are rounded to 8 bits, by 2^-9 at most; the rest is sent as it is.

    A sum of eight in bfloat16, as a TPU's, would be rounded seven times more.
    """
    of_devices = np.random.default_rng(0).standard_normal((8, 1000)).astype(np.float32)

    def means(gradient, rest):
        return mean_over_devices(gradient[0], rest[0], "bfloat16")

    mesh = make_mesh(jax.devices())
    spread = jax.shard_map(means, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    gradient, rest = jax.jit(spread)(of_devices, of_devices)
    mean = of_devices.astype(np.float64).mean(0)
    np.testing.assert_allclose(rest, mean, rtol=0, atol=1e-6)
    error = np.abs(gradient - mean)
    assert gradient.dtype == np.float32
    assert error.max() > 1e-4  # of what was sent in float32 it would be a thousandth of this
    assert (error <= 2**-9 * (np.abs(of_devices).mean(0) * 8 + np.abs(mean)) + 1e-6).all()

    tiny_config.all_reduce_dtype = "bfloat16"
    assert built(tiny_config).recipe.all_reduce_dtype == "bfloat16"


def test_a_checkpoint_of_eight_devices_is_measured_and_continued_on_other_numbers(tiny_config, tmp_path):
    tiny_config.total_steps = 6
    tiny_config.schedule.name, tiny_config.augment.mixup_off_last = "constant", "0 steps"  # one program for 6 and 8
    result = train_and_evaluate(tiny_config, tmp_path)
    for devices in (1, 2, 3, 8):  # of three none would train with batches of 32
        measured = evaluate_checkpoint(tiny_config, tmp_path, "newest", jax.devices()[:devices])
        assert measured["examples"] == 360
        assert measured["top1"] == result["final"]["top1"]
        assert measured["loss"] == pytest.approx(result["final"]["loss"], rel=1e-5)
    net = load(tmp_path, "newest")
    for devices in (1, 3):
        assessed = measure(net, jax.devices()[:devices]).assessment
        assert np.mean(assessed.labels == assessed.predicted) == pytest.approx(result["final"]["top1"], rel=1e-6)
        summary = summarise_net(net, jax.devices()[:devices])
        assert (summary.examples, summary.top1) == (360, pytest.approx(result["final"]["top1"], rel=1e-6))
    tiny_config.total_steps = 8
    assert train_and_evaluate(tiny_config, tmp_path, jax.devices()[:2])["step"] == 8
    with Reader(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == 8


def test_a_batch_that_does_not_divide_is_an_error_naming_sizes_that_do(tiny_config):
    tiny_config.batch_size = 33
    with pytest.raises(UsageError, match="batch_size is 33, which does not divide by the 8 devices; 32 or 40 would"):
        built(tiny_config)
    tiny_config.batch_size = 40
    with pytest.raises(UsageError, match="leaves 5 for each of the 8 devices"):
        built(tiny_config)
