"""The streaming pipeline: order, sharding, faults, and a run on a folder of pictures."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import jax
import numpy as np
import PIL.Image
import psutil
import pytest
from helpers import (
    ROOT,
    Numbers,
    assert_same_bits,
    broken_files,
    built,
    encoded,
    final_state,
    free_port,
    train_stream,
)

from resattn_jax.data.batches import ProcessBatches, ThreadedBatches, TrainBatches
from resattn_jax.data.order import batch_rows, mirrored
from resattn_jax.data.sources import open_source, read
from resattn_jax.data.streaming import Reading, StreamingEval, StreamingTrain
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import RunError, UsageError
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.show_data import write_contact_sheet
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.runtime import CPU, GPU, make_mesh

PLAIN = TrainTransform(8, False, (0.08, 1.0), (0.75, 4 / 3), (0, 9))
RANDOM = TrainTransform(24, True, (0.08, 1.0), (0.75, 4 / 3), (2, 9))
CENTRE = EvalTransform(8, 1.0, 1)


class Deadly(Numbers):
    """Ends the worker process that reads it, as the kernel does when memory runs out."""

    def __getitem__(self, row):
        if row == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def stream(
    source, transform=PLAIN, workers=0, skip=False, devices=None, size=16, seed=3, platform=CPU, alternating=False
):
    reading = Reading(workers, skip, platform.shares_host_memory, make_mesh(devices))
    return StreamingTrain(source, transform, reading, seed=seed, batch_size=size, alternating=alternating)


def eval_stream(source, workers=0, skip=False, size=16, limit=None):
    return StreamingEval(source, CENTRE, Reading(workers, skip, True, make_mesh()), batch_size=size, max_examples=limit)


def batches(pipeline, steps):
    got = [jax.device_get(pipeline.batches(step, 1)) for step in steps]
    pipeline.close()
    return got


def test_the_order_is_the_resident_pipelines_and_pictures_keep_their_labels():
    for step, batch in enumerate(batches(stream(Numbers(40)), range(6))):
        assert batch["image"].shape == (1, 16, 8, 8, 3)
        np.testing.assert_array_equal(batch["label"][0], batch_rows(3, step, 16, 40))
        np.testing.assert_array_equal(batch["image"][0, :, 4, 4, 0], batch["label"][0])


class Ramps(Numbers):
    """Examples whose label is their row, brighter to the right."""

    def __getitem__(self, row):
        pixels = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, :, None], (8, 8, 3))
        return encoded(PIL.Image.fromarray(np.ascontiguousarray(pixels))), row


def test_alternating_flip_is_the_resident_pipelines():
    """Three epochs of 40; on a part of the devices too, and from any step on."""
    straight = batches(stream(Ramps(40), alternating=True), range(8))
    cut = batches(stream(Ramps(40), alternating=True, devices=jax.devices()[:1]), range(5, 8))
    jax.tree.map(np.testing.assert_array_equal, straight[5:], cut)
    for step, batch in enumerate(straight):
        rows = batch_rows(3, step, 16, 40)
        mirrors = mirrored(3, rows, np.arange(step * 16, (step + 1) * 16), 40)
        np.testing.assert_array_equal(batch["image"][0, :, 0, 0, 0], np.where(mirrors, 7, 0))
        np.testing.assert_array_equal(batch["image"][0, :, 5, 7, 2], np.where(mirrors, 0, 7))


def test_going_on_at_a_step_gives_the_same_batches_and_reads_nothing_before_it():
    source = Numbers(200)
    straight = batches(stream(source, RANDOM), range(8))
    source.read.clear()
    cut = batches(stream(source, RANDOM), range(6, 8))
    jax.tree.map(np.testing.assert_array_equal, straight[6:], cut)
    before = {row for step in range(6) for row in batch_rows(3, step, 16, 200)}
    assert not before & set(source.read)


def test_a_batch_is_the_same_whatever_the_number_of_workers_and_devices(tfds_dir):
    source = open_source("imagenet2012", "train", tfds_dir)
    expected = batches(stream(source, RANDOM), range(17, 21))
    for workers, devices in ((1, None), (3, None), (0, jax.devices()[:1])):
        got = batches(stream(source, RANDOM, workers, devices=devices), range(17, 21))
        jax.tree.map(np.testing.assert_array_equal, expected, got)


def test_the_same_picture_is_cut_otherwise_in_the_next_epoch_and_by_another_seed(tfds_dir):
    source = open_source("imagenet2012", "train[:16]", tfds_dir)

    def by_label(batch):
        return batch["image"][0][np.argsort(batch["label"][0], kind="stable")]

    first, second = batches(stream(source, RANDOM), range(2))
    (other,) = batches(stream(source, RANDOM, seed=4), range(1))
    for batch in (second, other):
        np.testing.assert_array_equal(np.sort(first["label"]), np.sort(batch["label"]))
        assert (by_label(first) != by_label(batch)).mean() > 0.9


def test_hosts_read_disjoint_parts_that_make_up_the_batch_with_randomness_of_their_own():
    """What each of two hosts reads, put together, is what one host reads."""
    source = Numbers(100)
    parts = [TrainBatches(source, RANDOM, 3, 16, places) for places in (np.arange(8), np.arange(8, 16))]
    whole = next(ThreadedBatches(TrainBatches(source, RANDOM, 3, 16, np.arange(16)), 5, 2))
    halves = [next(ThreadedBatches(part, 5, 2)) for part in parts]
    np.testing.assert_array_equal(np.concatenate([h.images for h in halves]), whole.images)
    np.testing.assert_array_equal(np.concatenate([h.labels for h in halves]), whole.labels)


@pytest.mark.parametrize(
    ("examples", "limit", "workers"), [(37, None, 0), (48, None, 0), (37, 20, 0), (5, None, 0), (37, None, 2)]
)
def test_an_evaluation_sees_every_example_once(examples, limit, workers):
    seen = []
    for batch, mask in eval_stream(Numbers(examples), workers, limit=limit):
        assert batch["image"].shape == (16, 8, 8, 3)
        seen += list(np.asarray(batch["label"])[np.asarray(mask)])
    assert seen == list(range(limit or examples))


def test_an_evaluation_that_is_given_up_ends_its_threads():
    import threading

    before = threading.active_count()
    iterator = iter(eval_stream(Numbers(200)))
    next(iterator)
    iterator.close()
    assert threading.active_count() <= before


def test_label_noise_is_the_same_streamed_and_resident(tiny_config):
    tiny_config.data.label_noise = 0.5
    tiny_config.batch_size = 64
    resident = train_stream(tiny_config)
    tiny_config.data.pipeline = "streaming"
    streamed = train_stream(tiny_config)
    rows = batch_rows(0, 2, 64, 1437)
    (batch,) = batches(streamed, [2])
    np.testing.assert_array_equal(batch["label"][0], np.asarray(resident.arrays["label"])[rows])
    clean = read(open_source("digits", "train")).labels
    assert 0.45 < (np.asarray(resident.arrays["label"]) != clean).mean() < 0.55


# ---- Faults.


def test_a_broken_picture_ends_the_run_with_its_name():
    with pytest.raises(UsageError, match=r"example 9 cannot be read: .*set config.data.broken=skip"):
        batches(stream(Numbers(20, broken={9})), range(2))
    with pytest.raises(UsageError, match="example 9 cannot be read"):
        list(eval_stream(Numbers(20, broken={9}), size=8))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_are_told_of_and_counted_once_and_others_stand_in_their_places(caplog, workers):
    broken = {3, 9, 17}
    pipeline = stream(Numbers(24, broken), PLAIN, workers, skip=True, size=8)
    with caplog.at_level(logging.WARNING, "resattn_jax"):
        got = batches(pipeline, range(6))  # two epochs
    assert pipeline.skipped == 3
    assert sorted(r.args[0] for r in caplog.records) == ["example 17", "example 3", "example 9"]
    assert not broken & set(np.concatenate([b["label"][0] for b in got]))
    for step, batch in enumerate(got):
        rows = batch_rows(3, step, 8, 24)
        kept = ~np.isin(rows, list(broken))
        np.testing.assert_array_equal(batch["label"][0][kept], rows[kept])
        np.testing.assert_array_equal(batch["image"][0, :, 0, 0, 0], batch["label"][0])
    again = batches(stream(Numbers(24, broken), PLAIN, 0, skip=True, size=8), range(6))
    jax.tree.map(np.testing.assert_array_equal, got, again)


def test_skipped_pictures_do_not_count_in_an_evaluation():
    pipeline, seen = eval_stream(Numbers(24, {0, 23}), skip=True), []
    for batch, mask in pipeline:
        seen += list(np.asarray(batch["label"])[np.asarray(mask)])
    assert seen == list(range(1, 23))
    assert pipeline.skipped == 2


def test_a_set_of_broken_pictures_alone_is_an_error():
    with pytest.raises(UsageError, match="of 20 pictures none could be read; the last was example"):
        batches(stream(Numbers(8, range(8)), skip=True, size=8), range(1))


def test_a_worker_that_dies_is_an_error_not_a_wait():
    began = time.monotonic()
    with pytest.raises(RunError, match="a data worker failed: "):
        batches(stream(Deadly(32), workers=2), range(20))
    assert time.monotonic() - began < 60


def test_an_error_in_a_worker_process_is_the_one_that_a_thread_raises():
    source = Numbers(8, range(8))
    with pytest.raises(UsageError, match="of 20 pictures none could be read; the last was example"):
        next(ProcessBatches(TrainBatches(source, PLAIN, 0, 8, np.arange(8)), 0, workers=1, threads=1))


# ---- A whole run.


@pytest.fixture
def folder(tmp_path):
    """Red and blue pictures of many sizes, easy to tell apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name, color in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                size = tuple(int(s) for s in rng.integers(20, 90, 2))
                image = PIL.Image.new("RGB", size, tuple(int(c + rng.integers(-30, 31)) for c in color))
                image.save(tmp_path / "pictures" / split / name / f"{i}.jpg")
    return tmp_path / "pictures"


