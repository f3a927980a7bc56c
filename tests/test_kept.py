"""Decoded sets that are kept for the next start: what is read is what was decoded, whatever happened to the file."""

import errno
import io
import logging
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from helpers import assert_same_bits

from resattn_jax.data.kept import read_kept
from resattn_jax.data.label_noise import NoisySource
from resattn_jax.data.sources import open_source, read
from resattn_jax.errors import UsageError


class Pictures:
    """Nine pictures of noise; counts how many of them were read. broken: a row that is no picture."""

    class_names, image_shape = ("a", "b"), (4, 5, 3)

    def __init__(self, seed=0, broken=None):
        self._seed, self._broken, self.reads = seed, broken, 0
        self._images = np.random.default_rng(seed).integers(0, 256, (9, 4, 5, 3), np.uint8)

    def __len__(self):
        return 9

    def __getitem__(self, row):
        self.reads += 1
        file = io.BytesIO()
        PIL.Image.fromarray(self._images[row]).save(file, "PNG")
        return b"" if row == self._broken else file.getvalue(), row % 2

    def name(self, row):
        return f"picture {row}"

    def identity(self):
        return "pictures", f"as of {self._seed}, {self._broken}"


def fields(examples):
    return examples.images, examples.labels, examples.readable


def kept_file(folder):
    (path,) = folder.iterdir()
    return path


def test_the_second_start_reads_no_record_and_has_the_same_bits(tmp_path):
    first, second = Pictures(), Pictures()
    assert_same_bits(fields(read_kept(first, tmp_path / "new")), fields(read(first)))
    again = read_kept(second, tmp_path / "new")
    assert second.reads == 0
    assert_same_bits(fields(again), fields(read(first)))
    assert (again.class_names, again.broken) == (("a", "b"), ())
    assert again.images.flags.writeable


def test_other_records_of_the_same_split_take_the_place_of_what_was_kept(tmp_path):
    read_kept(Pictures(0), tmp_path)
    other = Pictures(1)
    assert_same_bits(fields(read_kept(other, tmp_path)), fields(read(Pictures(1))))
    kept_file(tmp_path)  # one


DAMAGE = {
    "a bit of a pixel": lambda data: data[:-60] + bytes([data[-60] ^ 1]) + data[-59:],
    "the last byte missing": lambda data: data[:-1],
    "a byte too many": lambda data: data + b"\0",
    "half of it": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no JSON": lambda data: b"\xff" + data,
    "JSON of another kind": lambda data: b"[]\n" + data.partition(b"\n")[2],
    "without an end of its line": lambda data: data.partition(b"\n")[0],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_noticed_and_written_anew(damage, tmp_path):
    read_kept(Pictures(), tmp_path)
    path = kept_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    source = Pictures()
    assert_same_bits(fields(read_kept(source, tmp_path)), fields(read(Pictures())))
    assert source.reads == 9
    assert kept_file(tmp_path).read_bytes() == whole


def test_a_file_of_another_user_is_not_read(tmp_path, monkeypatch):
    read_kept(Pictures(), tmp_path)
    monkeypatch.setattr(os, "getuid", lambda me=os.getuid(): me + 1)
    source = Pictures()
    read_kept(source, tmp_path)
    assert source.reads == 9


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    source = Pictures()
    with caplog.at_level(logging.WARNING):
        examples = read_kept(source, tmp_path / "file" / "folder")
    assert_same_bits(fields(examples), fields(read(Pictures())))
    assert [r.message for r in caplog.records] == [
        f"the decoded images are not kept for the next start: [Errno 20] Not a directory: '{tmp_path}/file/folder'"
    ]


@pytest.mark.parametrize("step", ["_write", "os.replace"])
def test_a_full_disk_leaves_nothing_behind(step, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"resattn_jax.data.kept.{step}", full)
    assert_same_bits(fields(read_kept(Pictures(), tmp_path)), fields(read(Pictures())))
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path):
    read_kept(Pictures(0), tmp_path)
    path = kept_file(tmp_path)
    old, new = (pathlib.Path(f"{path}.{name}") for name in ("old", "new"))
    for half in old, new:
        half.write_bytes(b"half")
    os.utime(old, (0, 0))
    read_kept(Pictures(1), tmp_path)
    assert sorted(tmp_path.iterdir()) == [path, new]


def test_starts_at_the_same_time_disturb_none(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        all_examples = list(pool.map(lambda i: read_kept(Pictures(i % 2), tmp_path), range(40)))
    for i, examples in enumerate(all_examples):
        assert_same_bits(fields(examples), fields(read(Pictures(i % 2))))
    kept_file(tmp_path)  # one


def test_broken_pictures_are_told_of_at_every_start(tmp_path):
    first = read_kept(Pictures(broken=3), tmp_path, skip_broken=True)
    source = Pictures(broken=3)
    second = read_kept(source, tmp_path, skip_broken=True)
    assert source.reads == 0
    assert first.broken == second.broken == (("picture 3", "the file is empty"),)
    assert_same_bits(fields(first), fields(second))
    with pytest.raises(UsageError, match="picture 3 cannot be read"):
        read_kept(Pictures(broken=3), tmp_path)


def test_what_is_decoded_in_no_time_is_not_kept(tmp_path):
    read_kept(open_source("digits", "test"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_tfds_is_known_by_the_times_and_sizes_of_its_files(tfds_dir, tmp_path):
    folder = next(pathlib.Path(tfds_dir).glob("cifar10/*"))
    copy = tmp_path / "cifar10" / folder.name
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    file = min(copy.glob("*train*"))
    file.unlink()
    file.write_bytes(b"")

    def opened(split):
        return open_source("cifar10", split, str(tmp_path))

    then = opened("train").identity()
    assert then == opened("train").identity()
    assert then[0] != opened("train[:10]").identity()[0] != opened("test").identity()[0]
    noisy = [NoisySource(opened("train"), 0.1, seed).identity() for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]
    assert noisy[0][0] == then[0]
    assert noisy[0] != then
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    touched = opened("train").identity()
    file.write_bytes(b"longer")
    os.utime(file, ns=(0, 0))
    longer = opened("train").identity()
    assert then[0] == touched[0] == longer[0]
    assert len({then[1], touched[1], longer[1]}) == 3
