"""--profile: the steps asked for are in the trace, whole and no others, and the run is the one without it."""

import socket
from types import SimpleNamespace

import jax
import pytest
from absl import flags
from helpers import assert_same_bits, final_state
from test_train import stop_at

from benchmarks import profile_picture
from resattn_jax import cli, profiler
from resattn_jax.errors import Interrupted, UsageError
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.run import Run

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(autouse=True)
def fresh_flags():
    yield
    for flag in flags.FLAGS:
        flags.FLAGS[flag].unparse()


def traced(workdir):
    """(the numbers of the steps, the names of the programs whose operations ran) in the traces of a run."""
    steps, programs = set(), set()
    for file in workdir.glob("plugins/profile/*/*.xplane.pb"):  # where TensorBoard looks
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events):
                stats = dict(event.stats)
                if event.name == "train":
                    steps.add(stats["step_num"])
                if "hlo_op" in stats:
                    programs.add(stats["hlo_module"])
    return steps, programs


@pytest.mark.parametrize(
    ("steps_per_dispatch", "profile", "annotated"),
    [
        (1, (5, 3), {6, 7, 8}),
        (5, (3, 6), {4, 6, 8, 9}),  # cut at 4 and 8 to log, at 6 to evaluate; without these after 3 and 9 it is at 5
    ],
)
def test_the_trace_holds_these_steps_and_the_run_is_the_same(
    steps_per_dispatch, profile, annotated, tiny_config, one_device, tmp_path, capfd
):
    tiny_config.steps_per_dispatch = steps_per_dispatch
    train_and_evaluate(tiny_config, tmp_path / "without", one_device)
    train_and_evaluate(tiny_config, tmp_path / "with", one_device, profile=profile)
    assert f"traced steps {profile[0] + 1} to {sum(profile)}: " in capfd.readouterr().out
    steps, programs = traced(tmp_path / "with")
    assert steps == annotated
    assert "jit_steps" in programs
    assert not (tmp_path / "without" / "plugins").exists()
    assert_same_bits(*(final_state(tiny_config, tmp_path / name, one_device) for name in ("without", "with")))


@pytest.mark.parametrize(("profile", "annotated"), [((0, 1), {1}), ((10, 5), {11, 12})])
def test_a_trace_may_begin_with_the_run_and_ends_with_it(profile, annotated, tiny_config, one_device, tmp_path):
    train_and_evaluate(tiny_config, tmp_path, one_device, profile=profile)
    assert traced(tmp_path)[0] == annotated


def test_a_run_that_is_stopped_writes_what_it_has_and_the_next_start_traces_the_rest(
    tiny_config, one_device, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted, match="stopped at step 7"):
            train_and_evaluate(tiny_config, tmp_path, one_device, profile=(5, 4))
    assert traced(tmp_path)[0] == {6, 7}
    train_and_evaluate(tiny_config, tmp_path, one_device, profile=(5, 4))
    assert traced(tmp_path)[0] >= {8, 9}
    assert 10 not in traced(tmp_path)[0]
    capfd.readouterr()
    train_and_evaluate(tiny_config, tmp_path, one_device, profile=(5, 4))
    assert "steps 6 to 9, to be traced, are trained already" in capfd.readouterr().out


def test_a_run_that_has_no_such_steps_is_told_before_anything_is_written(tiny_config, one_device, tmp_path):
    with pytest.raises(UsageError, match=r"^--profile=12:1: the run ends at step 12; START must be less$"):
        train_and_evaluate(tiny_config, tmp_path / "run", one_device, profile=(12, 1))
    assert not (tmp_path / "run").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(tiny_config, one_device, tmp_path, capfd):
    (tmp_path / "plugins").write_text("in the way")
    assert train_and_evaluate(tiny_config, tmp_path, one_device, profile=(5, 3))["step"] == 12
    assert "the trace could not be written: " in capfd.readouterr().out


def test_steps_are_written_as_two_numbers():
    assert cli.parse(["main.py"]).profile is None
    assert cli.parse(["main.py", "--profile=0100:5", "--profiler_port=9012"]).profile == (100, 5)


@pytest.mark.parametrize(
    "given", ["", "5", "5:", "5:0", "-1:3", "5:3:1", "5.0:1", "five:1", "5 : 1", "²:1", "1:99999999999"]
)
def test_anything_else_is_told(given):
    with pytest.raises(UsageError, match=rf"^--profile={given}: it is written START:COUNT, such as 100:5"):
        cli.parse(["main.py", f"--profile={given}"])


@pytest.mark.parametrize("flag", ["--profile=1:1", "--profiler_port=9012"])
def test_it_goes_with_training_alone(flag):
    with pytest.raises(UsageError, match=r"is for --mode=train, not for --mode=evaluate"):
        cli.parse(["main.py", "--mode=evaluate", flag])


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_is_a_number(port):
    with pytest.raises(UsageError, match="profiler_port"):
        cli.parse(["main.py", f"--profiler_port={port}"])


def test_a_server_answers_at_its_port_and_one_that_is_taken_is_told():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^--profiler_port={port}: .*in use; choose another port$"):
            profiler.serve(port)
    profiler.serve(port)
    with socket.create_connection(("localhost", port), timeout=10):
        pass
    jax.profiler.stop_server()


def test_on_a_gpu_it_says_how_kernels_have_names(monkeypatch, tmp_path):
    flag = "XLA_FLAGS=--xla_gpu_enable_command_buffer="
    for platform, given, told in (("gpu", "", True), ("gpu", flag.partition("=")[2], False), ("cpu", "", False)):
        monkeypatch.setenv("XLA_FLAGS", given)
        said = []
        profiler.Profile(Run(tmp_path).path, (5, 1), 9).begin_run(0, platform, said.append)
        assert [line.endswith(flag) for line in said] == [True] * told


def test_operations_are_summed_by_kind_for_a_step():
    """By hand: two steps, two convolutions of 2 and 4 ms; a loop, which holds others, and another program."""

    def event(name, milliseconds, **stats):
        return SimpleNamespace(name=name, duration_ns=milliseconds * 1e6, stats=stats.items())

    ours = [("convolution.1", 2), ("convolution.2.clone", 4), ("loop_add_fusion", 1), ("while.3", 9)]
    events = [event(name, time, hlo_op=name, hlo_module="jit_steps") for name, time in ours]
    events += [event("dot.1", 5, hlo_op="dot.1", hlo_module="jit_evaluate"), event("train", 7), event("train", 7)]
    data = SimpleNamespace(planes=[SimpleNamespace(lines=[SimpleNamespace(events=events)])])
    assert profile_picture.by_kind(data) == {"convolution": (3.0, 1.0), "loop_add_fusion": (0.5, 0.5)}
