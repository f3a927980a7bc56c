"""Sources and the resident pipeline: every example once an epoch, every example once in an evaluation."""

import io
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from helpers import examples
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from resattn_jax.data.order import batch_rows, mirrored
from resattn_jax.data.pictures import Picture
from resattn_jax.data.pipelines import TrainingData
from resattn_jax.data.resident import ResidentEval, ResidentTrain, take
from resattn_jax.data.sources import open_source, prepare, read
from resattn_jax.errors import UsageError
from resattn_jax.runtime import make_mesh


def some_examples(count):
    return examples(np.zeros((count, 4, 4, 1), np.uint8), np.arange(count, dtype=np.int32), ("a",))


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


def seen_mirrored(step, batch_size, examples, seed=7):
    """(rows of a batch, which of them are seen in the mirror)"""
    rows = batch_rows(seed, step, batch_size, examples)
    return rows, mirrored(seed, rows, np.arange(step * batch_size, (step + 1) * batch_size), examples)


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 5), (10, 4), (3, 8), (101, 32)])
def test_alternating_flip_is_the_other_way_round_in_every_epoch(examples, batch_size):
    """Also where an epoch ends within a batch, or a batch has several."""
    batches = [seen_mirrored(step, batch_size, examples) for step in range(-(-6 * examples // batch_size))]
    rows, mirrors = (np.concatenate(part)[: 6 * examples].reshape(6, examples) for part in zip(*batches, strict=True))
    epochs = [mirror[np.argsort(row)] for row, mirror in zip(rows, mirrors, strict=True)]  # by example
    for before, after in itertools.pairwise(epochs):
        np.testing.assert_array_equal(after, ~before)


def test_the_first_epochs_coin_is_fair_and_the_seeds():
    first, other = (mirrored(seed, np.arange(4000), np.arange(4000), 4000) for seed in (7, 8))
    assert first.mean() == pytest.approx(0.5, abs=0.03)
    assert (first != other).mean() == pytest.approx(0.5, abs=0.03)


def test_the_epoch_of_an_alternating_flip_is_exact_in_the_longest_run():
    """Of 333 examples in batches of 1,024 at the last step of all: by Python's integers, which do not overflow."""
    step, size = 2**31 - 2, 1024
    rows, mirrors = seen_mirrored(step, size, 333)
    coins = mirrored(7, np.arange(333), np.arange(333), 333)
    for place in range(0, size, 93):
        assert mirrors[place] == coins[rows[place]] ^ ((step * size + place) // 333 % 2 == 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_resident_stream_with_alternating_flip_mirrors_what_it_takes(devices):
    """On any number of devices, and from any step on; asked for many steps at once or for one."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 2, 3, 1), np.uint8)
    split, mesh = examples(pixels, np.arange(20, dtype=np.int32), ("a",)), make_mesh(jax.devices()[:devices])
    stream = ResidentTrain(split, seed=7, batch_size=16, steps_per_dispatch=4, mesh=mesh, alternating=True)
    batches = np.asarray(stream.batches(3, 4))
    np.testing.assert_array_equal(stream.batches(5, 1)[0], batches[2])
    for step, batch in zip(range(3, 7), batches, strict=True):
        images, labels = jax.jit(stream.take)(stream.arrays, batch)
        rows, mirrors = seen_mirrored(step, 16, 20)
        np.testing.assert_array_equal(labels, rows)
        for image, row, mirror in zip(np.asarray(images), rows, mirrors, strict=True):
            np.testing.assert_array_equal(image, pixels[row][:, ::-1] if mirror else pixels[row])
    assert mirrors.any()
    assert not mirrors.all()


@pytest.mark.parametrize("limit", [None, 20, 13])
def test_an_evaluation_sees_every_example_once(limit):
    split = ResidentEval(some_examples(37), batch_size=16, max_examples=limit, mesh=make_mesh())
    seen = []
    for rows, mask in split:
        assert rows.shape == mask.shape == (16,)
        seen += list(np.asarray(rows)[np.asarray(mask)])
    assert seen == list(range(limit or 37))


def test_take_gives_the_rows_asked_for():
    mesh = make_mesh(jax.devices()[:1])
    split = ResidentTrain(some_examples(9), seed=0, batch_size=3, steps_per_dispatch=1, mesh=mesh)
    images, labels = take(split.arrays, np.array([8, 0, 3]))
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


def test_digits_are_in_the_order_that_scikit_learn_splits_them_into():
    """The test set's own indices, drawn by scikit-learn, as runs of older versions had them."""
    digits = load_digits()
    splits = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0, shuffle=True)
    for name, rows in zip(("train", "test"), splits, strict=True):
        ours = read(open_source("digits", name))
        np.testing.assert_array_equal(ours.labels, digits.target[rows])
        np.testing.assert_array_equal(ours.images[..., 0], np.round(digits.images[rows] * 255 / 16))


def test_cifar10_is_read_as_tfds_wrote_it(tfds_dir):
    test = read(open_source("cifar10", "test", tfds_dir))
    assert test.images.shape == (10000, 32, 32, 3)
    assert list(np.bincount(test.labels)) == [1000] * 10
    assert test.class_names[:2] == ("airplane", "automobile")
    some = read(open_source("cifar10", "train[:20%]", tfds_dir))
    assert len(some.labels) == 10000
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
        assert ours.__getitems__([4, 0, 5]) == [ours[4], ours[0], ours[5]]
    assert ours.name(5) == f"imagenet2012 train[3:9], example 5 {record['file_name'].decode()}"


class Files:
    """Examples from the content of files. Their labels are their rows; a file that is None cannot be opened."""

    def __init__(self, files, image_shape):
        self._files, self.image_shape = files, image_shape
        self.class_names = tuple(map(str, range(len(files))))

    def __len__(self):
        return len(self._files)

    def __getitem__(self, row):
        if self._files[row] is None:
            raise OSError("the disk is gone")
        return self._files[row], row

    def name(self, row):
        return f"file {row}"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def numbered(count):
    """Grey pictures of 4 x 6 whose pixels are their row."""
    return [encoded(PIL.Image.new("L", (6, 4), row)) for row in range(count)]


@pytest.mark.parametrize(
    ("channels", "mode", "color", "expected"),
    [
        (1, "L", 90, [90]),
        (1, "1", 1, [255]),
        (1, "I;16", 90 * 257, [90]),
        (1, "RGB", (90, 90, 90), [90]),
        (1, "LA", (90, 0), [255]),
        (2, "LA", (90, 7), [90, 7]),
        (3, "RGB", (200, 100, 50), [200, 100, 50]),
        (3, "L", 90, [90, 90, 90]),
        (3, "RGBA", (200, 100, 50, 0), [255, 255, 255]),
        (4, "RGBA", (200, 100, 50, 7), [200, 100, 50, 7]),
        (4, "RGB", (200, 100, 50), [200, 100, 50, 255]),
    ],
)
def test_a_set_is_decoded_with_as_many_channels_as_it_has(channels, mode, color, expected):
    images = read(Files([encoded(PIL.Image.new(mode, (6, 4), color))], (4, 6, channels))).images
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, np.tile(np.array(expected, np.uint8), (1, 4, 6, 1)))


def test_a_palette_picture_and_one_with_a_transparent_color_are_decoded():
    palette = PIL.Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    grey = encoded(PIL.Image.new("L", (6, 4), 90), transparency=90)  # a grey set has its pixels as they are stored
    assert read(Files([encoded(palette)], (4, 6, 3))).images[0, 0, 0].tolist() == [200, 100, 50]
    assert read(Files([grey], (4, 6, 1))).images[0, 0, 0].tolist() == [90]


def test_jpegs_of_a_grey_and_of_a_color_set_are_decoded_as_by_pillow():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for mode, channels in (("L", 1), ("RGB", 3)):
        data = encoded(PIL.Image.fromarray(noise).convert(mode), "JPEG", quality=95)
        expected = np.asarray(PIL.Image.open(io.BytesIO(data))).reshape(16, 16, channels)
        np.testing.assert_allclose(read(Files([data], (16, 16, channels))).images[0], expected, atol=2)
    assert read(Files([data], (16, 16, 4))).images[0, ..., 3].min() == 255


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "the file is empty"),
        (b"no picture", "it is no image of a known kind"),
        (numbered(1)[0][:-20], r"\w{2}"),
        (None, "the disk is gone"),
        (encoded(PIL.Image.new("L", (4, 6))), "it has 6 x 4 pixels, not 4 x 6"),
        (encoded(PIL.Image.new("F", (6, 4)), "TIFF"), "its pixels are floating-point numbers"),
    ],
)
def test_a_broken_picture_of_a_set_in_memory_is_an_error_or_another_stands_in_its_place(file, why):
    files = numbered(30)
    files[7] = file
    message = f"file 7 cannot be read: .*{why}.*; replace or remove it, or set config.data.broken=skip"
    with pytest.raises(UsageError, match=message):
        read(Files(files, (4, 6, 1)))
    examples = read(Files(files, (4, 6, 1)), skip_broken=True)
    assert len(examples.images) == len(examples.labels) == 30
    ((name, _),) = examples.broken
    assert name == "file 7"
    np.testing.assert_array_equal(examples.readable, np.arange(30) != 7)
    np.testing.assert_array_equal(examples.labels[examples.readable], np.delete(np.arange(30), 7))
    np.testing.assert_array_equal(examples.images[:, 0, 0, 0], examples.labels)  # also in the place of the broken one
    assert examples.labels[7] != 7


