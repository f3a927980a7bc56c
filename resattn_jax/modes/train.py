"""--mode=train: a net trained as its config says, from nothing or from where the run was cut off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec as P

from resattn_jax import profiler, runtime
from resattn_jax.ahead import StepsAhead
from resattn_jax.checkpoint import Writer, newest_step
from resattn_jax.cli import Command
from resattn_jax.config import check
from resattn_jax.data.order import batch_rows
from resattn_jax.data.pipelines import EvalStream, TrainingData, TrainStream
from resattn_jax.data.resident import put
from resattn_jax.errors import Interrupted, RunError
from resattn_jax.experiment import Experiment, build
from resattn_jax.fine_tune import start_from
from resattn_jax.metrics import is_better, scalars
from resattn_jax.models.count import count_multiply_adds, count_parameters
from resattn_jax.report.console import Startup
from resattn_jax.report.contact_sheet import contact_sheet
from resattn_jax.report.mask_sheet import MaskSheet
from resattn_jax.report.tracker import check_installed
from resattn_jax.report.training import Report
from resattn_jax.run import Run
from resattn_jax.signals import SIGNALS, Signals
from resattn_jax.state import Progress, TrainState
from resattn_jax.watchdog import Watchdog

SHOWN = 16  # images of the first batch that TensorBoard has
MOST_IN_A_ROW = 10  # steps that are not finite, one after the other, until a run that skips them has broken down


def run(command: Command) -> None:
    """Trains; the report is what it prints."""
    runtime.initialize(*command.cluster)
    if command.profiler_port:
        profiler.serve(command.profiler_port)
    train_and_evaluate(command.config, command.run.path, began=command.began, profile=command.profile)


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    devices: list[jax.Device] | None = None,
    began: float | None = None,
    profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Trains to the end of the run, going on from the newest checkpoint if there is one.

    The workdir then holds the files that `run` lists and TensorBoard's events. Returns what result.json holds: {"step",
    "train_images_per_second", "final": {"top1", "top5", "loss", "ece"}, "best": {…, "step"}}. devices: which to use;
    None: all of all hosts. began: `time.perf_counter()` at the start of the command, from where it tells the time until
    the first step; None: now. profile: (START, COUNT), so many steps after the first START are traced.

    Raises UsageError for a fault of the config, the data or `profile`, RunError when the loss is no longer finite, a
    device is out of memory or another process was lost, and Interrupted on SIGTERM or SIGINT, after a checkpoint of the
    step reached.
    """
    startup = Startup(time.perf_counter() if began is None else began)
    run = Run(workdir)
    check(config)
    check_installed(config)
    run.compare(config)
    mesh = runtime.make_mesh(devices)
    startup.done("imports and devices")
    data = TrainingData(config)
    startup.done("data")
    experiment = build(config, data.spec, mesh)
    ahead = StepsAhead(experiment, newest_step(run.checkpoints))
    startup.done("tracing")
    train = data.train_stream(
        mesh, experiment.platform, batch_size=config.batch_size, steps_per_dispatch=experiment.steps_per_dispatch
    )
    evaluation = data.eval_stream(mesh, experiment.platform, batch_size=experiment.eval_batch_size)
    startup.done("data")
    trace = profiler.Profile(run.path, profile, experiment.durations.total)
    keep = {"keep_newest": config.checkpoint.keep_newest, "keep_best": config.checkpoint.keep_best}
    with (
        run.writing(config, data.spec, first_host=jax.process_index() == 0) as notes,
        runtime.device_faults(_memory_advice(config, experiment)),
        Report(run, experiment.durations.total) as report,
        Writer(run.checkpoints, **keep, say=report.say, before=run.settle_logs) as checkpoints,
        contextlib.closing(train),
        Watchdog(60 * config.watchdog_minutes) as watchdog,
        trace,
    ):
        _introduce(report, experiment, config, run, data, notes)
        masks = MaskSheet(experiment, data)
        training = Training(
            config, experiment, ahead, train, evaluation, masks, checkpoints, report, startup, watchdog, trace
        )
        training.start()
        with SIGNALS.held() as signals:
            training.loop(signals)
            return training.finish(run)


