"""What --mode=attention draws: the channels by their rules, maps as they are, and pages that hold any name."""

import html.parser
import json
import re
import types

import jax
import matplotlib
import numpy as np
import PIL.Image
import pytest
from helpers import plain_spec, random_variables

from resattn_jax.classifier import Classifier
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.mask_statistics import ModuleStatistics, Summary
from resattn_jax.modes.attention import looks_at, run, summarise_net, write_looks, write_summary
from resattn_jax.report.attention import chosen_channels
from resattn_jax.report.colours import MASK, draw, number, symmetric
from resattn_jax.run import Run

NASTY = ("<script>alert(1)</script>", "a & \"b\" 'c' $x_1$", "line\nbreak \u202eabc", "bad\udcff", "漢字 {{ 7 * 7 }}")


@pytest.fixture
def net(tiny_config):
    spec = plain_spec((8, 8, 3), classes=len(NASTY), class_names=NASTY)
    return Classifier(tiny_config, spec, random_variables(Classifier(tiny_config, spec, {}).model, (8, 8, 3)))


@pytest.fixture
def pictures(tmp_path):
    """Two, and a broken one."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    for name, image in zip(("<i>&.png", "bad\udcff\n.png"), pixels, strict=True):
        with (tmp_path / name).open("wb") as file:
            PIL.Image.fromarray(image).save(file, "PNG")
    (tmp_path / "broken.png").touch()
    return tmp_path


class Page(html.parser.HTMLParser):
    """The elements, the addresses that a browser would ask for, and the text of a page."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.addresses, self.text = set(), re.findall(r"url\((.{9})", content), ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_channels_are_chosen_by_variance_and_by_correlation():
    """By hand: channel 2 varies most, then 0; of the others 3 is the class activation map, and 1 is constant."""
    cam = np.array([[1, 2], [3, 5]], np.float32)
    fine = np.kron(cam, np.ones((2, 2), np.float32))  # the mask has four positions for one of the map
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    noise = np.tile(np.float32([[0.2, -0.2], [-0.2, 0.2]]), (2, 2))  # is nothing on the average
    mask = np.stack([1 - ramp, np.full((4, 4), 0.5), 5 * ramp, 0.01 * fine + noise, -0.01 * fine], -1)
    first, second, third, fourth = chosen_channels(mask.astype(np.float32), cam)
    assert [c.number for c in (first, second, third, fourth)] == [2, 0, 3, 4]
    variance = np.var(5 * np.arange(16) / 15)
    assert (first.why, third.why, fourth.why) == (f"variance {number(variance)}", "correlation 1", "correlation −1")
    assert [c.number for c in chosen_channels(mask.astype(np.float32), np.ones((1, 1), np.float32))] == [2, 0]
    uneven = np.arange(15, dtype=np.float32).reshape(3, 5, 1)  # 3 x 5 to 2 x 2, by shares of a position
    [only] = chosen_channels(np.concatenate([3 * uneven, uneven], -1), np.float32([[0, 2.5], [7.5, 10]]), count=1)[1:]
    assert (only.number, only.why) == (1, "correlation 1")


def test_a_position_of_a_map_is_a_pixel_of_its_colour():
    values = np.float32([[0.25, 0.5], [0.75, 1.25]])
    shown = draw(values, MASK)
    assert (shown.low, shown.high, shown.image.size) == ("0.25", "1.25", (2, 2))
    expected = matplotlib.colormaps["magma"](np.round((values - 0.25) * 255).astype(int), bytes=True)[..., :3]
    np.testing.assert_array_equal(np.asarray(shown.image.convert("RGB")), expected)
    assert len(draw(np.zeros((2, 2)), MASK).image.getcolors()) == 1
    assert symmetric(np.float32([-3, 1])) == (-3, 3)
    assert [number(x) for x in (-0.012345, 12.345, 0.0)] == ["−0.012", "12.3", "0"]


def test_the_page_holds_any_name_and_asks_nothing_of_the_network(net, pictures, tmp_path, capsys):
    output = tmp_path / "out"
    write_looks(net, looks_at(net, (str(pictures),)), output)
    assert "broken.png cannot be read: the file is empty" in capsys.readouterr().out
    content = (output / "index.html").read_bytes().decode()  # is UTF-8
    page = Page(content)
    assert page.tags.isdisjoint({"script", "iframe", "object"})
    assert {address[:8] for address in page.addresses} == {"data:,", "data:ima", "picture_"}
    shown = ("<script>alert(1)</script>", r"line\nbreak \u202eabc", r"bad\udcff", *NASTY[1:2], *NASTY[4:])
    for name in ("<i>&.png", r"bad\udcff\n.png", *shown):
        assert name in page.text
    assert "stage1_attention1" in page.text
    for i in (1, 2):
        with PIL.Image.open(output / f"picture_{i}.png") as figure:
            assert min(figure.size) > 300
    assert sorted(p.name for p in output.iterdir()) == ["index.html", "picture_1.png", "picture_2.png"]
    assert "prefers-color-scheme: dark" in content


def test_too_many_pictures_and_none_that_can_be_read_are_told(net, pictures):
    with pytest.raises(UsageError, match="names 303 pictures; a page holds 100"):
        list(looks_at(net, (str(pictures),) * 101))
    with pytest.raises(UsageError, match=r"none of the pictures could be read; the last: .*broken.png"):
        list(looks_at(net, (str(pictures / "broken.png"),)))


def test_rows_of_the_evaluation_split_are_drawn_with_their_classes(tiny_config):
    spec = plain_spec()
    digits = Classifier(tiny_config, spec, random_variables(Classifier(tiny_config, spec, {}).model, (8, 8, 1)))
    looks = list(looks_at(digits, ("eval:0,359",)))
    assert [(one.name, one.pixels.shape) for one in looks] == [
        ("digits example 0", (8, 8, 1)),
        ("digits example 359", (8, 8, 1)),
    ]
    assert looks[0].label == "7"
    np.testing.assert_allclose(looks[0].cam, digits.cam(looks[0].pixels)[0], rtol=1e-5)
    assert [name for name, _ in looks[0].top] == [name for name, _ in digits.top(looks[0].pixels)[0]]
    with pytest.raises(UsageError, match="the evaluation split has rows 0 to 359"):
        list(looks_at(digits, ("eval:360",)))
    tiny_config.eval.max_examples = 50
    tiny_config.eval.views = 2
    summary = summarise_net(digits)
    assert summary.examples == 50
    tiny_config.eval.views = 1
    assert summary.top1 == digits.evaluate()["top1"]  # one view, whatever is measured


def test_the_summary_is_a_table_a_page_and_json(net, tmp_path):
    shares = dict(zip(ModuleStatistics.__dataclass_fields__, [(4, 4, 16), *np.arange(1, 11) / 16], strict=True))
    summary = Summary(
        examples=1234,
        top1=0.75,
        loss=0.5,
        responses={"stage1": 1.5},
        modules={"stage1_attention1": ModuleStatistics(**shares)},
    )
    write_summary(net, summary, tmp_path)
    plain = json.loads((tmp_path / "summary.json").read_text())
    assert plain["modules"]["stage1_attention1"] == shares | {"shape": [4, 4, 16]}
    assert (plain["examples"], plain["responses"]) == (1234, {"stage1": 1.5})
    text = Page((tmp_path / "summary.html").read_text()).text
    for shown in ("1,234 examples", "1.500", "4×4×16", "43.8 %", "56.25 %", "-18.75", "0.6250", "+0.1250"):
        assert shown in text


def test_the_mode_opens_an_exported_net_and_writes_into_its_folder(net, pictures, tmp_path, capsys):
    variables = jax.device_get(net.variables)
    taken = TrainedNet(config=net.config, spec=net.spec, variables=variables, step=1, metrics={})
    write_folder(Run(tmp_path / "net"), taken)
    line = {
        "config": net.config,
        "run": Run(tmp_path / "net"),
        "checkpoint": "newest",
        "output": None,
        "summary": False,
    }
    run(types.SimpleNamespace(**line, images=(f"{pictures}/<i>&.png",)))
    assert {path.name for path in (tmp_path / "net/attention").iterdir()} == {"index.html", "picture_1.png"}
    assert f"{tmp_path / 'net'} looks at is drawn in {tmp_path / 'net/attention/index.html'}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="there is no 'nowhere'"):
        run(types.SimpleNamespace(**line, images=("nowhere",)))
