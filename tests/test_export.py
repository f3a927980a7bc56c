"""An exported folder: what its model card says, and how each of its files is loaded, by the card's own lines."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest
import yaml
from helpers import plain_spec, random_variables

import resattn_jax
from configs import digits
from resattn_jax.classifier import Classifier
from resattn_jax.convert import from_torch, read_torch
from resattn_jax.data.pictures import Picture
from resattn_jax.data.pipelines import eval_transform
from resattn_jax.errors import UsageError
from resattn_jax.export import FILES
from resattn_jax.export.folder import write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.models import create_model
from resattn_jax.run import Run

METRICS = {"top1": 0.875, "top5": 0.99, "loss": 0.5, "ece": 0.02, "examples": 360, "class_top1": [0.875] * 10}


def trained_net(name="ra_tiny", shape=(8, 8, 1), step=1200, **changes):
    """A net of random weights, for pictures of another size to be resized to 10 / 8 of its own."""
    c = digits.get_config()
    c.model.name = name
    c.eval.crop_fraction = 0.8
    spec = plain_spec(shape, resident=False, mean=np.float32([0.3]), std=np.float32([0.4]))
    variables = jax.tree.map(np.asarray, dict(random_variables(create_model(name, num_classes=10), shape)))
    fields = {"config": c, "spec": spec, "variables": variables, "step": step, "metrics": METRICS}
    return TrainedNet(**fields | changes)


def picture(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def net():
    return trained_net(shape=(8, 8, 3))


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("a net")
    write_folder(Run(path), net, ["stablehlo", "onnx"])
    PIL.Image.fromarray(picture((21, 30, 3))).save(path / "picture.png")
    return path


@pytest.fixture(scope="module")
def expected(net):
    """The logits of the picture, by the net itself."""
    return Classifier(net.config, net.spec, net.variables).logits(picture((21, 30, 3)))


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def lines_for(card, file):
    """The program that a card has for a file, the lines that make `images` before it."""
    making, *_ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    [loading] = re.findall(rf"### {re.escape(file)}\n.*?```python\n(.*?)```", card, re.DOTALL)
    assert max(making.count("\n"), loading.count("\n")) <= 10
    return making + loading


def logits_of(folder, file, absent):
    """What the card's lines for a file compute in a program of their own, in which some packages cannot be imported."""
    card = (folder / "README.md").read_text()
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n{lines_for(card, file)}\n"
        "import json\nprint(json.dumps(logits.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    label, logits = done.stdout.splitlines()
    logits = np.float32(json.loads(logits))
    assert label == str(logits.argmax())
    return logits


