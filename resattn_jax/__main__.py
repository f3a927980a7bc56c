"""Train and evaluate Residual Attention Networks.

resattn_jax [--config=NAME or FILE] [--mode=train|evaluate|show_data|…] [--workdir=DIR] [--config.key=value ...]

`python -m resattn_jax` and, in the repository, `python main.py` are the same.
"""

import gc
import importlib
import io
import keyword
import os
import signal
import sys
from collections.abc import Callable

from resattn_jax.errors import Interrupted, RunError, UsageError, reason
from resattn_jax.signals import SIGNALS


def main(argv: list[str]) -> None:
    """Does what the command line says. Raises UsageError, RunError and Interrupted."""
    from resattn_jax import cli  # after signals are caught

    command = cli.parse(argv)
    name = f"{command.mode}_" if keyword.iskeyword(command.mode) else command.mode
    importlib.import_module(f"resattn_jax.modes.{name}").run(command)  # what a mode needs takes seconds to import


def program(run: Callable[[list[str]], int | None] = main) -> int:
    """Runs `main`, or another function of the command line, as the whole of this process; a fault is one line.

    Returns the exit status: what the function returns, None for 0, and that of the fault otherwise.
    """
    sys.modules["__main__"].__doc__ = __doc__  # what --help begins with
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal has no letters for
    try:
        SIGNALS.catch()
        use_large_pages()
        gc.set_threshold(200_000, 50, 1000)  # tracing a net makes millions of small objects, of which few are garbage
        status = run(sys.argv) or 0
        sys.stdout.flush()
        return status
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
    finally:
        gc.freeze()  # Python looks for garbage once more before it ends, a second's work in which nothing is freed
    print(message, file=sys.stderr)
    return status


LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def use_large_pages() -> None:
    """Starts this process again, once, with a C library that asks the system for pages of 2 MB where it asks for much.

    On the CPU the temporaries of a step are one piece of memory, 2.5 GB for ra92_cifar and 64 images, mapped anew for
    every step; in pages of 4 kB that alone takes a fifth of it. glibc reads the setting when a process starts, other C
    libraries pass it over, and one that is set already is left alone.
    """
    if sys.platform == "linux" and not LARGE_PAGES.keys() & os.environ.keys():
        os.environ.update(LARGE_PAGES)
        SIGNALS.block()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(program())
