"""A folder of pictures, one folder a class."""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import os
import pathlib
import stat
from collections.abc import Iterable

import numpy as np

from resattn_jax.data.pictures import SUFFIXES
from resattn_jax.data.sources import Source
from resattn_jax.data.sources.slices import by_share, sliced
from resattn_jax.errors import UsageError

LARGEST_FILE = 256 << 20  # bytes; a file of more is no picture to train on

_VALIDATION = ("val", "valid", "validation", "dev")  # names of one split
_SPLITS = ("train", "training", "test", *_VALIDATION)

log = logging.getLogger("resattn_jax")


def open_split(name: str, split: str, data_dir: str | None) -> Source:
    """Opens a split of "folder:DIR", or a slice of it. Raises UsageError."""
    root = pathlib.Path(name.removeprefix("folder:")).expanduser()
    return sliced(split, functools.partial(FolderSource, root), lambda source: by_share(source.shares()))


def prepare(name: str, data_dir: str | None) -> str:
    """Says that there is nothing to do."""
    return f"{name} needs no preparing; start training"


class FolderSource:
    """Pictures in DIR/SPLIT/CLASS/…, at any depth below CLASS. Labels count the sorted names of the classes.

    Where no folder is named as a split, those of DIR/CLASS/… are the split "train".
    """

    image_shape = None

    def __init__(self, root: pathlib.Path, split: str):
        """Raises UsageError if there is no such split, no picture in it or in a class, or fewer than two classes."""
        if not root.is_dir():
            raise UsageError(
                f"there is no folder {root}; folder:DIR needs DIR/train/CLASS/*.jpg and DIR/val/CLASS, or DIR/CLASS"
            )
        try:
            folder = root / _split_folder(root, split)
            self.class_names = _classes_in(folder)
            files, labels = _pictures_in(folder, self.class_names)
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error
        if not files:
            raise UsageError(f"{folder} has no pictures; their names must end in one of {', '.join(SUFFIXES)}")
        empty = set(range(len(self.class_names))) - set(labels)
        if empty:
            raise UsageError(f"{_shown(folder / self.class_names[min(empty)])} has no pictures; remove it or fill it")
        # One array each: a million small objects would be copied to every worker as their counts are touched.
        self._folder = str(folder)
        self._files, self._labels = np.array([os.fsencode(f) for f in files]), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        path = self._path(row)
        info = os.stat(path)  # before it is opened: a pipe would wait for a writer, a device would have no end
        if not stat.S_ISREG(info.st_mode):
            raise OSError("it is no regular file")
        if info.st_size > LARGEST_FILE:
            raise OSError(f"it has {info.st_size / 2**20:,.0f} MB, more than {LARGEST_FILE >> 20}")
        with open(path, "rb") as file:
            return file.read(), int(self._labels[row])

    def name(self, row: int) -> str:
        return _shown(self._path(row))

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        """Of the paths from the split's folder on, in their order."""
        files = self._files if rows is None else self._files[rows]
        return hashlib.blake2b(b"\0".join(files.tolist()), digest_size=8).hexdigest()

    def shares(self) -> np.ndarray:
        """A number in [0, 1) for each picture, a hash of its path from the split's folder on: float64 [N].

        A slice in percent is a range of these numbers, so that no picture changes sides when others come or go.
        """
        digests = b"".join(hashlib.blake2b(path, digest_size=8).digest() for path in self._files.tolist())
        return (np.frombuffer(digests, ">u8") >> 11) / 2.0**53

    def _path(self, row: int) -> str:
        return f"{self._folder}/{os.fsdecode(self._files[row])}"


def _split_folder(root: pathlib.Path, split: str) -> str:
    """The name of the folder that holds a split. Raises UsageError if there is none."""
    there = sorted(d.name for d in root.iterdir() if d.is_dir())
    if split in there:
        return split
    if split == "train" and not any(name.lower() in _SPLITS for name in there):
        return "."  # the folders are the classes
    # What one person calls val, another calls valid or test. One of them is enough.
    others = (*_VALIDATION, "test") if split in _VALIDATION else _VALIDATION if split == "test" else ()
    for other in others:
        if other in there:
            kind = "test" if split == "test" else "validation"
            log.warning("there is no folder %s; %s pictures are those of %s", split, kind, other)
            return other
    hint = ", or take a part of the training pictures: 'train[90%:]'" if others else ""
    found = f"it has {_listed(there)}" if there else "it is empty"
    raise UsageError(f"{root} has no folder {split!r}; {found}; it needs {root / split}/CLASS/*.jpg{hint}")