def test_stablehlo_runs_by_jax_alone(folder, expected):
    logits = logits_of(folder, "model.stablehlo", ["resattn_jax", "flax", "optax", "ml_collections"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_onnx_runs_by_onnxruntime_alone(folder, expected):
    pytest.importorskip("onnxruntime")
    logits = logits_of(folder, "model.onnx", ["resattn_jax", "flax", "jax", "jaxlib", "onnx"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_stablehlo_is_for_three_platforms_and_any_batch(folder, net):
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    model = create_model("ra_tiny", num_classes=10)
    for count in 1, 3:
        some = picture((count, 8, 8, 3))
        standardised = (np.float32(some) / 255 - 0.3) / 0.4
        logits = program.call(some)
        assert (logits.dtype, logits.shape) == (np.float32, (count, 10))
        by_hand = jax.jit(lambda v, x: model.apply(v, x, train=False))(net.variables, standardised)
        np.testing.assert_allclose(logits, by_hand, rtol=0, atol=1e-5 * np.abs(by_hand).max())


def test_what_is_loaded_again_gives_the_same_bits(folder, net, expected, monkeypatch):
    again = resattn_jax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, dict(again.variables), net.variables)
    monkeypatch.chdir(folder)
    names = {}
    exec(lines_for((folder / "README.md").read_text(), "model.safetensors"), names)
    np.testing.assert_array_equal(names["net"].logits("picture.png"), expected)
    [shown] = eval_transform(net.config, net.measured_on)(Picture((folder / "picture.png").read_bytes()))
    np.testing.assert_array_equal(names["images"], shown[None])


def test_a_picture_is_turned_as_its_exif_says_where_the_net_was_trained_so(tmp_path, monkeypatch):
    net = trained_net(shape=(8, 8, 3))
    net = dataclasses.replace(net, spec=dataclasses.replace(net.spec, exif_orientation=True))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # on its side
    PIL.Image.fromarray(picture((21, 30, 3))).save(tmp_path / "picture.png", exif=exif)
    card = card_of(tmp_path, net)
    assert json.loads((tmp_path / "preprocessing.json").read_text())["exif_orientation"]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    upright = Picture((tmp_path / "picture.png").read_bytes(), upright=True)
    np.testing.assert_array_equal(names["images"], eval_transform(net.config, net.measured_on)(upright))


def test_how_images_are_made_is_said_plainly(folder):
    said = json.loads((folder / "preprocessing.json").read_text())
    assert (said["size"], said["crop_size"]) == ({"shortest_edge": 10}, {"height": 8, "width": 8})
    np.testing.assert_allclose([*said["image_mean"], *said["image_std"], said["rescale_factor"]], [0.3, 0.4, 1 / 255])
    assert (said["layout"], said["channels"]) == ("NHWC", "RGB")


def test_the_front_matter_is_what_hubs_read(folder):
    front = front_matter((folder / "README.md").read_text())
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-classification"
    assert {"onnx", "stablehlo", "safetensors", "jax"} <= set(front["tags"])
    [model] = front["model-index"]
    [result] = model["results"]
    assert model["name"] == "ra_tiny"
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
    assert result["metrics"][0] == {"type": "accuracy", "name": "top-1 accuracy, step 1200", "value": 0.875}


def card_of(tmp_path, net, formats=()):
    write_folder(Run(tmp_path), net, formats)
    return (tmp_path / "README.md").read_text()


def test_the_card_tells_data_recipe_metrics_and_licence(tmp_path):
    net = trained_net()
    net.config.data.name = "cifar10"
    card = card_of(tmp_path, net)
    assert front_matter(card)["datasets"] == ["uoft-cs/cifar10"]
    for words in (
        "Trained on `cifar10`, split `train`: 100 images. Measured on split `test`.",
        "| `optimizer.weight_decay` | 0.0005 |",
        "| `schedule.warmup` | 2 epochs |",
        "Step 1,200, split `test` of `cifar10`, 360 images.",
        "| top-1 accuracy | 87.50% |",
        "resizing and cropping are the caller's",
        "Apache-2.0",
    ):
        assert words in card
    assert "mixup_alpha" not in card  # which is not in use
    assert "model.onnx" not in card


def test_a_card_of_others_weights_claims_nothing(tmp_path):
    """Imported, and never measured by the run; or trained from others' weights."""
    card = card_of(tmp_path, trained_net(step=0, metrics={}))
    front = front_matter(card)
    assert front["license"] == "unknown"
    assert "model-index" not in front
    assert "Trained on" not in card
    assert "weight_decay" not in card
    assert "Not measured by the run at this step" in card
    net = trained_net()
    net.config.init_from = "runs/imported"
    assert front_matter(card_of(tmp_path, net))["license"] == "unknown"


def test_a_folder_of_pictures_is_not_told_by_its_path(tmp_path):
    net = trained_net()
    net.config.data.name = "folder:/home/somebody/pictures"
    assert "somebody" not in card_of(tmp_path, net)


def test_files_of_an_earlier_export_go(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"of another net")
    (tmp_path / "notes.txt").write_text("a person's own")
    card_of(tmp_path, trained_net())
    written = {"model.safetensors", "config.json", "data.json", "classes.txt", "preprocessing.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {*written, "notes.txt"}


def test_a_state_dict_for_pytorch_lies_beside(tmp_path, monkeypatch):
    """The card's lines, with a stand-in for the public code's class that computes what its net does."""
    torch = pytest.importorskip("torch")
    import public_net

    class Net:
        fc = torch.nn.Linear(1024, 10)

        def eval(self):
            return self

        def load_state_dict(self, state):
            self.state = state

        def __call__(self, x):
            return public_net.logits(self.state, x)

    module = types.ModuleType("model.residual_attention_network")
    module.ResidualAttentionModel_92_32input_update = Net
    monkeypatch.setitem(sys.modules, "model", types.ModuleType("model"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    net = trained_net("ra92_cifar", (32, 32, 3))
    card = card_of(tmp_path, net, ["torch"])
    again = from_torch(read_torch(tmp_path / "model.pth"), "ra92_cifar")
    jax.tree.map(np.testing.assert_array_equal, again, net.variables)
    monkeypatch.chdir(tmp_path)
    PIL.Image.fromarray(picture((40, 40, 3))).save("picture.png")
    names = {}
    exec(lines_for(card, "model.pth"), names)
    logits = jax.jit(net.function())(names["images"])
    np.testing.assert_allclose(names["logits"].numpy(), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_a_net_that_pytorch_has_not_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="the public PyTorch code has no net 'ra_tiny'"):
        write_folder(Run(tmp_path / "net"), trained_net(), ["torch"])
    assert not (tmp_path / "net").exists()


def test_a_net_of_pytorchcv_is_loaded_by_its_name_there():
    resattnet = pytest.importorskip("pytorchcv.models.resattnet")
    from resattn_jax.export.model_card import model_card

    config = ml_collections.ConfigDict(digits.get_config())
    config.model.name = "ra128"
    net = TrainedNet(config=config, spec=plain_spec((224, 224, 3)), variables={"params": {}}, step=1, metrics={})
    assert "from pytorchcv.models.resattnet import resattnet128\n" in model_card(net, FILES)
    assert "net = resattnet128(num_classes=10).eval()\n" in model_card(net, FILES)
    assert callable(resattnet.resattnet128)
