"""--mode=predict: pictures are named in any way, broken ones do not stop the others, and a file is whole."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from helpers import ROOT, plain_spec, random_variables

from configs import digits
from resattn_jax.classifier import Classifier
from resattn_jax.data.listing import list_pictures, split_rows
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.modes.predict import predict_files
from resattn_jax.report import predictions
from resattn_jax.run import Run

NAMES = ["a, b.png", "line\nbreak.png", "<b>.png", "sub/é 漢.png", os.fsdecode(b"bad\xff.png"), "[1].png"]


@pytest.fixture
def folder(tmp_path):
    """Pictures with names of all kinds, and what is no picture beside them."""
    for i, name in enumerate(NAMES):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            PIL.Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(file, "PNG")
    (tmp_path / "pictures" / ".hidden.png").touch()
    (tmp_path / "pictures" / "notes.txt").touch()
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    return tmp_path / "pictures"


@pytest.fixture
def net(tiny_config):
    spec = plain_spec(classes=4)
    return Classifier(tiny_config, spec, random_variables(Classifier(tiny_config, spec, {}).model, (8, 8, 1)))


def test_a_folder_a_file_and_a_pattern_stand_for_their_pictures(folder, monkeypatch):
    paths = sorted(str(folder / name) for name in NAMES)
    assert list_pictures([str(folder)]) == paths
    flat = [path for path in paths if "/sub/" not in path]
    assert list_pictures([f"{folder}/*.png"]) == flat
    assert list_pictures([f"{folder}/**/*.png"]) == paths
    exact = [f"{folder}/[1].png", f"{folder}/notes.txt", f"{folder}/a, b.png"]  # in the order they were named
    assert list_pictures(exact) == exact
    (folder / "loop").symlink_to(folder)
    assert list_pictures([str(folder)]) == paths
    monkeypatch.setenv("HOME", str(folder))
    assert list_pictures(["~"]) == paths


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "--images= is no path"),
        ("nowhere", "there is no 'nowhere'; --images names a file, a folder or a pattern"),
        ("nowhere\n*", r"--images=nowhere\\n\* fits no file"),
        ("{folder}/none", "has no pictures; their names must end in one of .jpg"),
        ("/dev/null", "is no regular file"),
    ],
)
def test_a_text_that_stands_for_no_picture_is_told(folder, given, says):
    (folder / "none").mkdir()
    with pytest.raises(UsageError, match=says):
        list_pictures([given.format(folder=folder)])


def test_rows_of_the_evaluation_split_are_named_by_number(tmp_path, monkeypatch):
    assert split_rows("eval:0,5,17") == [0, 5, 17]
    assert split_rows("evaluation/a.png") is None
    for wrong in ("eval:", "eval:1,", "eval:-1", "eval:²", "eval:1-3"):
        with pytest.raises(UsageError, match="it is written eval:0,5,17"):
            split_rows(wrong)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval:1").touch()
    assert split_rows("eval:1") is None


def test_files_hold_what_the_net_says_in_order(net, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no picture")
    images = list_pictures([str(folder)])
    expected = {image: net.predict(image)[0] for image in images if "broken" not in image}
    for kind in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out.{kind}"
        assert predict_files(net, images, top=3, output=str(output)) == 1
        assert "broken.png cannot be read: it is no image of a known kind" in capsys.readouterr().err
        assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    escaped = [image.encode("utf-8", "backslashreplace").decode() for image in images]

    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == images
    for row in rows:
        if "broken" in row["image"]:
            assert row["error"] == "it is no image of a known kind"
            continue
        best = np.argsort(-expected[row["image"]], kind="stable")[:3]
        assert [found["class"] for found in row["top"]] == [net.labels[i] for i in best]
        shares = [found["probability"] for found in row["top"]]
        np.testing.assert_allclose(shares, expected[row["image"]][best], rtol=1e-4)

    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["image"] for row in table] == escaped
    by_row = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["image"] for row in by_row] == escaped
    for row, text, values in zip(rows, table, by_row, strict=True):
        top = row.get("top", [{"class": "", "probability": 0.0}] * 3)
        assert [text[f"class{i}"] for i in (1, 2, 3)] == [found["class"] for found in top]
        assert [values[f"class{i}"] or "" for i in (1, 2, 3)] == [found["class"] for found in top]
        assert float(text["probability2"] or 0) == pytest.approx(top[1]["probability"], rel=1e-4)
        assert values["probability2"] or pytest.approx(top[1]["probability"], rel=1e-4) == 0
        assert text["error"] == (values["error"] or "") == row.get("error", "")


def test_no_file_is_left_when_all_pictures_are_broken(net, tmp_path):
    (tmp_path / "broken.png").touch()
    with pytest.raises(UsageError, match=r"none of the pictures could be read; the last: .*broken.png cannot be read"):
        predict_files(net, [str(tmp_path / "broken.png")], output=str(tmp_path / "out.csv"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_an_output_that_cannot_be_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    for name, says in (
        ("out.cvs", r"must end in .csv, .jsonl or .parquet \(did you mean '.csv'"),
        ("a/b.csv", "no folder"),
    ):
        with pytest.raises(UsageError, match=says):
            predictions.check_output(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="needs PyArrow: pip install pyarrow"):
        predictions.check_output(str(tmp_path / "out.parquet"))


def test_the_command_line_labels_pictures_with_an_exported_net(net, folder, tmp_path):
    """A folder that an export wrote, in place of a run; one picture is broken."""
    config = digits.get_config()
    net = Classifier(config, plain_spec(), {})
    variables = random_variables(net.model, (8, 8, 1))
    write_folder(
        Run(tmp_path / "net"), TrainedNet(config=config, spec=net.spec, variables=variables, step=1, metrics={})
    )
    (folder / "broken.png").touch()

    def main(*arguments):
        line = [sys.executable, "main.py", "--mode=predict", f"--workdir={tmp_path / 'net'}", "--top=2", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)

    done = main(f"--images={folder}/a, b.png", f"--images={folder}/b*.png")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{folder}/a, b.png ")
    assert lines[0].count("%") == 2
    assert "broken: the file is empty" in lines[2]
    assert f"2 of 3 pictures were read, by the net of {tmp_path / 'net'}" in done.stdout
    refused = main(f"--images={folder}", "--checkpoint=7")
    assert refused.returncode == 2
    assert "is an exported net, which has no checkpoint '7'" in refused.stderr
