"""Checkpoints of a run. The only module that knows Orbax.

A checkpoint holds four items: `model` (params and batch_stats), `ema` (the same, when there is one), `optimizer`
(step and optimizer state) and `progress` (plain JSON). Measuring or fine-tuning reads the first two alone.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resattn_jax.errors import UsageError
from resattn_jax.train_step import TrainState


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


class Checkpoints:
    """The checkpoints under workdir/checkpoints, written in the background. Use it as a context manager.

    Kept are the newest `keep_newest` and the best `keep_best` by top-1, of those that were saved with metrics.
    must_exist: raise UsageError when there is no such folder rather than make it.
    """

    def __init__(self, workdir: pathlib.Path, *, keep_newest: int = 2, keep_best: int = 1, must_exist: bool = False):
        best = BestN(get_metric_fn=_top1, n=keep_best, keep_checkpoints_without_metrics=False)
        self.folder = (workdir / "checkpoints").absolute()  # Orbax takes no relative path
        if must_exist and not self.folder.is_dir():
            raise UsageError(f"there is no checkpoint in {self.folder}; train first, or choose another --workdir")
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("model", "ema", "optimizer")}
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={**handlers, "progress": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep_newest), best]),
                best_fn=_top1,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()  # waits for what is being written

    def steps(self) -> list[int]:
        """The steps there is a checkpoint of, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts to write the state and returns. A step that is already there is left as it is.

        progress: JSON values that go on with the run; metrics: {"top1": …, …} if the step was evaluated.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            "model": ocp.args.StandardSave(state.variables),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "progress": ocp.args.JsonSave(progress),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def find(self, which: str) -> int:
        """The step called "newest", "best" or a number. Raises UsageError when there is none, listing what is."""
        steps = self.steps()
        if not steps:
            raise UsageError(f"there is no checkpoint in {self.folder}; train first, or choose another --workdir")
        if which == "newest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            if best is None:
                raise UsageError(f"no checkpoint in {self.folder} was evaluated, so none is the best")
            return best
        if not which.isdigit() or int(which) not in steps:
            there = ", ".join(map(str, steps))
            raise UsageError(f"there is no checkpoint {which!r} in {self.folder}; there are newest, best, {there}")
        return int(which)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` and the progress saved with it.

        like: shapes, dtypes and shardings to restore into, so that it may be other devices than those that wrote it.
        Raises UsageError naming the first weights that differ when the checkpoint is of another model.
        """
        wanted = {"model": like.variables, "optimizer": {"step": like.step, "opt_state": like.opt_state}}
        if like.ema is not None:
            wanted["ema"] = like.ema
        self._check(step, wanted)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        got = self._manager.restore(step, args=ocp.args.Composite(**items, progress=ocp.args.JsonRestore()))
        model, optimizer = got["model"], got["optimizer"]
        state = like.replace(
            step=optimizer["step"],
            params=model["params"],
            batch_stats=model["batch_stats"],
            opt_state=optimizer["opt_state"],
            ema=got["ema"] if like.ema is not None else None,
        )
        return state, got["progress"]

    def save_model(self, step: int, variables: dict[str, Any]) -> None:
        """Writes variables alone, as a checkpoint to measure or to start another run from."""
        self._manager.save(step, args=ocp.args.Composite(model=ocp.args.StandardSave(variables)))

    def read_eval_variables(self, step: int, like: dict[str, Any] | None = None) -> dict[str, Any]:
        """The variables that are measured: the moving average if the checkpoint has one, else the model's own.

        like: shapes, dtypes and shardings to restore into; None: as they are, on one device. Raises UsageError naming
        the first weights that differ when the checkpoint is of another model.
        """
        item = "ema" if (self.folder / str(step) / "ema").exists() else "model"
        if like is None:
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            saved = dict(self._manager.item_metadata(step)[item])
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), saved)
        else:
            self._check(step, {item: like})
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))[item]

    def _check(self, step: int, wanted: dict[str, Any]) -> None:
        saved = self._manager.item_metadata(step)
        for item, tree in wanted.items():
            if saved.get(item) is None:
                raise UsageError(
                    f"the checkpoint {self.folder / str(step)} has no item {item!r}, so no run can go on from it;"
                    " start a new one from its weights: --config.init_from and another --workdir"
                )
            there, here = _shapes(saved[item]), _shapes(tree)
            differing = [k for k in there.keys() | here.keys() if there.get(k) != here.get(k)]
            if differing:
                first = min(differing, key=lambda k: (not k.startswith("params/"), k))
                raise UsageError(
                    f"the checkpoint {self.folder / str(step)} does not fit the model: {len(differing)} weights differ,"
                    f" first {first}: {there.get(first, 'absent')} in the checkpoint, {here.get(first, 'absent')} in"
                    " the model; is it another config's?"
                )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{'params/head/kernel': (64, 10), …}; a checkpoint's metadata and a tree of arrays give the same names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(_key(k)) for k in path): tuple(leaf.shape) for path, leaf in leaves}


def _key(entry: Any) -> Any:
    return next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name))
