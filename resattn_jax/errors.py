"""The two kinds of fault a person is told of in one line, without a traceback."""


class UsageError(Exception):
    """The command line, the config or the data is at fault; the message says what to do. Exit status 2."""


class RunError(Exception):
    """The run itself failed: a loss that is not finite, a device out of memory, a lost process. Exit status 1."""


class Interrupted(Exception):
    """A signal ended the run after it saved a checkpoint. Exit status 128 + signal, as a shell has it."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
