"""A run in a bucket is the run it would be on a disk: gs:// against an emulator of Cloud Storage, and a mounted bucket.

The mount is a folder of this disk that /proc/mounts is made to call one, where no folder can be renamed.
"""

import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from helpers import ROOT, assert_same_bits, built, final_state
from test_checkpoint import restored, state_of

import resattn_jax
from configs import digits
from resattn_jax import buckets
from resattn_jax.checkpoint import Reader, Writer
from resattn_jax.errors import UsageError
from resattn_jax.fine_tune import start_from
from resattn_jax.modes import report
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.export import export_folder
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.run import Run
from resattn_jax.state import Progress

# Connections of gcsfs that end with the process.
connections = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
pytestmark = [connections, pytest.mark.usefixtures("shared_programs")]


@pytest.fixture(scope="module")
def server():
    if not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))):
        pytest.skip("gcsfs and gcp-storage-emulator are not installed")
    from bucket_server import running

    with running() as objects:
        yield objects


@pytest.fixture
def address(server, request):
    """A folder of its own in the bucket."""
    return f"gs://bucket/{request.node.name.partition('[')[0]}"


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """A folder that is a mounted bucket, as far as a bucket without a hierarchical namespace differs from a disk."""
    mounts = tmp_path / "mounts"
    folder = tmp_path / "bucket mounted"
    folder.mkdir()
    named = str(folder).replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nbucket {named} fuse.gcsfuse rw,user_id=0 0 0\n")
    monkeypatch.setattr(buckets, "MOUNTS", mounts)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refusing_folders(getattr(os, name)))
    return folder


def refusing_folders(rename):
    def do(source, target, **options):
        assert not os.path.isdir(source), f"{source} is a folder, which a bucket does not rename"
        rename(source, target, **options)

    return do


@pytest.fixture(params=["address", "mount"])
def folder(request):
    """Where the checkpoints of a run lie, in each of the two."""
    return Run(request.getfixturevalue(request.param)).path / "checkpoints"


def write(folder, *steps, **keep):
    with Writer(folder, **keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), Progress(train_images=step), {"top1": step / 100})
            checkpoints.wait()
            assert checkpoints.saved == step, checkpoints.failure


def pretend(step):
    """Files of a checkpoint, for what does not look into them."""
    metadata = json.dumps({"commit_timestamp_nsecs": 1})
    for name, text in (("model/file", "x"), ("_CHECKPOINT_METADATA", metadata), ("commit_success.txt", "")):
        if not buckets.is_url(step):
            (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_text(text)


def unfinished(step):
    """Makes of a checkpoint what it was before Orbax's last two writes."""
    (step / "commit_success.txt").unlink()
    metadata = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps({**metadata, "commit_timestamp_nsecs": None}))


def steps(folder):
    with Reader(folder) as checkpoints:
        return checkpoints.steps()


# ---- Addresses and mounts.


def test_without_gcsfs_it_is_a_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^gs://bucket/run needs gcsfs; install it: pip install -e '\.\[gcs\]'$"):
        Run("gs://bucket/run")


