"""benchmarks.recipes: a list of runs goes on whatever ended it, and every list is of configs that can be trained."""

import json
import re
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks import recipes
from benchmarks.recipe_list import read_list, rehearsed
from resattn_jax.config import Durations, flatten
from resattn_jax.errors import UsageError
from resattn_jax.run import Run

LISTS = sorted((ROOT / "benchmarks/lists").glob("*.toml"))

TINY = """
config = "digits"
set.total_epochs = "None"
set.total_steps = 60
set.batch_size = 16
set.model = {p = 0, t = 0, r = 0, last = 0}
set.schedule = {name = "constant", warmup = "0 steps"}
set.log_every = "10 steps"
set.checkpoint.every = "10 steps"
set.eval.max_examples = 100
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


RUNS = """
[[run]]
name = "one"
[[run]]
name = "two"
[[run]]
name = "split"
set.data.eval_split = "nowhere"
[[run]]
name = "longer"
set.total_steps = 70
set.log_every = "3 steps"
goes_on_from = "one at 95%"
[[run]]
name = "too_early"
goes_on_from = "one at 5%"
"""


LAST = """
import json, pathlib, sys, jax
from benchmarks import recipes
from benchmarks.recipe_list import read_list
failed = recipes.run_all(read_list(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))
print(json.dumps([failed, sum(array.nbytes for array in jax.live_arrays())]))
"""


def test_a_list_goes_on_after_kill_9_after_a_signal_and_past_what_fails(tmp_path):
    """Each run is trained once, from where it was cut off, and its time is that of all its pieces."""
    file, out = listed(tmp_path, RUNS), tmp_path / "out"
    assert end_at(start(file, f"--output={out}"), ["step 30/60"], signal.SIGKILL) == -signal.SIGKILL
    [killed_after] = json.loads((out / "one_0.pieces.json").read_text())
    ending = end_at(start(file, f"--output={out}"), ["—— 2 of 5", "step 20/60"], signal.SIGTERM)
    assert ending == 128 + signal.SIGTERM
    done = subprocess.run([sys.executable, "-c", LAST, file, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed, left = json.loads(done.stdout.splitlines()[-1])
    assert left < 10_000  # bytes on the device: not even the smallest set of weights
    assert failed.keys() == {"split_0", "too_early_0"}
    assert "nowhere" in failed["split_0"]
    assert "no checkpoint up to step 3" in failed["too_early_0"]

    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["pieces"], row["final"]["step"], row["goes_on_from"]) for row in rows] == [
        ("one", 2, 60, None), ("two", 2, 60, None), ("longer", 1, 70, "one_0 at step 50")
    ]  # fmt: skip
    one, two, longer = (Run(out / name) for name in ("one_0", "two_0", "longer_0"))
    assert rows[0]["seconds"] > killed_after
    assert one.starts[1]["step"] in range(10, 40, 10)  # of a checkpoint that was written in time
    assert two.starts[1]["step"] >= 20  # of the one that the signal asked for
    assert one.result["final"] == two.result["final"]  # they are the same run, cut at other steps
    assert rows[0]["final"]["top1"] == one.result["final"]["top1"]
    steps = [row["step"] for row in longer.metrics if "train/loss" in row]
    assert steps == [10, 20, 30, 40, 50, 51, 54, 57, 60, 63, 66, 69, 70]
    assert [line.split()[0] for line in (out / "table.txt").read_text().splitlines()] == ["run", "one", "two", "longer"]
    with pytest.raises(UsageError, match="holds another run longer_0; choose another --output"):
        recipes.run_all(read_list(listed(tmp_path, RUNS.replace("70", "71"))), out)


# ---- Lists.


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_every_run_of_a_list_can_be_trained_and_rehearsed(file):
    """Its config is one, also as it is rehearsed: with the net's options, and durations of the same part of the run."""
    entries = read_list(file)
    short = rehearsed(entries)
    assert [entry.workdir for entry in short] == [entry.workdir for entry in entries]
    assert len({entry.workdir for entry in entries}) == len(entries)
    for entry, small in zip(entries, short, strict=True):
        config, rehearsal = flatten(entry.read_config()), flatten(small.read_config())
        assert (rehearsal["total_steps"], rehearsal["model.name"]) == (8, "ra_tiny")
        same = ("model.learning", "model.attention", "model.mask", "augment.mixup_alpha", "optimizer.weight_decay")
        assert [config[key] for key in same] == [rehearsal[key] for key in same]
        assert config["seed"] == entry.seed == rehearsal["seed"]


