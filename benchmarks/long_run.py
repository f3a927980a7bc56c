"""Whether a run grows: memory, open files and threads over 10,000 steps with evaluations and saves.

    python -m benchmarks.long_run --steps=10000

Trains a small net on the digits by turns resident and streamed, measuring its own process as it goes. Prints a line of
JSON every twentieth of the run: the step, resident memory in MB, open files and threads.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from typing import Any

import jax
import psutil

from configs import digits
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.report.training import Report


def measure(pipeline: str, steps: int) -> list[dict[str, Any]]:
    """Trains so many steps of 16 images, 20 evaluations and 40 saves; what its process was at each evaluation."""
    config = digits.get_config()
    config.model.update(p=0, t=1, last=0)
    config.update(batch_size=16, total_epochs=None, total_steps=steps, log_every=f"{steps // 200} steps")
    config.eval.every, config.checkpoint.every = f"{steps // 20} steps", f"{steps // 40} steps"
    config.data.update(pipeline=pipeline, mean_image=False, mean=(0.3,))
    config.schedule.name = "constant"
    if pipeline == "streaming":
        config.steps_per_dispatch = None
    process, rows = psutil.Process(), []
    log = Report.log

    def log_and_measure(self: Report, step: int, split: str, metrics: Any) -> None:
        log(self, step, split, metrics)
        if split == "eval":
            gc.collect()
            rows.append(
                {
                    "pipeline": pipeline,
                    "step": step,
                    "memory_mb": round(process.memory_info().rss / 2**20, 1),
                    "open_files": process.num_fds(),
                    "threads": process.num_threads(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)

    Report.log = log_and_measure  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as workdir:
            train_and_evaluate(config, workdir, jax.devices()[:1])
    finally:
        Report.log = log  # type: ignore[method-assign]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--pipeline", choices=("resident", "streaming"), action="append")
    args = parser.parse_args()
    for pipeline in args.pipeline or ["resident", "streaming"]:
        measure(pipeline, args.steps)


if __name__ == "__main__":
    main()
