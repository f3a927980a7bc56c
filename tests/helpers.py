"""What several tests use: configs and recipes of a few lines, runs looked into, sources whose examples are known."""

import functools
import io
import json
import pathlib
import signal
import socket
import struct
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image

from configs import default
from resattn_jax.checkpoint import Writer
from resattn_jax.config import check_values
from resattn_jax.data.pipelines import TrainingData
from resattn_jax.data.resident import ResidentTrain, put
from resattn_jax.data.sources import Examples
from resattn_jax.data.spec import DataSpec
from resattn_jax.experiment import Experiment, build
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.runtime import make_mesh, platform_of
from resattn_jax.train_step import Recipe

ROOT = pathlib.Path(__file__).parents[1]

# Flags of a run on the digits with the smallest net; the programs of any number of steps are the same.
SMALL = [f"--config.model.{units}=0" for units in ("p", "t", "r", "last")]
SMALL += ["--config.batch_size=32", "--config.schedule.name=constant"]


# ---- Built without a command line.


def augmentation(**changes):
    """The section config.augment, nothing in use but what is changed."""
    section = default.get_config().augment
    section.update(changes)
    return ml_collections.FrozenConfigDict(section)


def plain_recipe(**changes):
    """Pixels in [0, 1] and no augmentation; changes: of Recipe's fields or of the section augment."""
    fields = Recipe.__dataclass_fields__.keys() & changes.keys()
    section = augmentation(**{k: v for k, v in changes.items() if k not in fields})
    own = {"seed": 0, "mean": np.zeros(1, np.float32), "std": np.ones(1, np.float32), "augment": section}
    return Recipe(**own | {k: changes[k] for k in fields})


def plain_spec(image_shape=(8, 8, 1), classes=10, **changes):
    """Of a resident set of 100 examples."""
    fields = {
        "examples": 100,
        "image_shape": image_shape,
        "eval_shape": image_shape,
        "class_names": tuple(map(str, range(classes))),
        "mean": np.zeros(1, np.float32),
        "std": np.ones(1, np.float32),
        "crop_fraction": 1.0,
        "resident": True,
    }
    return DataSpec(**fields | changes)


def examples(images, labels, class_names):
    """A split in memory, nothing broken."""
    return Examples(images, labels, class_names, broken=(), readable=np.ones(len(labels), bool))


def built(config, devices=None) -> Experiment:
    """The experiment of a config, its data opened for what a net has to know of it."""
    check_values(config)
    return build(config, TrainingData(config).spec, make_mesh(devices))


def train_stream(config, devices=None):
    """The training stream of a config, and its evaluation stream."""
    mesh, data = make_mesh(devices), TrainingData(config)
    experiment = build(config, data.spec, mesh)
    platform, steps = platform_of(mesh), experiment.steps_per_dispatch
    return data.train_stream(mesh, platform, batch_size=config.batch_size, steps_per_dispatch=steps)


def eval_stream(config, devices=None):
    mesh, data = make_mesh(devices), TrainingData(config)
    experiment = build(config, data.spec, mesh)
    return data.eval_stream(mesh, experiment.platform, batch_size=experiment.eval_batch_size)


def steps_of(config, devices, steps):
    """The state before the first of so many steps of a config, and after each; and its metrics. One step a dispatch,
    to which the state before is donated.
    """
    with config.unlocked():
        config.steps_per_dispatch = 1
    experiment, stream = built(config, devices), train_stream(config, devices)
    state = experiment.initial_state()
    yield state, None
    for step in range(steps):
        span = put(np.array([step, step + 1], np.int32), experiment.mesh, jax.sharding.PartitionSpec())
        seed = np.uint32(config.seed)
        state, metrics = experiment.train_steps(state, stream.arrays, stream.batches(step, 1), span, seed)
        yield state, jax.tree.map(lambda x: float(x[0]), metrics)


def run_steps(config, devices, steps):
    """The state and the metrics after so many steps of a config, one a dispatch."""
    states, history = zip(*steps_of(config, devices, steps), strict=True)
    return states[-1], list(history[1:])


# ---- Nets.


def trace(model, image_shape, batch=2):
    """(logits, variables) as shapes: nothing is computed."""
    variables, images = variable_shapes(model, image_shape), jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    return jax.eval_shape(functools.partial(model.apply, train=False), variables, images), variables


def random_variables(model, image_shape):
    """Variables away from their initial values; kernels with the variance 1 / fan_in."""
    rng = np.random.default_rng(0)
    shapes = variable_shapes(model, image_shape)

    def draw(leaf):
        normal = rng.standard_normal(leaf.shape).astype(np.float32)
        return normal / np.float32(np.prod(leaf.shape[:-1]) ** 0.5) if leaf.ndim > 1 else 1 + 0.2 * np.abs(normal)

    return jax.tree.map(draw, shapes)


def images(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


# ---- Runs.


def lines(workdir):
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(config, workdir, devices):
    """The state in a run's newest checkpoint."""
    with Writer(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(checkpoints.find("newest")[0], built(config, devices).abstract_state())[0]


def assert_same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def stop_at(monkeypatch, step):
    """Sends this process a SIGTERM when `step` is about to be trained, as a machine that is taken away does."""
    batches = ResidentTrain.batches

    def signalling(self, first, count):
        if first < step <= first + count:
            signal.raise_signal(signal.SIGTERM)
        return batches(self, first, count)

    monkeypatch.setattr(ResidentTrain, "batches", signalling)


# ---- Sources.


class Numbers:
    """Examples that carry their row: label and every pixel are the row's number. Some may be broken."""

    image_shape = (8, 8, 3)
    class_names = tuple(map(str, range(250)))

    def __init__(self, count, broken=()):
        self._count, self._broken, self.read = count, set(broken), []

    def __len__(self):
        return self._count

    def __getitem__(self, row):
        self.read.append(row)
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (row, row, row)).save(file, "PNG")
        return (file.getvalue()[:20] if row in self._broken else file.getvalue()), row

    def name(self, row):
        return f"example {row}"


# ---- Pictures.


def save(path, color, size=(40, 30), kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path, kind)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode, color, size=(16, 8)):
    return PIL.Image.new(mode, size, color)


def photograph(height=120, width=161):
    """A smooth picture, as Pillow sees it."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(x / a + y / b) for a, b in ((17, 29), (23, -19), (-31, 13))]
    return PIL.Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def png_claiming(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def jpeg_claiming(width, height, data=None):
    data = bytearray(data or encoded(photograph(), "JPEG"))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def broken_files():
    """More than 30: empty, cut off at many places, another format, garbage, bombs."""
    files = {"empty.jpg": b"", "newline.png": b"\n", "text.jpg": b"this is no picture", "page.png": b"<!DOCTYPE html>"}
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(photograph(), kind)
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
            files[f"cut{share}.{kind.lower()}"] = whole[: int(len(whole) * share)]
        files[f"no_head.{kind.lower()}"] = whole[40:]
        if kind != "WEBP":  # where zeros are a picture like any other
            files[f"zeros.{kind.lower()}"] = whole[:30] + bytes(len(whole))
    files["bomb.png"] = png_claiming(60_000, 60_000)
    files["wide_bomb.png"] = png_claiming(1_000_000, 1_000)
    files["bomb.jpg"] = jpeg_claiming(60_000, 60_000)
    files["no_size.png"] = png_claiming(0, 0)
    files["short_pixels.png"] = png_claiming(300, 300)
    files["random.jpg"] = np.random.default_rng(0).bytes(5000)
    files["random.webp"] = b"RIFF\x00\x10\x00\x00WEBPVP8 " + np.random.default_rng(1).bytes(4096)
    return files
