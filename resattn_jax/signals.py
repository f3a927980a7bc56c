"""What SIGTERM, SIGINT and SIGHUP do to the program: it ends in one line, and a run saves first.

Nothing here imports JAX: signals are caught before anything that takes long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """What a process does with the signals it gets, once `catch` was called.

    The first one ends it, whatever the main thread is doing, XLA's compiler included, for a thread of its own waits for
    signals. While a run holds them (`held`) the first is only kept in `received`, and the second one ends the process.
    """

    def __init__(self) -> None:
        self.received = 0
        self._held = self._catching = False
        self.at_end: list[Callable[[], object]] = []  # what to do before a signal ends the process, for 2 s at most

    def catch(self) -> None:
        """Catches the signals to the end of the process, also those that `block` kept. Call it in the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        for number in CAUGHT:
            signal.signal(number, lambda *_: None)  # the number is in the socket already
        self._catching = True
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)

    @staticmethod
    def block() -> None:
        """Keeps signals for the program that takes this one's place, until it catches them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)

    @contextlib.contextmanager
    def held(self) -> Iterator[Signals]:
        """Within, the first signal is only kept in `received`.

        In a program that does not catch signals, such as a notebook, they are caught for so long, and a second one
        raises KeyboardInterrupt.
        """
        own = not self._catching and threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, self._handle) for number in CAUGHT} if own else {}
        self._held = True
        try:
            yield self
        finally:
            self._held = False
            for number, handler in previous.items():
                signal.signal(number, handler)
                self.received = 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def _watch(self, reader: socket.socket) -> None:
        while True:
            number = reader.recv(1)[0]
            if number not in CAUGHT:
                continue
            if not self._held:
                _end(number, f"stopped by {signal.Signals(number).name}; the same command starts again")
            if self.received:
                _end(number, "stopped at once; the checkpoints that were written are kept")
            self.received = number


def _end(number: int, line: str) -> None:
    """Ends the process, from a thread, with what was printed and a line."""
    for do, seconds in [(sys.stdout.flush, 1), *((do, 2) for do in SIGNALS.at_end)]:
        doing = threading.Thread(target=do, daemon=True)
        doing.start()
        doing.join(seconds)  # unless whoever should read the output does not
    os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


SIGNALS = Signals()
