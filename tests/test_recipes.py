"""benchmarks.recipes: a list of runs goes on whatever ended it, and every list is of configs that can be trained."""

import json
import re
import signal
import subprocess
import sys

import jax
import pytest
from helpers import ROOT

from benchmarks import recipes
from benchmarks.recipe_list import read_list
from resattn_jax.run import Run

LISTS = sorted((ROOT / "benchmarks/lists").glob("*.toml"))

TINY = """
config = "digits"
set.total_epochs = "None"
set.total_steps = 60
set.batch_size = 16
set.model = {p = 0, t = 1, last = 0}
set.schedule.warmup = "0 steps"
set.log_every = "10 steps"
set.checkpoint.every = "5 steps"
"""


def listed(folder, text):
    file = folder / "list.toml"
    file.write_text(TINY + text)
    return file


# ---- Running.


def start(*arguments):
    command = [sys.executable, "-u", "-m", "benchmarks.recipes", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end_at(process, lines, number):
    """Sends a signal when these lines were printed, one after the other, and returns the exit status."""
    for line in lines:
        assert any(re.match(line, said) for said in process.stdout), line
    process.send_signal(number)
    process.communicate()
    return process.returncode


def test_a_list_goes_on_after_kill_9_and_after_a_signal(tmp_path):
    """Each run is trained once, from where it was cut off, and its time is that of all its pieces."""
    arguments = listed(tmp_path, '[[run]]\nname = "one"\n[[run]]\nname = "two"\n'), f"--output={tmp_path / 'out'}"
    assert end_at(start(*arguments), ["step 20/60"], signal.SIGKILL) == -signal.SIGKILL
    [killed_after] = json.loads((tmp_path / "out/one_0.pieces.json").read_text())
    assert end_at(start(*arguments), ["—— 2 of 2", "step 20/60"], signal.SIGTERM) == 128 + signal.SIGTERM
    process = start(*arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["pieces"], row["final"]["step"]) for row in rows] == [("one", 2, 60), ("two", 2, 60)]
    assert rows[0]["seconds"] > killed_after
    one, two = (Run(tmp_path / "out" / name) for name in ("one_0", "two_0"))
    assert one.starts[1]["step"] in range(5, 25, 5)  # of a checkpoint that was written in time
    assert two.starts[1]["step"] >= 20  # of the one that the signal asked for
    assert one.result["final"] == two.result["final"]  # they are the same run, cut at other steps
    assert rows[0]["final"]["top1"] == one.result["final"]["top1"]
    assert (tmp_path / "out/table.txt").read_text() in said


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs a list here, on one device."""
    monkeypatch.setattr(jax, "devices", lambda devices=jax.devices(): devices[:1])

    def run(file, folder):
        folder.mkdir(exist_ok=True)
        return recipes.run_all(read_list(file), folder)

    return run


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, in_this_process):
    """And one that goes on from another takes over all of its state, optimizer and step, at that part of it."""
    runs = """
[[run]]
name = "wild"
set.schedule.learning_rate = 1000.0
set.model.init = "pytorch"
set.ema_decay = "None"
[[run]]
name = "plain"
set.total_steps = 10
set.checkpoint.keep_newest = 3
[[run]]
name = "decay"
set.total_steps = 10
set.optimizer.weight_decay = 0.1
goes_on_from = "plain at 50%"
[[run]]
name = "too_early"
goes_on_from = "plain at 10%"
"""
    failed = in_this_process(listed(tmp_path, runs), tmp_path / "out")
    assert failed.keys() == {"wild_0", "too_early_0"}
    assert "is nan" in failed["wild_0"]
    assert "no checkpoint up to step 1" in failed["too_early_0"]
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["goes_on_from"]) for row in rows] == [("plain", None), ("decay", "plain_0 at step 5")]
    assert Run(tmp_path / "out/decay_0").starts[0]["step"] == 5
