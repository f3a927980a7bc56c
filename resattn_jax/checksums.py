"""Checksums of arrays, so that a bit that a disk has turned is noticed; and whether weights are finite."""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from resattn_jax.errors import RunError


class Damaged(Exception):
    """A checkpoint that cannot be read, or that holds something else than what was written; the message is why."""


def checksums(tree: Any) -> dict[str, str]:
    """{name: CRC-32 of the array's bytes} of a tree of arrays, computed on all cores."""
    arrays = named(tree)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # outside of Python's lock
        return dict(zip(arrays, pool.map(_crc, arrays.values()), strict=True))


def _crc(array: Any) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def json_checksum(content: Any) -> str:
    """The CRC-32 of plain JSON."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises Damaged naming the first array that is not what was written."""
    for item in then:
        if then[item] is None:
            raise Damaged(f"it has no checksum of {item!r}")
        if isinstance(then[item], Mapping):
            wrong = sorted(name for name in then[item] if then[item][name] != now[item].get(name))
        else:
            wrong = [item] * (then[item] != now[item])
        if wrong:
            raise Damaged(f"{item}: {len(wrong)} are not what was written, first {wrong[0]}")


def check_finite(variables: Mapping[str, Any], what: str) -> None:
    """Raises RunError naming the first weights of `variables` that are not finite."""
    for name, array in named(variables).items():
        count = np.size(array) - np.count_nonzero(np.isfinite(array))
        if count:
            raise RunError(f"{what} has weights that are not finite: {name} ({count:,} of {np.size(array):,} values)")


def named(tree: Any) -> dict[str, Any]:
    """{'params/head/kernel': array, …}; a checkpoint's metadata and a tree of arrays give the same names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(_key(k)) for k in path): leaf for path, leaf in leaves}


def _key(entry: Any) -> Any:
    return next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name))
