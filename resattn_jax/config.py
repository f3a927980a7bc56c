"""What a config's values mean: what they say together, durations, and how a run's config is read, compared and changed.

A config is checked once, right after the command line is parsed. Nothing here imports JAX or opens data: what depends
on those is checked where they are (`experiment.build`, `data.pipelines`). `rules` has what holds of each key by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from resattn_jax.errors import UsageError, nearest
from resattn_jax.models.nets import smallest_side
from resattn_jax.rules import MOST_STEPS, REQUIRED, RULES, Freedom, parse_duration, shortened, shown

# ---- Checks.


def check_keys(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError for the first key that is missing, or has no rule."""
    flat = flatten(config)
    for key in [key for key in RULES if key not in flat]:
        raise UsageError(f"the config has no config.{key}")
    for key in [key for key in flat if key not in RULES]:
        raise no_such_key(key)


def no_such_key(key: str) -> UsageError:
    """The error for a key without a rule."""
    return UsageError(f"there is no config.{shortened(key)}{nearest(f'config.{key}', _NAMES)}")


_NAMES = [f"config.{key}" for key in RULES]


def check_values(config: ml_collections.ConfigDict) -> None:
    """Checks each key by itself. Raises UsageError for the first whose rule does not hold, or that has no rule."""
    check_keys(config)
    for key, value in flatten(config).items():
        RULES[key].check(key, value)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks each key, and those that have to agree as far as that can be known without data and devices.

    Raises UsageError naming the key, the value and the rule.
    """
    check_values(config)
    for fault in (*_faults_of_the_length(config), *_faults_of_the_batch(config), *_faults_of_the_images(config)):
        raise UsageError(fault)


def _faults_of_the_length(c: ml_collections.ConfigDict) -> Iterator[str]:
    if (c.total_steps is None) == (c.total_epochs is None):
        yield (
            f"config.total_steps is {c.total_steps} and config.total_epochs is {c.total_epochs}; exactly one of them"
            " must be set"
        )
        return
    length = f"{c.total_steps} steps" if c.total_steps else f"{c.total_epochs:g} epochs"
    parts = {"schedule.warmup": c.schedule.warmup}
    if c.augment.mixup_alpha or c.augment.cutmix_alpha:
        parts["augment.mixup_off_last"] = c.augment.mixup_off_last
    if c.sam.rho:
        parts["sam.last"] = c.sam.last
    for key, value in parts.items():
        if (_share(c, value) or 0) > 1:
            yield f"config.{key} is {value!r}; it must not be longer than the run, which has {length}"
    if c.schedule.name == "step":
        boundaries = f"config.schedule.boundaries is {shown(tuple(c.schedule.boundaries))}"
        shares = [share for value in c.schedule.boundaries if (share := _share(c, value)) is not None]
        if any(share >= 1 for share in shares):
            yield (
                f"{boundaries}; each must lie before the end of the run, which has {length}; for a short trial set"
                " config.schedule.name=constant"
            )
        if shares != sorted(shares):
            yield f"{boundaries}; they must be in ascending order"


def _share(c: ml_collections.ConfigDict, value: str) -> float | None:
    """How much of the run a duration takes; None where only the number of examples would tell."""
    number, unit = parse_duration(value) or (0.0, "s")
    if unit == "%":
        return number / 100
    total = c.total_steps if unit == "s" else c.total_epochs
    return None if total is None else number / total


def _faults_of_the_batch(c: ml_collections.ConfigDict) -> Iterator[str]:
    if c.batch_size % c.accumulate:
        yield f"config.accumulate is {c.accumulate}; it must divide config.batch_size, which is {c.batch_size}"
    if c.sync_batch_norm and c.batch_norm_span:
        yield (
            f"config.sync_batch_norm is True and config.batch_norm_span is {c.batch_norm_span}; the former is a span of"
            " the whole batch, so set one of them"
        )
    if c.batch_norm_span and c.batch_norm_span > c.batch_size:
        yield f"config.batch_norm_span is {c.batch_norm_span}; it must be at most config.batch_size, {c.batch_size}"
    if (c.augment.mixup_alpha or c.augment.cutmix_alpha) and c.batch_size % 2:
        yield f"config.batch_size is {c.batch_size}; mixup and CutMix pair the images of a batch, so it must be even"


def _faults_of_the_images(c: ml_collections.ConfigDict) -> Iterator[str]:
    if len({len(c.data.mean), len(c.data.std)} - {1}) == 2:
        yield (
            f"config.data.mean has {len(c.data.mean)} values and config.data.std {len(c.data.std)}; each must have one,"
            " or as many as there are channels"
        )
    if c.augment.flip and c.augment.alternating_flip:
        yield "config.augment.flip and config.augment.alternating_flip are both True; set one of them"
    if why := why_streamed(c):
        if c.data.pipeline == "resident":
            yield f"config.data.pipeline is 'resident', but a set cannot be resident: {why}"
        if c.data.mean_image:
            yield f"config.data.mean_image is True; it is for resident sets, and yours is streamed: {why}"
        if c.steps_per_dispatch not in (None, 1):
            yield f"config.steps_per_dispatch is {c.steps_per_dispatch}; a streamed set needs 1, or unset: {why}"
    least = smallest_side(c.model.name, c.model.wiring, c.model.mask)
    for key, size in {"data": c.data.image_size, "eval": c.eval.image_size}.items():
        if size and size < least:
            yield f"config.{key}.image_size is {size}; {c.model.name} needs images of {least}x{least} at least"
    for key in ("crop_padding", "cutout"):
        if c.data.image_size and c.augment[key] > c.data.image_size:
            yield (
                f"config.augment.{key} is {c.augment[key]}; it must be no larger than config.data.image_size, which is"
                f" {c.data.image_size}"
            )


def why_streamed(c: ml_collections.ConfigDict) -> str | None:
    """What of a config alone lets no set be resident."""
    sizes = {c.data.image_size, c.eval.image_size} - {None}
    reasons = {
        "config.data.pipeline is streaming": c.data.pipeline == "streaming",
        "config.augment.random_resized_crop is set": c.augment.random_resized_crop,
        "config.augment.randaugment is set": c.augment.randaugment > 0,
        "config.eval.views is 10": c.eval.views == 10,
        "config.data.exif_orientation is set": c.data.exif_orientation,
        "config.data.image_size and config.eval.image_size differ": len(sizes) == 2,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def for_measuring(config: ml_collections.ConfigDict, devices: int) -> ml_collections.ConfigDict:
    """A copy for so many devices that train nothing: what it says of a training batch was of others."""
    copy = config.copy_and_resolve_references()
    copy.update(batch_size=2 * devices, accumulate=1, sync_batch_norm=False, batch_norm_span=None)
    return copy


# ---- Durations.


class Durations:
    """The durations of a config in steps, for a training set of so many examples.

    `total` is the length of the run; calling it with a key gives that key's duration, a tuple of them for a tuple,
    and 0 for None. An epoch may end within a step. What is over 0 takes one step at least.
    """

    def __init__(self, config: ml_collections.ConfigDict, examples: int):
        """Raises UsageError when the run would have no step, or more than 2,147,483,647."""
        self._values, self._epoch = flatten(config), examples / config.batch_size
        self.total = config.total_steps or max(round((config.total_epochs or 0) * self._epoch), 1)
        if self.total > MOST_STEPS:
            raise UsageError(f"the run would have {self.total:,} steps; set config.total_steps or total_epochs lower")

    def __call__(self, key: str) -> Any:
        value = self._values[key]
        return tuple(map(self._steps, value)) if isinstance(value, tuple) else self._steps(value)

    def _steps(self, value: str | None) -> int:
        number, unit = parse_duration(value) or (0.0, "s")
        steps = number * {"s": 1.0, "e": self._epoch, "%": self.total / 100}[unit]
        return min(max(round(steps), 1), MOST_STEPS) if steps else 0

    def notes(self) -> list[str]:
        """Sentences about durations that the run is too short for, which the data alone could tell."""
        return [
            f"config.{key} is {self._values[key]!r}, {self(key):,} steps, longer than the run of {self.total:,}"
            for key in ("schedule.warmup", "augment.mixup_off_last", "sam.last")
            if self(key) > self.total
        ]


# ---- A config as plain values.


def flatten(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """{'data.name': 'cifar10', …}, lists as tuples."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = tuple(value) if isinstance(value, list) else value

    walk("", config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)
    return flat


