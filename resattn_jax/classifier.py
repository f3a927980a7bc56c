"""A trained net as an object: opened by the path of its run or of an exported folder, it labels and looks at images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import PIL.Image
import PIL.ImageOps
from etils import epath

from resattn_jax import runtime
from resattn_jax.data.pictures import BrokenPicture, Picture, to_mode
from resattn_jax.data.pipelines import describe_for, eval_transform
from resattn_jax.data.spec import DataSpec
from resattn_jax.data.transforms import EvalTransform
from resattn_jax.errors import UsageError, nearest, printable, reason
from resattn_jax.experiment import Experiment, build_to_measure
from resattn_jax.intermediates import attention_modules, maps
from resattn_jax.run import Run
from resattn_jax.train_step import predict
from resattn_jax.trained import find_trained, is_exported, read_variables

BATCH = 64  # images at a time; of maps, which are many times as large, fewer
MAPS_BATCH = 8

Image = str | pathlib.PurePath | PIL.Image.Image | np.ndarray
Images = Image | Sequence[Image]


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """What an attention module does to N images (paper, section 3 and figure 1), each float32 [N, H, W, C].

    trunk: T, what the trunk branch gives. mask: M, what the soft mask branch gives. product: (1 + M) * T, or M * T in a
    net without attention residual learning; the module's last units come after it.
    """

    trunk: np.ndarray
    mask: np.ndarray
    product: np.ndarray


ATTENTION = tuple(field.name for field in dataclasses.fields(Attention))


class Classifier:
    """A trained net with what it knows of its data. `load` makes one.

    config: what it was trained as. spec: what it knows of its data. variables: {"params": …, "batch_stats": …}.
    name: where it comes from, for people.

    Images are given one or many: paths, PIL images, or arrays, uint8 in 0 … 255 or float in 0 … 1, of shape [H, W],
    [H, W, C] or, many, [N, H, W, C]. Whatever their size, they are resized, cropped and standardised as in the
    evaluation of the run. An image that cannot be read is a UsageError.

    Probabilities and logits are of all views that config.eval.views asks for. What lies inside of the net (`maps`,
    `features`, `attention`, `cam`) is of one view, the centre, not mirrored.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        spec: DataSpec,
        variables: Mapping[str, Any],
        name: str = "",
    ):
        mesh = runtime.make_mesh(jax.local_devices()[:1])
        self.config, self._name = config, name or f"a {config.model.name}"
        self._programs: dict[tuple[str, ...], Any] = {}
        self._experiment: Experiment = build_to_measure(config, spec, mesh)
        self.variables = jax.device_put(variables, jax.local_devices()[0])

    def __str__(self) -> str:
        return self._name

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

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the net's attention modules, in their order: "stage1_attention1", …"""
        return tuple(attention_modules(self.model.spec))

    def logits(self, images: Images) -> np.ndarray:
        """float32 [N, num_classes]. With config.eval.views > 1 the logarithm of the views' mean probabilities."""
        parts = [np.zeros((0, len(self.labels)), np.float32)]
        for batch in _batches(map(self._views, _listed(images)), BATCH):
            parts.append(self._run(self._predict, batch))
        return np.concatenate(parts)

    def predict(self, images: Images) -> np.ndarray:
        """Probabilities float32 [N, num_classes]."""
        return _softmax(self.logits(images))

    def predict_each(self, images: Iterable[Image]) -> Iterator[np.ndarray | UsageError]:
        """For each image in its order the probabilities float32 [num_classes], or the error if it cannot be read.

        For any number of images: threads decode them ahead of the net, and no more than two batches are in memory.
        """
        waiting = iter(images)
        pool = ThreadPoolExecutor((os.cpu_count() or 1) + 1, thread_name_prefix="decode")
        try:
            ahead = [pool.submit(self._tried, image) for image in itertools.islice(waiting, BATCH)]
            while ahead:
                now, ahead = ahead, [pool.submit(self._tried, image) for image in itertools.islice(waiting, BATCH)]
                views = [future.result() for future in now]
                readable = [view for view in views if not isinstance(view, UsageError)]
                found = (_softmax(self._run(self._predict, batch)) for batch in _batches(readable, BATCH))
                rows = itertools.chain.from_iterable(found)
                for view in views:
                    yield view if isinstance(view, UsageError) else next(rows)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def top(self, images: Images, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k most probable classes, (name, probability), the most probable first."""
        probabilities = self.predict(images)
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
        return [[(self.labels[c], float(row[c])) for c in best] for row, best in zip(probabilities, order, strict=True)]

    # ---- What lies inside of the net.

    def maps(self, images: Images, layers: Iterable[str]) -> dict[str, np.ndarray]:
        """The named maps, float32 [N, h, w, c], or [N, c] of "embedding" and "head", the logits of the centre view.

        layers: of `layers`; `resattn_jax.intermediates.maps` says what the names mean. They come out of one compiled
        program. Raises UsageError when there is no such map.
        """
        layers = tuple(layers)
        for layer in layers:
            if layer not in self._shapes:
                units = ", ".join(name for name in self._shapes if "/" not in name)
                raise UsageError(
                    f"the net has no map {printable(layer)!r}{nearest(layer, self._shapes)}; there are {units}, and"
                    " those within an attention module, such as its trunk, mask and product"
                )
        parts: dict[str, list[np.ndarray]] = {name: [np.zeros((0, *self._shapes[name]), np.float32)] for name in layers}
        for batch in _batches(map(self.shown, _listed(images)), MAPS_BATCH):
            for name, part in self._run(self._maps(layers), batch).items():
                parts[name].append(part)
        return {name: np.concatenate(part) for name, part in parts.items()}

    @property
    def layers(self) -> tuple[str, ...]:
        """The names that `maps` and `features` know, in alphabetical order."""
        return tuple(sorted(self._shapes))

    def features(self, images: Images, layer: str = "embedding") -> np.ndarray:
        """float32 [N, C], what the last layer reads: the averages of the last map. layer: any other of `layers`.

        Raises UsageError when there is no such layer.
        """
        return self.maps(images, [layer])[layer]

    def attention(self, images: Images) -> dict[str, Attention]:
        """What each attention module does to the images, by its name, in the net's order."""
        found = self.maps(images, [f"{name}/{part}" for name in self.modules for part in ATTENTION])
        return {name: Attention(**{part: found[f"{name}/{part}"] for part in ATTENTION}) for name in self.modules}

    def cam(self, images: Images, classes: int | str | Sequence[int | str] | None = None) -> np.ndarray:
        """Class activation maps, float32 [N, h, w] (Zhou et al., CVPR 2016, equation 2).

        They are exact here, as averages over the last map and one linear layer are all that follows: their mean over
        h and w plus the class's bias is the logit of the centre view, up to rounding.
        classes: names or numbers, one for all images or one for each; None: each image's most probable. Raises
        UsageError when there is no such class.
        """
        found = self.maps(images, ["last_map", "head"])
        count = len(found["head"])
        if classes is None:
            numbers = found["head"].argmax(-1)
        elif isinstance(classes, int | np.integer | str):
            numbers = np.full(count, self._class_number(classes))
        elif len(classes) != count:
            raise UsageError(f"there are {len(classes)} classes for {count} images; give one, or one for each image")
        else:
            numbers = np.array([self._class_number(one) for one in classes], int)
        return self.activation_maps(found["last_map"], numbers)

    def activation_maps(self, last_map: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """What `cam` gives, of maps that are there already: float32 [N, h, w, C] and a class for each, int [N]."""
        kernel = np.asarray(self.variables["params"]["head"]["kernel"])
        return np.einsum("nhwc,cn->nhw", last_map, kernel[:, numbers])

    def shown(self, image: Image) -> np.ndarray:
        """What the net is shown of an image: its centre view, uint8 [H, W, C]. Raises UsageError."""
        return self._cut_out(image, dataclasses.replace(self._transform, views=1))[0]

    # ---- Measuring.

    def evaluate(self, split: str | None = None) -> dict[str, Any]:
        """The metrics on a split of the run's data set, as --mode=evaluate gives them, and class_names.

        split: such as "train", "test" or "test[:50%]"; None: config.data.eval_split. The data set has to be where
        config.data says. Raises UsageError when it is not, there is no such split, or its classes are not the net's.
        """
        config = self.config.copy_and_resolve_references()
        if split is not None:
            config.data.eval_split = split
        stream = self._experiment.open_eval(config)
        return {**self._experiment.evaluate(self.variables, stream), "class_names": self.labels}

    # ---- Programs, one for each number of images that is a power of two.

    @functools.cached_property
    def _predict(self) -> Any:
        return self._compiled(functools.partial(predict, self.model, self._experiment.recipe))

    def _maps(self, layers: tuple[str, ...]) -> Any:
        def some(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
            found = maps(self.model, self._experiment.recipe, variables, images)
            return {layer: found[layer] for layer in layers}

        return self._programs.setdefault(layers, self._compiled(some))

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the maps of one image, by their names."""
        one = jax.ShapeDtypeStruct((1, *self.spec.eval_shape), np.uint8)
        found = jax.eval_shape(functools.partial(maps, self.model, self._experiment.recipe), self.variables, one)
        return {name: value.shape[1:] for name, value in found.items()}

    def _compiled(self, function: Callable[..., Any]) -> Any:
        options = runtime.compiler_options(self._experiment.platform, self._experiment.mesh)
        return jax.jit(function, compiler_options=options)

    def _run(self, program: Any, batch: list[np.ndarray]) -> Any:
        """What a program gives for a batch, as NumPy arrays. The batch is filled up to a power of two."""
        images = np.stack(batch)
        room = (1 << (len(images) - 1).bit_length()) - len(images)
        padded = np.pad(images, [(0, room), *[(0, 0)] * (images.ndim - 1)])
        return jax.tree.map(lambda x: np.asarray(x)[: len(images)], program(self.variables, padded))

    # ---- Images.

    @property
    def _transform(self) -> EvalTransform:
        return eval_transform(self.config, self.spec)

    def _views(self, image: Image) -> np.ndarray:
        """uint8 [H, W, C], or of five views [5, H, W, C], as the net is measured on."""
        views = self._cut_out(image, self._transform)
        return views[0] if len(views) == 1 else views

    def _tried(self, image: Image) -> np.ndarray | UsageError:
        try:
            return self._views(image)
        except UsageError as error:
            return error

    def _cut_out(self, image: Image, transform: EvalTransform) -> np.ndarray:
        try:
            return transform(_picture(image, self.spec))
        except (BrokenPicture, OSError) as error:
            raise UsageError(f"{_named(image)} cannot be read: {reason(error)}") from error

    def _class_number(self, one: int | str) -> int:
        if isinstance(one, str):
            if one not in self.labels:
                raise UsageError(f"there is no class {printable(one)!r}{nearest(one, self.labels)}")
            return self.labels.index(one)
        if not 0 <= one < len(self.labels):
            raise UsageError(f"there is no class number {one}; they are 0 to {len(self.labels) - 1}")
        return int(one)


def load(path: epath.PathLike, checkpoint: str = "best") -> Classifier:
    """Opens a trained net.

    path: the workdir of a run, a folder that --mode=export --output wrote, or, where there is no such folder, the name
    of a net on board, such as "digits/ra_tiny" (`pretrained` lists them). checkpoint: of a run, "best" by top-1 (the
    newest where none was measured), "newest" or a step. Raises UsageError when there is no such net.
    """
    run = find_trained(path)
    config = run.config
    if config is None:
        raise UsageError(f"{run} holds no config.json: it is no workdir of a run, and no exported net")
    return open_net(run, config, checkpoint, or_newest=True)


def open_net(run: Run, config: ml_collections.ConfigDict, checkpoint: str, *, or_newest: bool = False) -> Classifier:
    """`load` for a config that is the run's with what may differ for measuring.

    or_newest: the newest checkpoint is the best where none was measured; else that is a UsageError.
    """
    spec = run.spec
    if spec is None and is_exported(run):
        raise UsageError(f"{run} holds no data.json, which an exported net has")
    name, variables = read_variables(run, checkpoint, or_newest=or_newest)
    if spec is None:
        spec = spec_of_run(run, config, variables)
        run.check_data(spec)
    return Classifier(config, spec, variables, name=name)


def spec_of_run(run: Run, config: ml_collections.ConfigDict, variables: Mapping[str, Any]) -> DataSpec:
    """What the net of a run knows of its data; where the run has not kept it, what the data or the config say.

    That is so in runs older than data.json, and where others' weights were imported without their data. Raises
    UsageError when none of them says it.
    """
    kernel, bias = variables["params"]["stem_conv"]["kernel"], variables["params"]["head"]["bias"]
    return run.spec or describe_for(config, channels=kernel.shape[2], classes=len(bias))


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


def _picture(image: Image, spec: DataSpec) -> Picture | _Pixels:
    """A picture as the net takes it. Raises BrokenPicture, OSError, and UsageError for what is no image."""
    if isinstance(image, str | pathlib.PurePath):
        image = Picture(epath.Path(image).expanduser().read_bytes(), upright=spec.exif_orientation).pixels()
    elif isinstance(image, PIL.Image.Image):
        image = PIL.ImageOps.exif_transpose(image) if spec.exif_orientation else image
        image = np.asarray(to_mode(image, 1 if image.mode == "L" else 3))
    array = np.asarray(image)
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UsageError("an array of floats must lie in 0 … 1; one of uint8 in 0 … 255")
        array = np.round(array * 255).astype(np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise UsageError(f"an image is uint8 or float [H, W], [H, W, 1] or [H, W, 3], not {array.dtype} {array.shape}")
    channels = spec.eval_shape[-1]
    if channels == 3 and array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    elif channels == 1 and array.shape[-1] == 3:
        array = np.asarray(PIL.Image.fromarray(array).convert("L"))[..., None]
    return _Pixels(array)


def _named(image: Image) -> str:
    return printable(str(image)) if isinstance(image, str | pathlib.PurePath) else "an image"


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """The images, so many at a time."""
    waiting = iter(images)
    while batch := list(itertools.islice(waiting, size)):
        yield batch


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
