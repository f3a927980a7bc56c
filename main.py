"""Train and evaluate Residual Attention Networks.

python main.py [--config=FILE] [--mode=train|evaluate|show_data|…] [--workdir=DIR] [--config.key=value ...]
"""

import importlib
import io
import keyword
import os
import signal
import sys

from resattn_jax.errors import Interrupted, RunError, UsageError, reason
from resattn_jax.signals import SIGNALS


def main(argv: list[str]) -> None:
    """Does what the command line says. Raises UsageError, RunError and Interrupted."""
    from resattn_jax import cli  # after signals are caught

    cli.use_large_pages(__file__)
    command = cli.parse(argv)
    name = f"{command.mode}_" if keyword.iskeyword(command.mode) else command.mode
    importlib.import_module(f"resattn_jax.modes.{name}").run(command)  # what a mode needs takes seconds to import


def program() -> int:
    """Runs `main` and returns the exit status; a fault is one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal has no letters for
    try:
        SIGNALS.catch()
        main(sys.argv)
        sys.stdout.flush()
        return 0
    except UsageError as error:
        message, status = f"error: {error}", 2
    except RunError as error:
        message, status = f"error: {error}", 1
    except Interrupted as stop:
        message, status = str(stop), 128 + stop.signal
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        from resattn_jax import buckets

        if not isinstance(error, buckets.faults()[1:]):
            raise
        message, status = f"error: the bucket cannot be reached: {reason(error)}", 1
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(program())
