"""The model card of an exported net, README.md in the form that model hubs read, and how images are made for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import yaml

import resattn_jax
from resattn_jax.config import flatten
from resattn_jax.convert import their_net
from resattn_jax.export import FILES
from resattn_jax.export.portable import STABLEHLO_PLATFORMS, TrainedNet
from resattn_jax.models.count import count_parameters
from resattn_jax.rules import RULES

HUB_DATASETS = {  # what the Hugging Face hub calls them
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet2012": "ILSVRC/imagenet-1k",
    "mnist": "ylecun/mnist",
}
METRICS = {  # ours: (the hub's type, how a person calls it)
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
    "loss": ("loss", "cross-entropy in nats"),
    "ece": ("expected_calibration_error", "expected calibration error"),
}


def preprocessing(net: TrainedNet) -> dict[str, Any]:
    """How a picture of any size becomes what the net is shown, in the words that image processors use."""
    height, width, channels = net.measured_on.eval_shape
    return {
        "exif_orientation": net.spec.exif_orientation,
        "size": {"shortest_edge": _resized(net)},
        "resample": "bilinear, antialiased, as Pillow has it",
        "crop_size": {"height": height, "width": width},
        "crop": "center",
        "channels": {1: "grey", 3: "RGB"}.get(channels, channels),
        "layout": "NHWC",
        "rescale_factor": 1 / 255,
        "image_mean": net.spec.mean.tolist(),
        "image_std": net.spec.std.tolist(),
        "inside_the_graphs": ["rescale_factor", "image_mean", "image_std"],
    }


def _resized(net: TrainedNet) -> int:
    """The shorter side, in pixels, that a picture is resized to before it is cropped."""
    return round(net.measured_on.eval_shape[0] / net.measured_on.crop_fraction)


def model_card(net: TrainedNet, formats: Collection[str]) -> str:
    """README.md of a folder with these formats, of `FILES`: YAML front matter, then Markdown."""
    front = yaml.safe_dump(_front_matter(net, formats), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", _head(net), _data(net), _recipe(net), _metrics(net), _files(net, formats)]
    return "\n\n".join([*parts, _limits(net, formats), _licence(net)]) + "\n"


def _front_matter(net: TrainedNet, formats: Collection[str]) -> dict[str, Any]:
    data, name = net.config.data, _data_name(net)
    front: dict[str, Any] = {
        "license": "apache-2.0" if _trained_here(net) else "unknown",
        "library_name": "resattn_jax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "residual-attention-network", "jax", "flax", *map(_tag, sorted(formats))],
        "datasets": [HUB_DATASETS[name]] if name in HUB_DATASETS and net.step else None,
        "metrics": ["accuracy"],
    }
    if net.metrics:
        metrics = [
            {"type": kind, "name": f"{called}, step {net.step}", "value": net.metrics[key]}
            for key, (kind, called) in METRICS.items()
            if key in net.metrics
        ]
        dataset = {"type": HUB_DATASETS.get(name, name), "name": name, "split": data.eval_split}
        task = {"type": "image-classification", "name": "Image classification"}
        front["model-index"] = [
            {"name": net.config.model.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    return {key: value for key, value in front.items() if value is not None}


def _tag(format: str) -> str:
    return "pytorch" if format == "torch" else format


def _data_name(net: TrainedNet) -> str:
    """The set's name, without where it lies."""
    return str(net.config.data.name).partition(":")[0]


def _trained_here(net: TrainedNet) -> bool:
    """Whether all of the weights come from the run, none from somebody else's."""
    return net.step > 0 and net.config.init_from is None


def _head(net: TrainedNet) -> str:
    size = "x".join(map(str, net.measured_on.eval_shape))
    where = f"step {net.step:,} of its run" if net.step else "of weights that were imported"
    parameters, classes = count_parameters(net.variables["params"]), net.spec.num_classes
    return f"""# {net.config.model.name} on {_data_name(net)}

A Residual Attention Network ([Wang et al., CVPR 2017](https://arxiv.org/abs/1704.06904)), {parameters:,} parameters,
for images of {size} and {classes} classes, named in `classes.txt` in the order of the logits. Exported by resattn_jax
{resattn_jax.__version__}, {where}."""


def _data(net: TrainedNet) -> str:
    data = net.config.data
    if not net.step:
        return "## Data\n\nWhat these weights were trained on, those who made them know."
    return (
        f"## Data\n\nTrained on `{_data_name(net)}`, split `{data.train_split}`: {net.spec.examples:,} images. Measured"
        f" on split `{data.eval_split}`."
    )


def _recipe(net: TrainedNet) -> str:
    """The keys that say how it was trained, as far as they change anything."""
    if not net.step:
        return "## Recipe\n\nHow these weights were trained, those who made them know."
    sections = ("optimizer.", "sam.", "schedule.", "augment.", "model.", "data.label_noise")
    alone = ("seed", "batch_size", "accumulate", "total_epochs", "total_steps", "sync_batch_norm", "batch_norm_span",
             "init_from", "label_smoothing", "ema_decay")  # fmt: skip
    rows = [
        f"| `{key}` | {value} |"
        for key, value in flatten(net.config).items()
        if (key in alone or key.startswith(sections)) and value not in (None, RULES[key].absent)
    ]
    return "\n".join(["## Recipe", "", "`config.json` has every key.", "", "| key | value |", "|---|---|", *rows])


