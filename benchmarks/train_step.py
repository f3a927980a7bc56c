"""Images per second of training and inference steps, beside PyTorch and beside what the machine can do.

    python -m benchmarks.train_step --net=ra92_cifar --batch=64 [--dtype=float32] [--json=FILE]

Ours is the train step of a run: rows taken from a set on the device, normalised, forward, backward, SGD with Nesterov
momentum and weight decay. PyTorch's (pytorchcv's blocks; `pip install torch`, and pytorchcv with --no-deps) has its
batch ready on the device and does the rest. Compilation is apart; after a warm-up every step, or dispatch of several,
is timed until its result is there, and the median counts. Each implementation has a process of its own; they take
turns, so that what else the machine does meets them all alike.

FLOP/s are those of the net: 2 for a multiply-add, three times as many for training. The machine's peak is that of a
large matrix product in the same process, its bandwidth that of a large copy; bytes are those the compiled program's
kernels read and write (XLA's cost analysis), so that their rate may exceed the memory's where caches serve.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from main import LARGE_PAGES

CLASSES = {32: 10}  # else 1000
IMPLEMENTATIONS = ("resattn_jax", "torch eager", "torch channels_last", "torch compile")


@dataclasses.dataclass
class Timed:
    """What is timed: `call` does `steps` steps and waits for their result. figures: of the median seconds of a call."""

    call: Callable[[], Any]
    steps: int
    figures: Callable[[float], dict[str, Any]]
    seconds: list[float] = dataclasses.field(default_factory=list)

    def turn(self, seconds: float, at_least: int = 2) -> None:
        """Calls for so many seconds, and at least so often, after one call that is not timed."""
        self.call()
        began, before = time.perf_counter(), len(self.seconds)
        while len(self.seconds) < before + at_least or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            self.call()
            self.seconds.append(time.perf_counter() - start)


def median_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Of one call, called for so many seconds."""
    timed = Timed(call, 1, lambda _: {})
    timed.turn(seconds, at_least=5)
    return statistics.median(timed.seconds)


def spec_and_counts(args):
    """The net's model, and its parameters and multiply-adds."""
    import jax
    import jax.numpy as jnp

    from resattn_jax.models import create_model
    from resattn_jax.models.count import count_multiply_adds, count_parameters
    from resattn_jax.runtime import compute_dtype

    model = create_model(args.net, num_classes=CLASSES.get(args.size, 1000), dtype=compute_dtype(args.dtype))
    shape = (args.size, args.size, 3)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return model, count_parameters(variables["params"]), count_multiply_adds(model, shape, variables)


