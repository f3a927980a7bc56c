"""A signal ends the program in one line at any stage; a run saves first; nothing that was started stays."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT, SMALL

from benchmarks import kills

RUN = [*SMALL, "--config.log_every=5 steps", "--config.eval.every=100000 steps", "--config.total_steps=100000"]


def start(workdir, *flags, program=("main.py",)):
    command = [sys.executable, *program, *RUN, f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process, word):
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.stderr.read())


MODULE = ("-m", "resattn_jax")
STAGES = [
    (0.15, signal.SIGTERM, ("main.py",)),
    (0.15, signal.SIGTERM, MODULE),
    (0.4, signal.SIGINT, MODULE),
    (0.8, signal.SIGHUP, ("main.py",)),
    (1.5, signal.SIGTERM, MODULE),
    (3.0, signal.SIGINT, ("main.py",)),
]


@pytest.mark.parametrize(("seconds", "number", "program"), STAGES)
def test_before_the_first_step_it_is_one_line(seconds, number, program, tmp_path):
    """During imports, data, first weights, compiling: whatever is at work after so many seconds."""
    process = start(tmp_path / "run", "--config.model.t=9", "--config.model.last=9", program=program)  # slow to trace
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == f"stopped by {number.name}; the same command starts again\n"


STUCK = """
import hashlib, sys
sys.argv[0] = "main.py"
import main
from resattn_jax import runtime

def compile_for_minutes(*_):
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # inside C, as a compiler is, where Python's handlers do not run

runtime._compile = compile_for_minutes
sys.exit(main.program())
"""


def test_a_compiler_that_takes_minutes_does_not_hold_it(tmp_path):
    process = start(tmp_path, program=("-c", STUCK))
    until(process, "compiling")
    until(process, "compiling the train step …")
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert (process.returncode, said.count("\n")) == (143, 1), said


def test_a_second_signal_ends_a_run_at_once_with_the_checkpoints_it_had(tmp_path):
    process = start(tmp_path, "--config.checkpoint.every=10 steps")
    until(process, "step 25/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.count("\n") == 1
    assert any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_a_pipe_that_closes_is_no_traceback(tmp_path):
    process = start(tmp_path)
    until(process, "step 5/")
    process.stdout.close()
    process.wait(timeout=60)
    said = process.stderr.read()
    process.stderr.close()
    assert process.returncode in (1, 128 + signal.SIGPIPE)  # the first is what rich ends a program with
    assert said == ""


def test_a_killed_run_leaves_no_data_workers(tmp_path):
    process = start(
        tmp_path, "--config.data.pipeline=streaming", "--config.data.workers=2", "--config.data.mean=(0.3,)"
    )
    until(process, "step 5/")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_killed_at_six_moments_a_run_becomes_what_one_never_killed_is(tmp_path):
    """kill -9, saves included: weights to the bit, each logged step once, the same result. The benchmark does 100."""
    killed = kills.kill(tmp_path, 0, iter([0.05 + 0.3 * moment for moment in range(6)]), 6)
    assert killed.differs == []
    assert killed.kills >= 3
    assert (tmp_path / "killed" / "lock").exists()