def _classes_in(folder: pathlib.Path) -> tuple[str, ...]:
    """The sorted names of the folders in a split's folder. Raises UsageError if they are fewer than two."""
    names = tuple(sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] != "."))
    if not names:
        raise UsageError(f"{folder} has no folders; each class needs one with its pictures in it")
    if len(names) == 1:
        raise UsageError(f"{folder} has one class, {names[0]!r}; there must be two or more to tell apart")
    return names


def _pictures_in(folder: pathlib.Path, class_names: Iterable[str]) -> tuple[list[str], list[int]]:
    """The paths of all pictures from a split's folder on, sorted within each class, and their labels.

    Warns of the other files, and of pictures that lie beside the classes.
    """
    files: list[str] = []
    labels: list[int] = []
    passed_over: collections.Counter[str] = collections.Counter()
    for label, class_name in enumerate(class_names):
        found = _walk(str(folder), class_name)
        pictures = sorted(path for path in found if _is_picture(path))
        passed_over.update(os.path.splitext(path)[1].lower() for path in found if not _is_picture(path))
        files += pictures
        labels += [label] * len(pictures)
    if passed_over:
        kinds = _listed([f"{_shown(end or 'no ending')} ({count:,})" for end, count in passed_over.most_common()])
        count = passed_over.total()
        what = f"{count:,} files that are no pictures by their names" if count > 1 else "a file that is no picture"
        log.warning("passed over %s: %s; in %s", what, kinds, _shown(folder))
    beside = sum(_is_picture(path.name) and path.is_file() for path in folder.iterdir())
    if beside:
        log.warning("passed over pictures in no class's folder: %s; in %s", f"{beside:,}", _shown(folder))
    return files, labels


def pictures_below(folder: str) -> list[str]:
    """The paths of all pictures at any depth below a folder, sorted. Raises OSError.

    Hidden files and folders are passed over, as are files that are no pictures by their names; links are followed.
    """
    whole, inside = os.path.split(os.path.realpath(folder))
    found = [os.path.relpath(path, inside) for path in _walk(whole, inside) if _is_picture(path)]
    return [os.path.join(folder, path) for path in sorted(found)]


def _is_picture(path: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.basename(path)[0] != "." and path.lower().endswith(SUFFIXES)


def _walk(folder: str, class_name: str) -> list[str]:
    """The paths, from `folder` on, of all files at any depth below one of its folders, but hidden ones.

    A linked folder is followed, unless it was seen already or the link leads to a folder around itself.
    """
    whole, files, seen = os.path.realpath(folder), [], set()
    waiting = collections.deque([(class_name, os.path.realpath(os.path.join(folder, class_name)))])
    while waiting:
        inside, real = waiting.popleft()
        if real in seen or _lies_in(whole, real):
            continue
        seen.add(real)
        with os.scandir(os.path.join(folder, inside)) as entries:
            shown = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        for entry in shown:
            path = os.path.join(inside, entry.name)
            if entry.is_dir(follow_symlinks=False):
                waiting.appendleft((path, os.path.join(real, entry.name)))  # before links, which may lead to it
            elif entry.is_symlink() and os.path.isdir(entry.path):
                target = os.path.realpath(entry.path)
                if not _lies_in(real, target):
                    waiting.append((path, target))
            else:
                files.append(path)
    return files


def _lies_in(path: str, folder: str) -> bool:
    """Whether a real path is a folder or lies somewhere in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _listed(names: list[str]) -> str:
    """Names in a sentence, ten at most."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} others" if len(names) > 10 else "")


def _shown(path: str | pathlib.Path) -> str:
    """A path as it may be printed: its line breaks and the bytes that are no text are escaped."""
    return str(path) if str(path).isprintable() else repr(str(path))
