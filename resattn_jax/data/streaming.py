"""The streaming pipeline: pictures are read, decoded and cut out on the host, ahead of the step, for any size of set.

The batch of step k is a function of (seed, k), so that going on at a step reads nothing of those before it. Every host
reads only the part of the batch that lies on its own devices.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax.data.batches import Batch, EvalBatches, ProcessBatches, ThreadedBatches, TrainBatches, load
from resattn_jax.data.sources import Source
from resattn_jax.data.spec import DataSpec
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import UsageError

log = logging.getLogger("resattn_jax")


def take(arrays: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [B, H, W, 3] and labels int32 [B], inside the compiled step."""
    return batch["image"], batch["label"]


def train_shapes(
    spec: DataSpec, batch_size: int, steps_per_dispatch: int, mesh: Mesh
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """Shapes, dtypes and shardings of `arrays`, which is empty, and of what `batches` gives, without any data."""
    sharding, shape = NamedSharding(mesh, P(None, "data")), (steps_per_dispatch, batch_size)
    return {}, {
        "image": jax.ShapeDtypeStruct((*shape, *spec.image_shape), np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding),
    }


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pictures get from a source to the devices of a mesh.

    workers: processes that decode, 0 for threads of this one. skip_broken: leave broken pictures out, else the first
    is an error. shares_host_memory: as of a `Platform`.
    """

    workers: int
    skip_broken: bool
    shares_host_memory: bool
    mesh: Mesh


class _Stream:
    """What a stream for training and one for evaluation have in common."""

    def __init__(self, reading: Reading, batch_size: int, leading: int):
        self.take = take
        self.arrays: dict[str, jax.Array] = {}
        self._shards = _Shards(reading.mesh, batch_size, leading)
        self._reading, self._broken = reading, _Broken(reading.skip_broken)

    @property
    def skipped(self) -> int:
        """The number of different broken pictures met so far on this host."""
        return len(self._broken.names)

    def _prefetch(self, batches: TrainBatches | EvalBatches, start: int, put: Callable[[Batch], Any]) -> _Prefetched:
        loaded = load(batches, start, self._reading.workers)
        return _Prefetched(loaded, put, copied=not self._reading.shares_host_memory)


class StreamingTrain(_Stream):
    """The training stream of a set whose pictures are decoded and cut out ahead of the step; one step a dispatch.

    alternating: with alternating flip.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform,
        reading: Reading,
        *,
        seed: int,
        batch_size: int,
        alternating: bool = False,
    ):
        super().__init__(reading, batch_size, leading=1)
        self.examples = len(source)
        self._batches = TrainBatches(source, transform, seed, batch_size, self._shards.positions, alternating)
        self._next = 0
        self._prefetched: _Prefetched | None = None

    def batches(self, step: int, count: int) -> dict[str, jax.Array]:
        """The batch of `step`, leaves [1, B, …], B sharded; count is 1.

        Asked for one step after the other it gives what was prepared ahead; asked for another it starts there.
        Raises UsageError naming a broken picture, unless those are skipped, and RunError when a worker has died.
        """
        if self._prefetched is None or step != self._next:
            self.close()
            self._prefetched = self._prefetch(self._batches, step, self._put)
        self._next = step + count
        batch, broken = next(self._prefetched)
        try:
            self._broken.tell(broken)
        except UsageError:
            self.close()
            raise
        return batch

    def close(self) -> None:
        """Ends the threads or processes that read ahead."""
        if self._prefetched:
            self._prefetched.close()
            self._prefetched = None

    def _put(self, batch: Batch) -> dict[str, jax.Array]:
        return {"image": self._shards.put(batch.images), "label": self._shards.put(batch.labels)}


