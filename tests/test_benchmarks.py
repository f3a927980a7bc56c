"""The benchmarks run, and their figures fit together; how fast anything is decides no test."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT


def test_train_step_writes_its_figures(tmp_path):
    """Forward and backward pass of ra_tiny: three times its multiply-adds, two operations each."""
    file = tmp_path / "figures.jsonl"
    command = [sys.executable, "-m", "benchmarks.train_step", "--net=ra_tiny", "--size=32", "--batch", "8"]
    command += ["--seconds=0.2", "--turns=2", "--implementations", "resattn_jax", f"--json={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inference, train = map(json.loads, file.read_text().splitlines())
    assert (inference["what"], train["what"]) == ("inference", "train")
    for row, passes in (inference, 1), (train, 3):
        per_image = row["flops"] / row["images_per_second"]
        assert per_image / passes == pytest.approx(inference["flops"] / inference["images_per_second"])
        assert row["images_per_second"] * row["step_seconds"] == pytest.approx(8)
    assert len(done.stdout.splitlines()) == 3  # the head of the table, a row each
