"""Writes the tables of results into README.md and docs/paper.md, from what lies in benchmarks/results.

    python -m benchmarks.results

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`. Its rows are those that
benchmarks/results/wanted.toml asks for, with the runs of benchmarks/results/runs/*.jsonl, which are copies of the
results.jsonl that benchmarks.recipes writes, and the speeds that benchmarks.train_step writes. A row without a run is
"not run yet". tests/test_results.py holds the pages to it.
"""

from __future__ import annotations

import pathlib
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.records import Record, by_name, markdown, mean_and_spread, read_records

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = (ROOT / "README.md", ROOT / "docs/paper.md")
MISSING = "not run yet"
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(?:(?!<!--).)*(<!-- end of results -->)", re.DOTALL)


def main() -> None:
    """Writes the pages anew, and says which changed."""
    tables = all_tables()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before, tables)
        page.write_text(after, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'as it was' if after == before else 'changed'}")


def filled(page: str, tables: Mapping[str, str]) -> str:
    """A page with the tables in their places. Raises KeyError for the name of none."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)


def all_tables(folder: pathlib.Path = RESULTS) -> dict[str, str]:
    """{name: the table as Markdown} of the results in a folder."""
    wanted = tomllib.loads((folder / "wanted.toml").read_text(encoding="utf-8"))
    files = sorted((folder / "runs").glob("*.jsonl"))
    found = [record for file in files for record in read_records(file)]
    runs = by_name(sorted(found, key=lambda record: record["date"] or ""))  # of the same run the newest counts
    return {
        "results": results_table(wanted["result"], runs),
        "speed": speed_table(wanted["speed"], folder),
        "paper": paper_table(wanted["paper"], runs),
    }


def results_table(rows: Sequence[Mapping[str, str]], runs: Mapping[str, Sequence[Record]]) -> str:
    """Accuracies beside those of the paper and of the public PyTorch code."""
    head = ("data, net", "recipe", "paper", "public PyTorch code", "ours", "command, hardware, time")
    lines = []
    for row in rows:
        of = runs.get(row["run"], ())
        command = [row["command"] if row["command"] == "below" else f"`{row['command']}`"] if "command" in row else []
        how = "; ".join([*command, *([described(of)] if of else [])])
        published = (row.get("paper", ""), row.get("public", ""))
        lines.append((row["what"], row["recipe"], *published, accuracy(of) if of else MISSING, how))
    return markdown(head, lines)


def accuracy(runs: Sequence[Record]) -> str:
    """Top-1 of the last epoch and of the best: means over the seeds."""
    last, best = ([run[which]["top1"] for run in runs if run[which]] for which in ("final", "best"))
    text = f"**{_percent(last)}** last epoch"
    return f"{text}, {_percent(best)} best" if best else text


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * shares[0]:.4g} %" if len(shares) == 1 else f"{mean_and_spread(shares, 100)} %"


def described(runs: Sequence[Record]) -> str:
    """Hardware, length and time of runs that differ by their seed."""
    first = runs[0]
    parts = [first["hardware"].removeprefix("1 x "), f"{first['epochs']:g} epochs"]
    if len(runs) > 1:
        parts.append(f"{len(runs)} seeds")
    if all(run["seconds"] for run in runs):
        minutes = statistics.fmean(run["seconds"] for run in runs) / 60
        cut = f" in {first['pieces']} pieces" if first["pieces"] > 1 else ""
        parts.append(f"{minutes:.1f} minutes{' each' * (len(runs) > 1)}{cut}")
    return ", ".join([*parts, *([first["note"]] if "note" in first else [])])


def speed_table(rows: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> str:
    """Training steps beside PyTorch's: of every implementation the fastest in the file."""
    names = {"eager": "torch eager", "channels_last": "torch channels_last", "torch.compile": "torch compile"}
    head = ("hardware", "net, batch, precision", "images/s", *(f"PyTorch {name}" for name in names))
    lines = []
    for row in rows:
        asked = ("train", row["net"], row["batch"])
        steps = [r for r in read_records(folder / row["file"]) if (r["what"], r["net"], r["batch"]) == asked]
        fastest: dict[str, dict[str, Any]] = {}
        for step in sorted(steps, key=lambda step: step["images_per_second"]):
            fastest[step["implementation"]] = step
        ours = fastest["resattn_jax"]
        dtype = ours["dtype"] if ours["dtype"] != "auto" else "float32" if ours["device"] == "cpu" else "bfloat16"
        speed = ours["images_per_second"]
        beside = [fastest[name]["images_per_second"] if name in fastest else None for name in names.values()]
        cells = [f"{_rate(other)}, ours is {speed / other:.2f}x" if other else "" for other in beside]
        lines.append((row["hardware"], f"`{ours['net']}`, {ours['batch']}, {dtype}", f"**{_rate(speed)}**", *cells))
    return markdown(head, lines)


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.1f}"


def paper_table(rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[Record]]) -> str:
    """The paper's errors on CIFAR-10 and ours, in percent."""
    lines = []
    for row in rows:
        of = runs.get(row["run"], ())
        error = mean_and_spread([1 - run["final"]["top1"] for run in of], 100) if of else MISSING
        lines.append((str(row["table"]), row["what"], f"{row['error']:.2f}", error, described(of) if of else ""))
    return markdown(("table", "variant, depth", "paper", "ours, last epoch", "ours was"), lines)


if __name__ == "__main__":
    main()