class Training:
    """A run as it goes: the state, how far it is, and what happens after each dispatch of steps."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        experiment: Experiment,
        ahead: StepsAhead,
        train: TrainStream,
        evaluation: EvalStream,
        masks: MaskSheet,
        checkpoints: Writer,
        report: Report,
        startup: Startup,
        watchdog: Watchdog,
        trace: profiler.Profile,
    ):
        self.config, self.experiment, self.ahead = config, experiment, ahead
        self.train, self.evaluation = train, evaluation
        self.masks = masks
        self.checkpoints, self.report, self.startup, self.watchdog = checkpoints, report, startup, watchdog
        self.trace = trace
        self.seed = put(np.array(config.seed, np.uint32), experiment.mesh, P())
        self.total, self.devices = experiment.durations.total, runtime.describe_devices(experiment.mesh)
        self.step = 0
        self.state: TrainState
        self.final: dict[str, float] | None = None  # of the evaluation at this step
        self.warm = False  # the first dispatch of a process is slower, and not timed if there are more
        self._running: tuple[int, int, dict[str, jax.Array]] | None = None  # a dispatch not looked at yet

    def start(self) -> None:
        """Makes the state, and waits for the program of its next steps."""
        self.restore()
        self.startup.done("checkpoint" if self.step else "first weights")
        if compiled := self.ahead.wait(self.step, self.report.say):
            self.train_steps = compiled.program
            self.startup.done("compiling (from the cache)" if compiled.cached else "compiling")

    def restore(self) -> None:
        """Makes the state, of the first of these that there is:

        1. the run's newest checkpoint that can be read, with the progress that goes with it;
        2. the weights of another run, config.init_from, where they fit;
        3. the seed's.
        """
        progress = Progress()
        if self.checkpoints.steps():
            steps, like = self.checkpoints.find("newest"), self.experiment.abstract_state()
            self.step, (self.state, progress) = self.checkpoints.first_readable(
                steps, lambda step: self.checkpoints.restore(step, like)
            )
            self.report.say(f"going on from the checkpoint of step {self.step}")
        else:
            self.state = self.experiment.initial_state()
            if self.config.init_from:
                self.state, notes = start_from(self.state, self.config.init_from, self.config)
                self.report.say("\n".join([f"starting from the weights in {self.config.init_from}", *notes]))
        if progress.devices not in ("", self.devices):
            self.report.say(
                f"note     it was trained on {progress.devices} and goes on with {self.devices}: not to the same bits"
            )
        self.clock = Clock(progress, self.config.batch_size)
        self.best, self.skipped_before = progress.best, progress.skipped
        self.not_finite, self.not_finite_in_a_row = progress.not_finite, progress.not_finite_in_a_row
        self.since_log = StepMeans(progress.since_log)
        self.report.begin(self.step, self.config, runtime.describe_versions(self.experiment.mesh))

    def loop(self, signals: Signals) -> None:
        """Steps, log, evaluate, save, in this order, to the end. Raises Interrupted after a signal."""
        self.trace.begin_run(self.step, self.experiment.platform.name, self.report.say)
        self.clock.start(self.step)
        while self.step < self.total:
            self.dispatch()
            due = {name for name, n in self.experiment.every.items() if self.step == self.total or self._divides(n)}
            if self.trace.due(self.step):
                due.add("trace")
            if self.step == self.experiment.sam_from < self.total:
                due.add("sam")
            stopping = runtime.agreed(signals.received, due=bool(due))
            self.final = None
            if due or stopping:
                self.look()
                self.clock.stop(self.step)
            if self.since_log.newest:
                self.report.progress(self.step, self.since_log.newest["loss"], self.clock.images_per_second)
            if "log" in due:
                self.log()
            if "eval" in due:
                self.final = self.evaluate()
            if due & {"eval", "save", "sam"} or stopping:  # before compiling, which no signal cuts short
                self.save()
            if stopping and self.step < self.total:
                self.settle()
                raise Interrupted(
                    stopping, f"stopped at step {self.step} of {self.total}; the same command goes on from there"
                )
            if "sam" in due and (compiled := self.ahead.wait(self.step, self.report.say)):
                self.train_steps = compiled.program
            if due or not self.warm:
                jax.block_until_ready(self.state.step)
                self.warm = True
                self.trace.at(self.step)
                self.clock.start(self.step)

    def dispatch(self) -> None:
        """Trains up to the next step at which something is due, or as many as one dispatch takes."""
        until_due = [n - self.step % n for n in self.experiment.every.values() if n]
        until_due += self.trace.until_due(self.step)
        if self.step < self.experiment.sam_from:
            until_due.append(self.experiment.sam_from - self.step)
        count = min(self.experiment.steps_per_dispatch, self.total - self.step, *until_due)
        batches = self.train.batches(self.step, count)
        self.trace.at(self.step)
        span = put(np.array([self.step, self.step + count], np.int32), self.experiment.mesh, P())
        with self.trace.steps(self.step, count):
            self.state, metrics = self.train_steps(self.state, self.train.arrays, batches, span, self.seed)
        if not self.warm:
            jax.block_until_ready(metrics)
            self.startup.done("first step" if count == 1 else f"first {count} steps")
            self.report.say(str(self.startup))
        if self.step == 0:
            with self.clock.paused():
                self.show(batches)
        self.look()  # at the dispatch before, while this one runs, so that the device never waits
        self._running = self.step, count, metrics
        self.step += count

    def show(self, batches: Any) -> None:
        """Shows TensorBoard the first batch."""
        self.report.batch(contact_sheet(self.experiment, self.train, batches, SHOWN))

    def look(self) -> None:
        """Adds the metrics of the dispatch before. Raises RunError as `stumble` does."""
        if self._running is None:
            return
        (first, count, metrics), self._running = self._running, None
        values = {name: np.asarray(value)[:count] for name, value in jax.device_get(metrics).items()}
        for i in range(count):
            step_metrics = {name: float(value[i]) for name, value in values.items()}
            if np.isfinite([step_metrics["loss"], step_metrics["gradient_norm"]]).all():
                self.since_log.add(step_metrics)
                self.not_finite_in_a_row = 0
            else:
                self.stumble(first + i, step_metrics)
        self.watchdog.alive()

    def stumble(self, done: int, metrics: dict[str, float]) -> None:
        """Keeps what a step was made of whose loss or gradient is not finite; it changed nothing.

        done: the number of steps before it. Raises RunError, after saving the state before it, unless such steps are
        skipped; then too when there were many, one after the other.
        """
        name = next(name for name in ("loss", "gradient_norm") if not np.isfinite(metrics[name]))
        told = f"the {name.replace('_', ' ')} at step {done + 1} is {metrics[name]}"
        rows = batch_rows(self.config.seed, done, self.config.batch_size, self.experiment.spec.examples)
        self.report.not_finite(done + 1, metrics, rows.tolist())
        if self.config.on_nan == "skip":
            self.not_finite += 1
            self.not_finite_in_a_row += 1
            if self.not_finite_in_a_row == MOST_IN_A_ROW:
                raise RunError(f"{told}, as at the {MOST_IN_A_ROW - 1} steps before; {self._advice()}")
            self.report.say(f"{told}; the step was skipped")
            return
        if done:
            self.step = done
            self.clock.stop(done)
            self.save()
            self.settle()
        raise RunError(f"{told}; {self._advice()}, or go on without such steps: config.on_nan=skip")

    def log(self) -> None:
        """Logs the means over the steps since the last time."""
        means = self.since_log.take()
        means["learning_rate"] = float(self.experiment.schedule(self.step - 1))
        if self.clock.images_per_second:
            means["images_per_second"] = self.clock.images_per_second
        if self.skipped:
            means["broken_pictures_skipped"] = self.skipped
        if self.not_finite:
            means["steps_not_finite"] = self.not_finite
        self.report.log(self.step, "train", means)

    def evaluate(self) -> dict[str, float]:
        """Measures the evaluation split, logs it, keeps the best, and returns the metrics of one number."""
        metrics = self.measure()
        self.report.log(self.step, "eval", metrics)
        drawn = self.masks.draw(self.state.eval_variables)  # by every host, so that none waits for another in a step
        self.report.masks(self.step, drawn)
        self.watchdog.alive()
        final = scalars(metrics)
        if is_better(final, self.best):
            self.best = {**final, "step": self.step}
        return final

    def measure(self) -> dict[str, Any]:
        """The metrics of the evaluation split. Raises RunError when the loss is not finite."""
        metrics = self.experiment.evaluate(self.state.eval_variables, self.evaluation, self.watchdog.alive)
        if not np.isfinite(metrics["loss"]):
            raise RunError(f"the evaluation loss at step {self.step} is {metrics['loss']}; {self._advice()}")
        return metrics

    def save(self) -> None:
        """Begins to write a checkpoint; progress is a value of its own, for the file is written in the background."""
        progress = Progress(
            best=self.best,
            train_seconds=self.clock.seconds,
            train_images=self.clock.images,
            since_log=self.since_log.sums,
            skipped=self.skipped,
            not_finite=self.not_finite,
            not_finite_in_a_row=self.not_finite_in_a_row,
            devices=self.devices,
        )
        self.checkpoints.save(self.state, progress, self.final)

    def settle(self) -> None:
        """Waits for the last checkpoint. Raises RunError when the state could not be saved."""
        self.checkpoints.wait()
        if self.checkpoints.failure and self.checkpoints.saved != self.step:
            raise RunError(self.checkpoints.failure)

    def finish(self, run: Run) -> dict[str, Any]:
        """Waits for the last checkpoint, writes and returns the result."""
        final = self.final or scalars(self.measure())  # the run was complete before it was started again
        self.settle()
        rate = self.clock.mean
        best = self.best or {**final, "step": self.step}
        result = {"step": self.step, "train_images_per_second": rate, "final": final, "best": dict(best)}
        self.report.result(result, self.experiment.spec.class_names)
        if rate:
            self.report.say(
                f"{self.clock.images:,} images in {self.clock.seconds:.1f} s of training: {rate:,.0f} images/s"
            )
        self.report.say(f"the run lies in {run}")
        return result

    @property
    def skipped(self) -> int:
        """Broken pictures met on this host, in earlier processes of the run too."""
        return max(self.skipped_before, self.train.skipped)

    def _divides(self, n: int) -> bool:
        return n > 0 and self.step % n == 0

    def _advice(self) -> str:
        steps = self.checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written yet"
        return f"{kept}; lower config.schedule.learning_rate, or set config.optimizer.clip_norm"


class StepMeans:
    """Sums of the step metrics since they were logged; they go on with the run, so that means are over all steps."""

    def __init__(self, sums: Mapping[str, float]):
        self.sums: dict[str, float] = dict(sums)  # {"count": …, "loss": …}, replaced and never changed
        self.newest: dict[str, float] = {}

    def add(self, metrics: dict[str, float]) -> None:
        """Of one step."""
        self.newest = metrics
        self.sums = {name: self.sums.get(name, 0) + value for name, value in {"count": 1, **metrics}.items()}

    def take(self) -> dict[str, float]:
        """The means, of no step none, and nothing is left."""
        sums, self.sums = self.sums, {}
        return {name: value / sums["count"] for name, value in sums.items() if name != "count"}


class Clock:
    """Time and images of training alone, without compiling, evaluating and saving, over the whole run."""

    def __init__(self, progress: Progress, batch_size: int):
        self.seconds, self.images = progress.train_seconds, progress.train_images
        self._batch_size, self._began = batch_size, (0.0, 0)
        self.images_per_second: float | None = None  # between the last start and stop

    def start(self, step: int) -> None:
        self._began = (time.perf_counter(), step)

    def stop(self, step: int) -> None:
        seconds, images = time.perf_counter() - self._began[0], (step - self._began[1]) * self._batch_size
        self.seconds += seconds
        self.images += images
        self.images_per_second = images / seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within takes no time."""
        paused, (began, step) = time.perf_counter(), self._began
        yield
        self._began = began + time.perf_counter() - paused, step

    @property
    def mean(self) -> float | None:
        """Images per second over the whole run, earlier processes of it counted in."""
        return self.images / self.seconds if self.seconds else None


