"""Sources and the resident pipeline: every example once an epoch, every example once in an evaluation."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from resattn_jax.data.order import batch_rows
from resattn_jax.data.pictures import Picture
from resattn_jax.data.pipelines import open_pipelines
from resattn_jax.data.resident import Resident
from resattn_jax.data.sources import Examples, open_source, prepare, read
from resattn_jax.errors import UsageError
from resattn_jax.runtime import make_mesh


def some_examples(count):
    return Examples(np.zeros((count, 4, 4, 1), np.uint8), np.arange(count, dtype=np.int32), ("a",))


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 5), (10, 4), (10, 7), (3, 8)])
def test_every_epoch_has_every_example_once_in_its_own_order(examples, batch_size):
    """Epochs follow each other without a gap, also where the batch does not divide them or is longer than one."""
    epochs = 8
    steps = epochs * examples // batch_size
    stream = np.concatenate([batch_rows(7, step, batch_size, examples) for step in range(steps)])
    whole = stream[: len(stream) // examples * examples].reshape(-1, examples)
    assert (np.sort(whole, axis=1) == np.arange(examples)).all()
    assert len({tuple(epoch) for epoch in whole}) > 1


def test_a_batch_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(batch_rows(1, 5, 64, 1000), batch_rows(1, 5, 64, 1000))
    assert (batch_rows(1, 5, 64, 1000) != batch_rows(2, 5, 64, 1000)).any()
    assert (batch_rows(1, 5, 64, 1000) != batch_rows(1, 6, 64, 1000)).any()


@pytest.mark.parametrize("limit", [None, 20, 13])
def test_an_evaluation_sees_every_example_once(limit):
    split = Resident(some_examples(37), make_mesh())
    seen = []
    for rows, mask in split.eval_batches(16, limit):
        assert rows.shape == mask.shape == (16,)
        seen += list(np.asarray(rows)[np.asarray(mask)])
    assert seen == list(range(limit or 37))


def test_take_gives_the_rows_asked_for():
    split = Resident(some_examples(9), make_mesh(jax.devices()[:1]))
    images, labels = Resident.take(split.arrays, np.array([8, 0, 3]))
    assert images.shape == (3, 4, 4, 1)
    assert list(labels) == [8, 0, 3]


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test = read(open_source("digits", "train")), read(open_source("digits", "test"))
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    both = np.concatenate([train.images, test.images])[..., 0]
    original = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in original)
    counts = np.bincount(test.labels)
    assert counts.min() >= 34  # 360 of ten nearly equal classes
    assert counts.max() <= 37
    np.testing.assert_array_equal(test.labels, read(open_source("digits", "test")).labels)


def test_cifar10_is_read_as_tfds_wrote_it(tfds_dir):
    test = read(open_source("cifar10", "test", tfds_dir))
    assert test.images.shape == (10000, 32, 32, 3)
    assert list(np.bincount(test.labels)) == [1000] * 10
    assert test.class_names[:2] == ("airplane", "automobile")
    some = read(open_source("cifar10", "train[:90%]", tfds_dir))
    assert len(some.labels) == 45000
    # The published statistics of the training pixels, to three decimals.
    np.testing.assert_allclose(some.images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=2e-3)
    np.testing.assert_allclose(some.images.std((0, 1, 2)) / 255, [0.2470, 0.2435, 0.2616], atol=2e-3)


def test_a_record_is_what_tfds_reads(tfds_dir):
    import tensorflow_datasets as tfds

    for name in ("cifar10", "imagenet2012"):
        ours = open_source(name, "train[3:9]", tfds_dir)
        theirs = tfds.builder(name, data_dir=tfds_dir).as_data_source("train[3:9]")
        for row, record in enumerate(theirs):
            data, label = ours[row]
            np.testing.assert_array_equal(Picture(data).pixels(), record["image"])
            assert label == record["label"]
    assert ours.name(5) == f"imagenet2012 train[3:9], example 5 {record['file_name'].decode()}"


def test_unknown_sets_and_splits_name_the_nearest(tfds_dir):
    with pytest.raises(UsageError, match=r"unknown data set 'cifra10' \(did you mean 'cifar10'\?\); there are digits"):
        open_source("cifra10", "train")
    with pytest.raises(UsageError, match=r"no split 'trian' \(did you mean 'train'\?\); it has train, test"):
        open_source("cifar10", "trian", tfds_dir)
    for split in ("train[:0%]", "train[5:5]", "train[60000:]", "train[a:b]"):
        with pytest.raises(UsageError, match=r"is empty or no slice; train has 50,000 examples.*'train\[:90%\]'"):
            open_source("cifar10", split, tfds_dir)
    for name in ("cifar10/nope", "cifar10:9.9.9", "cifar10/"):
        with pytest.raises(UsageError, match=f"TFDS cannot open '{name}': "):
            open_source(name, "train", tfds_dir)
    with pytest.raises(UsageError, match="train and test, not 'validation'"):
        open_source("digits", "validation")


def test_a_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setattr("resattn_jax.data.sources._can_prepare", lambda: False)
    with pytest.raises(UsageError, match=r"cifar10 is not prepared in .*\[prepare\].*--mode=prepare"):
        open_source("cifar10", "train", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs TensorFlow: pip install -e '\.\[prepare\]'"):
        prepare("cifar10", str(tmp_path))


def copy_of_cifar10(tfds_dir, tmp_path, **changes):
    """A folder with a description of cifar10 but without its records; changes: to dataset_info.json."""
    folder = next(pathlib.Path(tfds_dir).glob("cifar10/*"))
    copy = tmp_path / "cifar10" / folder.name
    copy.mkdir(parents=True)
    for name in ("features.json", "label.labels.txt"):
        shutil.copy(folder / name, copy / name)
    info = json.loads((folder / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, **changes}))
    return folder, copy


def test_a_set_in_tfrecord_format_says_how_to_convert_it(tfds_dir, tmp_path):
    copy_of_cifar10(tfds_dir, tmp_path, fileFormat="tfrecord")
    with pytest.raises(UsageError, match=r"as tfrecord, .*tfds convert_format --dataset_version_dir=.*array_record"):
        open_source("cifar10", "train", str(tmp_path))


def test_a_set_that_was_converted_to_a_second_format_is_read(tfds_dir, tmp_path):
    """As `tfds convert_format` leaves it."""
    folder, copy = copy_of_cifar10(tfds_dir, tmp_path, fileFormat="tfrecord", alternativeFileFormats=["array_record"])
    for path in folder.glob("*-test.array_record*"):
        (copy / path.name).symlink_to(path)
    assert open_source("cifar10", "test", str(tmp_path))[7] == open_source("cifar10", "test", tfds_dir)[7]


def test_a_split_without_labels_is_refused(tfds_dir, tmp_path, tiny_config):
    """TFDS gives the examples of a competition's test set the label -1."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    split = {"name": "test", "shardLengths": ["1"], "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    _, copy = copy_of_cifar10(tfds_dir, tmp_path, splits=[split])
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(b"picture")
    example.features.feature["label"].int64_list.value.append(-1)
    writer = ArrayRecordWriter(str(copy / "cifar10-test.array_record-00000-of-00001"), "group_size:1")
    writer.write(example.SerializeToString())
    writer.close()
    tiny_config.data.update(name="cifar10", dir=str(tmp_path), train_split="test", eval_split="test")
    with pytest.raises(UsageError, match="the split 'test' of cifar10 has no labels"):
        open_pipelines(tiny_config, make_mesh())
