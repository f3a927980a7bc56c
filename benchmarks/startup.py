"""How long a run takes to its first step: with an empty cache, and then from the cache.

    python -m benchmarks.startup
    python -m benchmarks.startup --config=cifar10_ra92 --rounds=3 --beside=../before    # taking turns with a checkout

Starts the training of a recipe and kills it when its first step is done. Prints a line of JSON for each start: the
seconds until then in all and by their parts, as the run tells them, and the processor's seconds. `python -m benchmarks
startup_cpu` keeps them, with hardware, versions and date.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def start(tree: pathlib.Path, config: str, cache: str) -> dict[str, Any]:
    """One start of a checkout, with what is kept in `cache`. Raises SystemExit when it ends before its first step."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "main.py", f"--config=configs/{config}.py", f"--workdir={workdir}/run"]
        run = subprocess.Popen(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE)
        assert run.stdout
        try:
            told = until_first_step(run.stdout)
        finally:
            run.kill()
            _, _, used = os.wait4(run.pid, 0)
            run.returncode = -9
            run.stdout.close()
    if told is None:
        raise SystemExit(f"{' '.join(command)} ended before its first step")
    return {**told, "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}


def until_first_step(output: Any) -> dict[str, Any] | None:
    """What the run tells of its start, {"seconds", "parts": {what: seconds}}; None if it ends without."""
    text = ""
    for line in output:
        text += " " + line.strip()
        if match := re.search(r"first step after ([\d.]+) s:(.*first (?:\d+ )?steps?)$", text):
            parts = re.findall(r"([\d.]+) s ([^,]+)", match[2])
            return {"seconds": float(match[1]), "parts": {what: float(seconds) for seconds, what in parts}}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help="recipes; by default cifar10_ra92 and digits")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--beside", action="append", default=[], help="another checkout, which takes turns with this one"
    )
    args = parser.parse_args()
    trees = [ROOT, *(pathlib.Path(tree).resolve() for tree in args.beside)]
    for _ in range(args.rounds):
        for config in args.config or ["cifar10_ra92", "digits"]:
            with tempfile.TemporaryDirectory() as caches:
                for cache in ("empty", "full"):
                    for i, tree in enumerate(trees):
                        told = start(tree, config, f"{caches}/{i}")
                        print(json.dumps({"config": config, "cache": cache, "tree": tree.name, **told}), flush=True)


if __name__ == "__main__":
    main()
