"""A list of runs as a TOML file has it: which recipe, what is set in it, with which seeds.

    config = "cifar10_ra92_fast"      # of every run: a recipe on board or a file, with :VARIANT where it takes one
    seeds = [0, 1]
    set.total_epochs = 40.0           # any key of the config, as --config.KEY=VALUE sets it

    [[run]]
    name = "decay"                    # a run for each seed; config, seeds and set may be its own
    set.optimizer.weight_decay = 3e-4

    [[run]]
    name = "sam"
    goes_on_from = "decay at 87.5%"   # from the checkpoint of another run of this list, of the same seed

Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from resattn_jax.cli import parse_config
from resattn_jax.config import flatten
from resattn_jax.errors import UsageError, nearest, reason
from resattn_jax.rules import RULES, parse_duration, shown

_OF_ALL = {"config", "seeds", "set"}
_OF_A_RUN = {"name", "goes_on_from", *_OF_ALL}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a list.

    overrides: {"optimizer.weight_decay": 3e-4}, without the seed. source: the entry that it goes on from, or None;
    part: at which part of that run, in percent.
    """

    name: str
    config: str
    seed: int
    overrides: Mapping[str, Any]
    source: Entry | None = None
    part: float = 0.0

    @property
    def workdir(self) -> str:
        """The name of its folder: no other run of the list has it."""
        return f"{self.name}_{self.seed}"

    def arguments(self) -> list[str]:
        """What the command line of resattn_jax says for this run."""
        values = {**self.overrides, "seed": self.seed}
        return [f"--config={self.config}", *(f"--config.{key}={value}" for key, value in values.items())]

    def read_config(self) -> ml_collections.ConfigDict:
        """Its config, checked as far as that needs no data. Raises UsageError."""
        try:
            return parse_config(["recipes", *self.arguments()])
        except UsageError as error:
            raise UsageError(f"{self.workdir}: {error}") from error


def read_list(file: pathlib.Path) -> list[Entry]:
    """The runs of a list: those of the lowest seed in its order, then those of the next, so that a list that is cut off
    has each variant once. Raises UsageError for what cannot be run.
    """
    try:
        plain = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {reason(error)}") from error
    runs = plain.pop("run", None)
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise UsageError(f"{file} lists no runs; each is a table [[run]] with a name")
    _check_keys(file, plain, _OF_ALL)
    entries: dict[tuple[str, int], Entry] = {}
    for run in runs:
        _check_keys(file, run, _OF_A_RUN)
        for entry in _entries(file, plain, run, entries):
            if entries.setdefault((entry.name, entry.seed), entry) is not entry:
                raise UsageError(f"{file} has two runs of the name {entry.name} and the seed {entry.seed}")
            entry.read_config()
    return sorted(entries.values(), key=lambda entry: entry.seed)


def _entries(
    file: pathlib.Path, common: Mapping[str, Any], run: Mapping[str, Any], before: Mapping[tuple[str, int], Entry]
) -> list[Entry]:
    """A run's entries, one for each seed; before: those that came before it."""
    name = run.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise UsageError(f"{file}: a run has the name {shown(name)}; write letters, digits, '.', '-' and '_'")
    both = {**common, **run}
    config, seeds = both.get("config"), both.get("seeds", [0])
    if not isinstance(config, str):
        raise UsageError(f"{file}: {name} has no config; write config = 'NAME', above or in the run")
    if not isinstance(seeds, list) or not seeds:
        raise UsageError(f"{file}: the seeds of {name} are {shown(seeds)}; write a list such as [0, 1]")
    overrides = flatten(common.get("set", {})) | flatten(run.get("set", {}))
    if "seed" in overrides:
        raise UsageError(f"{file}: {name} sets the seed; write seeds = [{overrides['seed']}]")
    source, part = _source(file, run)
    entries = []
    for seed in seeds:
        RULES["seed"].check("seed", seed)
        if source and (source, seed) not in before:
            raise UsageError(
                f"{file}: {name} goes on from {source}, of which no run with the seed {seed} comes before it"
            )
        entry = Entry(name=name, config=config, seed=seed, overrides=overrides, part=part)
        entries.append(dataclasses.replace(entry, source=before[source, seed]) if source else entry)
    return entries


def _source(file: pathlib.Path, run: Mapping[str, Any]) -> tuple[str | None, float]:
    """(the name of the run that this one goes on from, at which percent of it)."""
    written = run.get("goes_on_from")
    if written is None:
        return None, 0.0
    name, _, part = str(written).partition(" at ")
    number, unit = parse_duration(part) or (0.0, "")
    if unit != "%":
        raise UsageError(f"{file}: goes_on_from is {shown(written)}; write 'NAME at 87.5%'")
    return name, number


def _check_keys(file: pathlib.Path, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table.keys() - known:
        raise UsageError(
            f"{file} has the key {shown(key)}{nearest(key, known)}; it may have {', '.join(sorted(known))}"
        )


# ---- A rehearsal.

REHEARSED_STEPS = 8
_SMALL: dict[str, Any] = {
    "model.name": "ra_tiny",
    "model.p": 0,
    "model.t": 1,
    "model.last": 0,
    "batch_size": 16,
    "eval.batch_size": 50,
    "data.train_split": "train[:200]",
    "data.eval_split": "test[:100]",
}


def rehearsed(entries: Sequence[Entry]) -> list[Entry]:
    """The same runs with a small net, few pictures and 8 steps: each the same programs, but for their size.

    What lasts so many epochs or steps lasts the same part of the run.
    """
    short: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        then = flatten(entry.read_config())
        overrides = {key: value for key, value in entry.overrides.items() if key not in ("total_epochs", "total_steps")}
        overrides |= {**_SMALL, "total_steps": REHEARSED_STEPS, **_parts(then)}
        if then.get("batch_norm_span"):
            overrides["batch_norm_span"] = _SMALL["batch_size"] // 2
        source = entry.source and short[entry.source.name, entry.seed]
        short[entry.name, entry.seed] = dataclasses.replace(entry, overrides=overrides, source=source)
    return list(short.values())


def _parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The durations of a flat config as parts of the run, where they are known without the data."""
    totals = {"e": config["total_epochs"], "s": config["total_steps"]}

    def part(value: Any) -> Any:
        number, unit = parse_duration(value) or (0.0, "")
        return f"{min(100 * number / totals[unit], 100):g}%" if totals.get(unit) else value

    found = {}
    for key, value in config.items():
        new = tuple(map(part, value)) if isinstance(value, tuple) else part(value)
        if new != value:
            found[key] = new
    return found
