"""Checkpoints of a run. The only module that knows Orbax.

A checkpoint is a folder named by its step, with these items: `model` (params and batch_stats), `ema` (the same, when
there is one), `optimizer` (step and optimizer state), `progress` (plain JSON) and `checksums` (of all of these, made
from what was to be written). Measuring or fine-tuning reads the first two alone.

The state is the same on every device, so the first host writes it by itself, in a thread of its own, and every host
reads for itself: no host waits for another. What was written is read again before it counts, and only then do older
checkpoints go. A checkpoint that cannot be read is no end: the run goes on from the one before.

On a disk a checkpoint is written under another name and gets its own when it is whole. In a bucket, mounted or not, it
is written where it stays and is one once it holds the commit file; `buckets` knows which is which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import jax
import numpy as np
from etils import epath, epy

from resattn_jax import buckets
from resattn_jax.checksums import Damaged, check_finite, checksums, compare, json_checksum, named
from resattn_jax.errors import RunError, UsageError, reason
from resattn_jax.metrics import by_rank
from resattn_jax.state import Progress, TrainState

with epy.lazy_imports():  # takes an eighth of a second, which a run has while XLA compiles its step
    import orbax.checkpoint as ocp

ARRAYS = ("model", "ema", "optimizer")
_CUT_OFF = re.compile(r"\.orbax-checkpoint-tmp|\.deleted\d*$")  # of a save or a deletion
T = TypeVar("T")


class Reader:
    """The checkpoints in a folder, to be read; nothing is written. Use it as a context manager.

    say: told a sentence when a damaged checkpoint is passed over.
    """

    def __init__(self, folder: epath.PathLike, say: Callable[[str], None] = print):
        """Raises UsageError when there is no such folder."""
        self.folder, self._say = buckets.absolute(epath.Path(folder)), say  # Orbax takes no relative path
        if not self.folder.is_dir():
            raise self._nothing()
        self._open()

    def _open(self) -> None:
        self._by_file = buckets.commits_by_file(self.folder)
        self._checkpointer, self._plain = _checkpointer(self._by_file), _plain_name(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps there is a checkpoint of, in order."""
        try:
            return sorted(int(path.name) for path in buckets.listed(self.folder) if self._is_whole(path))
        except buckets.faults() as error:
            raise UsageError(f"{self.folder} cannot be read: {reason(error)}") from error

    def find(self, which: str, *, or_newest: bool = False) -> list[int]:
        """The steps that "newest", "best" or a number asks for: the first is meant, the others stand in for it.

        or_newest: the newest is the best where none was evaluated. Raises UsageError when there is none, listing what
        is.
        """
        steps = self.steps()
        if not steps:
            raise self._nothing()
        if which == "newest":
            return steps[::-1]
        if which == "best":
            ranked = by_rank({step: self._metrics(step) for step in steps})
            if not ranked and not or_newest:
                raise UsageError(f"no checkpoint in {self.folder} was evaluated, so none is the best")
            return ranked or steps[::-1]
        if not _is_number(which) or int(which) not in steps:
            there = ", ".join(map(str, steps))
            raise UsageError(f"there is no checkpoint {which!r} in {self.folder}; there are newest, best, {there}")
        return [int(which)]

    def first_readable(self, steps: list[int], read: Callable[[int], T]) -> tuple[int, T]:
        """(step, what `read(step)` gives) of the first that is not damaged; those that are are told of.

        Raises UsageError when all are.
        """
        told = []
        for step in steps:
            try:
                return step, read(step)
            except Damaged as error:
                told.append(f"the checkpoint {self.folder / str(step)} cannot be used: {error}")
                if (self.folder / str(step)).exists():  # else a run beside has just deleted it
                    self.set_aside(step, told[-1])
        raise UsageError(told[-1] + ("" if len(steps) == 1 else "; none of the others can either"))

    def set_aside(self, step: int, why: str) -> None:
        """Tells of a damaged checkpoint."""
        self._say(why)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        """The state of `step` and the progress saved with it.

        like: shapes, dtypes and shardings to restore into, so that it may be other devices than those that wrote it.
        Raises UsageError naming the first weights that differ when the checkpoint is of another model, and Damaged.
        """
        wanted = {"model": like.variables, "optimizer": {"step": like.step, "opt_state": like.opt_state}}
        if like.ema is not None:
            wanted["ema"] = like.ema
        got = self._read(step, wanted, progress=True)
        model, optimizer = got["model"], got["optimizer"]
        state = dataclasses.replace(
            like,
            step=optimizer["step"],
            params=model["params"],
            batch_stats=model["batch_stats"],
            opt_state=optimizer["opt_state"],
            ema=got["ema"] if like.ema is not None else None,
        )
        return jax.tree.map(_onto_devices, state, like), got["progress"]

    def read_eval_variables(self, step: int, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The variables that are measured: the moving average if the checkpoint has one, else the model's own.

        like: shapes, dtypes and shardings to restore into; None: as they are, NumPy arrays. Raises UsageError naming
        the first weights that differ when the checkpoint is of another model, RunError naming weights that are not
        finite, and Damaged.
        """
        item = "ema" if (self.folder / str(step) / "ema").exists() else "model"
        got = self._read(step, {item: like})[item]
        check_finite(got, f"the checkpoint {self.folder / str(step)}")
        return got if like is None else jax.tree.map(_onto_devices, got, dict(like))

    def eval_variables(self, which: str, *, or_newest: bool = False) -> tuple[int, dict[str, Any]]:
        """The step that `find` gives and what is measured of it, NumPy arrays; another stands in for a damaged one."""
        return self.first_readable(self.find(which, or_newest=or_newest), self.read_eval_variables)

    def _is_whole(self, path: epath.Path) -> bool:
        """Whether a path is a checkpoint, written to its end: its name says so, and in a bucket its commit file."""
        if not _is_number(path.name):
            return False
        return buckets.committed(path) if self._by_file else path.is_dir()

    def _metrics(self, step: int) -> Mapping[str, Any] | None:
        """The metrics a step was saved with; None where there are none, or they are not what was written."""
        if not (self.folder / str(step) / "metrics").exists():
            return None
        try:
            metrics, sums = self._read_json(step, "metrics"), self._checksums(step)
        except Exception:  # told of when the step is read
            return None
        if metrics and sums is not None and sums.get("metrics") != json_checksum(metrics):
            self._say(f"the metrics in {self.folder / str(step)} are damaged, so that it cannot be the best")
            return None
        return metrics

    def _checksums(self, step: int) -> dict[str, Any] | None:
        """What `checksums` gave when the step was written; None in a checkpoint older than these."""
        if not (self.folder / str(step) / "checksums").exists():
            return None
        sums = self._read_json(step, "checksums")
        if not isinstance(sums, dict):
            raise Damaged("its checksums are damaged")
        return sums

    def _read_json(self, step: int, item: str) -> Any:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return self._checkpointer.restore(self._plain / str(step), args=args)[item]

    def _read(self, step: int, wanted: Mapping[str, Any], *, progress: bool = False) -> dict[str, Any]:
        """The items as NumPy trees like those wanted, or as they are for None. Raises Damaged and UsageError."""
        try:
            saved = self._checkpointer.metadata(self._plain / str(step)).item_metadata
            sums = self._checksums(step)
            for item, like in wanted.items():
                self._check_item(step, item, saved.get(item), sums)
                if like is not None:
                    self._check_shapes(step, saved[item], like)
            like_saved = {item: dict(saved[item]) if like is None else like for item, like in wanted.items()}
            args = {n: ocp.args.StandardRestore(jax.tree.map(_template, tree)) for n, tree in like_saved.items()}
            if progress:
                args["progress"] = ocp.args.JsonRestore()
            got = dict(self._checkpointer.restore(self._plain / str(step), args=ocp.args.Composite(**args)))
            if sums is not None:
                compare({name: sums.get(name) for name in got}, _sums(got))
            return {**got, "progress": Progress.from_plain(got["progress"])} if progress else got
        except (UsageError, Damaged):
            raise
        except Exception as error:  # Orbax, TensorStore and JSON raise nearly everything on a broken file
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # where Orbax leaves the errors of other files
            raise Damaged(_short(error)) from error

    def _check_item(self, step: int, item: str, saved: Any, sums: Mapping[str, Any] | None) -> None:
        there = [path.name for path in (self.folder / str(step)).iterdir()]
        if not {"model", "ema", "optimizer", "progress"} & set(there):
            raise Damaged("it holds nothing")
        if sums and "ema" in sums and "ema" not in there:
            raise Damaged("its item 'ema' is missing")
        if saved is None and "progress" in there:  # a run's has them all
            raise Damaged(f"its item {item!r} is missing")
        if saved is None:
            raise UsageError(
                f"the checkpoint {self.folder / str(step)} has no item {item!r}, so no run can go on from it;"
                " start a new one from its weights: --config.init_from and another --workdir"
            )

    def _check_shapes(self, step: int, saved: Any, tree: Any) -> None:
        there, here = _shapes(saved), _shapes(tree)
        differing = [k for k in there.keys() | here.keys() if there.get(k) != here.get(k)]
        if differing:
            first = min(differing, key=lambda k: (not k.startswith("params/"), k))
            raise UsageError(
                f"the checkpoint {self.folder / str(step)} does not fit the model: {len(differing)} weights differ,"
                f" first {first}: {there.get(first, 'absent')} in the checkpoint, {here.get(first, 'absent')} in"
                " the model; is it another config's?"
            )

    def _nothing(self) -> UsageError:
        return UsageError(f"there is no checkpoint in {self.folder}; train first, or choose another --workdir")


def newest_step(folder: epath.PathLike) -> int:
    """The step of the newest checkpoint in a folder, 0 where there is none. Raises UsageError if it cannot be read."""
    if not epath.Path(folder).is_dir():
        return 0
    with Reader(folder) as checkpoints:
        return max(checkpoints.steps(), default=0)


class Writer(Reader):
    """The checkpoints in a folder, which is made. Use it as a context manager.

    Kept are the newest `keep_newest` and the best `keep_best` by top-1, of those that were saved with metrics. Only the
    first host writes; on the others saving does nothing.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep_newest: int = 2,
        keep_best: int = 1,
        say: Callable[[str], None] = print,
        before: Callable[[], None] = lambda: None,
    ):
        """Raises UsageError when the folder cannot be made. before: called ahead of each save, in its thread."""
        self.folder, self._say, self._before = buckets.absolute(epath.Path(folder)), say, before
        self._keep = keep_newest, keep_best
        self._active = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self.saved: int | None = None  # the newest step that was written and read again
        self.failure = ""  # why the last save failed
        try:
            if not buckets.is_url(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._open()
            if self._active:
                self._remove_leftovers(say)
        except buckets.faults() as error:
            raise UsageError(f"{self.folder} cannot be used: {reason(error)}; choose another --workdir") from error

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._checkpointer.close()

    def set_aside(self, step: int, why: str) -> None:
        """Tells of a damaged checkpoint and gives it another name, N.damaged."""
        if self._active:
            self._say(f"{why}; it is now called {self._rename(step, 'damaged').name}")

    def save(self, state: TrainState, progress: Progress, metrics: Mapping[str, float] | None = None) -> None:
        """Copies the state to the host, begins to write it, and returns; waits for the save before.

        A step that is already there is left as it is. metrics: {"top1": …, …} if the step was evaluated. A save that
        fails is told of, and leaves `saved` as it is.
        """
        step = int(state.step)
        items = {"model": state.variables, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
        if state.ema is not None:
            items["ema"] = state.ema
        self._begin(step, items, progress, metrics)

    def save_model(self, step: int, variables: Mapping[str, Any]) -> None:
        """Writes variables alone, as a checkpoint to measure or to start another run from. Raises RunError."""
        self._begin(step, {"model": variables}, None, None)
        self.wait()
        if self._active and self.saved != step:
            raise RunError(self.failure)

    def wait(self) -> None:
        """Returns when the last save has ended, well or not."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _begin(
        self, step: int, items: Mapping[str, Any], progress: Progress | None, metrics: Mapping[str, float] | None
    ) -> None:
        self.wait()
        if not self._active or step == self.saved:
            return
        copies = {item: jax.tree.map(np.array, jax.device_get(tree)) for item, tree in items.items()}
        plain = {} if progress is None else {"progress": progress.to_plain()}
        arguments = step, copies, plain, None if metrics is None else dict(metrics)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(
        self, step: int, arrays: dict[str, Any], plain: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Runs in the thread: write, read again, then let older checkpoints go."""
        try:
            self._before()
            if step not in self.steps():
                sums = _sums({**arrays, **plain, "metrics": metrics})
                args = {item: ocp.args.StandardSave(tree) for item, tree in arrays.items()}
                plain = {**plain, "checksums": sums} | ({"metrics": metrics} if metrics else {})
                args |= {item: ocp.args.JsonSave(content) for item, content in plain.items()}
                self._checkpointer.save(self._plain / str(step), args=ocp.args.Composite(**args))
            self._read(step, dict.fromkeys(arrays), progress="progress" in plain)
        except Exception as error:
            self.failure = f"the checkpoint of step {step} could not be written: {_short(error)}"
            self._say(f"{self.failure}; training goes on, and the next one is tried")
            with contextlib.suppress(*buckets.faults()):
                self._remove_leftovers(lambda _: None)
                if (self.folder / str(step)).exists():
                    self._rename(step, "damaged")
        else:
            self.saved = step
            with contextlib.suppress(*buckets.faults()):  # what cannot go now is tried again after the next save
                self._prune()

    def _remove_leftovers(self, say: Callable[[str], None]) -> None:
        """Removes what a save or a deletion left that was cut off."""
        for path in buckets.listed(self.folder):
            cut_off = self._by_file and _is_number(path.name) and not self._is_whole(path)
            if cut_off or _CUT_OFF.search(path.name):
                say(f"{path.name}: what a process left that was ended is removed")
                path.rmtree(missing_ok=True)

    def _prune(self) -> None:
        """Deletes what is neither among the newest nor among the best."""
        infos = {step: self._metrics(step) for step in self.steps()}
        newest, best = self._keep
        kept = {*sorted(infos)[-newest:], *by_rank(infos)[:best]}
        for step in infos.keys() - kept:
            if self._by_file:
                buckets.delete(self.folder / str(step))
            else:
                self._rename(step, "deleted").rmtree()

    def _rename(self, step: int, why: str) -> epath.Path:
        """Gives a step's folder a name that is no step's. Returns the new path."""
        for number in range(1000):
            path = self.folder / f"{step}.{why}{number or ''}"
            if not path.exists():
                if not self._by_file:
                    return (self.folder / str(step)).rename(path)
                buckets.move(self.folder / str(step), path)
                return path
        raise OSError(f"{path} and those before are there already")


# ---- Orbax.


def _checkpointer(by_file: bool) -> ocp.Checkpointer:
    """Orbax's, for this host alone: no host waits for another. by_file: a checkpoint counts by its commit file."""
    me, options = jax.process_index(), ocp.options
    alone = options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}")
    handlers: dict[str, Any] = {
        **{item: ocp.StandardCheckpointHandler(multiprocessing_options=alone) for item in ARRAYS},
        "metrics": ocp.JsonCheckpointHandler("metrics", multiprocessing_options=alone),
        **{item: ocp.JsonCheckpointHandler(multiprocessing_options=alone) for item in ("progress", "checksums")},
    }
    mode = options.AtomicityMode.COMMIT_FILE if by_file else options.AtomicityMode.ATOMIC_RENAME
    atomicity = options.AtomicityOptions(mode=mode, allow_legacy_atomic_rename=True)  # `_is_whole` tells what is whole
    together = ocp.CompositeOptions(multiprocessing_options=alone, atomicity_options=atomicity)
    composite = ocp.CompositeCheckpointHandler(composite_options=together, **handlers)
    return ocp.Checkpointer(composite, multiprocessing_options=alone, atomicity_options=atomicity)


def _plain_name(folder: epath.Path) -> epath.Path:
    """A path to the folder of plain characters: Orbax takes its path for a pattern, and TensorStore for UTF-8.

    Raises UsageError where there is no plain folder for the link.
    """
    if buckets.is_url(folder) or re.fullmatch(r"[\w./ +,=@~^-]+", str(folder), re.ASCII):
        return folder
    name = hashlib.blake2b(os.fsencode(folder), digest_size=12).hexdigest()
    for place in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]):
        links = epath.Path(place) / f"resattn_jax-{os.getuid()}"
        try:
            if not re.fullmatch(r"[\w./-]+", str(links), re.ASCII):
                continue
            links.mkdir(mode=0o700, exist_ok=True)
            link = pathlib.Path(links / name)
            if not link.is_symlink() or os.readlink(link) != os.fspath(folder):
                link.unlink(missing_ok=True)
                link.symlink_to(folder)
            return epath.Path(link)
        except OSError:
            continue
    raise UsageError(f"checkpoints cannot be kept in {folder} because of its name; choose another --workdir")


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _template(leaf: Any) -> np.ndarray:
    """What Orbax restores an array like: NumPy's, without the memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _onto_devices(value: np.ndarray, like: Any) -> jax.Array:
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _sums(items: Mapping[str, Any]) -> dict[str, Any]:
    """What the item `checksums` holds: {item: {name: checksum}}, or a checksum for an item that is plain JSON."""
    return {item: checksums(tree) if item in ARRAYS else json_checksum(tree) for item, tree in items.items()}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named(tree).items()}


def _short(error: BaseException) -> str:
    text = reason(error)
    return text if len(text) <= 200 else f"{text[:200]}…"
