"""The benchmarks run, and their figures fit together; how fast anything is decides no test."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks import startup


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


def test_the_first_step_is_found_in_what_a_run_says():
    said = ["first step after 12.3 s: 2.0 s imports and", "devices, 1.5 s data, 0.5 s compiling, 8.3 s first"]
    told = startup.until_first_step([*said, "step", "0"])
    assert told["seconds"] == 12.3
    assert told["parts"] == {"imports and devices": 2.0, "data": 1.5, "compiling": 0.5, "first step": 8.3}
    assert startup.until_first_step(said) is None