@pytest.fixture
def folder_config(tiny_config, folder):
    """A run on it with every transform in use."""
    c = tiny_config
    c.data.name, c.data.eval_split, c.data.image_size = f"folder:{folder}", "val", 16
    c.augment.random_resized_crop, c.augment.flip, c.augment.randaugment = True, True, 1
    c.augment.randaugment_magnitude = 3.0
    c.augment.color_jitter, c.augment.pca_lighting = (0.1, 0.1, 0.1), 0.1
    c.augment.random_erasing, c.augment.cutout, c.augment.cutmix_alpha = 0.2, 4, 1.0
    c.batch_size, c.eval.batch_size = 16, 8
    c.schedule.name, c.augment.mixup_off_last = "constant", "0 steps"  # runs of every length have the same programs
    return c


@pytest.mark.usefixtures("shared_programs")
def test_a_run_on_a_folder_learns_keeps_the_classes_and_is_measured(folder_config, tmp_path, folder):
    folder_config.total_steps = 40
    result = train_and_evaluate(folder_config, tmp_path / "run", jax.devices()[:2])
    assert result["final"]["top1"] >= 0.9
    assert (tmp_path / "run/classes.txt").read_text() == "blue\nred\n"
    for views in (1, 2, 10):
        folder_config.eval.views = views
        measured = evaluate_checkpoint(folder_config, tmp_path / "run", "newest", jax.devices()[:1])
        assert measured["examples"] == 16
        assert measured["top1"] >= 0.9
    (folder / "train/red").rename(folder / "train/green")
    (folder / "val/red").rename(folder / "val/green")
    with pytest.raises(UsageError, match=r"has other classes than .*: green, red differ"):
        evaluate_checkpoint(folder_config, tmp_path / "run", "newest", jax.devices()[:1])


