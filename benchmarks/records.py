"""What was measured, an object a line: written by `benchmarks.recipes`, read for tables.

The record of a run has
    name, config, command    what it was called in its list, its recipe, and the command line that is the same run
    overrides, seed          what was set in the recipe, {"optimizer.weight_decay": 3e-4}
    goes_on_from             "NAME_SEED at step 350" where it began with another run's checkpoint, else None
    net, data, epochs        the net, the data set, and how often it was seen
    final, best              {"top1", "top5", "loss", …} of the last evaluation and of the best, which has its "step"
    images_per_second        of training alone
    seconds, pieces          from the start of the command to the result, over all pieces; how many there were
    hardware, versions       such as "1 x NVIDIA H100 80GB HBM3", and {"jax": "0.11.2", …}
    date, commit             when it ended, in ISO 8601; the commit of the code, None where that is not known
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def read_records(file: pathlib.Path) -> list[dict[str, Any]]:
    """The records in a file, [] where there is none. A line that is no object, such as one cut off, is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_record(file: pathlib.Path, record: Record) -> None:
    """Adds a record to a file, in one piece."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def commit_of(folder: pathlib.Path) -> str | None:
    """The commit of a repository, with "+" where a tracked file is another than there; None without a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu() -> str:
    """Such as "2 cores of AMD EPYC 9B14": the cores of this process, and their name where the system tells it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{cores} cores of {model[1] if model else platform.processor() or platform.machine()}"


def by_name(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each name, by seed; of two of the same name and seed the later one counts."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(record["name"], {})[record["seed"]] = record
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in found.items()}


def mean_and_spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Such as "97.52 ± 0.07": the mean and the standard deviation of a sample; of one value only that."""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


HEAD = ("run", "net", "epochs", "seeds", "top-1 %, last", "top-1 %, best", "loss", "minutes", "images/s")


def table(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """A row for each name, as HEAD has the columns: means over the seeds, with their standard deviations."""
    rows: list[tuple[str, ...]] = []
    for name, runs in by_name(records).items():
        rates = [run["images_per_second"] for run in runs if run["images_per_second"]]
        rows.append(
            (
                name,
                runs[0]["net"],
                f"{runs[0]['epochs']:.4g}",
                ", ".join(str(run["seed"]) for run in runs),
                mean_and_spread([run["final"]["top1"] for run in runs], 100),
                mean_and_spread([run["best"]["top1"] for run in runs], 100),
                mean_and_spread([run["final"]["loss"] for run in runs], digits=4),
                mean_and_spread([run["seconds"] / 60 for run in runs], digits=1),
                f"{statistics.fmean(rates):,.0f}" if rates else "",
            )
        )
    return rows


def plain(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text, its columns aligned."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as Markdown has it."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"|{'---|' * len(head)}\n" if line[0] == "---" else f"| {' | '.join(line)} |\n" for line in lines)
