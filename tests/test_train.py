"""A run: what it leaves behind, and that being cut off changes nothing."""

import json
import signal

import jax
import numpy as np
import pytest
from conftest import NOT_COMPILED
from helpers import assert_same_bits, built, final_state, lines, run_steps, stop_at

from resattn_jax.checkpoint import Reader, Writer
from resattn_jax.config import flatten
from resattn_jax.data.pipelines import TrainingData
from resattn_jax.errors import Interrupted, RunError, UsageError
from resattn_jax.experiment import build
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.train import Clock, train_and_evaluate
from resattn_jax.runtime import make_mesh
from resattn_jax.state import Progress

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_what_is_done_while_the_clock_is_paused_is_no_time_of_training(monkeypatch):
    """It starts at 10 s, is paused from 12 to 15, and stops at 16 after 2 steps of 8 images: 16 in 3 s."""
    times = iter([10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr("resattn_jax.modes.train.time.perf_counter", lambda: next(times))
    clock = Clock(Progress(), batch_size=8)
    clock.start(0)
    with clock.paused():
        pass
    clock.stop(2)
    assert (clock.images, clock.seconds, clock.images_per_second) == (16, 3.0, 16 / 3)


def test_a_run_leaves_what_the_contract_names(tiny_config, one_device, tmp_path):
    result = train_and_evaluate(tiny_config, tmp_path, one_device)

    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 12
    assert result["train_images_per_second"] > 0
    assert set(result["final"]) == {"top1", "top5", "loss", "ece"}
    assert set(result["best"]) == {"top1", "top5", "loss", "ece", "step"}
    assert result["best"]["top1"] >= result["final"]["top1"]
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 32
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert "head/kernel" in (tmp_path / "parameters.txt").read_text()

    logged = lines(tmp_path)
    assert [line["step"] for line in logged if "train/loss" in line] == [4, 8, 12]
    evaluated = [line for line in logged if "eval/top1" in line]
    assert [line["step"] for line in evaluated] == [6, 12]  # the last step once, although 12 is due anyway
    assert all(line["eval/examples"] == 360 for line in evaluated)  # a batch of 100 does not divide 360
    assert evaluated[-1]["eval/top1"] == result["final"]["top1"]

    with Reader(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [6, 12]
        assert checkpoints.find("best")[0] == result["best"]["step"]

    measured = evaluate_checkpoint(tiny_config, tmp_path, "newest", one_device)
    assert measured["top1"] == result["final"]["top1"]
    assert measured["loss"] == pytest.approx(result["final"]["loss"], rel=1e-6)
    assert len(measured["class_top1"]) == 10


@pytest.mark.parametrize("steps_per_dispatch", [1, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    tiny_config, one_device, tmp_path, monkeypatch, steps_per_dispatch
):
    """Weights, momentum, running statistics, moving average and step; stopped where nothing else was due."""
    tiny_config.steps_per_dispatch = steps_per_dispatch
    train_and_evaluate(tiny_config, tmp_path / "straight", one_device)

    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted, match=r"stopped at step (7|8) of 12") as stopped:
            train_and_evaluate(tiny_config, tmp_path / "cut", one_device)
        assert stopped.value.signal == signal.SIGTERM
    result = train_and_evaluate(tiny_config, tmp_path / "cut", one_device)

    straight, cut = (final_state(tiny_config, tmp_path / name, one_device) for name in ("straight", "cut"))
    assert straight.step == cut.step == 12
    assert_same_bits(straight, cut)
    logged = {name: [dict(line) for line in lines(tmp_path / name)] for name in ("straight", "cut")}
    for line in logged["straight"] + logged["cut"]:
        line.pop("train/images_per_second", None)
    assert logged["straight"] == logged["cut"]  # means over the same steps, each once
    assert result["best"]["step"] in (6, 12)


def test_a_finished_run_started_again_trains_nothing_and_keeps_its_result(tiny_config, one_device, tmp_path):
    first = train_and_evaluate(tiny_config, tmp_path, one_device)
    before = final_state(tiny_config, tmp_path, one_device)
    again = train_and_evaluate(tiny_config, tmp_path, one_device)
    assert again == first
    assert len(lines(tmp_path)) == 5  # three of training, two of evaluation, none twice
    assert_same_bits(before, final_state(tiny_config, tmp_path, one_device))


def test_what_a_killed_run_logged_after_its_checkpoint_is_not_logged_twice(tiny_config, one_device, tmp_path):
    train_and_evaluate(tiny_config, tmp_path, one_device)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 14, "train/loss": 1.0}) + "\n" + '{"step": 1')
    train_and_evaluate(tiny_config, tmp_path, one_device)
    assert max(line["step"] for line in lines(tmp_path)) == 12


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tiny_config, one_device, tmp_path):
    tiny_config.total_steps = 6
    tiny_config.schedule.name = "constant"
    tiny_config.schedule.warmup = tiny_config.augment.mixup_off_last = "0 steps"
    tiny_config.optimizer.clip_norm = None
    tiny_config.eval.every = "2 steps"
    train_and_evaluate(tiny_config, tmp_path, one_device)

    tiny_config.total_steps = 12
    poison(tmp_path, tiny_config, one_device)
    with pytest.raises(RunError, match=r"at step 9 is (nan|inf); the checkpoint of step 8 is kept"):
        train_and_evaluate(tiny_config, tmp_path, one_device)
    with Reader(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == 8


def poison(workdir, config, devices):
    """Adds a checkpoint of step 8 whose head is not a number."""
    with Writer(workdir / "checkpoints") as checkpoints:
        state, progress = checkpoints.restore(6, built(config, devices).abstract_state())
        params = {**state.params, "head": jax.tree.map(lambda x: x * np.nan, state.params["head"])}
        checkpoints.save(state.replace(step=state.step + 2, params=params), progress)


def test_a_workdir_of_another_config_is_refused(tiny_config, one_device, tmp_path):
    train_and_evaluate(tiny_config, tmp_path, one_device)
    tiny_config.optimizer.weight_decay = 0.5
    with pytest.raises(
        UsageError, match=r"another config's run: config.optimizer.weight_decay is 0.0005 there and 0.5"
    ):
        train_and_evaluate(tiny_config, tmp_path, one_device)


def test_a_run_may_be_made_longer(tiny_config, one_device, tmp_path):
    """With mixup to its end its program is that of the shorter one."""
    tiny_config.schedule.name, tiny_config.augment.mixup_off_last = "constant", "0 steps"
    programs = []
    for total in (6, 8):
        tiny_config.total_steps = total
        assert train_and_evaluate(tiny_config, tmp_path, one_device)["step"] == total
        experiment = built(tiny_config, one_device)
        programs.append(experiment.train_steps.lower(*experiment.train_shapes()).as_text())
    assert programs[0] == programs[1]


def test_the_config_is_not_changed_by_its_reader(tiny_config, one_device, tmp_path):
    before = tiny_config.to_json()
    train_and_evaluate(tiny_config, tmp_path, one_device)
    assert tiny_config.to_json() == before


def test_runs_of_other_seeds_and_lengths_share_their_programs(tiny_config, one_device):
    """Nothing of them is in the compiled program, nor of any key that `shared_programs` leaves out of account. Each
    seed has weights and batches of its own.
    """
    other = tiny_config.copy_and_resolve_references()
    other.update(seed=2**32 - 1, total_steps=20, log_every="1 steps", watchdog_minutes=1.0)
    other.update(tracker="wandb", init_from="elsewhere")
    other.eval.update(every="5 steps", max_examples=50)
    other.checkpoint.update(every="3 steps", keep_newest=5)
    other.data.update(workers=2, broken="skip")
    changed = {key for key, value in flatten(other).items() if flatten(tiny_config)[key] != value}
    assert all(any(key.startswith(name) for key in changed) for name in NOT_COMPILED)
    programs, losses = [], []
    for config in tiny_config, other:
        config.update(steps_per_dispatch=1)
        config.schedule.name, config.augment.mixup_off_last = "constant", "0 steps"
        experiment = build(config, TrainingData(config).spec, make_mesh(one_device))  # not that of the fixture
        programs.append(experiment.train_steps.lower(*experiment.train_shapes()).as_text())
        losses.append(run_steps(config, one_device, 1)[1][0]["loss"])
    assert programs[0] == programs[1]
    assert losses[0] != losses[1]
