"""Runs a list of recipes one after the other, in pieces of any length, and prints a table of what came out.

    python -m benchmarks.recipes benchmarks/lists/fast.toml --output=DIR [--minutes=10] [--rehearse]

benchmarks/recipe_list.py says how a list is written. All runs share this process, so that libraries are loaded once and
programs that are the same, such as those of another seed, come from the compilation cache. --minutes: a SIGTERM is sent
in time for a checkpoint to be written before so many minutes have passed. Whatever ended it, kill -9 included, the same
command goes on: a run that has its result is not started again, one that was cut off goes on from its newest
checkpoint. A run that fails is named with its reason, and the others go on; the next command tries it again.

DIR has a workdir for each run, NAME_SEED, and

    results.jsonl          the record of each run that came to its end (benchmarks/records.py)
    table.txt, table.md    means and spreads over seeds
    NAME_SEED.pieces.json  the seconds of each piece of a run, kept while it goes

The exit status is 0 when every run has its result, 1 when one failed, 2 for a fault of the list, and 128 + signal when
it was stopped. --rehearse does all of it with a small net and 8 steps a run, in minutes on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import records
from benchmarks.recipe_list import Entry, read_list, rehearsed
from resattn_jax.__main__ import program
from resattn_jax.cli import BEGAN
from resattn_jax.errors import Interrupted, RunError, UsageError, reason
from resattn_jax.signals import SIGNALS

ROOT = pathlib.Path(__file__).parents[1]
TO_STOP = 20.0  # seconds that a dispatch, an evaluation and a checkpoint may take; of short pieces a fifth


def main(argv: Sequence[str]) -> int:
    """Runs what is left of a list and returns the exit status. Raises UsageError, and Interrupted on a signal."""
    args = parse_arguments(argv)
    entries = read_list(args.list)
    if args.rehearse:
        entries = rehearsed(entries)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.minutes:
        seconds = 60 * args.minutes
        stop_after(seconds - min(TO_STOP, seconds / 5) - (time.perf_counter() - BEGAN))

    from resattn_jax import runtime  # JAX takes seconds

    runtime.initialize()
    failed = run_all(entries, args.output)
    if (table := args.output / "table.txt").exists():
        print(f"\n{table.read_text(encoding='utf-8')}", end="", flush=True)
    for workdir, why in failed.items():
        print(f"failed   {workdir}: {why}", file=sys.stderr)
    return int(bool(failed))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("list", type=pathlib.Path, help="a TOML file, such as benchmarks/lists/fast.toml")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder of the runs and their results")
    parser.add_argument("--minutes", type=float, default=0.0, help="end before so many have passed; 0: run to the end")
    parser.add_argument("--rehearse", action="store_true", help="small nets and 8 steps a run")
    return parser.parse_args(argv)


def stop_after(seconds: float) -> None:
    """Sends this process a SIGTERM after so many seconds."""
    timer = threading.Timer(max(seconds, 0.0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def run_all(entries: Sequence[Entry], folder: pathlib.Path) -> dict[str, str]:
    """Runs those that have no record yet; {workdir: why} of those that failed.

    Raises UsageError when the folder holds other runs of these names, and Interrupted on a signal.
    """
    results, failed, began = folder / "results.jsonl", {}, BEGAN
    done = {(record["name"], record["seed"]): record["command"] for record in records.read_records(results)}
    for entry in entries:
        if done.get((entry.name, entry.seed), command_of(entry)) != command_of(entry):
            raise UsageError(f"{folder} holds another run {entry.workdir}; choose another --output, or delete that one")
    for number, entry in enumerate(entries, 1):
        if (entry.name, entry.seed) in done:
            continue
        print(f"\n—— {number} of {len(entries)}: {entry.workdir}\n   {command_of(entry)}", flush=True)
        try:
            records.append_record(results, train(entry, folder, began))
            write_tables(entries, folder)
        except (UsageError, RunError) as error:
            failed[entry.workdir] = str(error)
        except Exception as error:  # the others go on
            traceback.print_exc()
            failed[entry.workdir] = f"{type(error).__name__}: {reason(error)}"
        if entry.workdir in failed:
            print(f"failed   {failed[entry.workdir]}", file=sys.stderr)
        if SIGNALS.received:  # at the very end of a run, which had nothing to stop any more
            raise Interrupted(SIGNALS.received, "stopped between two runs; the same command goes on")
        free_devices()
        began = time.perf_counter()
    return failed


def free_devices() -> None:
    """Lets go of what a run had on the devices, arrays and programs, also where it failed."""
    import jax

    from resattn_jax.experiment import Experiment

    Experiment.eval_step.cache_clear()
    jax.clear_caches()
    gc.collect()


def train(entry: Entry, folder: pathlib.Path, began: float) -> dict[str, Any]:
    """Trains a run to its end and returns its record. began: `time.perf_counter()` from when its time counts."""
    from resattn_jax.modes.train import train_and_evaluate

    workdir = folder / entry.workdir
    with counted(folder / f"{entry.workdir}.pieces.json", began) as pieces:
        start_from(entry, folder)
        result = train_and_evaluate(entry.read_config(), workdir, began=began)
    return record_of(entry, workdir, result, pieces)


def start_from(entry: Entry, folder: pathlib.Path) -> None:
    """Gives a run that goes on from another one that one's log and its newest checkpoint up to a part of it.

    Nothing is done when it has begun. Raises RunError when the other has no such checkpoint.
    """
    from resattn_jax.checkpoint import Reader
    from resattn_jax.config import Durations
    from resattn_jax.run import Run

    new = folder / entry.workdir
    if entry.source is None or (new / "config.json").exists():
        return
    old = folder / entry.source.workdir
    spec = Run(old).spec
    if spec is None:
        raise RunError(f"{old}, which it goes on from, has not begun")
    most = Durations(entry.source.read_config(), spec.examples).total * entry.part / 100
    with Reader(old / "checkpoints") as checkpoints:
        steps = [step for step in checkpoints.steps() if step <= most]
    if not steps:
        raise RunError(f"{old} has no checkpoint up to step {most:g}; checkpoint.every and keep_newest say which are")
    (new / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copy(old / "metrics.jsonl", new)
    with tempfile.TemporaryDirectory(dir=new) as whole:
        copied = shutil.copytree(old / "checkpoints" / str(steps[-1]), pathlib.Path(whole) / "checkpoint")
        copied.rename(new / "checkpoints" / str(steps[-1]))


@contextlib.contextmanager
def counted(file: pathlib.Path, began: float) -> Iterator[list[float]]:
    """Adds the seconds since `began` to a file of the seconds of pieces, and again every second: it may be killed.

    Gives the seconds of all pieces; the last is that of this one, as far as it has come.
    """
    pieces: list[float] = [*(json.loads(file.read_text()) if file.exists() else []), 0.0]
    ended = threading.Event()

    def write() -> None:
        pieces[-1] = round(time.perf_counter() - began, 2)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(pieces) + "\n")
        temporary.replace(file)

    def keep_writing() -> None:
        write()
        while not ended.wait(1.0):
            write()

    thread = threading.Thread(target=keep_writing, name="pieces", daemon=True)
    thread.start()
    try:
        yield pieces
    finally:
        ended.set()
        thread.join()
        write()


def record_of(entry: Entry, workdir: pathlib.Path, result: dict[str, Any], pieces: list[float]) -> dict[str, Any]:
    """The record of a run that has ended, as benchmarks/records.py describes it."""
    from resattn_jax.run import Run

    run = Run(workdir)
    config, spec, about = run.config, run.spec, run.starts[-1]
    assert config is not None
    assert spec is not None
    return {
        "name": entry.name,
        "config": entry.config,
        "command": command_of(entry),
        "overrides": dict(entry.overrides),
        "seed": entry.seed,
        "goes_on_from": f"{entry.source.workdir} at step {run.starts[0]['step']}" if entry.source else None,
        "net": config.model.name,
        "data": config.data.name,
        "epochs": round(result["step"] * config.batch_size / spec.examples, 2),
        "final": {"step": result["step"], **result["final"]},
        "best": result["best"],
        "images_per_second": result["train_images_per_second"],
        "seconds": round(sum(pieces), 1),
        "pieces": len(pieces),
        "hardware": records.cpu() if about["devices"] == "1 x cpu" else about["devices"],
        "versions": {key: about[key] for key in ("resattn_jax", "jax", "jaxlib", "flax", "optax", "python")},
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "commit": records.commit_of(ROOT),
    }


def command_of(entry: Entry) -> str:
    """The command line that trains the same, without a list."""
    return shlex.join(["python", "main.py", *entry.arguments()])


def write_tables(entries: Sequence[Entry], folder: pathlib.Path) -> None:
    """Writes the table of the list's runs that have a record."""
    listed = {(entry.name, entry.seed) for entry in entries}
    found = [r for r in records.read_records(folder / "results.jsonl") if (r["name"], r["seed"]) in listed]
    rows = records.table(found)
    (folder / "table.txt").write_text(records.plain(records.HEAD, rows), encoding="utf-8")
    (folder / "table.md").write_text(records.markdown(records.HEAD, rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(program(lambda argv: main(argv[1:])))
