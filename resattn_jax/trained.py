"""Where a trained net lies: the workdir of a run, a folder that an export wrote, or a name on board."""

from __future__ import annotations

from typing import Any

from etils import epath

from resattn_jax.checkpoint import Reader
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import WEIGHTS, read_weights
from resattn_jax.on_board import find
from resattn_jax.run import Run


def find_trained(path: epath.PathLike) -> Run:
    """The folder of a trained net. path: of it, or, where there is no such folder, the name of a net on board.

    Raises UsageError when there is neither.
    """
    run = Run(path)
    return run if run.path.exists() else find(path)


def is_exported(run: Run) -> bool:
    """Whether it is a folder that an export wrote, and no workdir."""
    return (run.path / WEIGHTS).exists()


def read_variables(run: Run, checkpoint: str, *, or_newest: bool = False) -> tuple[str, dict[str, Any]]:
    """(which they are, for people, and the variables of a net, {"params": …, "batch_stats": …}).

    checkpoint: "best", "newest" or a step; of an exported net, which has one set of weights, no step. or_newest: the
    newest is the best where none was measured. Raises UsageError where there is none.
    """
    if not is_exported(run):
        with Reader(run.checkpoints) as checkpoints:
            step, variables = checkpoints.eval_variables(checkpoint, or_newest=or_newest)
        return f"{run}, step {step}", variables
    if checkpoint not in ("best", "newest"):
        raise UsageError(f"{run} is an exported net, which has no checkpoint {checkpoint!r}; it has one set of weights")
    return str(run), read_weights(run)
