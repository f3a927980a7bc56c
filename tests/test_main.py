"""The command line, run as a person runs it: exit statuses, one-line errors, stopping and going on."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from helpers import ROOT, SMALL

from resattn_jax import cli, experiment
from resattn_jax.errors import RunError
from resattn_jax.modes.train import train_and_evaluate


def main(*arguments):
    command = [sys.executable, "main.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config=configs/digit.py", "there is no config 'configs/digit.py' (did you mean 'configs/digits.py'?)"),
        ("--config.batch_sise=3", "there is no config.batch_sise (did you mean 'config.batch_size'?)"),
        ("--config.optimizer.momentun=3", "(did you mean 'config.optimizer.momentum'?)"),
        ("--config.batch_size=many", "config.batch_size is 'many'; it must be 1 or more, a whole"),
        ("--config.label_smoothing=x", "config.label_smoothing is 'x'; it must be from 0 to less than 1"),
        (
            "--config.model.name=ra93",
            "config.model.name is 'ra93' (did you mean 'ra92'?); it must be one of ra56, ra92,",
        ),
        (
            "--config.model.attention=chanel",
            "attention is 'chanel' (did you mean 'channel'?); it must be one of mixed,",
        ),
        ("--config.data.name=digit", "unknown data set 'digit' (did you mean 'digits'?)"),
        ("--config.batch_size=0", "config.batch_size is 0; it must be 1 or more"),
        ("--config.eval.every=often", "config.eval.every is 'often'; write '500 steps', '5 epochs' or '30%'"),
        ("--mode=trian", "--mode=trian: value should be one of <train|evaluate|prepare|show_data|"),
        ("--wrkdir=x", "there is no flag --wrkdir (did you mean '--workdir'?)"),
        ("train", "unexpected argument 'train'"),
        ("--mode=evaluate", "there is no checkpoint in"),
    ],
)
def test_a_fault_of_the_command_line_is_one_line_and_status_2(argument, message, tmp_path):
    workdir = tmp_path / "run"
    done = main(argument, f"--workdir={workdir}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not workdir.exists()  # a mistake leaves nothing behind


def test_another_kind_of_bucket_is_refused_as_workdir():
    done = main("--workdir=s3://bucket/run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "s3://bucket/run is no path; a folder in a bucket is written gs://BUCKET/FOLDER" in done.stderr


def test_both_totals_by_hand_are_refused_and_one_clears_the_other(tmp_path):
    assert "not both" in main("--config.total_steps=3", "--config.total_epochs=2").stderr
    done = main("--config.total_steps=2", "--config.eval.max_examples=40", *SMALL, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["total_steps"], config["total_epochs"]) == (2, None)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 2


def test_a_run_says_where_the_time_until_its_first_step_went(tmp_path):
    """The parts add up to the whole, which is most of what a clock outside measures; the compiler's cache is named."""
    began = time.perf_counter()
    done = main("--config.total_steps=1", "--config.eval.max_examples=40", *SMALL, f"--workdir={tmp_path}")
    wall = time.perf_counter() - began
    [line] = [line for line in done.stdout.splitlines() if line.startswith("first step after")]
    said = re.fullmatch(
        r"first step after (\S+) s: (\S+) s imports and devices, (\S+) s data, (\S+) s tracing, (\S+) s first weights,"
        r" (\S+) s compiling(?: \(from the cache\))?, (\S+) s first step",
        line,
    )
    whole, *parts = map(float, said.groups())
    assert sum(parts) == pytest.approx(whole, abs=0.3)  # each is rounded to 0.1
    assert whole < wall
    again = main("--config.total_steps=2", "--config.eval.max_examples=40", *SMALL, f"--workdir={tmp_path}")
    assert " s checkpoint, " in again.stdout
    assert "compiling (from the cache)" in again.stdout


