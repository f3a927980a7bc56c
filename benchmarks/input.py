"""Images per second that a host can feed: our pipeline, TFDS with tf.data, and a PyTorch DataLoader with Pillow.

    python -m benchmarks.input [--data=imagenet2012] [--data_dir=DIR] [--images=2000] [--rounds=3]

All three read the same pictures, take random resized crops of 224 pixels, mirror half of them and stack uint8 batches.
TensorFlow and PyTorch come with the extras [prepare] and [torch]; what is not installed is left out. Each pipeline has
a process of its own and all cores; rounds take turns, so that what else the machine does falls on all alike. Printed
are the median round's images a second, images per second of processor time, and the memory at its highest, children
included and shared pages counted once, less what the process held when its libraries were loaded.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

SIZE, BATCH = 224, 64
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PIPELINES = {
    "ours, threads": ("simplejpeg", lambda args: ours(args, 0)),
    "ours, processes": ("grain", lambda args: ours(args, CORES)),
    "tf.data": ("tensorflow", lambda args: tf_data(args)),
    "DataLoader": ("torch", lambda args: data_loader(args)),
}


def ours(args, workers):
    """The streaming pipeline up to arrays on the device; the flip is a part of the compiled step and costs nothing."""
    import jax

    from resattn_jax.data.sources import open_source
    from resattn_jax.data.streaming import Streaming
    from resattn_jax.data.transforms import TrainTransform
    from resattn_jax.runtime import make_mesh

    source = open_source(args.data, "train", args.data_dir)
    transform = TrainTransform(SIZE, True, AREA, ASPECT, (0, 0.0))
    pipeline = Streaming(source, make_mesh(jax.devices()[:1]), transform, workers, False)
    step = 0
    while True:
        yield pipeline.train_batches(0, step, 1, BATCH, 1)["image"].shape[1]
        step += 1


def tf_data(args):
    """As TFDS's guide to performance has it: shuffled files, fused decoding and cropping, parallel map, prefetch."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")

    def train(data, label):
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


def records_of(args):
    """(JPEG, label) records as a tf.data set without an end."""
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


def data_loader(args):
    """What PyTorch's ImageNet example does, with Pillow: a worker process for each core."""
    import io
    import math

    import numpy as np
    import PIL.Image
    import torch

    from resattn_jax.data.sources import open_source

    class Pictures(torch.utils.data.Dataset):
        def __init__(self):
            self.source = open_source(args.data, "train", args.data_dir)

        def __len__(self):
            return len(self.source)

        def __getitem__(self, row):
            data, label = self.source[row]
            image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
            width, height = image.size
            for _ in range(10):
                area = width * height * torch.empty(1).uniform_(*AREA).item()
                shape = math.exp(torch.empty(1).uniform_(*map(math.log, ASPECT)).item())
                w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
                if 0 < w <= width and 0 < h <= height:
                    break
            else:
                w, h = width, height
            left = int(torch.randint(0, width - w + 1, ()))
            top = int(torch.randint(0, height - h + 1, ()))
            image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR)
            if torch.rand(()) < 0.5:
                image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)), label

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Pictures(), BATCH, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True
    )
    while True:
        for images, _ in loader:
            yield len(images)


class Watch(threading.Thread):
    """The highest memory, in MB, of this process and its children; pages that several share count once."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.done = 0.0, threading.Event()

    def run(self):
        while not self.done.wait(0.2):
            self.highest = max(self.highest, memory())


def memory():
    """In MB."""
    return sum(read(p, lambda p: p.memory_full_info().pss, 0) for p in family()) / 2**20


def seconds():
    """Processor time of this process and its living children."""
    return sum(read(p, lambda p: sum(p.cpu_times()[:2]), 0.0) for p in family())


def family():
    import psutil

    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def read(process, what, otherwise):
    import psutil

    try:
        return what(process)
    except psutil.Error:  # it has just ended
        return otherwise


def measure(name, args):
    """Warm up, wait for a word on stdin, do a round of so many images, say how it went; again until stdin ends."""
    libraries = {"tf.data": "tensorflow", "DataLoader": "torch"}.get(name, "jax")
    __import__(libraries)
    __import__("tensorflow_datasets")
    empty, batches, watch = memory(), PIPELINES[name][1](args), Watch()
    watch.start()
    for _ in range(6):
        next(batches)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        for _ in range(6):  # what was prepared while others had their turn
            next(batches)
        began, used, count = time.perf_counter(), seconds(), 0
        while count < args.images:
            count += next(batches)
        wall, cpu = time.perf_counter() - began, seconds() - used
        figures = {"wall": count / wall, "cpu": count / cpu, "memory": watch.highest, "more": watch.highest - empty}
        print(json.dumps(figures), flush=True)
    os._exit(0)  # threads and workers that read ahead without an end


def main():
    """Runs every pipeline that is installed and prints the table."""
    import importlib.util

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenet2012", help="a TFDS set of JPEGs, or synthetic")
    parser.add_argument("--data_dir", help="where TFDS has it; default: TFDS_DATA_DIR")
    parser.add_argument("--images", type=int, default=2000, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--tfrecord", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return measure(args.only, args)
    with tempfile.TemporaryDirectory() as folder:
        if args.data != "synthetic" and importlib.util.find_spec("tensorflow"):
            args.tfrecord = write_tfrecord(args, folder)
        table = run(args)
    print(f"{args.data}, {CORES} cores, crops of {SIZE}, batches of {BATCH}, median of {args.rounds} rounds")
    print(f"{'':18}{'images/s':>10}{'per CPU-s':>11}{'memory MB':>11}{'less libraries':>16}{'ours is':>10}")
    best = max((name for name in table if name.startswith("ours")), key=lambda name: table[name]["wall"])
    for name, row in table.items():
        ratio = "" if name.startswith("ours") else f"{table[best]['wall'] / row['wall']:.2f}x"
        print(f"{name:18}{row['wall']:10.0f}{row['cpu']:11.0f}{row['memory']:11.0f}{row['more']:16.0f}{ratio:>10}")


def run(args):
    """{pipeline: medians of its rounds}. A pipeline that does not have its turn is stopped: it would read ahead."""
    import importlib.util
    import signal

    def everyone(process, number):
        os.killpg(process.pid, number)

    running, rounds = {}, {}
    for name, (library, _) in PIPELINES.items():
        if not importlib.util.find_spec(library):
            print(f"{name}: {library} is not installed; left out", file=sys.stderr)
            continue
        command = [sys.executable, "-m", "benchmarks.input", "--only", name, *sys.argv[1:]]
        command += ["--tfrecord", args.tfrecord] if args.tfrecord else []
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        running[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        answer(running[name], name)
        everyone(running[name], signal.SIGSTOP)
    for _ in range(args.rounds):
        for name, process in running.items():
            everyone(process, signal.SIGCONT)
            process.stdin.write("go\n")
            process.stdin.flush()
            rounds.setdefault(name, []).append(answer(process, name))
            everyone(process, signal.SIGSTOP)
    for process in running.values():
        everyone(process, signal.SIGKILL)
        process.wait()
    return {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in rounds.items()
    }


def answer(process, name):
    """The next line that is JSON; libraries print others."""
    for line in process.stdout:
        try:
            return json.loads(line)
        except ValueError:
            continue
    raise SystemExit(f"{name} ended with status {process.wait()}")


def write_tfrecord(args, folder):
    """The set's training split as TFRecord, the format that TFDS writes by default and tf.data reads. Returns where."""
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
