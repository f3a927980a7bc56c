"""The state of a run: what a checkpoint holds, known without the step that changes it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import optax


@flax.struct.dataclass
class TrainState:
    """All that a step changes. step: int32 scalar, the number of steps done; ema: as `variables`, or None."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that are measured: the moving average where there is one."""
        return self.variables if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What goes on with a run and is no function of its config. Frozen: a checkpoint is written in the background.

    best: the metrics and the "step" of the best evaluation so far, or None. train_seconds, train_images: of training
    alone. since_log: sums of the step metrics since they were logged, and their "count". skipped: broken pictures.
    not_finite: steps whose loss or gradient was not finite; not_finite_in_a_row: those of them that came last.
    devices: what it was trained on, such as "8 x TPU v5 lite"; "" in runs older than this field.
    """

    best: Mapping[str, Any] | None = None
    train_seconds: float = 0.0
    train_images: int = 0
    since_log: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    not_finite: int = 0
    not_finite_in_a_row: int = 0
    devices: str = ""

    def to_plain(self) -> dict[str, Any]:
        """The same as JSON has it, shared with nobody."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Progress:
        """What `to_plain` gave, in this version or an older one. Raises ValueError for something else."""
        if not isinstance(plain, Mapping):
            raise ValueError(f"progress is a {type(plain).__name__}, not an object")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in plain.items() if name in names})


def random_key(seed: jax.Array | int, name: str, step: jax.Array | int = 0) -> jax.Array:
    """Randomness is a function of (seed, name, step); there is no generator whose state could be lost.

    seed: its lower 32 bits count; as uint32 it gives what a whole number gives.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)
