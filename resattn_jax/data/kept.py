"""Decoded sets, kept in a folder for the next start: a file for each split, written whole or not at all.

A file is a line of JSON, then images, labels and which of them are readable, as they lie in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import sys
import tempfile
import time
import zlib
from typing import IO, Any

import numpy as np

from resattn_jax.data import pictures, sources
from resattn_jax.data.sources import Examples, Source, identity_of, read
from resattn_jax.errors import reason

log = logging.getLogger("resattn_jax")

_LEFT_BEHIND = 3600.0  # seconds after which a half-written file is nobody's any more


def read_kept(source: Source, folder: pathlib.Path | None, *, skip_broken: bool = False) -> Examples:
    """What `read` gives, from the folder if it was kept there; else it is decoded, and kept for the next start.

    Only a source of which `identity_of` knows something is kept.
    A file that is damaged, another user's or of other records is as none. Where the folder cannot be written, a line is
    logged. folder: None to keep nothing. Raises UsageError as `read` does.
    """
    identity = identity_of(source)
    if folder is None or identity is None:
        return read(source, skip_broken=skip_broken)
    name, records = identity
    path = folder / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.decoded"
    key = hashlib.blake2b("\0".join([records, *_decoder()]).encode(), digest_size=24).hexdigest()
    kept = _load(path, key, source)
    if kept is not None and (skip_broken or not kept.broken):
        return kept
    examples = read(source, skip_broken=skip_broken)
    try:
        _save(path, key, examples)
    except OSError as error:
        log.warning("the decoded images are not kept for the next start: %s", reason(error))
    return examples


@functools.cache
def _decoder() -> tuple[str, ...]:
    """What the pixels of a record depend on beside the record."""
    files = [pathlib.Path(str(module.__file__)).read_bytes() for module in (pictures, sources, sys.modules[__name__])]
    versions = [importlib.metadata.version(name) for name in ("pillow", "simplejpeg")]
    return (hashlib.blake2b(b"\0".join(files)).hexdigest(), *versions, sys.byteorder)


def _load(path: pathlib.Path, key: str, source: Source) -> Examples | None:
    """The examples of a file, or None if it is not what it should be."""
    assert source.image_shape
    shape = (len(source), *source.image_shape)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():  # whoever wrote it could have written anything
                return None
            head = json.loads(file.readline(1 << 20))
            if head["key"] != key or head["shape"] != list(shape):
                return None
            images, labels, readable = _arrays(shape)
            if any(file.readinto(_bytes(array)) != array.nbytes for array in (images, labels, readable)):
                return None
            if file.read(1) or _checksum(images, labels, readable) != head["checksum"]:
                return None
            broken = tuple((str(name), str(why)) for name, why in head["broken"])
    except (OSError, ValueError, KeyError, TypeError):  # it is not there, or not what was written
        return None
    return Examples(images, labels, source.class_names, broken, readable)


def _save(path: pathlib.Path, key: str, examples: Examples) -> None:
    """Writes a file in place of what was kept of the same split. Raises OSError, and leaves nothing then."""
    arrays = [np.ascontiguousarray(a) for a in (examples.images, examples.labels, examples.readable)]
    head: dict[str, Any] = {
        "key": key,
        "shape": list(examples.images.shape),
        "checksum": _checksum(*arrays),
        "broken": examples.broken,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.name}.*"):
        with contextlib.suppress(OSError):  # another process removes it too
            if time.time() - old.stat().st_mtime > _LEFT_BEHIND:
                old.unlink()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        try:
            _write(file, json.dumps(head).encode() + b"\n", arrays)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _write(file: IO[bytes], head: bytes, arrays: list[np.ndarray]) -> None:
    file.write(head)
    for array in arrays:
        file.write(_bytes(array))
    file.flush()


def _arrays(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(shape, np.uint8), np.empty(shape[:1], np.int32), np.empty(shape[:1], bool)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _checksum(*arrays: np.ndarray) -> int:
    """The CRC-32 of the arrays' bytes, one after the other."""
    value = 0
    for array in arrays:
        value = zlib.crc32(_bytes(array), value)
    return value