@pytest.mark.parametrize("path", ["s3://bucket/run", "HTTP://host/run", "gs://bucket", "gs:///run", "gs://bucket/a[b]"])
def test_other_addresses_are_refused(path):
    with pytest.raises(UsageError, match="gs://BUCKET/FOLDER"):
        Run(path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/mnt/a b/run", "fuse.gcsfuse"),
        ("/mnt/a b", "fuse.gcsfuse"),
        ("/mnt/a bc", "ext4"),
        ("/mnt/pod/x", "fuse"),
        ("/mnt/twice", "tmpfs"),  # what was mounted last is seen
        ("/home", "ext4"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_nearest_mount(tmp_path, monkeypatch, path, kind):
    (tmp_path / "mounts").write_bytes(
        b"/dev/sda / ext4 rw 0 0\nbucket /mnt/a\\040b fuse.gcsfuse rw 0 0\nbucket /mnt/pod fuse rw 0 0\n"
        b"x /mnt/twice fuse.gcsfuse rw 0 0\ntmpfs /mnt/twice tmpfs rw 0 0\n"
    )
    monkeypatch.setattr(buckets, "MOUNTS", tmp_path / "mounts")
    assert buckets.file_system(path) == kind
    assert buckets.commits_by_file(pathlib.Path(path)) == kind.startswith("fuse")


# ---- Checkpoints.


def test_what_is_read_is_what_was_written_and_older_ones_go(folder):
    write(folder, 5, 10, keep_newest=1, keep_best=1)
    assert steps(folder) == [10]
    assert not (folder / "5").exists()
    step, state, progress = restored(folder, said := [])
    assert (step, progress.train_images, said) == (10, 10, [])
    assert_same_bits(state, state_of(10))


def test_a_save_that_was_cut_off_is_no_checkpoint_and_is_written_anew(folder):
    """All of it is there but what Orbax writes last: the time, and the commit file."""
    write(folder, 10)
    unfinished(folder / "10")
    assert steps(folder) == []
    said = []
    with Writer(folder, say=said.append) as checkpoints:
        assert checkpoints.steps() == []
    assert said == ["10: what a process left that was ended is removed"]
    assert not (folder / "10").exists()
    write(folder, 10)


def test_on_a_mount_a_checkpoint_from_before_there_were_commit_files_is_one(mount):
    """Orbax 0.12.0 renamed folders and left the time of it."""
    write(mount, 5)
    (mount / "5" / "commit_success.txt").unlink()
    step, state, _ = restored(mount, said := [])
    assert (step, said) == (5, [])
    assert_same_bits(state, state_of(5))


def test_a_deletion_that_is_cut_off_leaves_no_checkpoint(folder, monkeypatch):
    pretend(folder / "5")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            buckets.delete(folder / "5")
    assert (folder / "5" / "model" / "file").exists()
    assert steps(folder) == []


def test_a_damaged_checkpoint_is_set_aside_whole_and_its_step_can_be_written_again(folder):
    write(folder, 5, 10)
    (folder / "10" / "model" / "manifest.ocdbt").write_bytes(b"something else")
    said = []
    step, state, _ = restored(folder, said)
    assert step == 5
    assert_same_bits(state, state_of(5))
    assert "/10 cannot be used: " in said[0]
    assert said[0].endswith("; it is now called 10.damaged")
    assert not (folder / "10").exists()
    assert (folder / "10.damaged" / "model" / "manifest.ocdbt").read_bytes() == b"something else"
    for name in ("commit_success.txt", "progress/metadata", "ema/_METADATA", "optimizer/manifest.ocdbt"):
        assert (folder / "10.damaged" / name).exists()
    write(folder, 10)
    assert steps(folder) == [5, 10]


def test_setting_aside_that_is_cut_off_loses_nothing(folder, monkeypatch):
    """The process ends when it is to copy the first file, to delete the commit file, and to delete the rest."""
    pretend(folder / "5")
    whole = {p.name for p in (folder / "5").iterdir()}

    def killed(*_, **__):
        raise KeyboardInterrupt

    for name in ("copy", "unlink", "rmtree"):  # in the order in which they come
        moved = folder / f"5.damaged_{name}"
        with monkeypatch.context() as patch:
            patch.setattr(type(folder), name, killed)
            with pytest.raises(KeyboardInterrupt):
                buckets.move(folder / "5", moved)
        assert steps(folder) == ([] if name == "rmtree" else [5])
        assert whole == {path.name for path in (folder / "5" if name == "copy" else moved).iterdir()}


# ---- One writer.


def test_of_many_processes_that_begin_at_once_one_has_the_lock(server, address):
    lock, begin, end, won, refused = Run(address).path / "lock", threading.Barrier(8), threading.Event(), [], []

    def process(number):
        begin.wait()
        try:
            with buckets.claimed(lock, f"process 1 of user 0 on host{number} since 2026\n"):
                won.append(number)
                end.wait(20)
        except UsageError as error:
            refused.append(str(error))
            if len(refused) == 7:
                end.set()

    threads = [threading.Thread(target=process, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    says = f"{address} is in use by process 1 of user 0 on host{won[0]} since 2026; wait until it ends, or end it."
    assert set(refused) == {f"{says} If it is dead, remove what it left: gcloud storage rm {address}/lock"}
    assert not lock.exists()


def test_a_second_process_is_refused_and_what_a_dead_one_of_this_host_left_is_taken_over(server, address):
    code = f"""
import sys, time
from configs import digits
from resattn_jax.run import Run
with Run({address!r}).writing(digits.get_config(), None, first_host=True):
    print("in", flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    run, lock = Run(address), Run(address).path / "lock"
    assert lock.read_text().startswith(f"process {first.pid} of user {os.getuid()} on {socket.gethostname()} since 20")
    with (
        pytest.raises(UsageError, match=rf"^{address} is in use by process {first.pid} of user \d+ on \S+ since"),
        run.writing(digits.get_config(), None, first_host=True),
    ):
        pass
    first.kill()
    first.communicate()
    assert lock.exists()
    with run.writing(digits.get_config(), None, first_host=True):
        assert lock.read_text().startswith(f"process {os.getpid()} ")
    assert not lock.exists()


def test_what_a_process_of_another_host_left_is_told_and_how_to_remove_it(server, address):
    lock = Run(address).path / "lock"
    buckets.write(lock, b"process 12 of user 0 on elsewhere since 2026-11-25 07:00:00+00:00\n")
    with (
        pytest.raises(UsageError, match=rf"in use by process 12 .*; wait .* gcloud storage rm {address}/lock$"),
        Run(address).writing(digits.get_config(), None, first_host=True),
    ):
        pass
    assert lock.exists()
    assert not Run(address).path.joinpath("config.json").exists()


def test_a_bucket_that_is_not_there_is_one_line(server):
    run = Run("gs://no-such-bucket/run")
    assert run.config is None
    with (
        pytest.raises(UsageError, match=r"^gs://no-such-bucket/run cannot be written: .*; choose another --workdir"),
        run.writing(digits.get_config(), None, first_host=True),
    ):
        pass


# ---- What grows.


def test_a_log_that_cannot_be_copied_is_told_once_and_kept(server, address, monkeypatch, capfd):
    monkeypatch.setattr(buckets, "PAUSE", 0.0)
    run = Run(address)
    with run.writing(digits.get_config(), None, first_host=True), monkeypatch.context() as patch:
        kept = pathlib.Path(run.logs)

        def away(*_):
            raise OSError("the network is down")

        patch.setattr(buckets, "write", away)
        for step in range(3):
            run.log({"step": step})
            run.logged()
            run.settle_logs()
        assert capfd.readouterr().err == f"{kept} could not be copied to {address}: the network is down\n"
        patch.undo()
        run.log({"step": 3})
        run.logged()
    assert [row["step"] for row in Run(address).metrics] == [0, 1, 2, 3]
    assert not kept.exists()


# ---- Whole runs.


def without_rates(rows):
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


@pytest.mark.usefixtures("shared_programs")
def test_a_run_in_a_bucket_is_the_run_on_a_disk(server, address, tiny_config, one_device, tmp_path, monkeypatch):
    """Trained to step 6, gone on with to 8, measured, exported, opened, and the start of another run."""
    monkeypatch.setattr(buckets, "PAUSE", 0.0)
    tiny_config.schedule.name = "constant"
    tiny_config.augment.mixup_alpha = 0.0  # then the programs of 6 and of 8 steps are the same
    name = address.removeprefix("gs://bucket/")
    logged = {}  # by step, what lay in the bucket when its checkpoint began to count

    def look(written):
        if match := re.fullmatch(rf"{name}/checkpoints/(\d+)/commit_success.txt", written):
            logged[int(match[1])] = [json.loads(line) for line in server.read(f"{name}/metrics.jsonl").splitlines()]

    monkeypatch.setattr(server, "on_write", look)
    for total in (6, 8):
        tiny_config.total_steps = total
        for place in (address, tmp_path / "disk"):
            train_and_evaluate(tiny_config, place, one_device)
    there, here = Run(address), Run(tmp_path / "disk")
    assert without_rates(there.metrics) == without_rates(here.metrics)
    assert there.result["final"] == here.result["final"]
    assert there.config == here.config
    assert_same_bits(final_state(tiny_config, there.path, one_device), final_state(tiny_config, here.path, one_device))
    assert list(logged) == [6, 8]
    for step, rows in logged.items():
        upto = [row for row in there.metrics if row["step"] <= step]
        assert rows[: len(upto)] == upto
    kinds = [[re.sub(r"^events\..*", "events", path.name) for path in run.path.iterdir()] for run in (there, here)]
    assert sorted(kinds[0]) == sorted(kind for kind in kinds[1] if kind != "lock")
    assert kinds[0].count("events") == 2

    measured = evaluate_checkpoint(there.config, address, "newest", one_device)
    assert here.result["final"].items() <= measured.items()
    export_folder(there.config, address, "best", f"{address}_exported")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    exported, net = resattn_jax.load(f"{address}_exported"), resattn_jax.load(tmp_path / "disk")
    np.testing.assert_array_equal(exported.logits(images), net.logits(images))
    command = types.SimpleNamespace(output=None, run=there, runs=(there,), config=there.config)
    report.run(command)
    written = sorted(path.name for path in there.path.iterdir())
    assert "report.html" in written
    assert not [name for name in written if "tmp" in name]
    page = (there.path / "report.html").read_text()
    assert "measured for this page" in page
    assert address in page
    started, notes = start_from(built(tiny_config, one_device).initial_state(), f"{address}:best", tiny_config)
    assert notes == []
    assert_same_bits(started.eval_variables, net.variables)