def test_a_run_stopped_by_a_signal_goes_on_and_is_then_evaluated(tmp_path):
    """SIGTERM in the middle: status 143 and a checkpoint; the same command goes on; --mode=evaluate measures it."""
    run = ["--config.total_steps=400", "--config.log_every=5 steps", "--config.eval.every=400 steps", *SMALL]
    command = [sys.executable, "main.py", *run, f"--workdir={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "the same command goes on from there" in errors

    done = main(*run[1:], "--config.total_steps=60", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint of step" in done.stdout
    assert "config.total_steps was 400" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())

    measured = main(*run, "--mode=evaluate", "--checkpoint=best", f"--workdir={tmp_path}")
    assert measured.returncode == 0, measured.stderr
    assert f"{result['best']['top1']:.2%}" in measured.stdout
    for word in ("360 examples", "class", "top-5"):
        assert word in measured.stdout


def test_a_checkpoint_of_another_model_is_refused_naming_the_weights(tmp_path):
    main("--config.total_steps=1", "--config.eval.max_examples=40", *SMALL, f"--workdir={tmp_path}")
    (tmp_path / "config.json").unlink()  # so that the command line says what the net is
    done = main("--mode=evaluate", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "does not fit the model" in done.stderr
    assert "first params/stage1_attention1/first1/conv1/kernel: absent in the checkpoint" in done.stderr


def test_neither_the_package_nor_a_run_imports_tensorflow(tmp_path):
    arguments = ["main.py", "--config.total_steps=1", "--config.eval.max_examples=40", *SMALL, f"--workdir={tmp_path}"]
    code = f"""
import sys
import resattn_jax, main
sys.argv = {arguments}
main.main(sys.argv)
print(sorted({{"tensorflow", "tensorboard"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def exhaust(*_):
    """Asks XLA for 4 PB."""
    return jax.block_until_ready(jax.numpy.zeros(1 << 50))


class Steps:
    """Stands for a train step that does not compile, as XLA's compilers say it, or does not run."""

    def __init__(self, compiles):
        self.compiles = compiles

    def lower(self, *_):
        return self

    def compile(self):
        if not self.compiles:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nAnd more.")
        return exhaust


@pytest.mark.parametrize("when", ["compiling", "running", "evaluating"])
def test_a_device_out_of_memory_is_told_with_the_batch_and_what_helps(when, tmp_path, monkeypatch, one_device):
    if when == "evaluating":
        monkeypatch.setattr(experiment, "make_eval_step", lambda *_: exhaust)
    else:
        monkeypatch.setattr(experiment, "make_train_steps", lambda *_, **__: Steps(when == "running"))
    config = cli.parse_config(["main.py", "--config.total_steps=1", *SMALL])
    with pytest.raises(RunError, match=r"^a device is out of memory .*RESOURCE_EXHAUSTED") as caught:
        train_and_evaluate(config, tmp_path, one_device)
    said = str(caught.value)
    assert "\n" not in said
    if when == "evaluating":
        assert "evaluating 500 images at a time; lower config.eval.batch_size" in said
    else:
        assert "with 32 images of 8x8x1 on each through ra_tiny in float32" in said
        assert "raise config.accumulate (now 1) or lower config.batch_size, or set config.model.remat=True" in said


def test_a_fault_of_a_run_is_one_line_and_status_1(tmp_path):
    """Here a device out of memory, whatever XLA has to say beside it."""
    code = f"""
import runpy, sys
import jax
import resattn_jax.experiment as experiment

class Steps:
    def lower(self, *_):
        return self
    def compile(self):
        return lambda *_: jax.block_until_ready(jax.numpy.zeros(1 << 50))

experiment.make_train_steps = lambda *_, **__: Steps()
sys.argv = ["main.py", "--config.total_steps=1", *{SMALL}, "--workdir={tmp_path}"]
runpy.run_path("main.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: a device is out of memory ")
    assert done.stderr.count("\n") == 1


# Takes 256 MB twice, as a step's temporaries are taken, and says how many pages the system had to bring then.
ALLOCATE = """
import resource
import sys
from resattn_jax.__main__ import use_large_pages

if {large}:
    use_large_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    bytearray(256 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_comes_in_large_pages(tmp_path):
    setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give out large pages to those who ask for them")
    pages = []
    for large in False, True:
        program = tmp_path / "allocate.py"
        program.write_text(ALLOCATE.format(large=large))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(program)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        pages.append(int(done.stdout))
    assert pages[0] > 2 * (256 << 20) // 4096
    assert pages[1] < pages[0] / 50  # a page of 2 MB is 512 of 4 kB
