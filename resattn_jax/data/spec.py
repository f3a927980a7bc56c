"""What a net has to know of its data: kept with a run and with an exported net, so that neither needs the data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from resattn_jax.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DataSpec:
    """What a net has to know of its data.

    examples: the number of training examples, which an epoch has.
    image_shape: (H, W, C) of the images it is trained on; eval_shape: of those it is measured on.
    class_names: class_names[label] is a label's name.
    mean, std: float32 of pixels in [0, 1], of shape [1] or [C]; a mean image is [H, W, C].
    crop_fraction: a picture of another size is resized so that its shorter side is eval_shape[0] / crop_fraction, and
      the centre of it is cut out.
    exif_orientation: whether a picture's EXIF orientation is applied first. It was not when the published nets were
      trained.
    lists: {split: a hash of which examples it had}, of the splits whose examples may change; {} in older runs.
    resident: whether the images of the set have this shape already, so that the whole set can lie on the devices.
    """

    examples: int
    image_shape: tuple[int, int, int]
    eval_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    crop_fraction: float
    resident: bool
    exif_orientation: bool = False
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_plain(self) -> dict[str, Any]:
        """The same as JSON has it; float32 values keep their bits."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in plain.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], where: object) -> DataSpec:
        """What `to_plain` gave. Raises UsageError when `where`, the file it comes from, holds something else."""
        try:
            spec = cls(
                examples=int(plain["examples"]),
                image_shape=_shape(plain["image_shape"]),
                eval_shape=_shape(plain["eval_shape"]),
                class_names=tuple(map(str, plain["class_names"])),
                mean=np.array(plain["mean"], np.float32),
                std=np.array(plain["std"], np.float32),
                crop_fraction=float(plain["crop_fraction"]),
                resident=bool(plain["resident"]),
                exif_orientation=bool(plain.get("exif_orientation", False)),  # not in older runs
                lists=dict(plain.get("lists", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{where} does not describe the data of a run: {error!r}") from error
        return spec

    def check_same(self, now: DataSpec, workdir: object) -> None:
        """Raises UsageError when `now` is of other data than this spec, which `workdir` was trained on."""
        check_same_classes(self.class_names, now.class_names, workdir)
        for what in ("examples", "image_shape", "mean", "std"):
            before, after = getattr(self, what), getattr(now, what)
            if not np.array_equal(before, after):
                shown = f": {before} then, {after} now" if np.size(before) < 10 else ""
                raise UsageError(f"the data is not what {workdir} was trained on: {what} differs{shown}")

    def changed(self, lists: Mapping[str, str]) -> list[str]:
        """Sentences about splits of this spec that have other examples in `lists` now."""
        return [
            f"the pictures of {split!r} are not those that this run began with: some came, went or were renamed"
            for split, then in self.lists.items()
            if lists.get(split, then) != then
        ]


def check_same_classes(then: tuple[str, ...], now: tuple[str, ...], workdir: object) -> None:
    """Raises UsageError when the classes of the data are not those that `workdir` was trained on."""
    if then != now:
        names = ", ".join(sorted(set(then) ^ set(now))[:5]) or "the order"
        raise UsageError(f"the data has other classes than {workdir} was trained on: {names} differ")


def _shape(values: Any) -> tuple[int, int, int]:
    height, width, channels = map(int, values)
    return height, width, channels
