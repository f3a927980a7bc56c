"""A trained net as an object: opened by the path of its run or of an exported folder, it labels images."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import PIL.Image
from etils import epath

from resattn_jax import runtime
from resattn_jax.checkpoint import Reader
from resattn_jax.data.pictures import BrokenPicture, Picture
from resattn_jax.data.pipelines import describe, eval_transform, for_evaluation
from resattn_jax.data.spec import DataSpec
from resattn_jax.errors import UsageError
from resattn_jax.experiment import Experiment, build
from resattn_jax.export import WEIGHTS, read_weights
from resattn_jax.on_board import find
from resattn_jax.run import Run
from resattn_jax.train_step import predict

BATCH = 64  # images at a time

Image = str | pathlib.PurePath | PIL.Image.Image | np.ndarray
Images = Image | Sequence[Image]


class Classifier:
    """A trained net with what it knows of its data. `load` makes one.

    config: what it was trained as. spec: what it knows of its data. variables: {"params": …, "batch_stats": …}.

    Images are given one or many: paths, PIL images, or arrays, uint8 in 0 … 255 or float in 0 … 1, of shape [H, W],
    [H, W, C] or, many, [N, H, W, C]. Whatever their size, they are resized, cropped and standardised as in the
    evaluation of the run. An image that cannot be read is a UsageError.
    """

    def __init__(self, config: ml_collections.ConfigDict, spec: DataSpec, variables: dict[str, Any]):
        mesh = runtime.make_mesh(jax.local_devices()[:1])
        one = config.copy_and_resolve_references()
        one.update(batch_size=2, accumulate=1, sync_batch_norm=False)  # of training; the device is one
        self.config = config
        self._experiment: Experiment = build(one, for_evaluation(config, spec), mesh)
        self.variables = jax.device_put(variables, jax.local_devices()[0])

    @property
    def spec(self) -> DataSpec:
        return self._experiment.spec

    @property
    def model(self) -> nn.Module:
        """The Flax module: model.apply(variables, standardised images, train=False) gives logits."""
        return self._experiment.model

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, in the order of the logits."""
        return self.spec.class_names

    def logits(self, images: Images) -> np.ndarray:
        """float32 [N, num_classes]. With config.eval.views > 1 the logarithm of the views' mean probabilities."""
        views = [self._views(image) for image in _listed(images)]
        parts = [np.zeros((0, len(self.labels)), np.float32)]
        for start in range(0, len(views), BATCH):
            some = np.stack(views[start : start + BATCH])
            size = min(BATCH, 1 << (len(some) - 1).bit_length())  # few shapes, so few programs
            padded = np.pad(some, [(0, size - len(some)), *[(0, 0)] * (some.ndim - 1)])
            parts.append(np.asarray(self._predict(self.variables, padded))[: len(some)])
        return np.concatenate(parts)

    def predict(self, images: Images) -> np.ndarray:
        """Probabilities float32 [N, num_classes]."""
        logits = self.logits(images)
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    def top(self, images: Images, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k most probable classes, (name, probability), the most probable first."""
        probabilities = self.predict(images)
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
        return [[(self.labels[c], float(row[c])) for c in best] for row, best in zip(probabilities, order, strict=True)]

    @functools.cached_property
    def _predict(self) -> Any:
        experiment = self._experiment
        options = runtime.compiler_options(experiment.platform, experiment.mesh)
        return jax.jit(functools.partial(predict, experiment.model, experiment.recipe), compiler_options=options)

    def _views(self, image: Image) -> np.ndarray:
        """uint8 [H, W, C], or of five views [5, H, W, C], as the net is measured on."""
        try:
            views = eval_transform(self.config, self.spec)(_picture(image, self.spec.eval_shape[-1]))
        except (BrokenPicture, OSError) as error:
            raise UsageError(f"{_shown(image)} cannot be read: {error}") from error
        return views[0] if len(views) == 1 else views


def load(path: epath.PathLike, checkpoint: str = "best") -> Classifier:
    """Opens a trained net.

    path: the workdir of a run, a folder that --mode=export --output wrote, or, where there is no such folder, the name
    of a net on board, such as "digits/ra_tiny" (`pretrained` lists them). checkpoint: of a run, "best" by top-1 (the
    newest where none was measured), "newest" or a step. Raises UsageError when there is no such net.
    """
    run = Run(path)
    if not run.path.exists():
        run = find(path)
    config = run.config
    if config is None:
        raise UsageError(f"{run} holds no config.json: it is no workdir of a run, and no exported net")
    if (run.path / WEIGHTS).exists():
        spec, variables = run.spec, read_weights(run)
    else:
        spec = run.spec or describe(config)  # a run older than data.json
        with Reader(run.checkpoints) as checkpoints:
            _, variables = checkpoints.eval_variables(checkpoint, or_newest=True)
    if spec is None:
        raise UsageError(f"{run} holds no data.json, which an exported net has")
    return Classifier(config, spec, variables)


def _listed(images: Images) -> Iterable[Image]:
    """One image or many as a list."""
    if isinstance(images, str | pathlib.PurePath | PIL.Image.Image):
        return [images]
    if isinstance(images, np.ndarray) or hasattr(images, "__array__"):
        array = np.asarray(images)
        return list(array) if array.ndim == 4 else [array]
    return list(images)


class _Pixels:
    """An array as `Picture` gives it."""

    def __init__(self, array: np.ndarray):
        self._array, (self.height, self.width) = array, array.shape[:2]

    def pixels(self) -> np.ndarray:
        return self._array


def _picture(image: Image, channels: int) -> Picture | _Pixels:
    """A picture of so many channels. Raises BrokenPicture, OSError, and UsageError for what is no image."""
    if isinstance(image, str | pathlib.PurePath):
        image = Picture(epath.Path(image).expanduser().read_bytes()).pixels()
    elif isinstance(image, PIL.Image.Image):
        image = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UsageError("an array of floats must lie in 0 … 1; one of uint8 in 0 … 255")
        array = np.round(array * 255).astype(np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise UsageError(f"an image is uint8 or float [H, W], [H, W, 1] or [H, W, 3], not {array.dtype} {array.shape}")
    if channels == 3 and array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    elif channels == 1 and array.shape[-1] == 3:
        array = np.asarray(PIL.Image.fromarray(array).convert("L"))[..., None]
    return _Pixels(array)


def _shown(image: Image) -> str:
    return str(image) if isinstance(image, str | pathlib.PurePath) else "an image"
