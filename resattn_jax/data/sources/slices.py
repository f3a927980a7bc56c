"""Slices of a split, as TFDS writes them, for the sources that do without TFDS."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from resattn_jax.data.sources import Source
from resattn_jax.errors import UsageError

# The rows of a source in the order that slices are cut from, and the place in it where so many percent end.
Order = tuple[np.ndarray, Callable[[int], int]]
Whole = TypeVar("Whole", bound=Source)


class Part:
    """Some rows of another source."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.class_names, self.image_shape = source.class_names, source.image_shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        return self._source[int(self._rows[row])]

    def fingerprint(self, rows: np.ndarray | None = None) -> str:
        return self._source.fingerprint(self._rows if rows is None else self._rows[rows])

    def name(self, row: int) -> str:
        return self._source.name(int(self._rows[row]))


def permuted(source: Source) -> Order:
    """A fixed random permutation, for sources whose number of examples never changes."""
    count = len(source)
    return np.random.default_rng(0).permutation(count), lambda percent: round(count * percent / 100)


def by_share(shares: np.ndarray) -> Order:
    """The order of `shares`, a number in [0, 1) for each row: p percent are the rows whose share is below p / 100."""
    rows = np.argsort(shares, kind="stable")
    ascending = shares[rows]
    return rows, lambda percent: int(np.searchsorted(ascending, (percent + 100 * (percent < 0)) / 100))


def sliced(split: str, open_whole: Callable[[str], Whole], order: Callable[[Whole], Order] = permuted) -> Source:
    """Opens "NAME" or "NAME[FROM:TO]". FROM and TO are counts or percentages, negative from the end, or nothing.

    Raises UsageError.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UsageError(f"{split!r} is no split; write 'train', 'train[:90%]' or 'train[100:200]'")
    source = open_whole(match[1])
    if "[" not in split:
        return source
    rows, place_of = order(source)
    ends = [end and (place_of(int(end[:-1])) if end.endswith("%") else int(end)) for end in match.groups()[1:]]
    rows = rows[slice(*ends)]
    if not len(rows):
        raise UsageError(f"the split {split!r} is empty: there are {len(source):,} examples in {match[1]!r}")
    return Part(source, rows)