def _introduce(
    report: Report,
    experiment: Experiment,
    config: ml_collections.ConfigDict,
    run: Run,
    data: TrainingData,
    notes: list[str],
) -> None:
    spec, model = experiment.spec, experiment.model
    variables = experiment.abstract_state().variables
    size = "x".join(map(str, spec.image_shape))
    report.say(f"devices  {runtime.describe_devices(experiment.mesh)}, jax {jax.__version__}")
    report.say(
        f"data     {config.data.name}: {spec.examples:,} training and {data.eval_examples:,} evaluation images"
        f" of {size}, {spec.num_classes} classes"
    )
    parameters = f"{count_parameters(variables['params']):,} parameters"
    report.say(f"model    {config.model.name}: {parameters}, computing in {jnp.dtype(model.dtype)}")
    report.model(variables["params"], count_multiply_adds(model, spec.image_shape, variables))
    total = experiment.durations.total
    epochs = total * config.batch_size / spec.examples
    report.say(f"run      {total:,} steps of {config.batch_size} images ({epochs:.4g} epochs) in {run}")
    for note in [*notes, *experiment.durations.notes()]:
        report.say(f"note     {note}")


def _memory_advice(config: ml_collections.ConfigDict, experiment: Experiment) -> str:
    size = "x".join(map(str, experiment.spec.image_shape))
    images = config.batch_size // experiment.mesh.size
    remat = "" if config.model.remat else ", or set config.model.remat=True"
    return (
        f"with {images} images of {size} on each through {config.model.name} in {jnp.dtype(experiment.model.dtype)};"
        f" raise config.accumulate (now {config.accumulate}) or lower config.batch_size{remat}"
    )
