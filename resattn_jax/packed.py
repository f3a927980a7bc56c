"""The state of a run as a few long arrays, which is how a GPU changes it in few kernels.

A net has hundreds of arrays, and a kernel for a few of each of them takes longer to start than to run. Between
dispatches the state is what state.py says; within one its arrays lie behind each other. What changes an array value by
value, such as SGD, gives the same numbers in either form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from resattn_jax.state import TrainState

MOST = 64  # arrays in a long one: a kernel that reads or writes them all takes no more than about a hundred


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """How the arrays of a tree lie in long ones.

    shapes: of the leaves. groups: of each long array the name that its leaves have in common, and which they are.
    """

    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tree: Any) -> Packing:
        """For dictionaries of float32 arrays or their shapes.

        Only what has the same name and is a vector too, or a kernel too, lies together, for the sake of weight decay.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        shapes = tuple(leaf.shape for _, leaf in leaves)
        kinds: dict[tuple[bool, str], list[int]] = {}
        for i, (path, leaf) in enumerate(leaves):
            kinds.setdefault((len(leaf.shape) > 1, path[-1].key), []).append(i)
        groups = [
            (name, tuple(kind[i : i + MOST]))
            for (_, name), kind in sorted(kinds.items())
            for i in range(0, len(kind), MOST)
        ]
        return cls(structure, shapes, tuple(groups))

    def pack(self, tree: Any) -> dict[str, dict[str, jax.Array]]:
        """The long arrays, float32, by their leaves' name: {"long0": {"bias": [n]}, "long2": {"kernel": [1, n]}}."""
        leaves = self.structure.flatten_up_to(tree)
        return {
            f"long{g}": {name: self._join([leaves[i] for i in group])} for g, (name, group) in enumerate(self.groups)
        }

    def _join(self, leaves: list[jax.Array]) -> jax.Array:
        joined = jnp.concatenate([_outputs_first(leaf).astype(jnp.float32).reshape(-1) for leaf in leaves])
        return joined if leaves[0].ndim < 2 else joined[None]

    def unpack(self, packed: dict[str, dict[str, jax.Array]], kernels: Sequence[jax.Array] = ()) -> Any:
        """The tree, float32; kernels of convolutions as `self.kernels` gave them, if given."""
        leaves, given = self._parts(packed), iter(kernels)
        leaves = [next(given) if kernels and leaf.ndim == 4 else leaf for leaf in leaves]
        return self.structure.unflatten([leaf.transpose(1, 2, 3, 0) if leaf.ndim == 4 else leaf for leaf in leaves])

    def kernels(self, packed: dict[str, dict[str, jax.Array]], dtype: DTypeLike) -> list[jax.Array]:
        """The kernels of convolutions, [O, H, W, I]."""
        return [leaf.astype(dtype) for leaf in self._parts(packed) if leaf.ndim == 4]

    def _parts(self, packed: dict[str, dict[str, jax.Array]]) -> list[jax.Array]:
        """The leaves, kernels of convolutions [O, H, W, I]."""
        leaves: list[Any] = [None] * len(self.shapes)
        for g, (name, group) in enumerate(self.groups):
            ends = np.cumsum([math.prod(self.shapes[i]) for i in group])
            parts = jnp.split(packed[f"long{g}"][name].reshape(-1), ends[:-1])
            for i, part in zip(group, parts, strict=True):
                shape = self.shapes[i]
                leaves[i] = part.reshape((shape[-1], *shape[:-1]) if len(shape) == 4 else shape)
        return leaves

    def is_packed(self, tree: Any) -> bool:
        """Whether a tree has the form that `pack` gives."""
        return isinstance(tree, dict) and tree.keys() == {f"long{g}" for g in range(len(self.groups))}


@dataclasses.dataclass(frozen=True, eq=False)
class PackedState:
    """How the arrays of a state lie in long ones."""

    params: Packing
    batch_stats: Packing
    dtype: Any

    @classmethod
    def of(cls, state: TrainState, dtype: Any) -> PackedState:
        """For a state or its shapes. dtype: what the net's convolutions compute in."""
        return cls(Packing.of(state.params), Packing.of(state.batch_stats), dtype)

    def pack(self, state: TrainState) -> TrainState:
        """The state with long arrays. In opt_state whatever has a value for each parameter is packed as they are."""

        def is_tree(x: Any) -> bool:
            return jax.tree.structure(x) == self.params.structure

        opt_state = jax.tree.map(lambda x: self.params.pack(x) if is_tree(x) else x, state.opt_state, is_leaf=is_tree)
        ema = None if state.ema is None else self.pack_variables(state.ema["params"], state.ema["batch_stats"])
        variables = self.pack_variables(state.params, state.batch_stats)
        return dataclasses.replace(state, **variables, opt_state=opt_state, ema=ema)

    def unpack(self, state: TrainState) -> TrainState:
        """The reverse of `pack`."""
        is_packed = self.params.is_packed
        opt_state = jax.tree.map(
            lambda x: self.params.unpack(x) if is_packed(x) else x, state.opt_state, is_leaf=is_packed
        )
        ema = None if state.ema is None else self._unpack_variables(state.ema)
        return dataclasses.replace(state, **self._unpack_variables(state.variables), opt_state=opt_state, ema=ema)

    def pack_variables(self, params: Any, batch_stats: Any) -> dict[str, Any]:
        return {"params": self.params.pack(params), "batch_stats": self.batch_stats.pack(batch_stats)}

    def _unpack_variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {
            "params": self.params.unpack(variables["params"]),
            "batch_stats": self.batch_stats.unpack(variables["batch_stats"]),
        }

    def kernels(self, state: TrainState) -> list[jax.Array]:
        """The kernels of convolutions of a packed state, in the dtype they are used in."""
        return self.params.kernels(state.params, self.dtype)

    def variables(self, state: TrainState, kernels: Sequence[jax.Array]) -> dict[str, Any]:
        """What `model.apply` takes of a packed state whose kernels are at hand."""
        params = self.params.unpack(state.params, kernels)
        return {"params": params, "batch_stats": self.batch_stats.unpack(state.batch_stats)}


def _outputs_first(kernel: jax.Array) -> jax.Array:
    """[H, W, I, O] -> [O, H, W, I], the order in which cuDNN has kernels of convolutions; others as they are."""
    return kernel.transpose(3, 0, 1, 2) if kernel.ndim == 4 else kernel
