"""The program of a run's next steps, compiled while its data is decoded and its state is read."""

from __future__ import annotations

from collections.abc import Callable

from resattn_jax.experiment import Experiment
from resattn_jax.runtime import Compiled, compile_meanwhile


class StepsAhead:
    """Traces the program at once, and has it compiled in the background until somebody waits for it."""

    def __init__(self, experiment: Experiment, step: int):
        """step: after which the next steps are expected to come; at the end of the run there is nothing to compile."""
        self._experiment = experiment
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._steps = self._experiment.steps_from(step)
        self._compiling = self._steps and compile_meanwhile(self._steps, *self._experiment.train_shapes())

    def wait(self, step: int, say: Callable[[str], None]) -> Compiled | None:
        """The program of the steps after `step`, None at the end of the run. say: told how it goes.

        Where that is another than was expected, it is compiled now: SAM begins, or the newest checkpoint was damaged.
        """
        if self._experiment.steps_from(step) is not self._steps:
            self._begin(step)
        if self._compiling is None:
            return None
        with_sam = f" with SAM, which begins after step {self._experiment.sam_from}"
        say(f"compiling the train step{with_sam if step >= self._experiment.sam_from else ''} …")
        compiled = self._compiling.result()
        whence = "from" if compiled.cached else "the next start finds it in"
        say(f"compiled in {compiled.seconds:.1f} s ({whence} the cache)")
        return compiled
