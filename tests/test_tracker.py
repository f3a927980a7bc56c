"""What Weights & Biases gets of a run: what was logged, each step once, under one id. Read from its offline files."""

import importlib.util
import json
import types

import pytest
import wandb
from helpers import lines, stop_at
from wandb.proto.wandb_internal_pb2 import Record

from resattn_jax.config import flatten
from resattn_jax.errors import Interrupted, RunError, UsageError
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.report.tracker import Tracker
from resattn_jax.run import Run

BLOCK, HEAD = 32768, 7  # bytes of a block of a log, in LevelDB's format, and of the head of a piece: CRC, length, kind


def records(path):
    """The records of a .wandb file, which begins with a head of its own as long as that of a piece."""
    data, place, record, found = path.read_bytes(), HEAD, b"", []
    assert data[:4] == b":W&B"
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:  # the end of a block, which no head fits
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(record))
            record = b""
    return found


def plain(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def kept(workdir):
    """For each start of a run (its id, its config, its rows, its summary, its exit codes), as the disk has them."""
    wandb.teardown()  # its process writes the rest then
    for path in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found = records(path)
        config = plain(item for record in found for item in record.run.config.update)
        rows = [plain(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
        rows = [{"step" if k == "_step" else k: v for k, v in row.items() if k == "_step" or "/" in k} for row in rows]
        summary = plain(item for record in found for item in record.summary.update)
        codes = [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]
        [name] = {record.run.run_id for record in found if record.run.run_id}
        yield types.SimpleNamespace(id=name, config=config, rows=rows, summary=summary, exit=codes)


def logged(workdir):
    """The numbers of metrics.jsonl, a row for each step."""
    rows = {}
    for line in lines(workdir):
        rows.setdefault(line["step"], {}).update({k: v for k, v in line.items() if isinstance(v, int | float)})
    return list(rows.values())


def test_it_has_what_was_logged_each_step_once_also_of_a_run_that_was_stopped(
    tiny_config, one_device, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_config.tracker = "wandb"
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            train_and_evaluate(tiny_config, tmp_path, one_device)
    rows_then = logged(tmp_path)
    result = train_and_evaluate(tiny_config, tmp_path, one_device)
    stopped, whole = kept(tmp_path)
    assert stopped.rows == rows_then
    assert whole.rows == logged(tmp_path)
    assert [row["step"] for row in whole.rows] == [4, 6, 8, 12]  # the last with what training and evaluation logged
    assert whole.rows[-1].keys() >= {"train/loss", "eval/top1"}
    assert stopped.id == whole.id == (tmp_path / "wandb.txt").read_text().strip()
    assert stopped.exit == [1]
    assert whole.exit == [0]
    assert whole.config["schedule.learning_rate"] == 0.1
    assert whole.config.keys() >= flatten(tiny_config).keys()
    assert whole.summary["final/top1"] == result["final"]["top1"]
    assert whole.summary["best/step"] == result["best"]["step"]


class Server:
    """wandb as it goes on with a run of which it has all steps before `step`."""

    def __init__(self, step):
        self.step, self.rows, self.summary = step, [], {}

    def log(self, values, step, commit):
        assert commit
        self.rows.append({"step": step, **values})

    def finish(self, exit_code):
        self.exit_code = exit_code


def begun(monkeypatch, tmp_path, tiny_config, step):
    server = Server(step)
    monkeypatch.setattr(wandb, "init", lambda **_: server)
    return server, Tracker(Run(tmp_path), tiny_config)


def test_a_start_sends_what_a_killed_process_did_not_and_nothing_twice(monkeypatch, tmp_path, tiny_config):
    """By hand: steps 4 and 8 are on the disk, whose process was killed when wandb had 4, or had 12 already."""
    run = Run(tmp_path)
    before = [{"step": 4, "train/loss": 3.0}, {"step": 8, "train/loss": 2.0}, {"step": 8, "eval/top1": 0.5}]
    for row in before:
        run.log(row)
    after = [{"step": 12, "train/loss": 1.0, "eval/confusion": [[1]]}, {"step": 16, "train/loss": 0.5}]
    eight, twelve, sixteen = {**before[1], **before[2]}, {"step": 12, "train/loss": 1.0}, after[1]
    for had, sent in ((0, [before[0], eight, twelve, sixteen]), (5, [eight, twelve, sixteen]), (13, [sixteen])):
        server, tracker = begun(monkeypatch, tmp_path, tiny_config, had)
        for row in after:
            tracker.add(row)
        tracker.close(None)
        assert server.rows == sent
        assert server.exit_code == 0


def test_a_step_that_failed_before_its_evaluation_is_not_sent_without_it(monkeypatch, tmp_path, tiny_config):
    server, tracker = begun(monkeypatch, tmp_path, tiny_config, 0)
    for step in (4, 8):
        tracker.add({"step": step, "train/loss": 1.0})
    tracker.close(RunError("the evaluation loss is nan"))
    assert [row["step"] for row in server.rows] == [4]
    assert server.exit_code == 1


def test_without_wandb_it_is_one_line_that_names_the_extra(monkeypatch, tmp_path, tiny_config):
    tiny_config.tracker = "wandb"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed: pip install '\.\[wandb\]'"):
        train_and_evaluate(tiny_config, tmp_path)


def test_what_wandb_says_no_to_is_one_line(monkeypatch, tmp_path, tiny_config):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match=r"wandb does not begin: No API key configured.*WANDB_MODE=offline") as told:
        Tracker(Run(tmp_path), tiny_config)
    assert "\n" not in str(told.value)
