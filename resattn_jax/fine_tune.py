"""The start of one run from another's weights."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import flax.traverse_util
import jax
import ml_collections

from resattn_jax.config import differences
from resattn_jax.errors import UsageError
from resattn_jax.models.count import count_parameters
from resattn_jax.run import Run
from resattn_jax.state import TrainState
from resattn_jax.trained import find_trained, read_variables

SMALLEST_SHARE = 0.5  # of the parameters; a checkpoint that gives less is of another net
SAME_SHAPES = ("model.wiring", "model.attention", "model.learning", "data.mean", "data.std", "data.mean_image")


def start_from(state: TrainState, source: str, config: ml_collections.ConfigDict) -> tuple[TrainState, list[str]]:
    """Takes from another run's checkpoint into `state` what fits: the same name and shape.

    Args:
      state: the fresh state of step 0.
      source: a workdir, with ":best" or ":STEP" for another than its newest checkpoint; or a folder that an export
        wrote; or the name of a net on board.
      config: of the run that starts.

    Returns:
      The state, and sentences: about each weight that was not taken and starts fresh, the head of a net for other
      classes for instance, and about settings that make another function of the same weights.

    Raises:
      UsageError: there is no such net or checkpoint, or it fits less than half of the parameters.
    """
    folder, _, which = source.rpartition(":")
    if not re.fullmatch(r"newest|best|\d+", which):
        folder, which = source, "newest"
    run = find_trained(folder)
    _, variables = read_variables(run, which)
    given = flax.traverse_util.flatten_dict(variables)
    wanted = flax.traverse_util.flatten_dict(dict(state.variables))
    fits = {path: path in given and given[path].shape == value.shape for path, value in wanted.items()}
    taken = {path: given[path] if fits[path] else value for path, value in wanted.items()}
    fitting = count_parameters([v for path, v in wanted.items() if path[0] == "params" and fits[path]])
    share = fitting / count_parameters(state.params)
    fresh = [_fresh(path, given, wanted) for path, fit in fits.items() if not fit]
    if share < SMALLEST_SHARE:
        raise UsageError(f"only {share:.0%} of the parameters are in {source}: it is of another net; {fresh[0]}")

    def placed(new: Any, old: jax.Array) -> jax.Array:
        return jax.device_put(new, old.sharding)

    variables = jax.tree.map(placed, flax.traverse_util.unflatten_dict(taken), dict(state.variables))
    ema = None if state.ema is None else jax.tree.map(lambda x: x + 0, variables)  # its own buffers: both are donated
    state = dataclasses.replace(state, params=variables["params"], batch_stats=variables["batch_stats"], ema=ema)
    return state, fresh + _other_settings(run, config)


def _other_settings(run: Run, config: ml_collections.ConfigDict) -> list[str]:
    then = run.config
    found = differences(then, config) if then is not None else {}
    return [
        f"config.{key} was {found[key][0]!r} where the weights were trained and is {found[key][1]!r} here"
        for key in SAME_SHAPES
        if key in found
    ]


def _fresh(path: tuple[str, ...], given: dict[Any, Any], wanted: dict[Any, Any]) -> str:
    there = given[path].shape if path in given else "absent"
    return f"{'/'.join(path)} starts fresh: {wanted[path].shape} here, {there} there"
