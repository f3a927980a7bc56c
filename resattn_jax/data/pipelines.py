"""The data a config asks for, opened: what a net has to know of it, and its streams, resident or streaming."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from resattn_jax.config import why_streamed
from resattn_jax.data import resident, streaming
from resattn_jax.data.kept import read_kept
from resattn_jax.data.label_noise import NoisySource
from resattn_jax.data.pictures import BrokenPicture, Picture, exif_orientation
from resattn_jax.data.sources import Examples, Source, Split, open_source
from resattn_jax.data.spec import DataSpec, check_same_classes
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import UsageError
from resattn_jax.runtime import Platform, kept_folder

log = logging.getLogger("resattn_jax")

RESIDENT_BYTES = 2 << 30  # a larger set leaves a small device too little room for the net


class TrainStream(Protocol):
    """Batches to train on. The batch of step k is a function of (seed, k).

    examples: of the set. skipped: broken pictures met so far. arrays: lie whole on every device. take: what makes
    images uint8 [B, H, W, C] and labels int32 [B] of `arrays` and a batch, inside the compiled step.
    """

    examples: int
    arrays: dict[str, jax.Array]

    @property
    def skipped(self) -> int: ...

    def take(self, arrays: Any, batch: Any) -> tuple[jax.Array, jax.Array]: ...

    def batches(self, step: int, count: int) -> Any:
        """The batches of `count` steps from `step` on, every leaf [steps_per_dispatch, B, …], B sharded."""

    def close(self) -> None:
        """Ends what reads ahead."""


class EvalStream(Protocol):
    """Batches to measure by; iterating gives (batch, mask bool [B]), every example once. Fields as in TrainStream."""

    arrays: dict[str, jax.Array]

    @property
    def skipped(self) -> int: ...

    def take(self, arrays: Any, batch: Any) -> tuple[jax.Array, jax.Array]: ...

    def __iter__(self) -> Iterator[tuple[Any, jax.Array]]: ...

    def rows(self, step: int) -> np.ndarray:
        """The rows of the split that this host's part of batch `step` has, int32 [B]; they mean nothing unmasked."""


class TrainingData:
    """Both splits of a config's data set, opened, and what a net has to know of them."""

    def __init__(self, config: ml_collections.ConfigDict):
        """Raises UsageError for what the config asks of this data set and cannot be."""
        data = config.data
        self._config = config
        self._train, self._eval = (
            open_source(data.name, split, data.dir) for split in (data.train_split, data.eval_split)
        )
        _check_classes(data, self._train, self._eval)
        _check_labels(data, data.train_split, self._train)
        _check_labels(data, data.eval_split, self._eval)
        if data.label_noise:
            self._train = NoisySource(self._train, data.label_noise, config.seed)
        self.eval_examples = len(self._eval)

    @functools.cached_property
    def spec(self) -> DataSpec:
        """What a net has to know; with config.data.mean_image this decodes the training set."""
        spec = dataclasses.replace(spec_of(self._config, self._train, self._eval), lists=self._lists())
        if not self._config.data.mean_image:
            return spec
        return dataclasses.replace(spec, mean=np.asarray(self._examples.images.mean(0) / 255, np.float32))

    def train_stream(
        self, mesh: Mesh, platform: Platform, *, batch_size: int, steps_per_dispatch: int
    ) -> resident.ResidentTrain | streaming.StreamingTrain:
        """The training split's stream."""
        data, augment, seed = self._config.data, self._config.augment, self._config.seed
        if self.spec.resident:
            return resident.ResidentTrain(
                self._examples,
                seed=seed,
                batch_size=batch_size,
                steps_per_dispatch=steps_per_dispatch,
                mesh=mesh,
                alternating=augment.alternating_flip,
            )
        transform = TrainTransform(
            self.spec.image_shape[0],
            augment.random_resized_crop,
            tuple(augment.crop_area),
            tuple(augment.crop_aspect),
            (augment.randaugment, augment.randaugment_magnitude),
            self.spec.exif_orientation,
        )
        reading = _reading(data, platform, mesh)
        return streaming.StreamingTrain(
            self._train,
            transform,
            reading,
            seed=seed,
            batch_size=batch_size,
            alternating=augment.alternating_flip,
        )

    def eval_stream(self, mesh: Mesh, platform: Platform, *, batch_size: int) -> EvalStream:
        """The evaluation split's stream."""
        return _eval_stream(self._config, self.spec, self._eval, mesh, platform, batch_size)

    def eval_pictures(self, count: int) -> np.ndarray:
        """The first pictures of the evaluation split as the net is shown them: uint8 [N, H, W, C], the centre of each.

        N is `count`, or less where there are fewer or some cannot be read. It opens no stream.
        """
        height, width, channels = self.spec.eval_shape
        transform, found = dataclasses.replace(eval_transform(self._config, self.spec), views=1), []
        for row in range(min(count, len(self._eval))):
            with contextlib.suppress(BrokenPicture, OSError):  # the stream tells of them
                picture = Picture(self._eval[row][0], upright=transform.upright)
                found.append(transform(picture)[0, ..., :channels])  # a grey one has it three times
        return np.stack(found) if found else np.zeros((0, height, width, channels), np.uint8)

    def turned(self, rows: Iterable[int]) -> int:
        """How many of some rows of the training split are pictures that EXIF orientation wants to be turned."""
        count = 0
        for row in rows:
            with contextlib.suppress(OSError):  # it is told of when it is decoded
                count += exif_orientation(self._train[row][0]) != 1
        return count

    def _lists(self) -> dict[str, str]:
        data = self._config.data
        prints = {data.train_split: self._train.fingerprint(), data.eval_split: self._eval.fingerprint()}
        return {split: fingerprint for split, fingerprint in prints.items() if fingerprint}

    @functools.cached_property
    def _examples(self) -> Examples:
        return _read(self._config, self._train)


