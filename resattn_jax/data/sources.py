"""Where examples come from: TFDS sets, folders of pictures, scikit-learn's digits, and made-up pictures to time with.

A prepared TFDS set is read as random-access ArrayRecord files; no TensorFlow is needed for that, only for preparing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import logging
import os
import pathlib
import re
from typing import Any, Protocol

import numpy as np
import PIL.Image

from resattn_jax.config import nearest
from resattn_jax.data.pictures import SUFFIXES
from resattn_jax.errors import UsageError, reason

OWN_SPLITS = ("val", "validation", "test")  # a folder's split that is measured may have any of these names


class Source(Protocol):
    """One split: records to be had in any order, also in another process, to which a source can be sent.

    image_shape is (H, W, C) where all pictures have one, else None; class_names[label] is a label's name.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        """The picture's file content and its label. Raises OSError."""

    def name(self, row: int) -> str:
        """What a person finds the example by."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split in memory: images uint8 [N, H, W, C], labels int32 [N], and the classes' names."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens one split of a data set; reads nothing of it yet but a list of what is there.

    Args:
      name: "digits", "synthetic", "folder:DIR" or the name of a TFDS image classification set.
      split: its name or a slice of it ("train[:90%]"). TFDS has the same slices; elsewhere they are of a fixed random
        order, so that every slice has every class.
      data_dir: where TFDS keeps its sets; None: TFDS_DATA_DIR or TFDS's default.

    Raises:
      UsageError: there is no such set or split, it is not prepared, not as ArrayRecord, or no set to train on.
    """
    if name.startswith("folder:"):
        return _sliced(split, functools.partial(FolderSource, pathlib.Path(name.removeprefix("folder:")).expanduser()))
    if name in _MADE_HERE:
        return _sliced(split, _MADE_HERE[name])
    return TfdsSource(name, split, data_dir)


def read(source: Source) -> Examples:
    """Decodes a source into memory. Its images all have one size: image_shape is not None."""

    def decode(data: bytes) -> np.ndarray:
        image = np.asarray(PIL.Image.open(io.BytesIO(data)))
        return image.reshape(*image.shape[:2], source.image_shape[-1])

    records = [source[row] for row in range(len(source))]  # threads are slower for pictures this small
    images = np.stack([decode(data) for data, _ in records])
    return Examples(images, np.array([label for _, label in records], np.int32), source.class_names)


def prepare(name: str, data_dir: str | None = None) -> str:
    """Downloads a TFDS set and writes it as ArrayRecord with TFDS's own builder; needs the extra [prepare].

    Returns the folder it lies in. Raises UsageError when TensorFlow is not installed or TFDS cannot get the set.
    """
    if name == "digits":
        return "scikit-learn, where digits need no preparing"
    if name == "synthetic" or name.startswith("folder:"):
        raise UsageError(f"{name} needs no preparing; start training")
    builder = _builder(name, data_dir)
    if _readable(builder):
        return str(builder.data_path)
    if not _can_prepare():
        raise UsageError(f"preparing {name} needs TensorFlow: pip install -e '.[prepare]', then run this again")
    if builder.is_prepared():
        raise UsageError(_not_random_access(builder))
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # TFDS raises whatever the network, the disk or the set's own code does
        raise UsageError(f"TFDS could not prepare {name}: {reason(error)}") from error
    return str(builder.data_path)


class TfdsSource:
    """A split of a prepared TFDS image classification set."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        """Prepares the set if it can. Raises UsageError."""
        builder = _builder(name, data_dir)
        if not _readable(builder):
            if builder.is_prepared():
                raise UsageError(_not_random_access(builder))
            if not _can_prepare():
                raise UsageError(
                    f"{name} is not prepared in {builder.data_path}: set config.data.dir or TFDS_DATA_DIR to where it"
                    " is, or pip install -e '.[prepare]' and run again with --mode=prepare"
                )
            prepare(name, data_dir)
            builder = _builder(name, data_dir)
        features = builder.info.features
        self._image, self._label = _image_and_label(name, builder)
        self._records = _records(name, builder, split)
        self.class_names = tuple(features[self._label].names)
        shape = features[self._image].shape
        self.image_shape = None if None in shape else shape
        self._title = f"{name} {split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        example = self._example(row)
        return example[self._image].bytes_list.value[0], example[self._label].int64_list.value[0]

    def name(self, row: int) -> str:
        file_name = self._example(row)["file_name"].bytes_list.value
        return " ".join([f"{self._title}, example {row}", *(n.decode() for n in file_name)])

    def _example(self, row: int):
        """A record's features by their keys. TFDS's decoding of all of them would take as long as reading them."""
        from tensorflow_datasets.proto import tf_example_pb2  # slow the first time; other sources do without

        return tf_example_pb2.Example.FromString(self._records[row]).features.feature


class FolderSource:
    """Pictures in DIR/SPLIT/CLASS/…, at any depth below CLASS; labels count the sorted names of the classes."""

    image_shape = None

    def __init__(self, root: pathlib.Path, split: str):
        """Raises UsageError when there is no such split, no picture in it or in a class, or fewer than two classes."""
        if not root.is_dir():
            raise UsageError(f"there is no folder {root}; folder:DIR needs DIR/train/CLASS/*.jpg and DIR/val/CLASS")
        there = sorted(d.name for d in root.iterdir() if d.is_dir())
        if split in OWN_SPLITS and split not in there:  # people call it one or the other; one is enough
            split = next((s for s in OWN_SPLITS if s in there), split)
        if split not in there:
            hint = ", or take a part of the training pictures: 'train[90%:]'" if split in OWN_SPLITS else ""
            found = f"it has {', '.join(there)}" if there else "it is empty"
            raise UsageError(f"{root} has no folder {split!r}; {found}; it needs {root / split}/CLASS/*.jpg{hint}")
        folder = root / split
        self.class_names = tuple(sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] != "."))
        if not self.class_names:
            raise UsageError(f"{folder} has no folders; each class needs one with its pictures in it")
        if len(self.class_names) == 1:
            raise UsageError(
                f"{folder} has one class, {self.class_names[0]!r}; there must be two or more to tell apart"
            )
        self._folder, files, labels = str(folder), [], []
        for label, class_name in enumerate(self.class_names):
            inside = _pictures_in(self._folder, class_name)
            files += inside
            labels += [label] * len(inside)
        if not files:
            raise UsageError(f"{folder} has no pictures; they are known by their names' ends: {', '.join(SUFFIXES)}")
        empty = set(range(len(self.class_names))) - set(labels)
        if empty:
            raise UsageError(f"{folder / self.class_names[min(empty)]} has no pictures; remove it or fill it")
        # One array each: a million small objects would be copied to every worker as their counts are touched.
        self._files, self._labels = np.array([os.fsencode(f) for f in files]), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        with open(self.name(row), "rb") as file:
            return file.read(), int(self._labels[row])

    def name(self, row: int) -> str:
        return f"{self._folder}/{os.fsdecode(self._files[row])}"


class SyntheticSource:
    """JPEGs of smooth noise in the sizes that ImageNet's photographs have, to time with: no data set is needed."""

    image_shape = None
    class_names = tuple(f"class {i:03}" for i in range(1000))
    _PICTURES = 64  # different ones

    def __init__(self, split: str):
        """Raises UsageError when there is no such split."""
        if split not in _SYNTHETIC_EXAMPLES:
            raise UsageError(f"synthetic has the splits {', '.join(_SYNTHETIC_EXAMPLES)}, not {split!r}")
        self._count = _SYNTHETIC_EXAMPLES[split]
        self._seed = sum(split.encode())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        return _synthetic_jpeg(self._seed, row % self._PICTURES), (row * 7919) % len(self.class_names)

    def name(self, row: int) -> str:
        return f"synthetic example {row}"


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as PNG; 360 of them, stratified, are the test set."""

    image_shape = (8, 8, 1)
    class_names = tuple("0123456789")

    def __init__(self, split: str):
        """Raises UsageError when there is no such split."""
        from sklearn.datasets import load_digits  # slow imports that only digits need
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise UsageError(f"digits have the splits train and test, not {split!r}")
        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.images)), test_size=360, stratify=digits.target, random_state=0, shuffle=True
        )
        rows = train if split == "train" else test
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[rows]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        file = io.BytesIO()
        PIL.Image.fromarray(self._images[row]).save(file, "PNG")
        return file.getvalue(), int(self._labels[row])

    def name(self, row: int) -> str:
        return f"digits example {row}"


_MADE_HERE = {"digits": DigitsSource, "synthetic": SyntheticSource}
_SYNTHETIC_EXAMPLES = {"train": 10_000, "validation": 1_000, "test": 1_000}


class _Part:
    """Some rows of another source."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.class_names, self.image_shape = source.class_names, source.image_shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        return self._source[int(self._rows[row])]

    def name(self, row: int) -> str:
        return self._source.name(int(self._rows[row]))