def test_the_lists_hold_what_the_papers_tables_vary():
    """Tables 1, 3, 4 and 5 on CIFAR-10, each variant with two seeds."""
    runs = {entry.name: flatten(entry.read_config()) for entry in read_list(ROOT / "benchmarks/lists/paper.toml")}
    assert {runs[f"{kind}_56"]["model.attention"] for kind in ("arl", "channel", "spatial")} == {
        "mixed", "channel", "spatial"
    }  # fmt: skip
    for learning in ("arl", "nal"):
        for depth in (56, 92, 128, 164):
            run = runs[f"{learning}_{depth}"]
            assert (run["model.learning"], run["model.name"]) == (learning, f"ra{depth}_cifar_slim")
    assert runs["local_56"]["model.mask"] == "local_convolutions"
    assert [runs[f"noise_{n}"]["data.label_noise"] for n in (10, 30, 50, 70)] == [0.1, 0.3, 0.5, 0.7]
    assert all(run["data.name"] == "cifar10" and run["data.mean_image"] for run in runs.values())
    seeds = [(entry.name, entry.seed) for entry in read_list(ROOT / "benchmarks/lists/paper.toml")]
    assert seeds == [(name, seed) for seed in (0, 1) for name in runs]


def test_a_rehearsal_keeps_the_parts_of_a_run(tmp_path):
    file = tmp_path / "list.toml"
    file.write_text("""
config = "cifar10_ra92"
set.total_epochs = 40.0
set.schedule = {boundaries = ["10 epochs", "50%"], warmup = "2 epochs"}
set.eval.every = "1 steps"
[[run]]
name = "one"
""")
    config = rehearsed(read_list(file))[0].read_config()
    assert config.schedule.boundaries == ("25%", "50%")
    assert (config.schedule.warmup, config.eval.every) == ("5%", "1 steps")  # of steps there are none to be a part of
    assert Durations(config, 200)("schedule.boundaries") == (2, 4)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("", "lists no runs"),
        ("[[run]]", "a run has the name None"),
        ('[[run]]\nname = "a/b"', "a run has the name 'a/b'"),
        ('[[run]]\nname = "a"\n[[run]]\nname = "a"', "two runs of the name a and the seed 0"),
        ('[[run]]\nname = "a"\nseed = 1', r"the key 'seed' \(did you mean 'seeds'\?\)"),
        ('[[run]]\nname = "a"\nseeds = 1', r"the seeds of a are 1; write a list such as \[0, 1\]"),
        ('[[run]]\nname = "a"\nseeds = [-1]', "config.seed is -1"),
        ('[[run]]\nname = "a"\nset.seed = 1', r"a sets the seed; write seeds = \[1\]"),
        ('[[run]]\nname = "a"\nset.batch_sise = 1', r"a_0: there is no config.batch_sise \(did you mean"),
        ('[[run]]\nname = "a"\nset.batch_size = "many"', "a_0: config.batch_size is 'many'"),
        ('[[run]]\nname = "a"\ngoes_on_from = "b at 50%"', "a goes on from b, .* seed 0"),
        ('[[run]]\nname = "a"\ngoes_on_from = "b"', "write 'NAME at 87.5%'"),
        ("[[run", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_list_is_told_in_a_line(tmp_path, runs, message):
    with pytest.raises(UsageError, match=message) as error:
        read_list(listed(tmp_path, runs))
    assert "\n" not in str(error.value)
