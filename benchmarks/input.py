"""Measures the images per second that a host can feed: our pipeline, TFDS with tf.data, a PyTorch DataLoader.

    python -m benchmarks.input [--data=imagenet2012] [--data_dir=DIR] [--images=2000] [--rounds=3] [--step=0.02]
        [--json=FILE]

All three read the same pictures, take random resized crops of 224 pixels, mirror half of them and stack uint8 batches.
TensorFlow and PyTorch come with the extras [prepare] and [torch]; what is not installed is left out. Each pipeline has
a process of its own and all cores. The rounds take turns, so that what else the machine does falls on all alike.

The table has the median round's images per second, its images per second of processor time, and the highest memory.
Memory includes the children's, with shared pages counted once; the last column leaves out what the process held when
its libraries were loaded. With --step the reader then waits so many seconds with each batch, as for an accelerator's
step: a pipeline that reads ahead meanwhile loses nothing by it until the steps alone take the time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # imported only by the processes that use them
    import psutil
    import tensorflow as tf

T = TypeVar("T")

SIZE, BATCH = 224, 64
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Runs every pipeline that is installed, and prints the table."""
    args = parse_arguments()
    if args.only:
        measure(args.only, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.data != "synthetic" and importlib.util.find_spec("tensorflow"):
            args.tfrecord = write_tfrecord(args, folder)
        table = run(args)
    what = f"{args.data}, {CORES} cores, crops of {SIZE}, batches of {BATCH}, steps of {args.step} s"
    print(f"{what}, median of {args.rounds} rounds")
    print_table(table)
    if args.json:
        with open(args.json, "a") as file:
            for name, row in table.items():
                about = {"data": args.data, "cores": CORES, "size": SIZE, "batch": BATCH, "step_seconds": args.step}
                file.write(json.dumps({"pipeline": name, **about, **row}) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line. --only and --tfrecord are for the processes that `run` starts, one for each pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenet2012", help="a TFDS set of JPEGs, or synthetic")
    parser.add_argument("--data_dir", help="where TFDS has it; default: TFDS_DATA_DIR")
    parser.add_argument("--images", type=int, default=2000, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.0, help="seconds that an accelerator has each batch for")
    parser.add_argument("--json", help="append the figures to this file, an object a line")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--tfrecord", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Prints a row for each pipeline, with how many times its speed that of our faster one is."""
    print(f"{'':18}{'images/s':>10}{'per CPU-s':>11}{'memory MB':>11}{'less libraries':>16}{'ours is':>10}")
    best = max((name for name in table if name.startswith("ours")), key=lambda name: table[name]["wall"])
    for name, row in table.items():
        ratio = "" if name.startswith("ours") else f"{table[best]['wall'] / row['wall']:.2f}x"
        print(f"{name:18}{row['wall']:10.0f}{row['cpu']:11.0f}{row['memory']:11.0f}{row['more']:16.0f}{ratio:>10}")


# ---- The pipelines: each yields the number of images of one batch after another, without an end.


def ours(args: argparse.Namespace, workers: int) -> Iterator[int]:
    """The streaming pipeline, up to arrays on the device. The flip is left out: the compiled step does it for free."""
    import jax

    from resattn_jax.data.sources import open_source
    from resattn_jax.data.streaming import Reading, StreamingTrain
    from resattn_jax.data.transforms import TrainTransform
    from resattn_jax.runtime import make_mesh, platform_of

    source = open_source(args.data, "train", args.data_dir)
    transform = TrainTransform(SIZE, True, AREA, ASPECT, (0, 0.0))
    mesh = make_mesh(jax.devices()[:1])
    reading = Reading(workers, skip_broken=False, shares_host_memory=platform_of(mesh).shares_host_memory, mesh=mesh)
    stream = StreamingTrain(source, transform, reading, seed=0, batch_size=BATCH)
    for step in itertools.count():
        yield stream.batches(step, 1)["image"].shape[1]


def tf_data(args: argparse.Namespace) -> Iterator[int]:
    """What TFDS's guide to performance does: shuffled files, fused decoding and cropping, parallel map, prefetch."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")

    def train(data: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.image.extract_jpeg_shape(data)
        box = tf.constant([0.0, 0.0, 1.0, 1.0], shape=(1, 1, 4))
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, box, min_object_covered=0.0, area_range=AREA, aspect_ratio_range=ASPECT, max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = [begin[0], begin[1], size[0], size[1]]
        image = tf.image.resize(tf.image.decode_and_crop_jpeg(data, window, channels=3), (SIZE, SIZE))
        return tf.image.random_flip_left_right(tf.cast(image, tf.uint8)), label

    dataset = records_of(args).shuffle(1000).map(train, num_parallel_calls=tf.data.AUTOTUNE)
    for images, _ in dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE):
        yield len(images.numpy())


def records_of(args: argparse.Namespace) -> tf.data.Dataset:
    """The (JPEG, label) records as a tf.data set without an end."""
    import tensorflow as tf

    if args.data == "synthetic":
        from resattn_jax.data.sources import open_source

        source = open_source("synthetic", "train")
        data, labels = zip(*[source[row] for row in range(1000)], strict=True)
        return tf.data.Dataset.from_tensor_slices((list(data), list(labels))).repeat()
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(args.tfrecord)
    dataset = builder.as_dataset("train", decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=True)
    return dataset.map(lambda record: (record["image"], record["label"])).repeat()


def data_loader(args: argparse.Namespace) -> Iterator[int]:
    """What PyTorch's ImageNet example does, with Pillow and a worker process for each core."""
    import torch

    from benchmarks.torch_input import Pictures
    from resattn_jax.data.sources import open_source

    pictures = Pictures(open_source(args.data, "train", args.data_dir), SIZE, AREA, ASPECT)
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        pictures, BATCH, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True
    )
    while True:
        for images, _ in loader:
            yield len(images)


# {name: (the library that it cannot do without, the pipeline)}
PIPELINES: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[int]]]] = {
    "ours, threads": ("simplejpeg", functools.partial(ours, workers=0)),
    "ours, processes": ("grain", functools.partial(ours, workers=CORES)),
    "tf.data": ("tensorflow", tf_data),
    "DataLoader": ("torch", data_loader),
}


