"""What --mode=report writes: the figures are the net's, the page is whole by itself and holds any name."""

import html.parser
import io
import json
import pathlib
import re
import types

import jax
import matplotlib
import numpy as np
import PIL.Image
import pytest
from helpers import lines
from sklearn.calibration import calibration_curve
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

import resattn_jax
from benchmarks.kills import read_events
from resattn_jax.classifier import load
from resattn_jax.config import flatten
from resattn_jax.configs import default
from resattn_jax.data.sources import open_source
from resattn_jax.data.sources.digits import DigitsSource
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import TrainedNet, write_folder
from resattn_jax.mistakes import Assessment
from resattn_jax.models.count import count_parameters
from resattn_jax.modes import report as mode
from resattn_jax.modes.show_data import write_contact_sheet
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.report import mask_sheet
from resattn_jax.report.record import read_record, train_seconds
from resattn_jax.report.run_page import Measured, most_confused, run_page
from resattn_jax.report.tensorboard import confusion_picture
from resattn_jax.run import Run

pytestmark = pytest.mark.usefixtures("shared_programs")

NASTY = ["<script>alert(1)</script>", "$x_1$ & \"b\" 'c'", "line\nbreak \u202eabc", "bad\udcff", "漢字 {{ 7 * 7 }}"]
NASTY += list("56789")


