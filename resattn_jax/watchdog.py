"""A run that stands still says where, so that a person who comes back to it knows what it waits for."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Self, TextIO


class Watchdog:
    """Prints where every thread stands when `alive` was not called for so many seconds; then it waits on.

    Use it as a context manager. It prints once each time that the run stands still. seconds: 0 for never.
    """

    def __init__(self, seconds: float, out: TextIO | None = None):
        self._seconds, self._out = seconds, out
        self._woken, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self.alive()
        if self._seconds:
            self._thread.join()

    def alive(self) -> None:
        """Says that something was done."""
        self._woken.set()

    def _watch(self) -> None:
        told = False
        while not self._ended:
            if self._woken.wait(None if told else self._seconds):
                self._woken.clear()
                told = False
            else:
                self._tell()
                told = True

    def _tell(self) -> None:
        lines = [
            f"nothing was done for {self._seconds / 60:.3g} minutes, and it goes on waiting; its threads stand at\n"
        ]
        frames = sys._current_frames()
        for thread in threading.enumerate():
            if thread is not self._thread and thread.ident in frames:
                lines += [f"thread {thread.name}:\n", *traceback.format_stack(frames[thread.ident])]
        out = self._out or sys.stderr
        out.write("".join(lines))
        out.flush()
