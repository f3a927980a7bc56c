"""MXNet's own files of arrays, .params, as far as `net.save_parameters` writes them: dense arrays with names.

The format is that of src/ndarray/ndarray.cc of MXNet 1.9, little-endian and without padding. Nothing is executed.
"""

from __future__ import annotations

import struct

import numpy as np

MAGIC = struct.pack("<Q", 0x112)  # how every such file begins
_OLD, _STORED, _NUMPY = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # versions; the oldest has the number of axes there
_TYPES = dict(enumerate(("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")))
_MOST_AXES = 32  # that MXNet has


def decode(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file by their names; they may be written to. Raises ValueError where it is no such file."""
    reader = _Reader(data)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it is no file of MXNet")
    reader.place = 16  # after eight bytes that mean nothing
    arrays = [_array(reader) for _ in range(reader.count(8))]
    names = [reader.take(reader.count(1)).decode() for _ in range(reader.count(8))]
    if len(names) != len(arrays):
        raise ValueError(f"it has {len(arrays)} arrays and {len(names)} names")
    return dict(zip(names, arrays, strict=True))


class _Reader:
    """Bytes, from a place on. Raises ValueError where they end too soon."""

    def __init__(self, data: bytes):
        self._data, self.place = data, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.place += count
        if self.place > len(self._data):
            raise ValueError(f"it ends after {len(self._data)} bytes")
        return self._data[self.place - count : self.place]

    def numbers(self, kinds: str) -> tuple[int, ...]:
        """The next whole numbers, of the kinds that `struct` knows."""
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))

    def count(self, least: int) -> int:
        """How many parts follow, each of so many bytes at least."""
        (count,) = self.numbers("Q")
        if count * least > len(self._data) - self.place:
            raise ValueError(f"it ends after {len(self._data)} bytes")
        return count


def _array(reader: _Reader) -> np.ndarray:
    (version,) = reader.numbers("I")
    axes, kind = version, "I"
    if version in (_STORED, _NUMPY):
        storage, axes = reader.numbers("iI")
        if storage != 0:
            raise ValueError("it has an array that is sparse")
    elif version == _OLD:
        (axes,) = reader.numbers("I")
    if version >= _OLD:
        kind = "q"
    if not 0 < axes <= _MOST_AXES:
        raise ValueError("it has an array without values" if axes == 0 else f"it has an array of {axes} axes")
    shape = reader.numbers(f"{axes}{kind}")
    _, _, number = reader.numbers("iii")  # the device and its number, and the type
    if number not in _TYPES or min(shape) < 0:
        raise ValueError(f"it has an array of type {number} and shape {shape}")
    dtype, size = np.dtype(_TYPES[number]), 1
    for side in shape:
        size *= side  # of any length, unlike NumPy's
    return np.frombuffer(bytearray(reader.take(size * dtype.itemsize)), dtype).reshape(shape)