class Page(html.parser.HTMLParser):
    """Tags, addresses, ids, tables as texts of cells by their class, and the text of a page."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.ids, self.text, self.tables, self._kind = set(), [], "", {}, None
        self.addresses = re.findall(r"url\(([^)]*)\)", content)
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [value for name, value in attributes.items() if name.split(":")[-1] in ("src", "href")]
        if tag == "table":
            self._kind = attributes.get("class", "")
            self.tables[self._kind] = []
        elif tag == "tr":
            self.tables[self._kind].append([])
        elif tag in ("td", "th"):
            self.tables[self._kind][-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._kind = None

    def handle_data(self, data):
        self.text += data
        if self._kind is not None and self.tables[self._kind] and self.tables[self._kind][-1]:
            self.tables[self._kind][-1][-1] += data.strip()


def written(*runs, output=None, config=None):
    """The page that the mode writes of some runs."""
    runs = [Run(path) for path in runs]
    command = types.SimpleNamespace(run=runs[0], runs=tuple(runs), config=config or runs[0].config, output=output)
    mode.run(command)
    return Page(pathlib.Path(output or runs[0].path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def trained(tiny_config, tmp_path_factory, one_device):
    """A finished run, trained once, and a copy of its config."""
    folder = tmp_path_factory.getbasetemp() / "reported"
    if not folder.exists():
        train_and_evaluate(tiny_config, folder, one_device)
    return folder


@pytest.fixture
def page(trained):
    """The page of the run, written once."""
    file = trained / "report.html"
    return Page(file.read_text(encoding="utf-8")) if file.exists() else written(trained)


@pytest.fixture
def copied(trained, tmp_path):
    """Makes a copy of the run with changes of its config, and its checkpoints where they are asked for."""

    def copy(name, *, checkpoints=False, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("data.json", "metrics.jsonl", "result.json", "started.jsonl"):
            (folder / file).write_bytes((trained / file).read_bytes())
        config = json.loads((trained / "config.json").read_text())
        for key, value in changes.items():
            section, _, last = key.rpartition("__")
            (config[section] if section else config)[last] = value
        (folder / "config.json").write_text(json.dumps(config))
        if checkpoints:
            (folder / "checkpoints").symlink_to(trained / "checkpoints")
        return folder

    return copy


def test_confusions_and_calibration_are_those_of_the_logits(trained, page):
    net = load(trained)
    source = open_source("digits", "test")
    images, labels = zip(*((PIL.Image.open(io.BytesIO(data)), label) for data, label in source), strict=True)
    logits = net.logits(images).astype(np.float64)
    expected = np.zeros((10, 10), int)
    for label, row in zip(labels, logits, strict=True):
        expected[label, row.argmax()] += 1
    head, *rows = page.tables["confusion"]
    np.testing.assert_array_equal([[int(cell or 0) for cell in row[1:]] for row in rows], expected)
    assert head[1:] == [row[0] for row in rows] == list("0123456789")

    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    confidence, right = shares.max(-1), shares.argmax(-1) == labels
    places = np.ceil(confidence * 15) - 1
    ece = sum(abs(right[places == i].sum() - confidence[places == i].sum()) for i in range(15)) / len(labels)
    assert f"Expected calibration error {ece:.4f}" in page.text
    assert f"{net.evaluate()['ece']:.4f}" == f"{ece:.4f}"
    wrong = np.flatnonzero(~right)
    worst = wrong[np.argmax(confidence[wrong])]
    told = f"{labels[worst]} taken for {shares[worst].argmax()}, {100 * confidence[worst]:.1f} %"
    mistakes = page.text.partition("Most confident mistakes")[2]
    assert mistakes.index(told) < mistakes.index(f"digits example {worst}") < mistakes.index("stage1_attention1")

    bins = mode.measure(net).assessment.bins
    used = bins["count"] > 0
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    np.testing.assert_allclose((bins["right"] / np.maximum(bins["count"], 1))[used], accuracy)
    np.testing.assert_allclose((bins["confidence"] / np.maximum(bins["count"], 1))[used], mean, rtol=1e-5)


def test_the_page_is_whole_by_itself(trained, page):
    assert page.tags.isdisjoint({"script", "iframe", "object"})
    assert {address[:5] if address.startswith("data:") else address[:1] for address in page.addresses} == {"data:", "#"}
    assert "http" not in (trained / "report.html").read_text()
    assert len(page.ids) == len(set(page.ids)) > 100
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    result = Run(trained).result
    assert page.tables["results"][1][:3] == ["last step", "12", f"{100 * result['final']['top1']:.2f} %"]
    assert page.tables["results"][2][1] == str(result["best"]["step"])


def test_every_start_is_kept_with_its_hardware_and_versions(trained, tiny_config, one_device):
    """A second start of a finished run trains nothing, but is one."""
    train_and_evaluate(tiny_config, trained, one_device)
    *_, before, start = Run(trained).starts
    assert (before["step"], start["step"]) == (0, 12)
    assert start["parameters"] == count_parameters(load(trained).variables["params"])
    assert (start["jax"], start["devices"]) == (jax.__version__, "1 x cpu")
    rows = written(trained).tables["starts"]
    assert [row[0] for row in rows] == ["start", before["date"], start["date"], "this page"]
    assert f"devices 1 x cpu, resattn_jax {resattn_jax.__version__}, jax {jax.__version__}" in rows[1][2]


def test_what_differs_from_the_defaults_is_marked(trained, page):
    ours, theirs = flatten(Run(trained).config), flatten(default.get_config())
    rows = page.tables["config"][1:]
    assert {key for key, _, other in rows if other} == {key for key in ours if ours[key] != theirs[key]}
    assert ["batch_size", "32", "64"] in rows
    assert ["seed", "0", ""] in rows


@pytest.mark.parametrize("table", ["results", "differing"])
def test_runs_beside_each_other_show_exactly_what_differs(copied, tmp_path, table):
    changes = {"seed": 3, "model__learning": "nal"}
    if table == "differing":  # too many for a row of the results
        changes |= {"batch_size": 16, "log_every": "1 step", "label_smoothing": 0.0, "model__t": 2, "ema_decay": 0.5}
    runs = [copied("a"), copied("b", **changes), copied("c")]
    result = json.loads((runs[1] / "result.json").read_text())
    result["final"]["top1"] = 0.125
    (runs[1] / "result.json").write_text(json.dumps(result))
    page = written(*runs, output=tmp_path / "page.html")
    keys = {key.replace("__", ".") for key in changes}
    head, a, b, c = page.tables["results"]
    assert (b[0], b[head.index("top-1")], b[head.index("error")]) == ("b", "12.50 %", "87.50 %")
    assert ("differing" in page.tables) == (table == "differing")
    if table == "results":
        assert set(head[1 : head.index("parameters")]) == keys
        assert (b[head.index("seed")], a[head.index("seed")], c[head.index("seed")]) == ("3", "0", "0")
    else:
        assert {row[0] for row in page.tables["differing"][1:]} == keys
        assert ["seed", "0", "3", "0"] in page.tables["differing"]
    assert "not comparable" not in page.text
    assert page.text.count("over steps") == 0 < page.text.count("Over steps")
    assert len(page.ids) == len(set(page.ids)) > 100


def test_runs_of_other_data_say_what_is_not_comparable(copied, tmp_path):
    runs = [copied("a"), copied("b", data__name="cifar10", data__dir=None)]
    spec = json.loads((runs[1] / "data.json").read_text())
    (runs[1] / "data.json").write_text(json.dumps({**spec, "class_names": list("abcdefghij")}))
    (runs[1] / "started.jsonl").unlink()
    text = written(*runs, output=tmp_path / "page.html").text
    assert "Top-1 and loss are not comparable: the runs were measured by different data.name." in text
    assert "The runs have different classes." in text
    assert "Images/s and times are not comparable: some runs have not kept what they were trained on." in text


def test_names_may_be_anything(copied, tmp_path, monkeypatch):
    folder = copied("<b>run & 'co'\udcff", checkpoints=True)
    spec = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({**spec, "class_names": NASTY}))
    monkeypatch.setattr(DigitsSource, "class_names", tuple(NASTY))
    page = written(folder)
    assert page.tags.isdisjoint({"script", "b>run"})
    for shown in (*NASTY[:2], r"line\nbreak \u202eabc", r"bad\udcff", NASTY[4], r"<b>run & 'co'\udcff"):
        assert shown in page.text
    assert page.tables["confusion"][1][0] == NASTY[0]
    assert r"<b>run & 'co'\udcff" in written(folder, copied("b"), output=tmp_path / "two.html").text


def test_what_is_not_there_is_left_out_and_told(copied, tmp_path, capsys):
    no_data = copied("no_data", checkpoints=True, data__name="folder:/nowhere")
    (no_data / "started.jsonl").unlink()
    page = written(no_data)
    assert "Nothing was measured anew" in page.text
    assert "there is no folder /nowhere" in page.text
    assert "Hardware and versions were not kept" in page.text
    logged = lines(no_data)[-1]["eval/confusion"]
    assert [[int(cell or 0) for cell in row[1:]] for row in page.tables["confusion"][1:]] == logged
    assert "As logged at the newest evaluation." in page.text
    assert "there is no folder /nowhere" in capsys.readouterr().out

    running = copied("running")
    (running / "result.json").unlink()
    with (running / "metrics.jsonl").open("r+") as file:
        file.truncate(file.read().index("\n") + 20)  # one row, and a line cut off
    page = written(running)
    assert "confusion" not in page.tables  # there was no evaluation yet
    text = page.text
    assert "It has not ended: step 4 of 12 when this page was written." in text
    assert "there is no checkpoint in" in text

    (running / "metrics.jsonl").unlink()
    (running / "data.json").write_text("{")
    text = written(running).text
    assert "No metrics were logged, so there are no curves." in text
    assert "data.json is damaged: it holds no JSON object; it is left out." in text
    with pytest.raises(UsageError, match=r"nothing holds no config.json"):
        read_record(Run(tmp_path / "nothing"))


def test_an_exported_net_has_a_page(trained, tmp_path):
    net = load(trained)
    folder = Run(tmp_path / "net")
    write_folder(folder, TrainedNet(config=net.config, spec=net.spec, variables=net.variables, step=12, metrics={}))
    page = written(folder.path)
    assert "No metrics were logged" in page.text
    assert sum(int(cell or 0) for row in page.tables["confusion"][1:] for cell in row[1:]) == 360


def test_the_time_follows_from_the_images_per_second():
    """By hand: 10 steps at 20 images/s, an evaluation after 5 more, of unknown speed, and 5 at 10 images/s."""
    rows = [
        {"step": 10, "train/images_per_second": 20.0},
        {"step": 15, "eval/top1": 0.5},
        {"step": 20, "train/images_per_second": 10.0},
    ]
    steps, seconds = train_seconds(rows, batch_size=4)
    known = (40 + 20) / (2 + 2)  # images/s of what is known
    np.testing.assert_allclose([steps, seconds], [[0, 10, 15, 20], [0, 2, 2 + 20 / known, 4 + 20 / known]])
    assert train_seconds(rows, batch_size=4, rate=8.0)[1][-1] == pytest.approx(10)  # 80 images
    assert train_seconds(rows[1:2], batch_size=4) is None


def test_many_classes_are_listed_by_their_confusions(trained):
    """50 classes; class 3 is taken for 7 twice, 8 for 1 once, of three examples each."""
    labels = np.repeat(np.arange(50), 3)
    predicted = labels.copy()
    predicted[[9, 10, 24]] = [7, 7, 1]
    bins = {name: np.r_[np.zeros(14), 150] for name in ("count", "right", "confidence")}
    class_top1 = [(predicted[labels == i] == i).mean() for i in range(50)]
    found = Assessment(
        metrics={"top1": 0.98, "top5": 1.0, "loss": 0.5, "ece": 0.25, "examples": 150, "class_top1": class_top1},
        rows=np.arange(150),
        labels=labels,
        predicted=predicted,
        confidence=np.linspace(0, 1, 150),
        bins=bins,
    )
    assert most_confused(found.confusion(50)) == [(3, 7, 2, 2 / 3), (8, 1, 1, 1 / 3)]
    assert found.most_confident_mistakes(2).tolist() == [24, 10]
    measured = Measured(net="net", labels=tuple(f"c{i}" for i in range(50)), assessment=found, mistakes=[])
    page = Page(run_page(read_record(Run(trained)), measured, {}).decode())
    assert page.tables["pairs"][1:] == [["c3", "c7", "2", "66.7 %"], ["c8", "c1", "1", "33.3 %"]]
    assert "the 40 lowest of 50" in page.text
    assert page.text.index("33.3 % of 3") < page.text.index("66.7 % of 3")


# ---- TensorBoard.


def events(folder):
    """The values of the event files of a run, in order: (step, value)."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in read_events(path.read_bytes()):
            yield from ((event.step, value) for value in event.summary.value)