def ours(args):
    """This project's steps, compiled: yields one Timed for inference and one for training."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from resattn_jax.data.resident import Resident
    from resattn_jax.runtime import make_mesh
    from resattn_jax.train_step import Recipe, create_state, make_eval_step, make_train_steps

    model, _, multiply_adds = spec_and_counts(args)
    mesh = make_mesh(jax.devices()[:1])
    device, on_cpu = jax.devices()[0], jax.default_backend() == "cpu"
    recipe = Recipe(0, np.zeros(1), np.ones(1), 0, False, 0.0, 0, 0.0, None)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9, nesterov=True))
    shape = (args.size, args.size, 3)
    rng = np.random.default_rng(0)
    arrays = {
        "image": jnp.asarray(rng.integers(0, 256, (args.batch, *shape), np.uint8)),
        "label": jnp.asarray(rng.integers(0, model.num_classes, args.batch), jnp.int32),
    }
    state = jax.jit(lambda: create_state(model, optimizer, recipe, shape))()

    peak, bandwidth = machine_peaks(model.dtype)

    def figures(what, compiled, compile_seconds, steps, passes, seconds):
        cost = compiled.cost_analysis() or {}
        moved = cost.get("bytes accessed", float("nan"))
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "implementation": "resattn_jax",
            "what": what,
            "images_per_second": args.batch * steps / seconds,
            "step_seconds": seconds / steps,
            "compile_seconds": compile_seconds,
            "flops": 2 * passes * multiply_adds * args.batch * steps / seconds,
            "peak_flops": peak,
            "bytes_per_image": moved / args.batch,
            "bytes_per_second": moved * steps / seconds,
            "peak_bytes_per_second": bandwidth,
            "memory_bytes": memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device": device.device_kind,
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
        }

    if "inference" in args.what:
        step = make_eval_step(model, recipe, mesh, Resident.take)
        arguments = (arrays, jnp.arange(args.batch, dtype=jnp.int32), jnp.ones(args.batch, bool))
        infer, compile_seconds = compile_timed(step, state.variables, *arguments)
        yield Timed(
            lambda: jax.block_until_ready(infer(state.variables, *arguments)),
            1,
            functools.partial(figures, "inference", infer, compile_seconds, 1, 1),
        )

    if "train" in args.what:
        room = 1 if on_cpu else 10
        steps = make_train_steps(model, optimizer, recipe, mesh, Resident.take, room)
        rows = jnp.tile(jnp.arange(args.batch, dtype=jnp.int32), (room, 1))
        compiled, compile_seconds = compile_timed(steps, state, arrays, rows, np.int32(room))

        def dispatch():
            nonlocal state
            state, metrics = compiled(state, arrays, rows, np.int32(room))
            jax.block_until_ready(metrics)

        yield Timed(dispatch, room, functools.partial(figures, "train", compiled, compile_seconds, room, 3))


def machine_peaks(dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product in `dtype`, and bytes/s that a large copy reads and writes."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    size = 4096 if on_cpu else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    flops = 2 * size**3 / median_seconds(lambda: jax.block_until_ready(product(matrix)), 1.0)
    array = jnp.zeros((64 if on_cpu else 512) << 20, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return flops, 2 * array.nbytes / median_seconds(lambda: jax.block_until_ready(copy(array)), 1.0)


def compile_timed(function, *arguments):
    """The compiled function and the seconds that took."""
    began = time.perf_counter()
    return function.lower(*arguments).compile(), time.perf_counter() - began


def theirs(args):
    """PyTorch's steps, in the variant of args.only. Yields as `ours` does."""
    import torch

    from benchmarks.torch_nets import torch_net, train_step

    model, parameters, multiply_adds = spec_and_counts(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[str(model.dtype)]
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    layout = torch.contiguous_format if args.only == "torch eager" else torch.channels_last
    net = torch_net(model.spec, model.num_classes, parameters).to(device, memory_format=layout)
    images = torch.rand(args.batch, 3, args.size, args.size, device=device).to(memory_format=layout)
    labels = torch.randint(0, model.num_classes, (args.batch,), device=device)
    called = torch.compile(net, dynamic=False) if args.only == "torch compile" else net
    cuda = device.type == "cuda"
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=1e-4, nesterov=True, fused=cuda or None)

    def infer():
        net.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            called(images)
        wait()

    def train():
        net.train()
        for _ in range(repeat):
            train_step(called, optimizer, images, labels, dtype)
        wait()

    def wait():
        if cuda:
            torch.cuda.synchronize()

    def figures(what, compile_seconds, steps, passes, seconds):
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "implementation": args.only,
            "what": what,
            "images_per_second": args.batch * steps / seconds,
            "step_seconds": seconds / steps,
            "compile_seconds": compile_seconds,
            "flops": 2 * passes * multiply_adds * args.batch * steps / seconds,
            "memory_bytes": torch.cuda.max_memory_allocated() if cuda else rss,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    repeat = 10 if cuda else 1
    for what in args.what:
        call, steps, passes = (train, repeat, 3) if what == "train" else (infer, 1, 1)
        began = time.perf_counter()
        call()
        compile_seconds = time.perf_counter() - began
        yield Timed(call, steps, functools.partial(figures, what, compile_seconds, steps, passes))


