"""A run: a workdir that can be opened, for writing by one process or for reading by any.

It owns every file in the workdir:

    config.json       what is trained, as it was given
    data.json         what the net has to know of its data (`DataSpec`)
    classes.txt       the classes, a name a line
    metrics.jsonl     an object for each time that something was logged
    started.jsonl     an object for each start: when, on which devices, with which versions
    not_finite.jsonl  an object for each step whose loss or gradient was not finite, with the rows of its batch
    result.json       the last step's metrics and the best
    parameters.txt    every parameter of the net
    wandb.txt         the run's id in Weights & Biases, and wandb/ what it keeps here, where config.tracker names it
    checkpoints/      what `checkpoint` writes
    lock              who is writing

A file is written whole or not at all. In a bucket (gs://) metrics.jsonl and TensorBoard's events are copies of files on
the local disk, made anew each time that something was logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import ml_collections
from etils import epath

from resattn_jax import buckets
from resattn_jax.config import compare, from_plain
from resattn_jax.data.spec import DataSpec, check_same_classes
from resattn_jax.errors import RunError, UsageError, reason


class Run:
    """The files of one workdir, a folder or gs://BUCKET/FOLDER. Opening it reads nothing; `~` is the home folder."""

    def __init__(self, workdir: epath.PathLike):
        """Raises UsageError for an address that cannot be worked with."""
        self.path = buckets.opened(workdir)
        self.checkpoints = self.path / "checkpoints"
        self._uploads: buckets.Uploads | None = None  # while a bucket is written

    def __str__(self) -> str:
        return str(self.path)

    # ---- Reading.

    @property
    def config(self) -> ml_collections.ConfigDict | None:
        """What was trained, or None where no run has begun. Raises UsageError when the file is damaged."""
        plain = self._read_json("config.json")
        return None if plain is None else from_plain(plain, str(self.path / "config.json"))

    @property
    def spec(self) -> DataSpec | None:
        """What the net knows of its data; None where there is no run, and in runs older than the file.

        Raises UsageError when the file is damaged.
        """
        plain = self._read_json("data.json")
        return None if plain is None else DataSpec.from_plain(plain, self.path / "data.json")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes it was trained on, by label; None where no run has begun."""
        if spec := self.spec:
            return spec.class_names
        names = _read(self.path / "classes.txt")
        return None if names is None else tuple(names.splitlines())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, in order. A line that is no object, such as the last of a killed process, is left out."""
        return self._rows("metrics.jsonl")

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What was kept of each start, in order; [] in runs older than the file."""
        return self._rows("started.jsonl")

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run reached, or None. Raises UsageError when the file is damaged."""
        return self._read_json("result.json")

    @property
    def tracker_id(self) -> str | None:
        """The run's id in Weights & Biases; None where it was never there."""
        text = _read(self.path / "wandb.txt")
        return text.strip() if text else None

    def measured(self, step: int) -> dict[str, Any]:
        """The metrics of the evaluation split that were logged at `step`, {} where none were."""
        rows = [row for row in self.metrics if row.get("step") == step and "eval/top1" in row]
        return {key.removeprefix("eval/"): value for row in rows[-1:] for key, value in row.items() if key != "step"}

    def check_data(self, spec: DataSpec) -> None:
        """Raises UsageError when `spec` is of other data than the run's, as far as the run kept it."""
        if then := self.spec:
            then.check_same(spec, self)
        elif names := self.class_names:
            check_same_classes(names, spec.class_names, self)

    # ---- Writing.

    @contextlib.contextmanager
    def writing(
        self, config: ml_collections.ConfigDict, spec: DataSpec | None, *, first_host: bool
    ) -> Iterator[list[str]]:
        """Begins the run, or goes on with it; of its hosts the first alone writes, and no other process may.

        spec: None where nothing is known of the data yet. Gives sentences about what changed in the config and the data
        and may. Raises UsageError when the workdir holds the run of another config or of other data, is in use, or
        cannot be written.
        """
        notes = self.compare(config)
        if spec:
            self.check_data(spec)
        if spec and (then := self.spec):
            notes += then.changed(spec.lists)
            spec = dataclasses.replace(spec, lists={**spec.lists, **then.lists})
        with contextlib.ExitStack() as stack:
            if first_host:
                try:
                    self.make()
                    stack.enter_context(self._lock())
                    self.write("config.json", json.dumps(config.to_dict(), indent=2) + "\n")
                    if spec:
                        self.write_spec(spec)
                    if buckets.is_url(self.path):
                        self._uploads = stack.enter_context(buckets.Uploads(self.path))
                except buckets.faults() as error:
                    raise UsageError(f"{self} cannot be written: {reason(error)}; choose another --workdir") from error
            yield notes
        self._uploads = None

    def make(self) -> None:
        """Makes the folder; a bucket has none to be made. Raises OSError."""
        if not buckets.is_url(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def compare(self, config: ml_collections.ConfigDict) -> list[str]:
        """Sentences about what differs from the run's config and may. Raises UsageError for what may not."""
        then = self.config
        return [] if then is None else compare(then, config, self)

    def write_spec(self, spec: DataSpec) -> None:
        """Writes data.json, and classes.txt for people. Raises OSError."""
        self.write("classes.txt", "".join(f"{name}\n" for name in spec.class_names))
        self.write("data.json", json.dumps(spec.to_plain()) + "\n")

    def write(self, name: str, content: str) -> None:
        """Writes one text file, whole or not at all. Raises OSError."""
        self.write_bytes(name, content.encode("utf-8", "surrogateescape"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes one file, whole or not at all. Raises what `buckets.faults` lists, on a disk OSError alone."""
        if buckets.is_url(self.path):
            return buckets.write(self.path / name, content)
        temporary = self.path / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(self.path / name)

    def write_result(self, result: dict[str, Any]) -> None:
        """Raises RunError when it cannot be written."""
        try:
            self.write("result.json", json.dumps(result, indent=2) + "\n")
        except buckets.faults() as error:
            raise RunError(f"{self.path / 'result.json'} cannot be written: {reason(error)}") from error

    def start(self, about: dict[str, Any]) -> None:
        """Keeps what a start of the run was: a row of started.jsonl. Raises OSError."""
        rows = [*self.starts, about]
        self.write("started.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    @property
    def logs(self) -> epath.Path:
        """Where metrics.jsonl and TensorBoard's events grow: the workdir, or a folder that is copied to it."""
        return epath.Path(self._uploads.folder) if self._uploads else self.path

    def log(self, row: dict[str, Any], name: str = "metrics.jsonl") -> None:
        """Appends a row with a "step" to a file of rows. In a bucket `logged` has to follow."""
        with (self.logs / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def logged(self) -> None:
        """Begins to copy what was logged to where it belongs, and returns."""
        if self._uploads:
            self._uploads.begin()

    def settle_logs(self) -> None:
        """Returns when what was logged is where it belongs."""
        if self._uploads:
            self._uploads.wait()

    def forget_after(self, step: int) -> None:
        """Takes what was logged after `step` out of the files: the run goes on from there and logs it again."""
        for name in ("metrics.jsonl", "not_finite.jsonl"):
            if _read(self.path / name) is not None:
                kept = "".join(json.dumps(row) + "\n" for row in self._rows(name) if _step(row) <= step)
                self.write(name, kept)
                if self._uploads:
                    (self.logs / name).write_text(kept)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keeps other processes from writing; the system ends the lock with the process, however that ends.

        Raises UsageError naming who has it. A file system without locks has none. In a bucket the lock is an object,
        which processes of other hosts look at, and a file of this host for those of its own.
        """
        bucket = buckets.is_url(self.path)
        path = pathlib.Path(buckets.local_lock(self.path) if bucket else self.path / "lock")
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "another process"
                raise UsageError(f"{self} is in use by {who}; wait until it ends, or end it") from None
            except OSError:  # no locks here
                pass
            file.truncate(0)
            since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            user = f" of user {os.getuid()}" if bucket else ""
            who = f"process {os.getpid()}{user} on {socket.gethostname()} since {since}\n"
            file.write(who)
            file.flush()
            with buckets.claimed(self.path / "lock", who) if bucket else contextlib.nullcontext():
                yield

    def _rows(self, name: str) -> list[dict[str, Any]]:
        rows = map(_parsed, (_read(self.path / name) or "").splitlines())
        return [row for row in rows if row is not None]

    def _read_json(self, name: str) -> dict[str, Any] | None:
        text = _read(self.path / name)
        if text is None:
            return None
        plain = _parsed(text)
        if plain is None:
            raise UsageError(f"{self.path / name} is damaged: it holds no JSON object")
        return plain


def _read(path: epath.Path) -> str | None:
    """What a file holds; None where there is none, and only there: a bucket may be out of reach."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for what can be no name
        return None
    except buckets.faults() as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _step(row: dict[str, Any]) -> float:
    step = row.get("step")
    return step if isinstance(step, int) else math.inf