def open_eval(
    config: ml_collections.ConfigDict, spec: DataSpec, mesh: Mesh, platform: Platform, *, batch_size: int
) -> EvalStream:
    """The stream of config.data.eval_split, for a net that knows `spec`; no other split is opened.

    Raises UsageError when its classes are not the net's.
    """
    data = config.data
    source = open_source(data.name, data.eval_split, data.dir)
    check_same_classes(spec.class_names, source.class_names, "the net")
    for note in spec.changed({data.eval_split: source.fingerprint()}):
        log.warning("%s", note)
    _check_labels(data, data.eval_split, source)
    return _eval_stream(config, spec, source, mesh, platform, batch_size)


def describe(config: ml_collections.ConfigDict) -> DataSpec:
    """What a net has to know of a config's data, found out by opening both splits."""
    return TrainingData(config).spec


def describe_for(config: ml_collections.ConfigDict, channels: int, classes: int) -> DataSpec:
    """The same for a net of so many channels and classes, which others may have trained, on data that is not here.

    Where the data cannot be opened, a logged line says so, the classes are called by their numbers, and the rest is the
    config's. Raises UsageError when that is not enough, or the data has another number of classes.
    """
    data = config.data
    try:
        spec = describe(config)
    except UsageError as error:
        if not data.image_size or data.mean_image:
            raise
        log.warning("%s; until then classes are called by their numbers", error)
        shape = (data.image_size, data.image_size, channels)
        spec = for_evaluation(
            config,
            DataSpec(
                examples=0,
                image_shape=shape,
                eval_shape=shape,
                class_names=tuple(map(str, range(classes))),
                mean=_per_channel(data.mean, "mean", channels),
                std=_per_channel(data.std, "std", channels),
                crop_fraction=config.eval.crop_fraction,
                resident=False,
                exif_orientation=data.exif_orientation,
            ),
        )
    if spec.num_classes != classes:
        raise UsageError(f"{data.name} has {spec.num_classes} classes, and the net {classes}")
    return spec


def for_evaluation(config: ml_collections.ConfigDict, spec: DataSpec) -> DataSpec:
    """The spec with the size and the crop that config.eval asks for."""
    if spec.resident and not config.eval.image_size:
        return spec
    size = config.eval.image_size or config.data.image_size or spec.image_shape[0]
    shape = (size, size, spec.image_shape[-1])
    return dataclasses.replace(spec, eval_shape=shape, crop_fraction=config.eval.crop_fraction)


def eval_transform(config: ml_collections.ConfigDict, spec: DataSpec) -> EvalTransform:
    """How a picture of any size becomes what the net is shown."""
    views = 5 if config.eval.views == 10 else 1
    return EvalTransform(spec.eval_shape[0], spec.crop_fraction, views, spec.exif_orientation)