@pytest.mark.usefixtures("shared_programs")
def test_a_streamed_run_that_was_stopped_goes_on_to_the_same_weights(folder_config, one_device, tmp_path):
    straight = folder_config.copy_and_resolve_references()
    train_and_evaluate(straight, tmp_path / "straight", one_device)
    folder_config.total_steps = 7
    train_and_evaluate(folder_config, tmp_path / "cut", one_device)
    folder_config.total_steps = 12
    folder_config.data.workers = 2
    train_and_evaluate(folder_config, tmp_path / "cut", one_device)
    first, second = (final_state(folder_config, tmp_path / name, one_device) for name in ("straight", "cut"))
    assert_same_bits(first, second)


@pytest.mark.usefixtures("shared_programs")
def test_thirty_broken_files_in_a_folder_are_named_counted_and_left_out(folder_config, folder, one_device, tmp_path):
    for name, data in broken_files().items():
        suffix = name.rpartition(".")[2].replace("jpeg", "jpg")
        (folder / "train" / "red" / f"broken_{name.replace('.', '_')}.{suffix}").write_bytes(data)
    (folder / "val" / "blue" / "0.jpg").write_bytes(b"")
    folder_config.total_epochs, folder_config.total_steps = 3.0, None
    with pytest.raises(UsageError, match=r"train/red/broken_.* cannot be read: "):
        train_and_evaluate(folder_config, tmp_path / "fails", one_device)
    folder_config.data.broken = "skip"
    result = train_and_evaluate(folder_config, tmp_path / "skips", one_device)
    assert result["step"] > 0
    logged = [json.loads(line) for line in (tmp_path / "skips/metrics.jsonl").read_text().splitlines()]
    counts = [line["train/broken_pictures_skipped"] for line in logged if "train/broken_pictures_skipped" in line]
    assert counts[-1] == len(broken_files())
    measured = [line for line in logged if "eval/top1" in line][-1]
    assert (measured["eval/examples"], measured["eval/broken_pictures_skipped"]) == (15, 1)


def test_classes_that_differ_between_splits_are_an_error(folder_config, folder):
    (folder / "val/red").rename(folder / "val/green")
    with pytest.raises(UsageError, match="differ between its splits: only train has red; only val has green"):
        built(folder_config)


