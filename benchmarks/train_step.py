"""Measures images per second of training and inference steps, beside PyTorch and beside what the machine can do.

    python -m benchmarks.train_step --net=ra92_cifar --batch=64 [--dtype=float32] [--json=FILE]

Ours is the train step of a run: it takes rows from a set on the device, normalises them, and does the forward pass, the
backward pass, and SGD with Nesterov momentum and weight decay. PyTorch's has its batch ready on the device and does the
rest, with the blocks of pytorchcv; install them by `pip install torch`, and pytorchcv with --no-deps. Each
implementation has a process of its own; they take turns, so that what else the machine does meets them all alike. The
time to compile is listed apart. After a warm-up, every call of a step, or of several in one dispatch, is timed until
its result is there, and the median counts.

FLOP/s are those of the net: 2 for a multiply-add, three times as many for training. The machine's peak is that of a
large matrix product in the same process, its bandwidth that of a large copy. Bytes are those that the kernels of the
compiled program read and write, by XLA's cost analysis; their rate may exceed the memory's where caches serve.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

IMPLEMENTATIONS = ("resattn_jax", "torch eager", "torch channels_last", "torch compile")


def main() -> None:
    """Runs every implementation that is installed, and prints the table."""
    args = parse_arguments()
    if args.only:
        time_one(args)
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


def parse_arguments() -> argparse.Namespace:
    """The command line. --only is for the processes that `measure` starts: each times that one implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="ra92_cifar", help="for PyTorch a double-skip one: ra56_double_skip")
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
    return args


def is_installed(name: str) -> bool:
    """Whether an implementation can run here; prints what is missing if it cannot."""
    needed = ("jax",) if name == "resattn_jax" else ("torch", "pytorchcv")
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        print(f"{name}: {' and '.join(missing)} not installed; left out", file=sys.stderr)
    return not missing


def time_one(args: argparse.Namespace) -> None:
    """Times the implementation that args.only names, in this process. Only here are JAX and PyTorch imported."""
    if args.only == "resattn_jax":
        from benchmarks.jax_steps import steps_to_time
    else:
        from benchmarks.torch_steps import steps_to_time
    from benchmarks.timed import load_net, take_turns

    try:
        net = load_net(args.net, args.size, args.dtype)
        take_turns(steps_to_time(args.only, net, args.batch[0], args.what))
    except ValueError as error:  # such as a net that pytorchcv cannot build
        sys.exit(f"{args.only}: {error}")


class Worker:
    """An implementation in a process of its own, which compiles at once and then waits for its turns."""

    def __init__(self, name: str, batch: int, args: argparse.Namespace):
        from resattn_jax.__main__ import LARGE_PAGES

        self.name, self.batch = name, batch
        command = [sys.executable, "-m", "benchmarks.train_step", "--only", name, "--net", args.net]
        command += ["--size", str(args.size), "--batch", str(batch), "--dtype", args.dtype, "--what", *args.what]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        if name == "resattn_jax":
            environment |= LARGE_PAGES  # as main.py runs
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin
        assert self.process.stdout
        self._input, self._output = self.process.stdin, self.process.stdout

    def is_ready(self) -> bool:
        """Waits until it has compiled or taken its turn. Prints its exit status and returns False if it has ended."""
        if self._output.readline() == "ready\n":
            return True
        print(f"{self.name}, batch {self.batch}: ended with status {self.process.wait()}", file=sys.stderr)
        return False

    def start_turn(self, seconds: float) -> None:
        """Gives it a turn."""
        self._input.write(f"{seconds}\n")
        self._input.flush()

    def figures(self) -> list[dict[str, Any]]:
        """Ends the process, and returns the figures of its steps."""
        output, _ = self.process.communicate()
        return [json.loads(line) for line in output.splitlines()]


def measure(names: Sequence[str], batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of the implementations that do not fail. They compile, and take their turns, one after the other."""
    workers = []
    for name in names:
        worker = Worker(name, batch, args)
        if worker.is_ready():
            workers.append(worker)
    for _ in range(args.turns):
        for worker in list(workers):
            worker.start_turn(args.seconds / args.turns)
            if not worker.is_ready():
                workers.remove(worker)
    return [figures for worker in workers for figures in worker.figures()]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a row for each step, with how many times its speed ours is."""
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
