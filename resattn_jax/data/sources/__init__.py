"""Where examples come from. A new kind of source is one file here and one line in the table `_MODULES`.

Each module has two functions: `open_split(name, split, data_dir) -> Source` and `prepare(name, data_dir) -> str`.
Nothing here imports JAX: data workers import it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from resattn_jax.data.pictures import BrokenPicture, Picture
from resattn_jax.errors import UsageError, reason

# What config.data.name is, or begins with if it ends in ":" here, and the module that opens such a source. Every other
# name is a TFDS set.
_MODULES = {
    "digits": "digits",
    "folder:": "folder",
    "synthetic": "synthetic",
}
_TOGETHER = 500  # files that `read` reads before it decodes them: one by one, the processor's caches are of less use


class Split(Protocol):
    """What is known of a split before anything of it is read."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by label."""

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) if all pictures have the same, else None."""

    def __len__(self) -> int:
        """Number of examples."""


class Source(Split, Protocol):
    """One split of a data set: random access to its records. It can be pickled and sent to a worker process."""

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        """The content of the picture's file, and the label. Raises OSError.

        A source may have `__getitems__` beside it, for many rows at once where that is quicker.
        """

    def name(self, row: int) -> str:
        """A name by which a person finds the example."""

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        """A hash of which examples there are, all or those of some rows; "" for a set that is always the same."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split in memory: images uint8 [N, H, W, C], labels int32 [N], and the names of the classes.

    broken has the (name, reason) of each picture that could not be read. readable, bool [N], is False at their rows;
    there images and labels are those of another example. readable may be left out if all are.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    broken: tuple[tuple[str, str], ...] = ()
    readable: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.readable is None:
            object.__setattr__(self, "readable", np.ones(len(self.labels), bool))


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens one split of a data set. It lists what is there; it reads no picture yet.

    Args:
      name: "digits", "synthetic", "folder:DIR", or the name of a TFDS image classification set.
      split: the name of a split or a slice of it ("train[:90%]").
      data_dir: where TFDS keeps its sets. None: TFDS_DATA_DIR, or TFDS's default.

    Raises:
      UsageError: there is no such set or split, it is not prepared or not as ArrayRecord, or it has no classes.
    """
    return _module(name).open_split(name, split, data_dir)


def identity_of(source: Source) -> tuple[str, str] | None:
    """(a name of the split, what its records are), by which decoded images are kept; the latter changes with a record.

    None for a source without the method `identity`, and for one whose records can change unnoticed.
    """
    found: tuple[str, str] | None = getattr(source, "identity", lambda: None)()
    return found


def read(source: Source, *, skip_broken: bool = False) -> Examples:
    """Decodes a source into memory. All its pictures have one size: image_shape is not None.

    Args:
      source: what to read.
      skip_broken: put another example in the place of a picture that cannot be read. False: raise UsageError.

    Raises:
      UsageError: a picture cannot be read or has another size, or none can be read.
    """
    count, shape = len(source), source.image_shape
    assert shape
    broken: list[tuple[str, str]] = []
    images = np.empty((count, *shape), np.uint8)
    labels, readable = np.zeros(count, np.int32), np.ones(count, bool)
    for start in range(0, count, _TOGETHER):  # threads are slower for pictures this small
        records = _records(source, range(start, min(start + _TOGETHER, count)))
        for row, record in enumerate(records, start):
            image = record if isinstance(record, Exception) else _tried(_decode, record[0], shape)
            if not isinstance(image, Exception):
                images[row], labels[row] = image, record[1]
                continue
            name, why = source.name(row), reason(image)
            if not skip_broken:
                raise UsageError(
                    f"{name} cannot be read: {why}; replace or remove it, or set config.data.broken=skip"
                ) from image
            broken.append((name, why))
            readable[row] = False
    if broken and not readable.any():
        name, why = broken[-1]
        raise UsageError(f"of {count:,} pictures none could be read; the last was {name}: {why}")
    for row in np.flatnonzero(~readable).tolist():
        other = _stand_in(row, readable)
        images[row], labels[row] = images[other], labels[other]
    return Examples(images, labels, source.class_names, tuple(broken), readable)


def prepare(name: str, data_dir: str | None = None) -> str:
    """Makes a data set ready to be read, and says in one sentence where it lies or that there is nothing to do.

    A TFDS set is downloaded and written as ArrayRecord, which needs the extra [prepare]. Raises UsageError.
    """
    return _module(name).prepare(name, data_dir)


def made_here() -> list[str]:
    """The names of the sets that need no files."""
    return [kind for kind in _MODULES if not kind.endswith(":")]


def _module(name: str) -> ModuleType:
    kind = name if name in _MODULES else name.partition(":")[0] + ":"
    return importlib.import_module(f"{__name__}.{_MODULES.get(kind, 'tfds')}")


def _records(source: Source, rows: range) -> Sequence[Any]:
    """What a source has at these rows, or the error that one of them raises in its place."""
    if many := getattr(source, "__getitems__", None):
        found = _tried(many, rows)
        if not isinstance(found, Exception):
            return found
    return [_tried(source.__getitem__, row) for row in rows]


def _tried(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or the error that a broken picture raises."""
    try:
        return function(*args)
    except (BrokenPicture, OSError) as error:
        return error


def _decode(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a picture that must have a shape (H, W, C). Raises BrokenPicture."""
    picture = Picture(data)
    if (picture.height, picture.width) != shape[:2]:
        raise BrokenPicture(f"it has {picture.height} x {picture.width} pixels, not {shape[0]} x {shape[1]}")
    return picture.pixels(channels=shape[2])


def _stand_in(row: int, readable: np.ndarray) -> int:
    """The row of a readable example, drawn by `row` alone while few pictures are broken."""
    rng = np.random.default_rng([row, 0xB20C])
    for other in rng.integers(len(readable), size=20):
        if readable[other]:
            return int(other)
    return int(rng.choice(np.flatnonzero(readable)))
