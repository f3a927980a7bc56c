"""What a traced training step spends its time on, by kind of operation: a table, and a picture of it.

    python -m benchmarks.profile_picture --workdir=runs/digits --output=profile.png

Reads the newest trace that `--profile=START:COUNT` wrote into a workdir, of one host. Times are those of operations,
summed over the threads of a CPU or the streams of a GPU, and divided by the dispatches traced.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_AROUND = {"while", "call", "conditional"}  # hold other operations, which are counted themselves
_SHOWN = 12  # kinds


def newest_trace(workdir: pathlib.Path) -> pathlib.Path:
    """Raises SystemExit where there is none."""
    files = sorted(workdir.glob("plugins/profile/*/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise SystemExit(f"there is no trace in {workdir}; --profile=START:COUNT writes one")
    return files[-1]


def operations(data: Any) -> Iterator[tuple[str, str, float]]:
    """(program, operation, milliseconds) of each execution of each operation in a `jax.profiler.ProfileData`."""
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and event.duration_ns:
                    yield str(stats.get("hlo_module", "")), str(stats["hlo_op"]), event.duration_ns / 1e6


def count_steps(data: Any) -> int:
    """How many dispatches were traced. Each is a step where a dispatch is of one, as on the CPU."""
    return sum(event.name == "train" for plane in data.planes for line in plane.lines for event in line.events)


def kind(operation: str) -> str:
    """The name without its number: "loop_add_fusion.12.clone" is "loop_add_fusion"."""
    return re.sub(r"(\.\d+|\.clone|\.remat\d*|_\d+)*$", "", operation)


def by_kind(data: Any, program: str = "jit_steps") -> dict[str, tuple[float, float]]:
    """{kind: (milliseconds, operations) of a step}, the most costly first, of the train step's program."""
    steps = max(count_steps(data), 1)
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for module, operation, milliseconds in operations(data):
        if module.startswith(program) and (name := kind(operation)) not in _AROUND:
            sums[name][0] += milliseconds / steps
            sums[name][1] += 1 / steps
    return {name: (time, count) for name, (time, count) in sorted(sums.items(), key=lambda item: -item[1][0])}


def draw(kinds: Mapping[str, tuple[float, float]], output: pathlib.Path, title: str) -> None:
    """Bars of the most costly kinds, the others as one."""
    shown = [(name, *values) for name, values in kinds.items()]
    if rest := shown[_SHOWN:]:
        shown = [*shown[:_SHOWN], ("others", sum(row[1] for row in rest), sum(row[2] for row in rest))]
    whole = sum(time for _, time, _ in shown)
    figure = Figure(figsize=(8, 0.32 * len(shown) + 1.1), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    bars = axis.barh([name for name, _, _ in shown], [time for _, time, _ in shown], color="#4878a8")
    axis.bar_label(
        bars, [f"{time / whole:.0%}, {count:,.0f} a step" for _, time, count in shown], padding=4, fontsize=9
    )
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("ms a step, summed over threads")
    axis.set_title(title, loc="left", fontsize=11)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, help="the picture, .png; default: none")
    args = parser.parse_args()
    data = jax.profiler.ProfileData.from_file(str(newest_trace(args.workdir)))
    kinds = by_kind(data)
    whole = sum(time for time, _ in kinds.values())
    if not whole:
        raise SystemExit("the trace holds no operation of the train step; on a GPU see docs/performance.md")
    print("| kind of operation | ms a step | share | a step |\n|---|---|---|---|")
    for name, (time, count) in kinds.items():
        print(f"| {name} | {time:.3f} | {time / whole:.1%} | {count:,.1f} |")
    if args.output:
        draw(kinds, args.output, f"a train step, {whole:,.1f} ms of operations")


if __name__ == "__main__":
    main()