def _sliced(split: str, open_split: Any) -> Source:
    """Opens 'NAME' or 'NAME[FROM:TO]', FROM and TO being counts or percentages, negative from the end, or nothing."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UsageError(f"{split!r} is no split; write 'train', 'train[:90%]' or 'train[100:200]'")
    source = open_split(match[1])
    if "[" not in split:
        return source
    count = len(source)
    ends = [v and (round(count * int(v[:-1]) / 100) if v.endswith("%") else int(v)) for v in match.groups()[1:]]
    rows = np.random.default_rng(0).permutation(count)[slice(*ends)]
    if not len(rows):
        raise UsageError(f"the split {split!r} is empty: there are {count:,} examples in {match[1]!r}")
    return _Part(source, rows)


def _pictures_in(folder: str, class_name: str) -> list[str]:
    """Paths from `folder` of the pictures at any depth below one of its folders, sorted; nothing hidden."""
    found = []
    for path, folders, files in os.walk(os.path.join(folder, class_name)):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = os.path.relpath(path, folder)
        found += [os.path.join(inside, n) for n in files if n[0] != "." and n.lower().endswith(SUFFIXES)]
    return sorted(found)


@functools.lru_cache(maxsize=256)
def _synthetic_jpeg(seed: int, index: int) -> bytes:
    rng = np.random.default_rng([seed, index])
    # ImageNet's shapes: half are 500 x 375 or upright, the rest spread around (mean 400 x 350, a few of 2000 and more).
    size = (500, 375) if rng.random() < 0.5 else np.exp(rng.normal(np.log((430, 370)), 0.35)).astype(int)
    width, height = size if rng.random() < 0.75 else size[::-1]
    image = PIL.Image.fromarray(rng.integers(0, 256, (max(height // 8, 4), max(width // 8, 4), 3), np.uint8))
    image = np.asarray(image.resize((int(width), int(height)), PIL.Image.Resampling.BICUBIC), np.int16)
    noisy = image + rng.integers(-10, 11, image.shape)  # fine detail, so that a file is as long as a photograph's
    file = io.BytesIO()
    PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def _image_and_label(name: str, builder) -> tuple[str, str]:
    """Keys of the picture and the class: what TFDS supervises with, or the only ones of their kinds."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    kinds = {
        kind: [key for key, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    }
    images, labels = kinds.values()
    keys = builder.info.supervised_keys
    if keys and keys[0] in images and keys[1] in labels:
        return keys[0], keys[1]
    if len(images) != 1 or len(labels) != 1:
        raise UsageError(f"{name} is no image classification set: TFDS names no image and label for it")
    return images[0], labels[0]


