"""The streaming pipeline: pictures are read, decoded and cut out on the host, ahead of the step, for any size of set.

The batch of step k is a function of (seed, k), so that going on at a step reads nothing of those before it. Every host
reads only the part of the batch that lies on its own devices.
"""

from __future__ import annotations

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
from resattn_jax.data.transforms import EvalTransform, TrainTransform
from resattn_jax.errors import UsageError

log = logging.getLogger("resattn_jax")


class Streaming:
    """One split, read as it is needed. The contract is `Resident`'s; a batch is {"image": uint8, "label": int32}.

    skipped counts the broken pictures met so far on this host, each once. Images have image_shape (H, W, 3); an
    evaluation of several views has them [B, views, H, W, 3].
    """

    max_steps_per_dispatch = 1  # a dispatch of more would have to wait for as many batches

    def __init__(
        self, source: Source, mesh: Mesh, transform: TrainTransform | EvalTransform, workers: int, skip_broken: bool
    ):
        self.examples = len(source)
        self.class_names = source.class_names
        self.image_shape = (transform.size, transform.size, 3)
        self.arrays = {}
        self._source, self._mesh, self._transform, self._workers = source, mesh, transform, workers
        self._skip_broken, self._broken = skip_broken, set()
        self._stream: tuple[tuple[int, int], int, _Prefetched] | None = None  # (seed, batch size), next step, batches

    @staticmethod
    def take(arrays: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Images uint8 [B, H, W, 3] and labels int32 [B]."""
        return batch["image"], batch["label"]

    @property
    def skipped(self) -> int:
        """Number of different broken pictures met so far."""
        return len(self._broken)

    def train_batches(self, seed: int, step: int, count: int, batch_size: int, room: int):
        """The batch of `step`, leaves [1, B, …], sharded over the batch. room is 1; without count only shapes.

        Asked for one step after the other it gives what was prepared ahead; asked for another it starts there.
        Raises UsageError naming a broken picture, unless those are skipped, and RunError when a worker has died.
        """
        assert room == 1, room
        sharding = NamedSharding(self._mesh, P(None, "data"))
        if not count:
            images = jax.ShapeDtypeStruct((1, batch_size, *self.image_shape), np.uint8, sharding=sharding)
            return {"image": images, "label": jax.ShapeDtypeStruct((1, batch_size), np.int32, sharding=sharding)}
        kind, expected, prefetched = self._stream or (None, None, None)
        if (kind, expected) != ((seed, batch_size), step):
            self.close()
            batches = TrainBatches(self._source, self._transform, seed, batch_size, self._places(batch_size))
            prefetched = self._prefetched(batches, step, lambda b: {
                "image": self._put(b.images, sharding, batch_size, 1),
                "label": self._put(b.labels, sharding, batch_size, 1),
            })  # fmt: skip
        self._stream = (seed, batch_size), step + 1, prefetched
        batch, broken = next(prefetched)
        self._report(broken)
        return batch

    def eval_batches(self, batch_size: int, max_examples: int | None) -> Iterator[tuple[dict, jax.Array]]:
        """Yields (batch, mask bool [B]): every example once, the last batch filled up; a skipped one has no mask."""
        count = self.examples if max_examples is None else min(max_examples, self.examples)
        batches = EvalBatches(self._source, self._transform, count, batch_size, self._places(batch_size))
        sharding = NamedSharding(self._mesh, P("data"))
        prefetched = self._prefetched(batches, 0, lambda b: [self._put(x, sharding, batch_size, 0) for x in b[:3]])
        try:
            for (images, labels, mask), broken in prefetched:
                self._report(broken)
                yield {"image": images, "label": labels}, mask
        finally:
            prefetched.close()

    def close(self) -> None:
        """Ends the threads or processes that read ahead for training."""
        if self._stream:
            self._stream[2].close()
            self._stream = None

    def _prefetched(self, batches: TrainBatches | EvalBatches, start: int, put: Callable[[Batch], Any]) -> _Prefetched:
        copied = self._mesh.devices.flat[0].platform != "cpu"  # there an array may be the very memory that was put
        return _Prefetched(load(batches, start, self._workers), put, copied)

    def _places(self, batch_size: int) -> np.ndarray:
        """The places of the global batch that lie on this host's devices, ascending."""
        sharding = NamedSharding(self._mesh, P("data"))
        slices = sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))

    def _put(self, part: np.ndarray, sharding: NamedSharding, batch_size: int, leading: int) -> jax.Array:
        """This host's part of a batch on its devices, as a global array with `leading` axes of one before it."""
        places = self._places(batch_size)
        shape = (1,) * leading + (batch_size, *part.shape[1:])
        shards = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            mine = np.searchsorted(places, np.arange(batch_size)[index[leading]])
            shard = part[mine[0] : mine[-1] + 1].reshape((1,) * leading + (-1, *part.shape[1:]))
            shards.append(jax.device_put(shard, device))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _report(self, broken: tuple[tuple[str, str], ...]) -> None:
        for name, reason in broken:
            if not self._skip_broken:
                self.close()
                raise UsageError(
                    f"{name} cannot be read: {reason}; replace or remove it, or set config.data.broken=skip"
                )
            if name not in self._broken:
                self._broken.add(name)
                log.warning("skipped %s: %s (broken pictures so far: %d)", name, reason, len(self._broken))


class _Prefetched:
    """Host batches put on the devices by a thread of their own, one or two ahead of the one that is asked for.

    Iterating gives (what `put` made of a batch, its broken pictures). The transfer of one batch overlaps the step that
    works on the one before and the decoding of the next. copied: what was put may be written over.
    """

    def __init__(self, batches: ThreadedBatches | ProcessBatches, put: Callable[[Batch], Any], copied: bool):
        self._batches, self._put, self._copied = batches, put, copied
        self._ready, self._closed = queue.Queue(maxsize=1), threading.Event()
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
            error = StopIteration()
        except BaseException as caught:
            error = caught
        self._ready.put((None, error))
