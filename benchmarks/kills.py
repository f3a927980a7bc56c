"""kill -9 at random moments: whether a run then becomes what one never killed is, to the bit.

    python -m benchmarks.kills --kills=100 --seed=0

Runs of the digits are killed again and again, saves, evaluations and starts included, until they are done; then
another begins, of another seed. Weights, optimizer, logged lines, TensorBoard's steps and result.json are compared
with those of the same run never killed. Prints a line of JSON for each run, then the sum; the exit status is 1 if any
differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event

from resattn_jax.checkpoint import Reader
from resattn_jax.run import Run

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 80
_RUN = [
    *(f"--config.model.{units}=0" for units in ("p", "t", "r", "last")),
    *("--config.batch_size=16", "--config.eval.max_examples=100"),
    *(f"--config.total_steps={STEPS}", "--config.schedule.warmup=10 steps", "--config.log_every=10 steps"),
    *("--config.eval.every=40 steps", "--config.checkpoint.every=7 steps"),
]


@dataclasses.dataclass
class Killed:
    """What became of a run. kills: how often it was killed; differs: what is not as in the run never killed."""

    kills: int
    differs: list[str]


def start(workdir: pathlib.Path, seed: int) -> subprocess.Popen[str]:
    """Starts the run of a seed, or goes on with it."""
    command = [sys.executable, "main.py", *_RUN, f"--config.seed={seed}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for the end. Raises RuntimeError when that is not a good one."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(said)


def kill(folder: pathlib.Path, seed: int, delays: Iterator[float], most: int) -> Killed:
    """Kills the run of a seed up to `most` times, so many seconds after its first step each, and compares it."""
    finish(start(folder / "straight", seed))
    kills = 0
    while kills < most:
        process = start(folder / "killed", seed)
        assert process.stdout
        if not any("first step after" in line for line in process.stdout):
            finish(process)  # nothing was left to train
            break
        time.sleep(next(delays))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    else:
        finish(start(folder / "killed", seed))
    return Killed(kills, compare(folder / "straight", folder / "killed"))


def compare(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What differs between two runs of the same config."""
    found = []
    states = [_state(run) for run in (one, other)]
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(states[0])[0], jax.tree.leaves(states[1]), strict=True
    ):
        if not np.array_equal(a, b):
            found.append(jax.tree_util.keystr(path))
    for what in (_lines, _result, _events):
        if what(one) != what(other):
            found.append(what.__name__.strip("_"))
    return found


def _state(run: pathlib.Path) -> dict[str, Any]:
    with Reader(run / "checkpoints") as checkpoints:
        return checkpoints._read(STEPS, {"model": None, "optimizer": None, "ema": None})


def _lines(run: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("images_per_second")} for row in Run(run).metrics]


def _result(run: pathlib.Path) -> dict[str, Any]:
    return {k: v for k, v in (Run(run).result or {}).items() if k != "train_images_per_second"}


def _events(run: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value), …]} as TensorBoard shows them: a start forgets what was written from its first step on."""
    shown: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for file in sorted(run.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime_ns):
        for event in read_events(file.read_bytes()):
            if event.HasField("session_log"):
                for steps in shown.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                if not value.tag.endswith("images_per_second"):
                    shown[value.tag][event.step] = value.simple_value
    return {tag: sorted(steps.items()) for tag, steps in shown.items()}


def read_events(data: bytes) -> Iterator[Event]:
    """The whole records of an event file: a length of 8 bytes, 4 of a checksum, the record, 4 of a checksum."""
    place = 0
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 8], "little")
        if place + 16 + length > len(data):  # cut off by the kill
            return
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, runs, bad = random.Random(args.seed), 0, 0, 0
    while kills < args.kills:
        with tempfile.TemporaryDirectory() as folder:
            delays = iter(lambda: rng.uniform(0.0, 2.0), None)
            killed = kill(pathlib.Path(folder), args.seed + runs, delays, min(10, args.kills - kills))
        print(json.dumps({"seed": args.seed + runs, **dataclasses.asdict(killed)}), flush=True)
        kills, runs, bad = kills + killed.kills, runs + 1, bad + bool(killed.differs)
    print(json.dumps({"kills": kills, "runs": runs, "runs_that_differ": bad}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
