"""A run as a thing: what it was trained as is what is measured, and runs of older versions go on."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, built, lines, plain_spec

from benchmarks.kills import read_events
from configs import digits
from resattn_jax.checkpoint import Reader, Writer
from resattn_jax.cli import parse_config
from resattn_jax.config import changed, compare, flatten
from resattn_jax.errors import UsageError
from resattn_jax.metrics import best_step
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.export import export_folder
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.report.tensorboard import EventFile
from resattn_jax.run import Run
from resattn_jax.state import Progress

pytestmark = pytest.mark.usefixtures("shared_programs")

# ---- A run that commit dd52f1e wrote: ra_tiny without most of its units, double-skip wiring, learning=nal, 10 steps.


@pytest.fixture
def old_run(tmp_path):
    subprocess.run(["tar", "-xf", ROOT / "tests/data/run_dd52f1e.tar.gz", "-C", tmp_path], check=True)
    return tmp_path / "old_run"


def test_an_old_run_is_measured_as_what_it_was_trained_as(old_run, one_device):
    """Its own result: 19.72 % at step 10. With the wiring or the learning of the recipe it would be another number."""
    run = Run(old_run)
    assert run.config.optimizer.name == "sgd"  # there was no such key
    measured = evaluate_checkpoint(run.config, old_run, "best", one_device)
    assert measured["step"] == 10
    assert measured["top1"] == run.result["final"]["top1"] == pytest.approx(71 / 360)
    assert measured["loss"] == pytest.approx(2.240907457139757, rel=1e-5)
    assert run.spec is None
    assert run.class_names == tuple("0123456789")


def test_an_old_run_goes_on_to_what_its_own_code_reached(old_run, one_device):
    """dd52f1e itself went on from there for four steps: loss and gradient norm of steps 12 and 14, evaluation of 14."""
    config = Run(old_run).config
    config.total_steps = 14
    result = train_and_evaluate(config, old_run, one_device)
    steps = {line["step"]: line for line in lines(old_run) if "train/loss" in line}
    for step, loss, norm in ((12, 2.087862730026245, 1.2829222083091736), (14, 2.099120855331421, 1.1560903191566467)):
        assert steps[step]["train/loss"] == pytest.approx(loss, rel=1e-3)
        assert steps[step]["train/gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert result["final"]["loss"] == pytest.approx(2.1463194105360244, rel=1e-3)
    assert result["best"]["step"] == 10
    assert Run(old_run).spec.num_classes == 10


def test_an_old_run_is_exported_and_gives_the_same_logits(old_run, tmp_path):
    import resattn_jax

    export_folder(Run(old_run).config, old_run, "newest", tmp_path / "out")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    there, here = resattn_jax.load(old_run), resattn_jax.load(tmp_path / "out")
    np.testing.assert_array_equal(there.logits(images), here.logits(images))
    assert here.model.spec.learning == "nal"


@pytest.mark.parametrize("key", ["augment.cutout", "optimizer.name", "accumulate", "model.remat"])
def test_a_key_that_an_old_run_lacks_has_the_value_from_before_there_was_one(old_run, key):
    path = old_run / "config.json"
    plain = json.loads(path.read_text())
    *sections, name = key.split(".")
    node = plain
    for section in sections:
        node = node[section]
    node.pop(name, None)
    path.write_text(json.dumps(plain))
    now = Run(old_run).config
    assert flatten(now)[key] == flatten(digits.get_config())[key]
    Run(old_run).compare(now)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged: it holds no JSON object"),
        ("[1]", "is damaged: it holds no JSON object"),
        ("null", "is damaged: it holds no JSON object"),
        ("\udcff\x00", "is damaged: it holds no JSON object"),
        ("[" * 100_000, "is damaged: it holds no JSON object"),
        ("{}", "has no 'seed': it is no config of a run, or damaged"),
        ('{"seed": 0, "sead": 1}', "has the key 'sead', which this version does not know"),
    ],
)
def test_a_damaged_config_is_one_line(old_run, content, message):
    (old_run / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=message) as caught:
        _ = Run(old_run).config
    assert "\n" not in str(caught.value)


# ---- What it was trained as, and a command line that says something else.


def main(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_a_command_line_that_contradicts_the_run_is_refused_by_key(old_run, tmp_path):
    for mode in ("evaluate", "export"):
        output = [f"--output={tmp_path / 'out'}"] if mode == "export" else []
        for flags, key in (
            (["--config=configs/digits.py"], "config.model.wiring is 'double_skip' there and None now"),
            (["--config.model.learning=arl"], "config.model.learning is 'nal' there and 'arl' now"),
            (["--config.data.mean=(0.5,)"], "config.data.mean is (0.306,) there and (0.5,) now"),
        ):
            done = main(f"--mode={mode}", f"--workdir={old_run}", *flags, *output)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert key in done.stderr
    done = main("--mode=evaluate", f"--workdir={old_run}", "--config.eval.max_examples=40")  # from its folder alone
    assert done.returncode == 0, done.stderr
    assert "40 examples" in done.stdout


def test_a_run_goes_on_by_its_folder_alone(old_run, tmp_path):
    done = main(f"--workdir={old_run}", "--config.total_steps=11", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint of step 10" in done.stdout
    assert Run(old_run).config.model.learning == "nal"
    assert Run(old_run).result["step"] == 11


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--checkpoint=best"],
            "--checkpoint is for --mode=evaluate and --mode=predict and --mode=attention and --mode=export, not for"
            " --mode=train",
        ),
        (["--mode=prepare", "--workdir=x"], "--workdir is for "),
        (
            ["--mode=evaluate", "--output=x"],
            "--output is for --mode=predict and --mode=attention and --mode=report and --mode=export, not for"
            " --mode=evaluate",
        ),
        (["--torch_checkpoint=x.pth"], "--torch_checkpoint is for --mode=import and --mode=export, not for"),
    ],
)
def test_a_flag_of_another_mode_is_refused(flags, message):
    done = main(*flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr


def test_preparing_what_needs_none_is_a_sentence():
    done = main("--mode=prepare", "--config.data.name=digits")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "digits are on board and need no preparing\n"


def test_what_may_differ_when_a_net_is_measured_and_when_a_run_goes_on():
    config = digits.get_config()
    assert changed(config, {"eval.views": 2, "model.dtype": "bfloat16"}, ("always", "measuring"), "W").eval.views == 2
    with pytest.raises(UsageError, match=r"W holds another config's run: config.model.dtype is 'auto' there"):
        changed(config, {"model.dtype": "bfloat16"}, ("always",), "W")
    other = digits.get_config()
    other.data.name = config.data.name = "folder:here"
    other.data.name = "folder:there"
    other.data.dir = "somewhere"
    assert compare(config, other, "W") == ["config.data.dir was None when this run began and is 'somewhere' now"]


def test_other_data_under_the_same_name_is_refused(tmp_path):
    config, run = parse_config(["main.py"]), Run(tmp_path)
    with run.writing(config, plain_spec(), first_host=True):
        pass
    with pytest.raises(UsageError, match="examples differs: 100 then, 101 now"):
        run.check_data(plain_spec(examples=101))
    with pytest.raises(UsageError, match=r"has other classes than .*: the order differ"):
        run.check_data(plain_spec(class_names=tuple("1023456789")))
    run.check_data(plain_spec(eval_shape=(9, 9, 1)))


# ---- Files.


def test_the_spec_keeps_its_bits_and_odd_names(tmp_path):
    mean = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    names = ("new\nline", "[bold]markup[/]", "latin \udce9", "e\u0301", "\u00e9", "\u2028")
    spec = plain_spec((4, 4, 3), class_names=names, mean=mean)
    run = Run(tmp_path)
    with run.writing(digits.get_config(), spec, first_host=True):
        pass
    there = Run(tmp_path).spec
    assert there.class_names == names
    assert there.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(there.mean, mean)
    run.check_data(spec)


def test_another_host_writes_nothing(tmp_path):
    with Run(tmp_path / "run").writing(digits.get_config(), plain_spec(), first_host=False):
        assert not (tmp_path / "run").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A process that is killed while it writes leaves the file from before."""
    run = Run(tmp_path)
    run.write("result.json", '{"step": 1}')

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(run.path), "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.write("result.json", '{"step": 2}')
    assert run.result == {"step": 1}