def _records(name: str, builder, split: str):
    """The records of a split, bytes each."""
    import tensorflow_datasets as tfds

    try:
        return builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format="array_record"
        )
    except ValueError as error:
        splits, base = builder.info.splits, split.partition("[")[0]
        if base not in splits:
            raise UsageError(
                f"{name} has no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
            ) from error
        raise UsageError(
            f"{split!r} is empty or no slice; {base} has {splits[base].num_examples:,} examples,"
            f" and slices of it are written '{base}[:90%]' or '{base}[100:200]'"
        ) from error


def _builder(name: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of every folder it looks into
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        # Only a builder made of what lies there knows of a second format, such as `tfds convert_format` adds.
        return tfds.builder_from_directory(builder.data_path) if builder.is_prepared() else builder
    except tfds.core.registered.DatasetNotFoundError:
        near = nearest(name, [*_MADE_HERE, *tfds.list_builders(with_community_datasets=False)])
        raise UsageError(
            f"unknown data set {name!r}{near}; there are digits, folder:DIR and TFDS's image classification sets,"
            " such as cifar10, cifar100, svhn_cropped and imagenet2012 (python -c 'import tensorflow_datasets as t;"
            " print(t.list_builders())')"
        ) from None
    except (ValueError, AssertionError, ImportError) as error:  # of the name, the configuration, the version
        raise UsageError(f"TFDS cannot open {name!r}: {reason(error)}") from error


def _readable(builder) -> bool:
    return builder.is_prepared() and any(f.value == "array_record" for f in builder.info.available_file_formats())


def _not_random_access(builder) -> str:
    return (
        f"{builder.name} lies in {builder.data_path} as {builder.info.file_format.value}, which has no random access;"
        f" turn it into ArrayRecord: tfds convert_format --dataset_version_dir={builder.data_path}"
        " --out_file_format=array_record (docs/data.md says what that needs)"
    )


def _can_prepare() -> bool:
    return importlib.util.find_spec("tensorflow") is not None
