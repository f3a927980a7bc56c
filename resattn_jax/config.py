"""What a config's values mean: durations, checks, and how a run's config is kept beside it."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import ml_collections

from resattn_jax.errors import UsageError

# What may differ when a run goes on: how long it lasts, where the data lies, what is measured, kept and shown, and how
# a batch is spread over what there is of devices and memory.
_FREE = (
    "total_steps",
    "total_epochs",
    "data.dir",
    "data.workers",
    "data.broken",
    "eval.",
    "checkpoint.",
    "log_every",
    "steps_per_dispatch",
    "accumulate",
    "model.remat",
)


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean …?)' when one of `words` is near `word`, else nothing."""
    near = get_close_matches(str(word), [str(w) for w in words], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def choose(key: str, value: Any, choices: Iterable[Any]) -> Any:
    """Returns `value`. Raises UsageError naming the config key and the choices when it is none of them."""
    choices = list(choices)
    if value not in choices:
        names = ", ".join(map(str, choices))
        raise UsageError(f"config.{key} is {value!r}{nearest(value, choices)}; it must be one of {names}")
    return value


def flatten(config: ml_collections.ConfigDict) -> dict[str, object]:
    """{'data.name': 'cifar10', …}, tuples as lists, as JSON has them."""
    flat = {}

    def walk(prefix, node):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = list(value) if isinstance(value, tuple) else value

    walk("", config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)
    return flat


def resolve_total(config: ml_collections.ConfigDict, set_by_hand: Iterable[str]) -> None:
    """Setting one of total_steps and total_epochs by hand clears the other. Changes `config`; main.py calls it once.

    Raises UsageError when both were set by hand.
    """
    by_hand = {"total_steps", "total_epochs"} & set(set_by_hand)
    if len(by_hand) == 2:
        raise UsageError("set config.total_steps or config.total_epochs, not both")
    for key in by_hand:
        if config[key] is not None:
            config["total_epochs" if key == "total_steps" else "total_steps"] = None


class Durations:
    """The durations of a config in steps, for a training set of so many examples.

    `total` is the length of the run; calling it with a key gives that key's duration, a tuple of them for a tuple,
    and 0 for None. An epoch may end within a step. Raises UsageError naming the key for what is no duration.
    """

    def __init__(self, config: ml_collections.ConfigDict, examples: int):
        self._values, self._epoch = flatten(config), examples / config.batch_size
        if (config.total_steps is None) == (config.total_epochs is None):
            raise UsageError("exactly one of config.total_steps and config.total_epochs must be set")
        self.total = config.total_steps or round((config.total_epochs or 0) * self._epoch)
        if self.total < 1:
            raise UsageError(f"the run would have {self.total} steps; set config.total_steps or total_epochs higher")

    def __call__(self, key: str) -> int | tuple[int, ...]:
        value = self._values[key]
        return tuple(self._steps(key, v) for v in value) if isinstance(value, list) else self._steps(key, value)

    def _steps(self, key: str, duration: str | None) -> int:
        if duration is None:
            return 0
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?|%)\s*", str(duration))
        if not match:
            raise UsageError(f"config.{key} is {duration!r}; write '500 steps', '5 epochs' or '30%'")
        number, unit = float(match[1]), match[2][0]
        return round(number * {"s": 1, "e": self._epoch, "%": self.total / 100}[unit])


def save_or_compare_classes(class_names: tuple[str, ...], workdir: pathlib.Path) -> None:
    """Writes workdir/classes.txt, a name a line in the order of the labels, or compares it with the one there.

    Raises UsageError when the classes of the data are not those the run was trained on.
    """
    path = workdir / "classes.txt"
    if not path.exists():
        path.write_text("".join(f"{name}\n" for name in class_names))
    elif path.read_text().splitlines() != list(class_names):
        then, now = set(path.read_text().splitlines()), set(class_names)
        names = ", ".join(sorted(then ^ now)[:5]) or "the order"
        raise UsageError(f"the data has other classes than {path}, which {workdir} was trained on: {names} differ")


def save_or_compare(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, write: bool) -> list[str]:
    """Compares a config with workdir/config.json, if that is there, and writes it if this process is the one that does.

    Returns sentences about values that were changed and may be. Raises UsageError naming the first value that
    belongs to another run: model, data, recipe or seed.
    """
    path, now = workdir / "config.json", flatten(config)
    notes = []
    if path.exists():
        then = flatten(json.loads(path.read_text()))
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) == then.get(key):
                continue
            if not key.startswith(_FREE):
                raise UsageError(
                    f"{workdir} holds another config's run: config.{key} is {then.get(key)!r} there and"
                    f" {now.get(key)!r} now; choose another --workdir, or delete that one"
                )
            notes.append(f"config.{key} was {then.get(key)!r} when this run began and is {now.get(key)!r} now")
    if write:
        temporary = path.with_suffix(".tmp")  # a run killed while writing must not leave half a file
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        temporary.replace(path)
    return notes
