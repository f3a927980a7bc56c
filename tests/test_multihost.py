"""Two processes, each with a device of its own, train as one process with two devices does, and end together."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, free_port

from benchmarks.kills import read_events

RUN = [*SMALL, "--config.total_steps=6", "--config.log_every=3 steps", "--config.eval.every=3 steps"]
RUN += ["--config.sync_batch_norm=True"]


def start(workdir, *flags, devices):
    here = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": here}
    command = [sys.executable, "main.py", *RUN, f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(workdir, *flags):
    flags = [*flags, f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    return [start(workdir, *flags, f"--process_id={i}", devices=1) for i in range(2)]


def test_two_processes_are_one_run(tmp_path):
    """The same metrics, logged by one of them; every test image counted once; checkpoints written once."""
    together = tmp_path / "together"
    both = start_two(together)
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][1] + said[1][1]
    assert "step 6/6" in said[0][0]
    assert "step" not in said[1][0]

    alone = start(tmp_path / "alone", devices=2)
    alone.communicate(timeout=300)
    assert alone.returncode == 0
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (together, tmp_path / "alone")
    ]
    assert len(logs[0]) == len(logs[1]) == 4
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() - {"train/images_per_second"} == theirs.keys() - {"train/images_per_second"}
        for key in ours.keys() & {"step", "train/loss", "train/top1", "eval/loss", "eval/top1", "eval/examples"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    events = (event for path in together.glob("events.*") for event in read_events(path.read_bytes()))
    drawn = [event.step for event in events for value in event.summary.value if value.tag == "eval/masks"]
    assert drawn == [3, 6]  # by the first host alone
    assert sorted(p.name for p in (together / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "6"]


@pytest.mark.parametrize("killed", [0, 1], ids=["the coordinator", "another"])
def test_when_a_process_is_killed_the_other_ends_within_a_minute(tmp_path, killed):
    """With status 1, and a last line that says what happened and what to do."""
    endless = ["--config.total_steps=100000", "--config.log_every=1 steps", "--config.eval.every=100000 steps"]
    both = start_two(tmp_path, *endless)
    for line in both[0].stdout:
        if line.startswith("step 5/"):
            break
    both[killed].kill()
    _, said = both[1 - killed].communicate(timeout=60)
    both[killed].communicate()
    assert both[1 - killed].returncode == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("error: ")
    assert "another process of the run died" in last
    assert "the run goes on from its newest checkpoint" in last
    assert "Traceback" not in said
