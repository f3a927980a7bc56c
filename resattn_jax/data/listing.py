"""Pictures that a person names on a command line: files, folders and patterns, and rows of a split."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable

from resattn_jax.data.pictures import SUFFIXES
from resattn_jax.data.sources.folder import pictures_below
from resattn_jax.errors import UsageError, printable, reason


def list_pictures(given: Iterable[str]) -> list[str]:
    """The paths of the pictures that were named, one text after the other.

    A text that is the path of a file is that file, whatever its name ends in. One that is a folder stands for the
    pictures in it and below it, by their names, sorted; hidden files are passed over. Any other is a pattern (`glob`,
    "**" for folders at any depth), and stands for the files it fits, sorted. "~" is the home folder. Raises UsageError
    for a text that stands for none.
    """
    return [path for text in given for path in _expanded(text)]


def split_rows(text: str) -> list[int] | None:
    """[0, 5, 17] of "eval:0,5,17", None for a text that does not begin so or is a path. Raises UsageError."""
    if not text.startswith("eval:") or os.path.lexists(text):
        return None
    rows = text.removeprefix("eval:").split(",")
    if not all(re.fullmatch(r"\d{1,9}", row, re.ASCII) for row in rows):
        raise UsageError(f"--images={printable(text)}: it is written eval:0,5,17, rows of the evaluation split from 0")
    return list(map(int, rows))


def _expanded(text: str) -> list[str]:
    path, named = os.path.expanduser(text), f"--images={printable(text)}"
    if not path.strip() or "\0" in path:
        raise UsageError(f"{named} is no path")
    try:
        if os.path.isdir(path):
            found = [file for file in pictures_below(path) if os.path.isfile(file) or not os.path.exists(file)]
            if found:  # a link that leads nowhere is a broken picture; a pipe, which nobody may ever write to, is none
                return found
            raise UsageError(f"{named} has no pictures; their names must end in one of {', '.join(SUFFIXES)}")
        if os.path.lexists(path):
            if os.path.isfile(path):
                return [path]
            raise UsageError(f"{named} is no regular file")
    except OSError as error:
        raise UsageError(f"{named} cannot be read: {error.strerror or reason(error)}") from error
    if not glob.has_magic(path):
        raise UsageError(
            f"there is no {printable(path)!r}; --images names a file, a folder or a pattern such as '*.png'"
        )
    found = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    if not found:
        raise UsageError(f"{named} fits no file")
    return found
