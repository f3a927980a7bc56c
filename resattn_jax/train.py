"""Training a net as its config says, from nothing or from where the run was cut off. Read it from the top."""

from __future__ import annotations

import json
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from resattn_jax import runtime
from resattn_jax.checkpoint import Checkpoints
from resattn_jax.config import save_or_compare, save_or_compare_classes
from resattn_jax.data.resident import put
from resattn_jax.errors import Interrupted, RunError
from resattn_jax.evaluate import evaluate
from resattn_jax.experiment import Experiment, build
from resattn_jax.models.count import count_multiply_adds, count_parameters
from resattn_jax.report import Report, Startup
from resattn_jax.train_step import make_eval_step, make_train_steps
from resattn_jax.transfer import start_from

_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    devices: list[jax.Device] | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains to the end of the run, going on from the newest checkpoint in workdir if there is one.

    workdir then holds config.json, metrics.jsonl, TensorBoard events, parameters.txt, checkpoints/ and result.json,
    whose content is returned: {"step", "train_images_per_second", "final": {"top1", "top5", "loss"},
    "best": {…, "step"}}. devices: which to use; None: all of all hosts. began: `time.perf_counter()` at the start of
    the command, from where it tells the time until the first step; None: now.

    Raises UsageError for a fault of the config or the data, RunError when the loss is no longer finite, a device is out
    of memory or another process was lost, and Interrupted on SIGTERM or SIGINT, after a checkpoint of the step reached.
    """
    startup = Startup(time.perf_counter() if began is None else began)
    jax.devices()  # starts the devices
    startup.done("imports and devices")
    experiment = build(config, devices)
    startup.done("data")
    workdir.mkdir(parents=True, exist_ok=True)
    notes = save_or_compare(config, workdir, write=jax.process_index() == 0)
    save_or_compare_classes(experiment.train.class_names, workdir)
    keep = {"keep_newest": config.checkpoint.keep_newest, "keep_best": config.checkpoint.keep_best}
    total = experiment.durations.total
    with (
        runtime.device_faults(_memory_advice(config, experiment)),
        Checkpoints(workdir, **keep) as checkpoints,
        Report(workdir, total) as report,
        _Stop() as stop,
    ):
        _introduce(report, experiment, config, workdir, notes)
        return _run(config, experiment, workdir, checkpoints, report, stop, startup)


def _run(
    config,
    experiment: Experiment,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    report: Report,
    stop: _Stop,
    startup: Startup,
):
    mesh, train, total = experiment.mesh, experiment.train, experiment.durations.total
    every = experiment.every
    room = config.steps_per_dispatch or train.max_steps_per_dispatch or runtime.default_steps_per_dispatch()

    # ---- The state: the newest checkpoint's, else with another run's weights, else the seed's.
    # Progress is what is no function of the config.
    progress = {"best": None, "train_seconds": 0.0, "train_images": 0}
    if checkpoints.steps():
        step = checkpoints.find("newest")
        state, progress = checkpoints.restore(step, experiment.abstract_state())
        report.say(f"going on from the checkpoint of step {step}")
    else:
        step, state = 0, experiment.initial_state()
        if config.init_from:
            state, fresh = start_from(state, config.init_from)
            report.say("\n".join([f"starting from the weights in {config.init_from}", *fresh]))
    report.resume(step)

    # ---- Compilation, ahead of the first step.
    train_steps = make_train_steps(experiment.model, experiment.optimizer, experiment.recipe, mesh, train.take, room)
    eval_step = make_eval_step(experiment.model, experiment.recipe, mesh, experiment.test.take)

    def arguments(step, count):
        batches = train.train_batches(config.seed, step, count, config.batch_size, room)
        return train.arrays, batches, put(np.int32(count), mesh, P())

    def measure():
        size, limit = experiment.eval_batch_size, config.eval.max_examples
        figures = evaluate(eval_step, state.eval_variables, experiment.test, size, limit)
        if not np.isfinite(figures["loss"]):
            raise RunError(f"the evaluation loss at step {step} is {figures['loss']}; {_advice(checkpoints)}")
        return figures, {name: figures[name] for name in ("top1", "top5", "loss")}

    if step < total:
        startup.done("first weights" if step == 0 else "checkpoint")
        report.say("compiling the train step …")
        hits = runtime.events()[_CACHE_HIT]
        train_steps = train_steps.lower(state, *arguments(0, 0)).compile()
        cached = runtime.events()[_CACHE_HIT] > hits
        seconds = startup.done("compiling (from the cache)" if cached else "compiling")
        report.say(f"compiled in {seconds:.1f} s ({'from' if cached else 'the next start finds it in'} the cache)")

    # ---- The loop: steps, log, evaluate, save, in this order.
    clock, final, running, since_log = _Clock(progress, config.batch_size), None, None, []
    warm = False
    clock.start(step)
    while step < total:
        count = min(room, total - step, *(n - step % n for n in every.values() if n))
        state, metrics = train_steps(state, *arguments(step, count))
        if not warm:
            jax.block_until_ready(metrics)
            startup.done("first step" if count == 1 else f"first {count} steps")
            report.say(str(startup))
        if running:  # looked at while the next dispatch runs, so that the device never waits
            since_log += _finite(*running, checkpoints)
        step, running = step + count, (step, count, metrics)
        due = {event for event, n in every.items() if step == total or (n and step % n == 0)}
        stopping = stop.agreed(bool(due))

        if due or stopping:
            since_log += _finite(*running, checkpoints)
            running = None
            clock.stop(step)
        if since_log:
            report.progress(step, since_log[-1]["loss"], clock.images_per_second)
        if "log" in due:
            means = {name: float(np.mean([m[name] for m in since_log])) for name in since_log[0]}
            means["learning_rate"] = float(experiment.schedule(step - 1))
            if clock.images_per_second:
                means["images_per_second"] = clock.images_per_second
            if train.skipped:
                means["broken_pictures_skipped"] = train.skipped
            report.log(step, "train", means)
            since_log = []
        if "eval" in due:
            figures, final = measure()
            report.log(step, "eval", figures)
            if progress["best"] is None or final["top1"] > progress["best"]["top1"]:
                progress["best"] = {**final, "step": step}
        if due & {"eval", "save"} or stopping:
            checkpoints.save(state, progress, final if "eval" in due else None)
        if stopping and step < total:
            checkpoints.wait()
            raise Interrupted(stopping, f"stopped at step {step} of {total}; the same command goes on from there")
        if due or not warm:  # the first dispatch of a process is slower, and not counted if there are more
            jax.block_until_ready(metrics)
            warm = True
            clock.start(step)

    # ---- The result.
    if final is None:  # the run was complete before it was started again
        _, final = measure()
    checkpoints.wait()
    result = {
        "step": step,
        "train_images_per_second": clock.mean,
        "final": final,
        "best": progress["best"] or {**final, "step": step},
    }
    if jax.process_index() == 0:
        (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    report.result(result)
    if clock.mean:
        images, seconds = progress["train_images"], progress["train_seconds"]
        report.say(f"{images:,} images in {seconds:.1f} s of training: {clock.mean:,.0f} images/s")
    report.say(f"the run lies in {workdir}")
    return result


def _introduce(report: Report, experiment: Experiment, config, workdir: pathlib.Path, notes: list[str]) -> None:
    train, test, model = experiment.train, experiment.test, experiment.model
    variables = experiment.abstract_state().variables
    params = variables["params"]
    size = "x".join(map(str, train.image_shape))
    report.say(f"devices  {runtime.describe_devices(experiment.mesh)}, jax {jax.__version__}")
    report.say(
        f"data     {config.data.name}: {train.examples:,} training and {test.examples:,} test images of {size},"
        f" {len(train.class_names)} classes"
    )
    size = f"{count_parameters(params):,} parameters"
    report.say(f"model    {config.model.name}: {size}, computing in {jnp.dtype(model.dtype)}")
    report.model(params, count_multiply_adds(model, train.image_shape, variables), workdir / "parameters.txt")
    total = experiment.durations.total
    epochs = total * config.batch_size / train.examples
    report.say(f"run      {total:,} steps of {config.batch_size} images ({epochs:.4g} epochs) in {workdir}")
    for note in notes:
        report.say(f"note     {note}")


def _finite(first: int, count: int, metrics: dict[str, jax.Array], checkpoints: Checkpoints) -> list[dict[str, float]]:
    """The metrics of each step of a dispatch. Raises RunError naming the first whose loss or gradient is not finite."""
    metrics = {name: np.asarray(values)[:count] for name, values in jax.device_get(metrics).items()}
    for i in range(count):
        for name in ("loss", "gradient_norm"):
            if not np.isfinite(metrics[name][i]):
                what = name.replace("_", " ")
                raise RunError(f"the {what} at step {first + i + 1} is {metrics[name][i]}; {_advice(checkpoints)}")
    return [{name: float(values[i]) for name, values in metrics.items()} for i in range(count)]


def _advice(checkpoints: Checkpoints) -> str:
    steps = checkpoints.steps()
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written yet"
    return f"{kept}; lower config.schedule.learning_rate, or set config.optimizer.clip_norm"


def _memory_advice(config: ml_collections.ConfigDict, experiment: Experiment) -> str:
    images, size = config.batch_size // experiment.mesh.size, "x".join(map(str, experiment.train.image_shape))
    remat = "" if config.model.remat else ", or set config.model.remat=True"
    return (
        f"with {images} images of {size} on each through {config.model.name} in {jnp.dtype(experiment.model.dtype)};"
        f" raise config.accumulate (now {config.accumulate}) or lower config.batch_size{remat}"
    )


class _Clock:
    """Time and images of training alone, without compiling, evaluating and saving, summed up in `progress`."""

    def __init__(self, progress: dict[str, Any], batch_size: int):
        self._progress, self._batch_size, self._began = progress, batch_size, (0.0, 0)
        self.images_per_second: float | None = None  # between the last start and stop

    def start(self, step: int) -> None:
        self._began = (time.perf_counter(), step)

    def stop(self, step: int) -> None:
        seconds, images = time.perf_counter() - self._began[0], (step - self._began[1]) * self._batch_size
        self._progress["train_seconds"] += seconds
        self._progress["train_images"] += images
        self.images_per_second = images / seconds

    @property
    def mean(self) -> float | None:
        """Images per second over the whole run, earlier processes of it counted in."""
        seconds = self._progress["train_seconds"]
        return self._progress["train_images"] / seconds if seconds else None


class _Stop:
    """Catches SIGTERM and SIGINT, so that a run can save before it ends. A second signal ends it at once."""

    def __init__(self):
        self._signal = 0

    def agreed(self, due: bool) -> int:
        """The signal that came, 0 for none. Many hosts ask each other, and only when something else is due as well."""
        if jax.process_count() == 1:
            return self._signal
        return int(multihost_utils.process_allgather(np.int32(self._signal)).max()) if due else 0

    def __enter__(self) -> _Stop:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _) -> None:
        self._signal = number
        for s, handler in self._previous.items():
            signal.signal(s, handler)
