"""The device-resident pipeline: the whole set lies on the devices as uint8, and a batch is a list of rows.

The host only says which rows come next, a few kilobytes a dispatch; taking them, augmenting and training happen in one
compiled program. The batch of step k is a function of (seed, k) alone, so resuming needs no saved position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax.data.order import batch_rows, mirrored
from resattn_jax.data.sources import Examples
from resattn_jax.data.spec import DataSpec

Arrays = dict[str, jax.Array]  # {"image": uint8 [N, H, W, C], "label": int32 [N]}, whole on every device


def take(arrays: Arrays, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [B, H, W, C] and labels int32 [B] of rows int32 [B], inside the compiled step."""
    return arrays["image"][rows], arrays["label"][rows]


def take_mirrored(arrays: Arrays, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same for a stream with alternating flip, where ~row, a negative number, is a row seen in the mirror."""
    mirror = rows < 0
    images, labels = take(arrays, jnp.where(mirror, ~rows, rows))
    return jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images), labels


def train_take(alternating: bool) -> Callable[[Arrays, jax.Array], tuple[jax.Array, jax.Array]]:
    """The `take` of a training stream. alternating: with alternating flip."""
    return take_mirrored if alternating else take


def train_shapes(
    spec: DataSpec, batch_size: int, steps_per_dispatch: int, mesh: Mesh
) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of `arrays` and of what `batches` gives, without any data."""
    whole, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    arrays = {
        "image": jax.ShapeDtypeStruct((spec.examples, *spec.image_shape), np.uint8, sharding=whole),
        "label": jax.ShapeDtypeStruct((spec.examples,), np.int32, sharding=whole),
    }
    return arrays, jax.ShapeDtypeStruct((steps_per_dispatch, batch_size), np.int32, sharding=spread)


class ResidentTrain:
    """The training stream of a set that lies on every device of a mesh. alternating: with alternating flip."""

    def __init__(
        self,
        examples: Examples,
        *,
        seed: int,
        batch_size: int,
        steps_per_dispatch: int,
        mesh: Mesh,
        alternating: bool = False,
    ):
        self.examples, self.skipped = len(examples.labels), len(examples.broken)
        self.take = train_take(alternating)
        self.arrays, self._alternating = _put_examples(examples, mesh), alternating
        self._seed, self._mesh, self._shape = seed, mesh, (steps_per_dispatch, batch_size)

    def batches(self, step: int, count: int) -> jax.Array:
        """Rows of the batches of `count` steps from `step` on as `take` has them, int32 [steps_per_dispatch, B].

        B is sharded. What is beyond `count` only fills the array, so that one compiled program serves any count.
        """
        rows = np.zeros(self._shape, np.int32)
        for i in range(count):
            rows[i] = batch_rows(self._seed, step + i, self._shape[1], self.examples)
            if self._alternating:
                positions = np.arange((step + i) * self._shape[1], (step + i + 1) * self._shape[1])
                rows[i] ^= -mirrored(self._seed, rows[i], positions, self.examples).astype(np.int32)  # x ^ -1 is ~x
        return put(rows, self._mesh, P(None, "data"))

    def close(self) -> None:
        """Nothing reads ahead."""


class ResidentEval:
    """The evaluation stream of a set that lies on every device of a mesh; broken pictures are left out."""

    def __init__(self, examples: Examples, *, batch_size: int, max_examples: int | None, mesh: Mesh):
        rows = np.flatnonzero(examples.readable[:max_examples]).astype(np.int32)
        self.skipped, self.take = len(examples.readable[:max_examples]) - len(rows), take
        self.arrays = _put_examples(examples, mesh)
        self._rows, self._mesh, self._batch_size = rows, mesh, batch_size

    def __iter__(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """(rows int32 [B], mask bool [B]) of each batch: every example once, the last batch filled up."""
        for step in range(-(-len(self._rows) // self._batch_size)):
            mask = np.arange(self._batch_size) < len(self._rows) - step * self._batch_size
            yield put(self.rows(step), self._mesh, P("data")), put(mask, self._mesh, P("data"))

    def rows(self, step: int) -> np.ndarray:
        """The rows of the split that batch `step` has, int32 [B]; where it is filled up they mean nothing."""
        rows = self._rows[step * self._batch_size : (step + 1) * self._batch_size]
        return np.pad(rows, (0, self._batch_size - len(rows)))


def put(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Lays a host array, the same on every host, onto the mesh; each host writes only its own devices' part."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _put_examples(examples: Examples, mesh: Mesh) -> Arrays:
    return {"image": put(examples.images, mesh, P()), "label": put(examples.labels, mesh, P())}
