"""The device-resident pipeline: the whole set lies on the devices as uint8, and a batch is a list of rows.

The host only says which rows come next, a few kilobytes a dispatch; taking them, augmenting and training happen in one
compiled program. The batch of step k is a function of (seed, k) alone, so resuming needs no saved position.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax.data.order import batch_rows
from resattn_jax.data.sources import Examples


class Resident:
    """One split on every device of a mesh.

    arrays: {"image": uint8 [N, H, W, C], "label": int32 [N]}, replicated; `take` picks a batch out of them, inside
    the compiled step. skipped is the number of broken pictures met so far, which a set in memory has none of.
    """

    max_steps_per_dispatch = None  # any number
    skipped = 0

    def __init__(self, examples: Examples, mesh: Mesh):
        self.examples = len(examples.labels)
        self.image_shape = examples.images.shape[1:]
        self.class_names = examples.class_names
        self._mesh = mesh
        self.arrays = {
            "image": put(examples.images, mesh, P()),
            "label": put(examples.labels, mesh, P()),
        }

    @staticmethod
    def take(arrays: dict[str, jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images uint8 [B, H, W, C] and labels int32 [B] of rows int32 [B]."""
        return arrays["image"][rows], arrays["label"][rows]

    def train_batches(self, seed: int, step: int, count: int, batch_size: int, room: int):
        """Batches of steps step … step + count - 1, for `take`: rows int32 [room, batch_size], sharded over the batch.

        What is beyond `count` only fills the room, so that one compiled program serves any count.
        """
        rows = np.zeros((room, batch_size), np.int32)
        for i in range(count):
            rows[i] = batch_rows(seed, step + i, batch_size, self.examples)
        return put(rows, self._mesh, P(None, "data"))

    def eval_batches(self, batch_size: int, max_examples: int | None):
        """Yields (rows int32 [batch_size], mask bool [batch_size]): every example once, the last batch filled up."""
        count = self.examples if max_examples is None else min(max_examples, self.examples)
        for start in range(0, count, batch_size):
            rows = np.arange(start, start + batch_size, dtype=np.int32)
            mask = rows < count
            yield put(np.where(mask, rows, 0), self._mesh, P("data")), put(mask, self._mesh, P("data"))


def put(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Lays a host array, the same on every host, onto the mesh; each host writes only its own devices' part."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