class StreamingEval(_Stream):
    """The evaluation stream of a set whose pictures are decoded and cut out ahead of the step."""

    def __init__(
        self,
        source: Source,
        transform: EvalTransform,
        reading: Reading,
        *,
        batch_size: int,
        max_examples: int | None,
    ):
        super().__init__(reading, batch_size, leading=0)
        count = len(source) if max_examples is None else min(max_examples, len(source))
        self._batches = EvalBatches(source, transform, count, batch_size, self._shards.positions)

    def __iter__(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """(batch, mask bool [B]) of each batch: every example once; what fills the last one up and a broken picture
        have no mask. Images of several views are [B, views, H, W, 3].
        """
        prefetched = self._prefetch(self._batches, 0, self._put)
        try:
            for (images, labels, mask), broken in prefetched:
                self._broken.tell(broken)
                yield {"image": images, "label": labels}, mask
        finally:
            prefetched.close()

    def rows(self, step: int) -> np.ndarray:
        """The rows of the split that this host's part of batch `step` has; where it is filled up they are -1."""
        return self._batches.rows(step)

    def _put(self, batch: Batch) -> list[jax.Array]:
        return [self._shards.put(array) for array in (batch.images, batch.labels, batch.mask)]


class _Shards:
    """Lays this host's part of a global batch on its devices. leading: axes of one before the batch's."""

    def __init__(self, mesh: Mesh, batch_size: int, leading: int):
        self._batch_size, self._leading = batch_size, leading
        self._sharding = NamedSharding(mesh, P(*[None] * leading, "data"))
        slices = NamedSharding(mesh, P("data")).addressable_devices_indices_map((batch_size,)).values()
        # The positions in the global batch that lie on this host's devices, ascending.
        self.positions = np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))

    def put(self, part: np.ndarray) -> jax.Array:
        """part: [len(positions), …] -> the global array."""
        ones = (1,) * self._leading
        shape = (*ones, self._batch_size, *part.shape[1:])
        shards = []
        for device, index in self._sharding.addressable_devices_indices_map(shape).items():
            assert index is not None  # the device has a part of the batch
            mine = np.searchsorted(self.positions, np.arange(self._batch_size)[index[self._leading]])
            shard = part[mine[0] : mine[-1] + 1].reshape((*ones, -1, *part.shape[1:]))
            shards.append(jax.device_put(shard, device))
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)


class _Broken:
    """The broken pictures met so far, each told of once. Raises UsageError for the first unless they are skipped."""

    def __init__(self, skip: bool):
        self._skip = skip
        self.names: set[str] = set()

    def tell(self, broken: tuple[tuple[str, str], ...]) -> None:
        for name, reason in broken:
            if not self._skip:
                raise UsageError(
                    f"{name} cannot be read: {reason}; replace or remove it, or set config.data.broken=skip"
                )
            if name not in self.names:
                self.names.add(name)
                log.warning("skipped %s: %s (broken pictures so far: %d)", name, reason, len(self.names))


class _Prefetched:
    """Host batches put on the devices by a thread of their own, one or two ahead of the one that is asked for.

    Iterating gives (what `put` made of a batch, its broken pictures). The transfer of one batch overlaps the step that
    works on the one before and the decoding of the next. copied: what was put may be written over.
    """

    def __init__(self, batches: ThreadedBatches | ProcessBatches, put: Callable[[Batch], Any], copied: bool):
        self._batches, self._put, self._copied = batches, put, copied
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()

    def __iter__(self) -> _Prefetched:
        return self

    def __next__(self) -> tuple[Any, tuple[tuple[str, str], ...]]:
        result, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # whoever asks again is told again
            raise error
        return result

    def close(self) -> None:
        """Ends the thread and what it reads from."""
        self._closed.set()
        while self._thread.is_alive():  # it may be waiting for room
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._batches.close()

    def _run(self) -> None:
        try:
            for batch in self._batches:
                result = jax.block_until_ready(self._put(batch)), batch.broken
                if self._copied:
                    self._batches.give_back(batch.images)
                self._ready.put((result, None))
                if self._closed.is_set():
                    return
            error: BaseException = StopIteration()
        except BaseException as caught:
            error = caught
        self._ready.put((None, error))
