"""A run: a workdir that can be opened, for writing by one process or for reading by any.

It owns every file in the workdir:

    config.json       what is trained, as it was given
    data.json         what the net has to know of its data (`DataSpec`)
    classes.txt       the classes, a name a line
    metrics.jsonl     an object for each time that something was logged
    not_finite.jsonl  an object for each step whose loss or gradient was not finite, with the rows of its batch
    result.json       the last step's metrics and the best
    parameters.txt    every parameter of the net
    checkpoints/      what `checkpoint` writes
    lock              who is writing

A file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator
from typing import Any

import ml_collections
from etils import epath

from resattn_jax.config import compare, from_plain
from resattn_jax.data.spec import DataSpec, check_same_classes
from resattn_jax.errors import RunError, UsageError, reason


class Run:
    """The files of one workdir. Opening it reads nothing; `~` is the home folder."""

    def __init__(self, workdir: epath.PathLike):
        self.path = epath.Path(workdir).expanduser()
        self.checkpoints = self.path / "checkpoints"

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
        path = self.path / "classes.txt"
        return tuple(_read(path).splitlines()) if path.exists() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, in order. A line that is no object, such as the last of a killed process, is left out."""
        return self._rows("metrics.jsonl")

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run reached, or None. Raises UsageError when the file is damaged."""
        return self._read_json("result.json")

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
                    self.path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(self._lock())
                    self.write("config.json", json.dumps(config.to_dict(), indent=2) + "\n")
                    if spec:
                        self.write_spec(spec)
                except OSError as error:
                    raise UsageError(f"{self} cannot be written: {reason(error)}; choose another --workdir") from error
            yield notes

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
        """Writes one file, whole or not at all. Raises OSError."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(self.path / name)

    def write_result(self, result: dict[str, Any]) -> None:
        """Raises RunError when it cannot be written."""
        try:
            self.write("result.json", json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"{self.path / 'result.json'} cannot be written: {reason(error)}") from error

    def log(self, row: dict[str, Any], name: str = "metrics.jsonl") -> None:
        """Appends a row with a "step" to a file of rows."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Takes what was logged after `step` out of the files: the run goes on from there and logs it again."""
        for name in ("metrics.jsonl", "not_finite.jsonl"):
            if (self.path / name).exists():
                kept = [row for row in self._rows(name) if _step(row) <= step]
                self.write(name, "".join(json.dumps(row) + "\n" for row in kept))

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keeps other processes from writing; the system ends the lock with the process, however that ends.

        Raises UsageError naming who has it. A file system without locks, such as a bucket, has none.
        """
        if "://" in str(self.path):
            yield
            return
        with open(self.path / "lock", "a+", encoding="utf-8") as file:
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
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
            yield

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        rows = map(_parsed, _read(path).splitlines()) if path.exists() else ()
        return [row for row in rows if row is not None]

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        plain = _parsed(_read(path))
        if plain is None:
            raise UsageError(f"{path} is damaged: it holds no JSON object")
        return plain


def _read(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
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