def _metrics(net: TrainedNet) -> str:
    measured = {key: net.metrics[key] for key in METRICS if key in net.metrics}
    if not measured:
        return "## Metrics\n\nNot measured by the run at this step, or not as this folder's config has it."
    rows = [
        f"| {METRICS[key][1]} | {f'{value:.2%}' if key.startswith('top') else f'{value:.4f}'} |"
        for key, value in measured.items()
    ]
    where = f"split `{net.config.data.eval_split}` of `{_data_name(net)}`, {net.metrics.get('examples', 0):,} images"
    return "\n".join(["## Metrics", "", f"Step {net.step:,}, {where}.", "", "| metric | value |", "|---|---|", *rows])


def _files(net: TrainedNet, formats: Collection[str]) -> str:
    sections = [f"### {FILES[format]}\n\n{_LOADERS[format](net)}" for format in FILES if format in formats]
    return "\n\n".join(["## Files", _picture(net), *sections])


def _picture(net: TrainedNet) -> str:
    height, width, channels = net.measured_on.eval_shape
    opened, module = 'PIL.Image.open("picture.png")', "PIL.Image"
    if net.spec.exif_orientation:
        opened, module = f"PIL.ImageOps.exif_transpose({opened})", "PIL.Image, PIL.ImageOps"
    axes = "[None, ..., None]" if channels == 1 else "[None]"
    return f"""All but model.safetensors are shown `images`, uint8 [batch, {height}, {width}, {channels}]. How a picture
becomes one, `preprocessing.json` says too:

```python
import numpy as np
import {module}

image = {opened}.convert("{"L" if channels == 1 else "RGB"}")
scale = {_resized(net)} / min(image.size)
image = image.resize([max(round(side * scale), {height}) for side in image.size], PIL.Image.Resampling.BILINEAR)
left, top = (round((side - {height}) / 2) for side in image.size)
images = np.asarray(image.crop((left, top, left + {width}, top + {height})), np.uint8){axes}
```"""


def _load_safetensors(net: TrainedNet) -> str:
    return """The weights in float32, named as in resattn_jax, which needs `config.json` and `data.json` too:

```python
import resattn_jax

net = resattn_jax.load(".")
print(net.top("picture.png", k=3))
```"""


def _load_torch(net: TrainedNet) -> str:
    code, name = their_net(net.config.model.name)
    source, classes = "the public PyTorch code, github.com/tengshaofeng/ResidualAttentionNetwork-pytorch", ""
    module = "model.residual_attention_network"
    if code == "pytorchcv":
        source, module, classes = "pytorchcv", "pytorchcv.models.resattnet", f"num_classes={net.spec.num_classes}"
    resize = "" if classes else f"\nnet.fc = torch.nn.Linear(net.fc.in_features, {net.spec.num_classes})"
    return f"""A state dict by the names of {source}:

```python
import json, pathlib, torch
from {module} import {name}

net = {name}({classes}).eval(){resize}
net.load_state_dict(torch.load("model.pth", weights_only=True))
told = json.loads(pathlib.Path("preprocessing.json").read_text())
standardised = (torch.tensor(images) / 255 - torch.tensor(told["image_mean"])) / torch.tensor(told["image_std"])
logits = net(standardised.permute(0, 3, 1, 2))
```"""


def _load_stablehlo(net: TrainedNet) -> str:
    return f"""A program for {", ".join(STABLEHLO_PLATFORMS)}, its weights inside; JAX alone runs it:

```python
import pathlib
import jax.export

program = jax.export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
logits = np.asarray(jax.jit(program.call)(images))
print(pathlib.Path("classes.txt").read_text().splitlines()[logits[0].argmax()])
```"""


def _load_onnx(net: TrainedNet) -> str:
    return """A graph of opset 17, its weights inside; ONNX Runtime and others run it:

```python
import pathlib
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"images": images})
print(pathlib.Path("classes.txt").read_text().splitlines()[logits[0].argmax()])
```"""


_LOADERS = {
    "safetensors": _load_safetensors,
    "torch": _load_torch,
    "stablehlo": _load_stablehlo,
    "onnx": _load_onnx,
}


def _limits(net: TrainedNet, formats: Collection[str]) -> str:
    height, width, _ = net.measured_on.eval_shape
    limits = [
        f"Every image is given one of {net.spec.num_classes} classes, also one of something else.",
        "Where the checkpoint was chosen by the split it is measured on, the metrics are optimistic.",
        f"The graphs are for {height}x{width} pixels: resizing and cropping are the caller's, standardising is inside.",
    ]
    if "stablehlo" in formats:
        limits.append(
            f"model.stablehlo was made with JAX {jax.__version__}. JAX promises to read it in versions up to six months"
            " newer and three weeks older. Accelerators multiply float32 at their own default precision."
        )
    return "\n".join(["## Limits", "", *(f"- {limit}" for limit in limits)])


def _licence(net: TrainedNet) -> str:
    if not _trained_here(net):
        return "## Licence\n\nThe weights come from somebody else, wholly or at the start: theirs is the licence."
    return "## Licence\n\nApache-2.0, as resattn_jax. Whoever trained the weights may say otherwise, here and above."
