"""A trace of some training steps, in the workdir where TensorBoard's profile tab and XProf look for it.

Every host writes its own file, plugins/profile/TIME/HOST.xplane.pb, as `jax.profiler` does.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable

import jax
from etils import epath

from resattn_jax import buckets
from resattn_jax.errors import UsageError, reason

READABLE = "--xla_gpu_enable_command_buffer="  # kernels that are launched as one graph go by the graph's name


class Profile:
    """The steps of a run that are traced. A context manager: what is open at its end is written.

    A trace begins and ends between two dispatches, when the device is done: what it holds are the steps asked for,
    whole, and no others. The dispatches are cut there, as they are to log or evaluate, which changes no bit.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None, total: int):
        """steps: (START, COUNT), as many steps after the first START; None: no trace. total: the run's steps.

        Raises UsageError where the run has no such steps.
        """
        self._workdir = workdir
        self._say: Callable[[str], None]
        self._start, self._end, self._reached = 0, 0, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # while a trace is open
        if steps:
            self._start, self._end = steps[0], min(sum(steps), total)
            if steps[0] >= total:
                raise UsageError(f"--profile={steps[0]}:{steps[1]}: the run ends at step {total}; START must be less")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder:
            self._finish()

    def begin_run(self, step: int, platform: str, say: Callable[[str], None]) -> None:
        """Says what can be known before the first step. step: the one that the run goes on from; say: tells a line."""
        self._say = say
        if 0 < self._end <= step:
            self._say(f"note     steps {self._start + 1} to {self._end}, to be traced, are trained already")
        if self._end > step and platform == "gpu" and READABLE not in os.environ.get("XLA_FLAGS", "").split():
            self._say(f"note     for kernels by their names in the trace start with XLA_FLAGS={READABLE}")

    def due(self, step: int) -> bool:
        """Whether a trace begins or ends after so many steps."""
        return self._end > 0 and step in (self._start, self._end)

    def until_due(self, step: int) -> list[int]:
        """In how many steps a trace begins and ends, as far as that is to come."""
        return [at - step for at in (self._start, self._end) if at > step]

    def at(self, step: int) -> None:
        """Begins or ends the trace, if it is time, after so many steps. The device has to be done with them."""
        if self._folder and step >= self._end:
            self._finish()
        elif not self._folder and self._start <= step < self._end:
            self._reached = step
            self._begin(step)

    def steps(self, first: int, count: int) -> contextlib.AbstractContextManager[object]:
        """Around a dispatch of `count` steps after the first `first`; in the trace it has the number of the last."""
        self._reached = first + count
        if self._folder is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=first + count)

    def _begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a line for each call of a function would be most of the file
        self._folder, self._from = tempfile.TemporaryDirectory(), step
        try:
            jax.profiler.start_trace(self._folder.name, profiler_options=options)
        except RuntimeError as error:  # another trace is taken, by --profiler_port
            self._folder.cleanup()
            self._folder, self._end = None, 0
            self._say(f"the steps after {step} could not be traced: {reason(error)}")

    def _finish(self) -> None:
        """Ends the trace and puts its files into the workdir. A trace that cannot be written ends no run."""
        assert self._folder
        folder, self._folder = self._folder, None
        self._end = 0
        faults: tuple[type[Exception], ...] = (RuntimeError, *buckets.faults())
        with folder:
            try:
                jax.profiler.stop_trace()
                for file in pathlib.Path(folder.name).rglob("*"):
                    if file.is_file():
                        _put(file.read_bytes(), self._workdir / file.relative_to(folder.name))
            except faults as error:
                self._say(f"the trace could not be written: {reason(error)}")
                return
        self._say(f"traced steps {self._from + 1} to {self._reached}: tensorboard --logdir={self._workdir}")


def _put(content: bytes, path: epath.Path) -> None:
    if buckets.is_url(path):
        return buckets.write(path, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def serve(port: int) -> None:
    """Lets TensorBoard and XProf take traces of this process through `port`. Raises UsageError where it is taken."""
    try:
        with socket.create_server(("", port)):  # JAX only logs that it is
            pass
    except OSError as error:
        raise UsageError(f"--profiler_port={port}: {os.strerror(error.errno or 0)}; choose another port") from error
    jax.profiler.start_server(port)
