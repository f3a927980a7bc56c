"""TFDS's image classification sets, read as random-access ArrayRecord files.

Reading needs no TensorFlow, only preparing does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from resattn_jax.data.sources import Source, made_here
from resattn_jax.errors import UsageError, nearest, reason


def open_split(name: str, split: str, data_dir: str | None) -> Source:
    """Opens a split or a slice of it. Prepares the set first if it can. Raises UsageError."""
    return TfdsSource(name, split, data_dir)


def prepare(name: str, data_dir: str | None) -> str:
    """Downloads a set and writes it as ArrayRecord, with TFDS's own builder. Says where it lies.

    Raises UsageError if TensorFlow is not installed or TFDS cannot get the set.
    """
    builder = _builder(name, data_dir)
    if _readable(builder):
        return f"{name} lies in {builder.data_path}"
    if not _can_prepare():
        raise UsageError(f"preparing {name} needs TensorFlow: pip install -e '.[prepare]', then run this again")
    if builder.is_prepared():
        raise UsageError(_not_random_access(builder))
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # TFDS raises whatever the network, the disk or the set's own code does
        raise UsageError(
            f"{name} is not prepared in {builder.data_path} (config.data.dir or TFDS_DATA_DIR), and TFDS could not "
            f"prepare it: {reason(error)}"
        ) from error
    return f"{name} lies in {builder.data_path}"


class TfdsSource:
    """A split of a prepared TFDS set, or a slice of it."""

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
        self._title, self._version = f"{name} {split}", builder.info.full_name
        self._folder = str(builder.data_path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        with _damage_told():
            return self._picture_and_label(self._records[row])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """Those of many rows, in a third of the time that one after the other takes. Raises OSError if any would."""
        with _damage_told():
            return [self._picture_and_label(record) for record in self._records.__getitems__(rows)]

    def _picture_and_label(self, record: bytes) -> tuple[bytes, int]:
        example = _features(record)
        data, label = example[self._image].bytes_list.value, example[self._label].int64_list.value
        if not data or not label:
            raise OSError("the record has no picture or no label")
        return data[0], label[0]

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        """The set's name and version, by which TFDS promises the same examples."""
        return str(self._version)

    def identity(self) -> tuple[str, str] | None:
        """For `kept`: the split and where it lies; then also the name, size and time of every file of the set."""
        try:
            files = sorted((file.name, file.stat()) for file in os.scandir(self._folder) if file.is_file())
        except OSError:  # it lies in a bucket
            return None
        name = f"{self._title} {os.path.realpath(self._folder)}"
        return name, "\0".join([name, str(len(self)), *(f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in files)])

    def name(self, row: int) -> str:
        try:
            with _damage_told():
                file_name = _features(self._records[row])["file_name"].bytes_list.value
        except OSError:
            file_name = ()
        return " ".join([f"{self._title}, example {row}", *(n.decode(errors="backslashreplace") for n in file_name)])


def _features(record: bytes) -> Any:
    """The features of a record by their keys. TFDS would decode all of them, which takes as long as reading."""
    from tensorflow_datasets.proto import tf_example_pb2  # a slow import that other sources do without

    return tf_example_pb2.Example.FromString(record).features.feature


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Turns what a damaged record raises into an OSError."""
    from google.protobuf.message import DecodeError

    try:
        yield
    except (RuntimeError, DecodeError) as error:
        raise OSError(f"the record is damaged: {reason(error)}") from error


def _image_and_label(name: str, builder: Any) -> tuple[str, str]:
    """The keys of the picture and the class: those TFDS supervises with, or the only ones of their kinds."""
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


def _records(name: str, builder: Any, split: str) -> Any:
    """The records of a split: bytes by their rows, one by one or many at once."""
    import tensorflow_datasets as tfds

    try:
        pieces = builder.info.splits[split].file_instructions
        if any(piece.take <= 0 for piece in pieces):  # TFDS counts 'train[10:5]' as -5 examples
            raise ValueError("a slice ends before it begins")
        return builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format="array_record"
        )
    except (ValueError, KeyError) as error:
        splits, base = builder.info.splits, split.partition("[")[0]
        if base not in splits:
            raise UsageError(
                f"{name} has no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
            ) from error
        raise UsageError(
            f"{split!r} is empty or no slice; {base} has {splits[base].num_examples:,} examples,"
            f" and slices of it are written '{base}[:90%]' or '{base}[100:200]'"
        ) from error


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of every folder it looks into
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        # Only a builder made from the files knows of a second format, which `tfds convert_format` adds.
        return tfds.builder_from_directory(builder.data_path) if builder.is_prepared() else builder
    except tfds.core.registered.DatasetNotFoundError:
        near = nearest(name, [*made_here(), *tfds.list_builders(with_community_datasets=False)])
        raise UsageError(
            f"unknown data set {name!r}{near}; there are digits, folder:DIR and TFDS's image classification sets,"
            " such as cifar10, cifar100, svhn_cropped and imagenet2012 (python -c 'import tensorflow_datasets as t;"
            " print(t.list_builders())')"
        ) from None
    except (ValueError, AssertionError, ImportError) as error:  # for the name, the configuration or the version
        raise UsageError(f"TFDS cannot open {name!r}: {reason(error)}") from error


def _readable(builder: Any) -> bool:
    return builder.is_prepared() and any(f.value == "array_record" for f in builder.info.available_file_formats())


def _not_random_access(builder: Any) -> str:
    return (
        f"{builder.name} lies in {builder.data_path} as {builder.info.file_format.value}, which has no random access;"
        f" turn it into ArrayRecord: tfds convert_format --dataset_version_dir={builder.data_path}"
        " --out_file_format=array_record (docs/data.md says what that needs)"
    )


def _can_prepare() -> bool:
    return importlib.util.find_spec("tensorflow") is not None