def main():
    """Runs every implementation that is installed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="ra92_cifar")
    parser.add_argument("--size", type=int, help="of the images; default: 32 for the cifar nets, else 224")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--what", nargs="+", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--seconds", type=float, default=10.0, help="to time each, over all its turns")
    parser.add_argument(
        "--turns", type=int, default=5, help="all are in memory between turns; 1: one after the other, each alone"
    )
    parser.add_argument("--json", help="append the figures to this file, an object a line")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or (32 if "cifar" in args.net else 224)
    if args.only:
        args.batch = args.batch[0]
        take_turns(list((ours if args.only == "resattn_jax" else theirs)(args)))
        return
    rows = []
    names = [name for name in args.implementations if is_installed(name)]
    for batch in args.batch:
        for together in [names] if args.turns > 1 else [[name] for name in names]:
            for figures in measure(together, batch, args):
                rows.append({"net": args.net, "size": args.size, "batch": batch, "dtype": args.dtype, **figures})
                if args.json:
                    with open(args.json, "a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print_table(rows)


def is_installed(name: str) -> bool:
    """Whether an implementation can run here; says so where it cannot."""
    needed = ("jax",) if name == "resattn_jax" else ("torch", "pytorchcv")
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        print(f"{name}: {' and '.join(missing)} not installed; left out", file=sys.stderr)
    return not missing


def take_turns(measured: list[Timed]) -> None:
    """Runs in a process of its own: a turn for each line of standard input, of so many seconds; then the figures."""
    print("ready", flush=True)
    for line in sys.stdin:
        for timed in measured:
            timed.turn(float(line))
        print("ready", flush=True)
    for timed in measured:
        print(json.dumps(timed.figures(statistics.median(timed.seconds))), flush=True)


def measure(names: list[str], batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of the implementations, each in a process of its own; a word on those that fail instead."""
    processes = {}
    for turn in range(args.turns + 1):  # the first is the start, with its compilation
        for name in names:
            if turn == 0:
                command = [sys.executable, "-m", "benchmarks.train_step", "--only", name, "--net", args.net]
                command += ["--size", str(args.size), "--batch", str(batch), "--dtype", args.dtype]
                command += ["--what", *args.what]
                environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
                if name == "resattn_jax":
                    environment |= LARGE_PAGES  # as main.py runs
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                processes[name] = subprocess.Popen(command, env=environment, text=True, **pipes)
            elif name in processes:
                processes[name].stdin.write(f"{args.seconds / args.turns}\n")
                processes[name].stdin.flush()
            if name in processes and processes[name].stdout.readline() != "ready\n":
                print(f"{name}, batch {batch}: ended with status {processes.pop(name).wait()}", file=sys.stderr)
    lines = "".join(process.communicate()[0] for process in processes.values())
    return [json.loads(line) for line in lines.splitlines()]


def print_table(rows):
    """Images a second, and how many times those of each PyTorch variant ours are."""
    mine = {(r["what"], r["batch"]): r for r in rows if r["implementation"] == "resattn_jax"}
    head = f"{'':11}{'batch':>6} {'implementation':20}{'images/s':>10}{'ms/step':>9}{'ours is':>9}{'TFLOP/s':>9}"
    print(head + f"{'of peak':>9}{'MB/image':>10}{'GB/s':>8}{'of peak':>9}{'memory GB':>11}{'compile s':>11}")
    for r in sorted(rows, key=lambda r: (r["what"], r["batch"])):
        own = mine.get((r["what"], r["batch"]))
        ratio = f"{own['images_per_second'] / r['images_per_second']:.2f}x" if own and own is not r else ""
        peak = f"{r['flops'] / own['peak_flops']:.0%}" if own else ""
        line = f"{r['what']:11}{r['batch']:6} {r['implementation']:20}{r['images_per_second']:10.0f}"
        line += f"{1e3 * r['step_seconds']:9.1f}{ratio:>9}{r['flops'] / 1e12:9.2f}{peak:>9}"
        if own is r:
            line += f"{r['bytes_per_image'] / 1e6:10.1f}{r['bytes_per_second'] / 1e9:8.0f}"
            line += f"{r['bytes_per_second'] / r['peak_bytes_per_second']:9.0%}"
        else:
            line += " " * 27
        print(line + f"{r['memory_bytes'] / 1e9:11.2f}{r['compile_seconds']:11.1f}")


if __name__ == "__main__":
    main()
