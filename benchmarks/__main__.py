"""Measures again what docs/ and README.md tell of speed and reliability, each in a process of its own.

    python -m benchmarks                       # what there is, and what of it this machine can measure
    python -m benchmarks --all                 # all of that, an hour or more; make bench is the same
    python -m benchmarks train_step_cpu kills

What a benchmark prints as JSON, an object a line, becomes benchmarks/results/NAME.jsonl, when it has ended well, with
the hardware, versions, date, commit and command in each. What cannot be measured here is named with what it lacks. Then
`python -m benchmarks.results` writes README.md's tables. Rows of what was tried and left out need the code of then.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.records import commit_of, cpu

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


@dataclasses.dataclass(frozen=True)
class Figure:
    """Figures of one file in benchmarks/results.

    page: where they are told of. commands: modules of benchmarks with their arguments. needs: keys of NEEDS.
    """

    page: str
    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()


_STEP = "train_step --json=/dev/stdout"
_TPU = "compiled --config=configs/cifar10_ra92.py --topology"
FIGURES = {
    "train_step_cpu": Figure(
        "docs/performance.md, CPU",
        (f"{_STEP} --seconds=30", f"{_STEP} --net=ra56_double_skip --batch=8 --seconds=30"),
        ("CPU",),
    ),
    "train_step_gpu": Figure(
        "docs/performance.md, GPU",
        (
            f"{_STEP} --batch 512 1024 --dtype=bfloat16 --turns=1",
            f"{_STEP} --net=ra56_double_skip --batch 128 256 --dtype=bfloat16 --turns=1",
        ),
        ("GPU",),
    ),
    "compiled_tpu": Figure(
        "docs/performance.md, TPU",
        tuple(f"{_TPU}={name}" for name in ("v5e:2x4", "v5e:16x16", "v6e:2x4", "v5p:2x2x2", "v4:2x2x2")),
        ("libtpu",),
    ),
    "compiled_gpu": Figure(
        "docs/performance.md, GPU",
        ("compiled --config=configs/cifar10_ra92.py --topology=h100 --batch_per_chip=512",),
        ("jax_cuda13_plugin",),
    ),
    "startup_cpu": Figure("docs/performance.md, Start-up", ("startup --rounds=3",), ("CPU", "cifar10")),
    "input": Figure(
        "docs/data.md",
        tuple(f"input --rounds=5 --step={step} --json=/dev/stdout" for step in (0, 0.02)),
        ("imagenet2012",),
    ),
    "kills": Figure("docs/reliability.md", ("kills --kills=100",), ("CPU",)),
    "long_run_cpu": Figure("docs/reliability.md", ("long_run --steps=10000",), ("CPU", "psutil")),
}


def _finds_gpu() -> bool:
    """Whether JAX finds a GPU, asked of another process: one that has asked holds the GPU's memory."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() == "gpu"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _is_prepared(data: str) -> bool:
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return (pathlib.Path(folder).expanduser() / data).is_dir()


# {what a figure needs: (whether it is there, the environment it is then measured with)}
NEEDS: dict[str, tuple[Callable[[], bool], dict[str, str]]] = {
    "CPU": (lambda: True, {"JAX_PLATFORMS": "cpu"}),
    "GPU": (_finds_gpu, {}),
    **{name: (functools.partial(_is_prepared, name), {}) for name in ("cifar10", "imagenet2012")},
    **{name: (functools.partial(_is_installed, name), {}) for name in ("libtpu", "jax_cuda13_plugin", "psutil")},
}


def main(argv: Sequence[str]) -> int:
    """Lists or measures, and returns the exit status: 1 when a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--all", action="store_true", help="measure all that this machine can")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in FIGURES]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(FIGURES)}")
    there = {need: NEEDS[need][0]() for need in sorted({need for figure in FIGURES.values() for need in figure.needs})}
    failed = []
    for name in args.names or FIGURES:
        figure = FIGURES[name]
        missing = [need for need in figure.needs if not there[need]]
        if missing:
            print(f"{name:16} skipped: no {' and no '.join(missing)} here", flush=True)
        elif args.all or args.names:
            if not measure(name, figure):
                failed.append(name)
        else:
            print(f"{name:16} {figure.page}: {' and '.join(f'python -m benchmarks.{c}' for c in figure.commands)}")
    for name in failed:
        print(f"{name:16} failed; its file is as it was", file=sys.stderr)
    return int(bool(failed))


def measure(name: str, figure: Figure, folder: pathlib.Path = RESULTS) -> bool:
    """Runs the commands of a figure and writes its file; whether all ended well."""
    environment = {**os.environ, **{k: v for need in figure.needs for k, v in NEEDS[need][1].items()}}
    rows = []
    for command in figure.commands:
        print(f"\n{name:16} python -m benchmarks.{command}", flush=True)
        module, *arguments = shlex.split(command)
        run = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        with subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                if (row := _object(line)) is not None:
                    rows.append({**row, **about(row), "command": f"python -m benchmarks.{command}"})
        if process.returncode:
            return False
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return True


def about(row: dict[str, Any]) -> dict[str, Any]:
    """What every row has beside its figures: hardware, versions, date, commit; what it says itself goes before."""
    installed = {}
    for library in ("jax", "jaxlib", "flax", "optax", "torch", "libtpu"):
        try:
            installed[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = row.get("device", "cpu")
    return {
        "hardware": cpu() if device == "cpu" else f"{device}, {cpu()}",
        "versions": {"python": sys.version.split()[0], **installed, **row.get("versions", {})},
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "commit": commit_of(ROOT),
    }


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