# ---- The process of a pipeline.


def measure(name: str, args: argparse.Namespace) -> None:
    """Measures a round of args.images images for each line of standard input, and prints its figures as JSON.

    Prints "ready" after the first batches. Ends the process.
    """
    libraries = {"tf.data": "tensorflow", "DataLoader": "torch"}.get(name, "jax")
    __import__(libraries)
    __import__("tensorflow_datasets")
    empty, batches, watch = memory(), PIPELINES[name][1](args), Watch()
    watch.start()
    for _ in range(6):
        next(batches)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        for _ in range(6):  # prepared while others had their turn
            next(batches)
        began, used, count = time.perf_counter(), seconds(), 0
        while count < args.images:
            count += next(batches)
            time.sleep(args.step)
        wall, cpu = time.perf_counter() - began, seconds() - used
        figures = {"wall": count / wall, "cpu": count / cpu, "memory": watch.highest, "more": watch.highest - empty}
        print(json.dumps(figures), flush=True)
    os._exit(0)  # its threads and workers would read ahead without an end


class Watch(threading.Thread):
    """A thread that keeps the highest memory so far, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            self.highest = max(self.highest, memory())


def memory() -> float:
    """The memory of this process and its children, in MB; pages that several share count once."""
    return sum(read(p, lambda p: p.memory_full_info().pss, 0) for p in family()) / 2**20


def seconds() -> float:
    """The processor time of this process and its living children."""
    return sum(read(p, lambda p: sum(p.cpu_times()[:2]), 0.0) for p in family())


def family() -> list[psutil.Process]:
    """This process and its descendants."""
    import psutil

    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def read(process: psutil.Process, what: Callable[[psutil.Process], T], otherwise: T) -> T:
    """What a process says of itself, or `otherwise` if it has just ended."""
    import psutil

    try:
        return what(process)
    except psutil.Error:
        return otherwise


# ---- All of them.


class Worker:
    """A pipeline in a process of its own. It is stopped unless it has its turn, since it would read ahead."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name = name
        command = [sys.executable, "-m", "benchmarks.input", "--only", name, *sys.argv[1:]]
        command += ["--tfrecord", args.tfrecord] if args.tfrecord else []
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdin
        assert self.process.stdout
        self._input, self._output = self.process.stdin, self.process.stdout
        self._answer()
        self._signal(signal.SIGSTOP)

    def round(self) -> dict[str, float]:
        """Gives it a turn, and returns the figures of that round."""
        self._signal(signal.SIGCONT)
        self._input.write("go\n")
        self._input.flush()
        figures = self._answer()
        self._signal(signal.SIGSTOP)
        return figures

    def end(self) -> None:
        """Kills the process and its children."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _answer(self) -> Any:
        """The next line of its output that is JSON; libraries print others."""
        for line in self._output:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise SystemExit(f"{self.name} ended with status {self.process.wait()}")


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{pipeline: {figure: median of its rounds}} of the pipelines that are installed."""
    workers = []
    for name, (library, _) in PIPELINES.items():
        if importlib.util.find_spec(library):
            workers.append(Worker(name, args))
        else:
            print(f"{name}: {library} is not installed; left out", file=sys.stderr)
    rounds = [[worker.round() for worker in workers] for _ in range(args.rounds)]
    for worker in workers:
        worker.end()
    return {
        worker.name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for worker, results in zip(workers, zip(*rounds, strict=True), strict=True)
    }


def write_tfrecord(args: argparse.Namespace, folder: str) -> str:
    """Writes the training split as TFRecord, TFDS's default format, for tf.data to read. Returns the folder."""
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from array_record.python import array_record_data_source

    builder = tfds.builder(args.data, data_dir=args.data_dir)
    for path in pathlib.Path(builder.data_path).iterdir():
        if path.name == "dataset_info.json":
            info = json.loads(path.read_text())
            info["fileFormat"] = "tfrecord"
            (pathlib.Path(folder) / path.name).write_text(json.dumps(info))
        elif "-train.array_record" in path.name:
            records = array_record_data_source.ArrayRecordDataSource(str(path))
            name = path.name.replace("array_record", "tfrecord")
            with tf.io.TFRecordWriter(f"{folder}/{name}") as writer:
                for row in range(len(records)):
                    writer.write(records[row])
        elif "array_record" not in path.name:
            shutil.copy(path, folder)
    return folder


if __name__ == "__main__":
    main()