def pictures(folder, tag):
    return [
        (step, np.asarray(PIL.Image.open(io.BytesIO(value.image.encoded_image_string))))
        for step, value in events(folder)
        if value.tag == tag
    ]


def test_tensorboard_has_the_first_batch_as_the_net_sees_it(trained, tiny_config, one_device, tmp_path):
    [(step, shown)] = pictures(trained, "train/batch")
    with PIL.Image.open(write_contact_sheet(tiny_config, tmp_path, one_device)) as sheet:
        rows = np.asarray(sheet)[: shown.shape[0]]  # 8 of the 32 images in each
    assert step == 0
    np.testing.assert_array_equal(shown, rows)


def test_tensorboard_has_the_masks_of_the_same_pictures_at_each_evaluation(trained):
    """In the colours of a scale from 0 to 1; a row is a picture, and its second tile the mask of the one module."""
    shown = pictures(trained, "eval/masks")
    assert [step for step, _ in shown] == [6, 12]
    source, net = DigitsSource("test"), load(trained, "newest")
    seen = np.stack([net.shown(mode.pixels(source.name(row), source[row][0], net.spec)) for row in range(8)])
    masks = net.attention(seen)["stage1_attention1"].mask.mean(-1)
    size, step = mask_sheet._CELL, mask_sheet._CELL + mask_sheet._GAP
    (_, first), (_, last) = shown
    assert (first != last).any()
    for row in range(8):
        y = mask_sheet._HEAD + row * step
        picture, mask = (last[y : y + size, x : x + size] for x in (0, step))
        middles = np.arange(size // 16, size, size // 8)
        np.testing.assert_array_equal(picture[middles][:, middles, 0], seen[row, ..., 0])
        middles = size * (2 * np.arange(4) + 1) // 8
        colours = matplotlib.colormaps["magma"](np.round(masks[row] * 255).astype(int), bytes=True)[..., :3]
        np.testing.assert_array_equal(mask[middles][:, middles], colours)


def test_tensorboard_and_the_log_have_the_confusions(trained):
    [(step, shown)] = pictures(trained, "eval/confusion")
    net = load(trained, "newest")
    counts = mode.measure(net).assessment.confusion(10)
    assert lines(trained)[-1]["eval/confusion"] == counts.tolist()
    np.testing.assert_array_equal(shown, confusion_picture(counts.tolist(), list("0123456789")))
    assert step == 12


def test_a_cell_of_the_confusions_is_as_dark_as_its_share():
    """By hand: three of four right, and a class without examples. The last lines of a cell have no letters."""
    shown = confusion_picture([[3, 1], [0, 0]], [NASTY[0], NASTY[4]])
    cell = shown.shape[0] // 3  # a head and two rows
    right, wrong = 255 + 0.75 * (np.array((26, 127, 75)) - 255), 255 + 0.25 * (np.array((179, 54, 31)) - 255)
    expected = {(2 * cell - 4, -3 * cell // 2): right, (2 * cell - 4, -cell // 2): wrong}
    expected |= {(3 * cell - 4, -3 * cell // 2): 255, (3 * cell - 4, -cell // 2): 255}
    for place, colour in expected.items():
        np.testing.assert_array_equal(shown[place], np.round(colour))


def test_tensorboard_compares_runs_by_their_hyper_parameters(trained):
    """In the event file of the run itself, as a folder below it would be a run of its own."""
    found = [value for _, value in events(trained) if value.metadata.plugin_data.plugin_name == "hparams"]
    data = [HParamsPluginData.FromString(value.metadata.plugin_data.content) for value in found]
    kinds = [value.tag.rpartition("/")[2] for value in found]
    assert kinds[:3] == ["experiment", "session_start_info", "session_end_info"]
    metrics = {info.name.tag for info in data[0].experiment.metric_infos}
    assert metrics < {value.tag for _, value in events(trained)}  # each is a curve of the run
    values = data[1].session_start_info.hparams
    assert set(values) == set(flatten(Run(trained).config))
    assert values["batch_size"].number_value == 32
    assert values["optimizer.name"].string_value == "sgd"
    assert values["augment.flip"].bool_value is False
    assert not [path for path in trained.iterdir() if path.is_dir() and path.name != "checkpoints"]