def test_a_contact_sheet_shows_the_batch(folder_config, tmp_path):
    path = write_contact_sheet(folder_config, tmp_path)
    sheet = PIL.Image.open(path)
    assert sheet.format == "PNG"
    assert sheet.size == (8 * (128 + 4), 2 * (128 + 32))
    assert len(sheet.getcolors(100_000)) > 100


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.pipeline", "resident", "cannot be resident: the images have different sizes"),
        ("data.pipeline", "fast", "it must be one of auto, resident, streaming"),
        ("data.image_size", None, "set config.data.image_size, say to 224"),
        ("data.mean_image", True, "config.data.mean_image is for resident sets"),
        ("data.label_noise", 1.5, "config.data.label_noise is 1.5; it must be from 0 to 1"),
        ("data.workers", -1, "config.data.workers is -1; it must be 0 or more"),
        ("data.image_size", -8, "config.data.image_size is -8; it must be 8 or more"),
        ("seed", -1, "config.seed is -1; it must be 0 or more"),
        ("augment.randaugment_magnitude", 30.0, "it must be from 0 to 10"),
        ("augment.crop_aspect", (1.0,), r"write \(least, most\), such as \(0.75, 1.33\)"),
        ("eval.max_examples", 0, "config.eval.max_examples is 0; it must be 1 or more"),
        ("data.broken", "ignore", "it must be one of fail, skip"),
        ("steps_per_dispatch", 4, "config.steps_per_dispatch must be 1, or unset"),
        ("augment.crop_area", (0.5, 0.1), r"write \(least, most\), such as \(0.08, 1.0\)"),
        ("augment.color_jitter", (0.5, 2.0, 0.0), "write 3 numbers, from 0 to 1, such as"),
        ("eval.views", 3, "it must be one of 1, 2, 10"),
        ("eval.crop_fraction", 1.5, "it must be from 0.01 to 1"),
    ],
)
def test_what_cannot_be_is_told(folder_config, key, value, message):
    with folder_config.ignore_type():
        folder_config.update_from_flattened_dict({key: value})
    with pytest.raises(UsageError, match=message):
        built(folder_config)


def test_a_set_of_one_size_is_resident_unless_something_needs_the_host(tiny_config):
    assert built(tiny_config).spec.resident
    tiny_config.augment.random_resized_crop = True
    assert not built(tiny_config).spec.resident
    tiny_config.data.pipeline = "resident"
    with pytest.raises(UsageError, match=r"cannot be resident: config.augment.random_resized_crop is set"):
        built(tiny_config)


def test_memory_stays_flat_over_fifty_epochs_of_the_sample(tfds_dir):
    source = open_source("imagenet2012", "train[:150]", tfds_dir)
    transform = TrainTransform(96, True, (0.08, 1.0), (0.75, 4 / 3), (0, 9))
    pipeline = stream(source, transform, devices=jax.devices()[:1], size=150, seed=0)
    process, used = psutil.Process(), []
    for step in range(50):  # a batch is an epoch
        pipeline.batches(step, 1)
        if step % 10 == 9:
            gc.collect()
            used.append(process.memory_info().rss / 2**20)
    pipeline.close()
    # From the twentieth epoch on, when buffers and caches have their size: 30 epochs of 4.1 MB of pixels would be 124.
    assert max(used[1:]) - used[1] < 40, used  # MB


def test_pixels_given_to_the_device_do_not_change_when_their_memory_is_used_again():
    assert CPU.shares_host_memory
    assert not GPU.shares_host_memory
    pipeline = stream(Numbers(250), devices=jax.devices()[:1])
    held = [pipeline.batches(step, 1) for step in range(12)]
    time.sleep(0.2)
    pipeline.close()
    for step, batch in enumerate(held):
        np.testing.assert_array_equal(np.asarray(batch["image"])[0, :, 0, 0, 0], batch_rows(3, step, 16, 250))


def test_two_hosts_read_parts_of_each_batch_that_have_nothing_in_common():
    """Two processes, a device each: together they make the batches, and measure every example once."""
    coordinator = f"localhost:{free_port()}"
    here = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": here}
    hosts = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/streaming_host.py", coordinator, str(i)],
            env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for i in range(2)
    ]  # fmt: skip
    said = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said[0][1] + said[1][1]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    for host, places in ((first, slice(0, 5)), (second, slice(5, 10))):
        assert host["labels"] == host["pixels"] == [batch_rows(3, step, 10, 40).tolist() for step in range(4, 8)]
        own = np.concatenate([batch_rows(3, step, 10, 40)[places] for step in range(4, 13)]).tolist()  # some ahead
        assert Counter(own[:20]) <= Counter(host["read"]) <= Counter(own)
        assert host["measured"] == list(range(23))