def test_what_stands_in_the_place_of_a_broken_picture_is_drawn_by_its_row_alone():
    def stand_ins(*broken):
        files = [None if row in broken else data for row, data in enumerate(numbered(200))]
        return read(Files(files, (4, 6, 1)), skip_broken=True).labels

    alone, among_others = stand_ins(7), stand_ins(7, 11, 190)
    assert alone[7] == among_others[7]
    assert len({int(among_others[row]) for row in (7, 11, 190)}) == 3
    assert not {7, 11, 190} & set(among_others)
    assert set(stand_ins(*range(1, 200))) == {0}


def test_a_set_in_memory_of_broken_pictures_alone_is_an_error():
    with pytest.raises(UsageError, match="of 3 pictures none could be read; the last was file 2: the file is empty"):
        read(Files([b""] * 3, (4, 6, 1)), skip_broken=True)


def test_examples_are_all_readable_unless_it_is_said():
    examples = some_examples(3)
    assert examples.broken == ()
    assert examples.readable.tolist() == [True] * 3


def test_a_damaged_record_is_a_broken_picture(tfds_dir, tmp_path):
    folder, copy = copy_of_cifar10(tfds_dir, tmp_path)
    for path in folder.glob("*-test.array_record*"):
        (copy / path.name).symlink_to(path)
    damaged = sorted(copy.glob("*-test.array_record*"))[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 + 200] ^= 0xFF
    damaged.unlink()
    damaged.write_bytes(content)
    source = open_source("cifar10", "test", str(tmp_path))
    with pytest.raises(UsageError, match=r"cifar10 test, example \d+ cannot be read: the record is damaged: "):
        read(source)
    examples = read(source, skip_broken=True)
    assert 1 <= len(examples.broken) <= 2
    assert examples.images.shape == (10000, 32, 32, 3)
    whole = read(open_source("cifar10", "test", tfds_dir))  # the others, which were read together with it, are there
    assert (examples.images == whole.images).all((1, 2, 3)).sum() == 10000 - len(examples.broken)


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
    monkeypatch.setattr("resattn_jax.data.sources.tfds._can_prepare", lambda: False)
    with pytest.raises(UsageError, match=r"cifar10 is not prepared in .*\[prepare\].*--mode=prepare"):
        open_source("cifar10", "train", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs TensorFlow: pip install -e '\.\[prepare\]'"):
        prepare("cifar10", str(tmp_path))


def test_preparing_says_in_a_sentence_where_the_set_lies_or_that_nothing_is_to_be_done(tfds_dir):
    assert prepare("digits") == "digits are on board and need no preparing"
    assert prepare("cifar10", tfds_dir).startswith(f"cifar10 lies in {tfds_dir}/cifar10/")
    assert prepare("folder:/no/such") == "folder:/no/such needs no preparing; start training"
    assert prepare("synthetic").endswith("synthetic needs no preparing; start training")


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
        TrainingData(tiny_config)