def spec_of(config: ml_collections.ConfigDict, train: Split, evaluation: Split) -> DataSpec:
    """What a net has to know of two splits, as far as their numbers, shapes and classes tell; no mean image."""
    data, reason = config.data, _why_streamed(config, [train, evaluation])
    if reason is None and train.image_shape:
        shape = train.image_shape
    elif data.mean_image:
        raise UsageError(f"config.data.mean_image is for resident sets, but {data.name} is streamed: {reason}")
    else:
        size = data.image_size or (train.image_shape[0] if train.image_shape else None)
        if not size:
            raise UsageError(f"the images of {data.name} have different sizes; set config.data.image_size, say to 224")
        shape = (size, size, 3)
        if config.steps_per_dispatch not in (None, 1):
            raise UsageError(f"config.steps_per_dispatch must be 1, or unset, for {data.name}, which is streamed")
    spec = DataSpec(
        examples=len(train),
        image_shape=shape,
        eval_shape=shape,
        class_names=train.class_names,
        mean=_per_channel(data.mean, "mean", shape[-1]),
        std=_per_channel(data.std, "std", shape[-1]),
        crop_fraction=1.0,
        resident=reason is None,
        exif_orientation=data.exif_orientation,
    )
    return for_evaluation(config, spec)


def _per_channel(values: tuple[float, ...], key: str, channels: int) -> np.ndarray:
    if len(values) not in (1, channels):
        raise UsageError(f"config.data.{key} has {len(values)} values, but the images have {channels} channels")
    return np.array(values, np.float32)


def _why_streamed(config: ml_collections.ConfigDict, sources: Sequence[Split]) -> str | None:
    """Why a data set is streamed, or None for a resident one. Raises UsageError when it has to be both."""
    data = config.data
    shapes = [source.image_shape for source in sources]
    sizes = {size for size in (data.image_size, config.eval.image_size) if size}
    reasons = {
        "the images have different sizes": None in shapes or len(set(shapes)) > 1,
        "the images have another size than config asks for": bool(sizes) and {*(shapes[0] or ())[:2]} != sizes,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), why_streamed(config))
    if data.pipeline == "resident":
        if reason:
            raise UsageError(f"{data.name} cannot be resident: {reason}; set config.data.pipeline=streaming")
        return None
    if not reason and sum(map(len, sources)) * math.prod(shapes[0] or ()) > RESIDENT_BYTES:
        return f"it has more than {RESIDENT_BYTES:,} bytes"
    return reason


def _eval_stream(
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    source: Source,
    mesh: Mesh,
    platform: Platform,
    batch_size: int,
) -> EvalStream:
    data, limit = config.data, config.eval.max_examples
    as_stored = source.image_shape == spec.eval_shape and config.eval.views != 10 and data.pipeline != "streaming"
    if spec.resident and as_stored:
        examples = _read(config, source)
        return resident.ResidentEval(examples, batch_size=batch_size, max_examples=limit, mesh=mesh)
    if spec.image_shape[-1] != 3:
        raise UsageError(
            f"the net was trained on images of {spec.image_shape[-1]} channel; {data.name} cannot be streamed to it,"
            " which gives 3, as another size, ten views or config.data.pipeline=streaming would"
        )
    transform, reading = eval_transform(config, spec), _reading(data, platform, mesh)
    return streaming.StreamingEval(source, transform, reading, batch_size=batch_size, max_examples=limit)


def _reading(data: ml_collections.ConfigDict, platform: Platform, mesh: Mesh) -> streaming.Reading:
    return streaming.Reading(data.workers, data.broken == "skip", platform.shares_host_memory, mesh)


def _read(config: ml_collections.ConfigDict, source: Source) -> Examples:
    examples = read_kept(source, kept_folder(), skip_broken=config.data.broken == "skip")
    for name, why in examples.broken:
        log.warning("skipped %s: %s", name, why)
    return examples


def _check_classes(data: ml_collections.ConfigDict, train: Source, test: Source) -> None:
    if train.class_names != test.class_names:
        ours, theirs = set(train.class_names), set(test.class_names)
        only = [
            f"only {split} has {', '.join(sorted(names)[:5])}"
            for split, names in ((data.train_split, ours - theirs), (data.eval_split, theirs - ours))
            if names
        ]
        raise UsageError(f"the classes of {data.name} differ between its splits: {'; '.join(only)}")


def _check_labels(data: ml_collections.ConfigDict, split: str, source: Source) -> None:
    with contextlib.suppress(OSError):  # a file that cannot be read is told of when its turn comes
        if source[0][1] < 0:
            raise UsageError(f"the split {split!r} of {data.name} has no labels: TFDS writes -1 for each")