def from_plain(plain: Mapping[str, Any], where: str) -> ml_collections.ConfigDict:
    """The config that lies in `where` as JSON. A key that is not there has the value that older runs had.

    Raises UsageError when a key that every run has is missing, or one is there that this version does not know.
    """
    flat = flatten(plain)
    for key in sorted(flat.keys() - RULES.keys()):
        raise UsageError(f"{where} has the key {shown(key)}, which this version does not know; a newer one wrote it")
    config = ml_collections.ConfigDict()
    for key, rule in RULES.items():
        value = flat.get(key, rule.absent)
        if value is REQUIRED:
            raise UsageError(f"{where} has no {key!r}: it is no config of a run, or damaged")
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        (config[section] if section else config)[name] = value
    return config


def resolve_total(config: ml_collections.ConfigDict, set_by_hand: Iterable[str]) -> None:
    """Setting one of total_steps and total_epochs by hand clears the other. Changes `config`.

    Raises UsageError when both were set by hand.
    """
    by_hand = {key for key in ("total_steps", "total_epochs") if key in set_by_hand and config[key] is not None}
    if len(by_hand) == 2:
        raise UsageError("set config.total_steps or config.total_epochs, not both")
    for key in by_hand:
        config["total_epochs" if key == "total_steps" else "total_steps"] = None


