"""Batches on the host: the pictures of a source decoded, cut out and put together, by threads or by processes.

Nothing here imports JAX: worker processes import this module. A batch is a function of its number alone, whoever makes
it and when.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from resattn_jax.data.order import batch_rows, mirrored
from resattn_jax.data.pictures import BrokenPicture, Picture
from resattn_jax.data.sources import Source
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import RunError, UsageError, reason

_AHEAD = 2  # batches that are begun before they are asked for, so that no thread waits at the end of one
_TOGETHER = 8  # examples that a thread takes at a time: handing over each by itself costs a twentieth of decoding it
_TRIES = 20  # for an example; then the whole set is taken to be broken

Written = tuple[int, bool, list[tuple[str, str]]]  # an example's label, whether it counts, and what was broken


class Batch(NamedTuple):
    """images uint8 [B, …, H, W, 3], labels int32 [B], mask bool [B]; broken: (name, reason) of each broken picture."""

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    broken: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """An endless sequence of shuffled batches; this host's part of each, at `positions` of the global batch.

    alternating: with alternating flip.
    """

    source: Source
    transform: TrainTransform
    seed: int
    batch_size: int
    positions: np.ndarray
    alternating: bool = False

    def __len__(self) -> int:
        return 1 << 40

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return (self.transform.size, self.transform.size, 3)

    def rows(self, step: int) -> np.ndarray:
        """Rows of the source, int32 [len(positions)]."""
        return batch_rows(self.seed, step, self.batch_size, len(self.source))[self.positions]

    def write(self, step: int, position: int, row: int, out: np.ndarray) -> Written:
        """Writes an example to `out`; returns its label, True and what was broken. Randomness belongs to the position.

        In place of a broken picture stands another, drawn by the position too. Raises UsageError when many are broken.
        """
        place = step * self.batch_size + position
        rng = np.random.default_rng([self.seed, place, 1])
        broken: list[tuple[str, str]] = []
        for _ in range(_TRIES):
            try:
                data, label = self.source[row]
                self.transform(Picture(data, upright=self.transform.upright), rng, out)
                if self.alternating and mirrored(self.seed, np.array(row), np.array(place), len(self.source)):
                    out[...] = out[:, ::-1]
                return label, True, broken
            except (BrokenPicture, OSError) as error:
                broken.append((self.source.name(row), str(error)))
                row = int(rng.integers(len(self.source)))
        name, reason = broken[-1]
        raise UsageError(f"of {_TRIES} pictures none could be read; the last was {name}: {reason}")


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """The first `count` examples of a source in their order; this host's part of each batch, at `positions` of it."""

    source: Source
    transform: EvalTransform
    count: int
    batch_size: int
    positions: np.ndarray

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one example; several views come one after the other."""
        size, views = self.transform.size, self.transform.views
        return (size, size, 3) if views == 1 else (views, size, size, 3)

    def rows(self, step: int) -> np.ndarray:
        """Rows of the source, int32 [len(positions)]; -1 where the last batch is filled up."""
        rows = step * self.batch_size + self.positions
        return np.where(rows < self.count, rows, -1)

    def write(self, step: int, position: int, row: int, out: np.ndarray) -> Written:
        """Writes an example to `out`; returns its label, whether it counts, and what was broken."""
        if row >= 0:
            try:
                data, label = self.source[row]
                picture = Picture(data, upright=self.transform.upright)
                out[...] = self.transform(picture).reshape(out.shape)
                return label, True, []
            except (BrokenPicture, OSError) as error:
                broken = [(self.source.name(row), str(error))]
        else:
            broken = []
        out[...] = 0
        return 0, False, broken


class ThreadedBatches:
    """Iterates over batches from `start` on, made by threads of this process; decoders run outside Python's lock.

    `give_back` takes a batch's images, to be written over; without it every batch is new memory.
    """

    def __init__(self, batches: TrainBatches | EvalBatches, start: int, threads: int):
        self._batches, self._pool = batches, ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._steps = iter(range(start, len(batches)))
        self._ahead = collections.deque(self._begin(s) for s in itertools.islice(self._steps, _AHEAD))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        images, futures = self._ahead.popleft()
        self._ahead.extend(self._begin(s) for s in itertools.islice(self._steps, 1))
        return _collect(images, list(itertools.chain(*(future.result() for future in futures))))

    def give_back(self, images: np.ndarray) -> None:
        """Nobody looks at these images any more."""
        self._free.put(images)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int) -> tuple[np.ndarray, list[Future[list[Written]]]]:
        try:
            images = self._free.get_nowait()
        except queue.Empty:
            images = np.empty((len(self._batches.positions), *self._batches.image_shape), np.uint8)
        rows = self._batches.rows(step).tolist()
        work = list(zip(self._batches.positions.tolist(), rows, images, strict=True))
        parts = [work[i : i + _TOGETHER] for i in range(0, len(work), _TOGETHER)]
        return images, [self._pool.submit(self._write, step, part) for part in parts]

    def _write(self, step: int, part: list[tuple[int, int, np.ndarray]]) -> list[Written]:
        return [self._batches.write(step, *args) for args in part]


class ProcessBatches:
    """Iterates over batches from `start` on, whole batches made by turns in worker processes, through Grain."""

    def __init__(self, batches: TrainBatches | EvalBatches, start: int, workers: int, threads: int):
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # a program without absl's flags; Grain wants to hand them to its workers
            flags.FLAGS.mark_as_parsed()
        dataset = grain.MapDataset.source(_Whole(batches, threads))[start:]
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))
        self._iterator = iter(dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            return self._iterator.__next__()
        except (StopIteration, UsageError):  # what a worker raises comes through Grain as it is
            raise
        except Exception as error:
            said, advice = reason(error), ""
            if "-7" in said:  # SIGBUS, of memory that /dev/shm does not have
                advice = "; /dev/shm is too small for what workers hand over: enlarge it, or set config.data.workers=0"
            raise RunError(f"a data worker failed: {said}{advice}") from error

    def give_back(self, images: np.ndarray) -> None:
        """Shared memory goes back by itself."""

    def close(self) -> None:
        """Ends the processes."""
        self._iterator.close()


class _Whole:
    """What Grain sends to a worker: batches by number, each made by the worker's own threads."""

    def __init__(self, batches: TrainBatches | EvalBatches, threads: int):
        self._batches, self._threads = batches, threads
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        batches = self._batches
        images = np.empty((len(batches.positions), *batches.image_shape), np.uint8)
        work = zip(batches.positions.tolist(), batches.rows(step).tolist(), images, strict=True)
        return _collect(images, list(self._pool.map(lambda args: batches.write(step, *args), work)))


def _end_with_parent(parent: int) -> None:
    """Ends this worker when the process that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def load(batches: TrainBatches | EvalBatches, start: int, workers: int) -> ThreadedBatches | ProcessBatches:
    """Iterates over batches from number `start` on. workers: processes; 0 for threads of this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores // max(workers, 1), 1) + 1  # one more, as some of them wait for the disk or for Python's lock
    if workers == 0:
        return ThreadedBatches(batches, start, threads)
    return ProcessBatches(batches, start, workers, threads)


def _collect(images: np.ndarray, written: list[Written]) -> Batch:
    labels, mask, broken = zip(*written, strict=True)
    return Batch(images, np.array(labels, np.int32), np.array(mask), tuple(itertools.chain(*broken)))