def test_what_was_logged_after_the_step_a_run_goes_on_from_is_forgotten(tmp_path):
    run = Run(tmp_path)
    for step in (2, 4, 6):
        run.log({"step": step, "train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[]\n5\nnull\n{"step": 1')  # of another program, and of a process that was killed
    run.forget_after(4)
    assert [row["step"] for row in run.metrics] == [2, 4]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_second_process_in_a_workdir_is_refused_and_a_dead_ones_lock_is_none(tmp_path):
    code = f"""
import sys, time
from configs import digits
from resattn_jax.run import Run
with Run({str(tmp_path)!r}).writing(digits.get_config(), None, first_host=True):
    print("in", flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    run = Run(tmp_path)
    with (
        pytest.raises(UsageError, match=rf"is in use by process {first.pid} on \S+ since \d{{4}}-"),
        run.writing(digits.get_config(), None, first_host=True),
    ):
        pass
    first.kill()
    first.communicate()
    with run.writing(digits.get_config(), None, first_host=True) as notes:
        assert notes == []


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot be written: .*; choose another --workdir"),
        Run(tmp_path / "file" / "run").writing(digits.get_config(), None, first_host=True),
    ):
        pass


def test_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(Run("~/runs/a")) == str(tmp_path / "runs/a")


def test_tensorboard_forgets_the_steps_that_are_trained_again(tiny_config, one_device, tmp_path):
    tiny_config.schedule.name = "constant"
    tiny_config.total_steps = 6
    train_and_evaluate(tiny_config, tmp_path, one_device)
    tiny_config.total_steps = 8
    train_and_evaluate(tiny_config, tmp_path, one_device)
    files = sorted(tmp_path.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
    starts = [[e.step for e in read_events(f.read_bytes()) if e.HasField("session_log")] for f in files]
    assert starts == [[1], [7]]


def test_what_was_logged_is_in_tensorboards_file_before_the_next_step(tmp_path):
    """A process that is killed takes no queue with it: here the file is read while the writer is open."""
    events = EventFile(tmp_path, purge_step=1)
    events.scalar("train/loss", 0.5, 20)
    events.flush()
    [file] = tmp_path.iterdir()
    assert [(e.step, [v.tag for v in e.summary.value]) for e in read_events(file.read_bytes())] == [
        (0, []),
        (1, []),
        (20, ["train/loss"]),
    ]
    events.close()


# ---- Checkpoints.


def test_the_best_is_decided_once_and_is_the_first_of_equals(tiny_config, one_device, tmp_path):
    """Five evaluations of which the second and the third are the best and equal."""
    top1 = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6, 5: 0.1}
    assert best_step({step: {"top1": value} for step, value in top1.items()}.items()) == 2
    state = built(tiny_config, one_device).initial_state()
    with Writer(tmp_path, keep_newest=1, keep_best=1) as checkpoints:
        for step, value in top1.items():
            checkpoints.save(state.replace(step=state.step + step), Progress(), {"top1": value})
            checkpoints.wait()
    with Reader(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 5]
        assert checkpoints.find("best")[0] == 2


def test_progress_is_saved_as_it_was_when_it_was_handed_over(tiny_config, one_device, tmp_path):
    """The background thread that writes it is held until the run has gone on."""
    experiment = built(tiny_config, one_device)
    state, like = experiment.initial_state(), experiment.abstract_state()
    with Writer(tmp_path, keep_newest=20) as checkpoints:
        for step in range(1, 9):
            best = {"top1": step / 10, "step": step}
            progress = Progress(best=best, train_images=step)
            checkpoints.save(state.replace(step=state.step + step), progress)
            best["top1"] = 0.0
        checkpoints.wait()
        saved = [checkpoints.restore(step, like)[1] for step in range(1, 9)]
    assert [(p.best["top1"], p.train_images) for p in saved] == [(step / 10, step) for step in range(1, 9)]


def test_evaluating_opens_its_own_split_alone(tiny_config, one_device, tmp_path, monkeypatch):
    train_and_evaluate(tiny_config, tmp_path, one_device)
    from resattn_jax.data import pipelines

    opened = []
    open_source = pipelines.open_source
    monkeypatch.setattr(pipelines, "open_source", lambda *args: opened.append(args[1]) or open_source(*args))
    evaluate_checkpoint(tiny_config, tmp_path, "newest", one_device)
    assert opened == ["test"]


def test_a_net_with_a_mean_image_is_loaded_without_its_training_set(tiny_config, one_device, tmp_path, monkeypatch):
    import resattn_jax

    tiny_config.data.mean_image = True
    train_and_evaluate(tiny_config, tmp_path, one_device)
    from resattn_jax.data import pipelines

    monkeypatch.setattr(pipelines, "open_source", None)
    net = resattn_jax.load(tmp_path)
    assert net.spec.mean.shape == (8, 8, 1)
    assert net.predict(np.zeros((8, 8), np.uint8)).shape == (1, 10)