# ---- A run's config and another.


def differences(then: ml_collections.ConfigDict, now: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{key: (value then, value now)} of what differs, in the order of the rules.

    Where a folder of pictures lies is no difference; its classes and the number of its pictures are compared with the
    data spec.
    """
    before, after = flatten(then), flatten(now)
    found = {key: (before[key], after[key]) for key in RULES if before[key] != after[key]}
    if all(str(name).startswith("folder:") for name in found.get("data.name", ("",))):
        found.pop("data.name", None)
    return found


OF_THE_NET = ("model.", "data.mean", "data.std", "data.image_size")  # what makes another function of the weights


def compare(
    then: ml_collections.ConfigDict,
    now: ml_collections.ConfigDict,
    where: object,
    *,
    allowed: tuple[Freedom, ...] = ("always",),
    only: tuple[str, ...] = ("",),
) -> list[str]:
    """Sentences about what changed and may: the keys whose `may_change` is among `allowed`.

    only: what the keys that are looked at begin with. Raises UsageError naming the first key that makes it another
    run: of the model, the data, the recipe or the seed.
    """
    notes = []
    for key, (before, after) in differences(then, now).items():
        if not key.startswith(only):
            continue
        if RULES[key].may_change not in allowed:
            raise UsageError(
                f"{where} holds another config's run: config.{key} is {shown(before)} there and {shown(after)} now;"
                " choose another --workdir, or delete that one"
            )
        notes.append(f"config.{key} was {shown(before)} when this run began and is {shown(after)} now")
    return notes


def changed(
    run: ml_collections.ConfigDict, given: Mapping[str, Any], allowed: tuple[Freedom, ...], where: object
) -> ml_collections.ConfigDict:
    """A copy of a run's config with what a command line sets by hand. Raises UsageError for what may not change."""
    config = ml_collections.ConfigDict(run.to_dict())
    with config.ignore_type():
        config.update_from_flattened_dict(dict(given))
    resolve_total(config, given)
    compare(run, config, where, allowed=allowed)
    return config
