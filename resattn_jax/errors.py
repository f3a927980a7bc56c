"""The faults a person is told of in one line, without a traceback, and how such a line is worded."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """The command line, the config or the data is at fault; the message says what to do. Exit status 2."""


class RunError(Exception):
    """The run itself failed: a loss that is not finite, a device out of memory, a lost process. Exit status 1."""


class Interrupted(Exception):
    """A signal ended the run after it saved a checkpoint. Exit status 128 + signal, as a shell has it."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


def reason(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """A text in one line that can be printed: what is no letter, such as a line break or a byte of a file's name that
    is no UTF-8, is escaped as Python escapes it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(word: object, words: Iterable[object]) -> str:
    """' (did you mean …?)' when one of `words` is near `word`, else nothing."""
    near = get_close_matches(str(word), [str(w) for w in words], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
