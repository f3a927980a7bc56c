"""A trained net as an object: it gives what an evaluation of its run measures, whatever form an image comes in."""

import jax
import numpy as np
import PIL.Image
import pytest
from helpers import encoded, plain_spec, random_variables

import resattn_jax
from resattn_jax.classifier import Classifier
from resattn_jax.data.sources import open_source, read
from resattn_jax.errors import UsageError
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.export import export_folder
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.run import Run

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def trained(tiny_config, one_device, tmp_path):
    """A run whose two evaluations differ, so that best and newest can be told apart."""
    train_and_evaluate(tiny_config, tmp_path / "run", one_device)
    return tmp_path / "run"


@pytest.fixture
def net(tiny_config):
    """Of random weights, with five views and their mirror images for what it says, and one for what it looks at."""
    tiny_config.eval.views, tiny_config.eval.crop_fraction = 10, 8 / 14
    spec = plain_spec((8, 8, 3), classes=4, resident=False)
    model = Classifier(tiny_config, spec, {}).model
    return Classifier(tiny_config, spec, random_variables(model, (8, 8, 3)))


def test_it_reaches_what_its_run_measured(trained, tiny_config, one_device):
    digits = read(open_source("digits", "test"))
    for checkpoint in ("best", "newest", "6"):
        net = resattn_jax.load(trained, checkpoint)
        probabilities = net.predict(digits.images)
        measured = evaluate_checkpoint(tiny_config, trained, checkpoint, one_device)
        assert probabilities.shape == (360, 10)
        assert probabilities.dtype == np.float32
        assert np.mean(probabilities.argmax(-1) == digits.labels) == pytest.approx(measured["top1"])
        loss = -np.log(probabilities[np.arange(360), digits.labels]).mean()
        assert loss == pytest.approx(measured["loss"], rel=1e-5)
        assert net.evaluate() == {name: value for name, value in measured.items() if name != "step"}
    assert net.evaluate("train[:100]")["examples"] == 100
    with pytest.raises(UsageError, match="'val'"):
        net.evaluate("val")
    assert net.labels == tuple("0123456789")
    assert net.spec.image_shape == (8, 8, 1)


def test_logits_are_the_nets_own(trained, tiny_config, one_device):
    """Standardised by hand, through the module itself."""
    net = resattn_jax.load(trained)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    by_hand = net.model.apply(net.variables, (np.float32(images) / 255 - 0.306) / 0.377, train=False)
    np.testing.assert_allclose(net.logits(images), by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net.predict(images), jax.nn.softmax(by_hand), rtol=1e-4, atol=1e-6)


def test_an_image_comes_in_any_form(trained, tmp_path):
    net = resattn_jax.load(trained)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    picture = PIL.Image.fromarray(pixels)
    path = tmp_path / "a [picture] with é.png"
    picture.save(path)
    expected = net.logits(pixels)
    assert expected.shape == (1, 10)
    colour = np.repeat(pixels[..., None], 3, -1)
    for image in (str(path), path, picture, pixels[..., None], pixels / 255, np.float32(pixels / 255), [path], colour):
        np.testing.assert_array_equal(net.logits(image), expected)
    many = net.logits([path, picture, pixels])
    np.testing.assert_allclose(many, np.repeat(expected, 3, 0), rtol=1e-5)
    assert net.logits([]).shape == (0, 10)
    [best] = net.top(pixels, k=3)
    assert [name for name, _ in best] == [net.labels[i] for i in np.argsort(-expected[0])[:3]]
    assert net.logits(np.repeat(pixels, 4, 0).repeat(4, 1)).shape == (1, 10)  # another size is resized


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 2), np.uint8), r"an image is uint8 or float .*, not uint8 \(8, 8, 2\)"),
        (np.zeros((8, 8), np.int64), "not int64"),
        (np.full((8, 8), 7.0), r"must lie in 0 … 1; one of uint8 in 0 … 255"),
        (np.full((8, 8), np.nan), r"must lie in 0 … 1"),
        ("nowhere.png", r"nowhere.png cannot be read: .*No such file"),
    ],
)
def test_what_is_no_image_is_told(net, image, message):
    with pytest.raises(UsageError, match=message):
        net.predict(image)


def test_a_broken_picture_is_told_by_its_name(net, tmp_path):
    (tmp_path / "broken.png").write_bytes(encoded(PIL.Image.new("L", (8, 8)))[:30])
    with pytest.raises(UsageError, match=r"broken.png cannot be read: "):
        net.predict(tmp_path / "broken.png")


def test_an_exported_net_needs_neither_its_run_nor_its_data(trained, tiny_config, one_device, tmp_path, monkeypatch):
    there = resattn_jax.load(trained)
    measured = evaluate_checkpoint(tiny_config, trained, "best", one_device)
    export_folder(tiny_config, trained, "best", tmp_path / "net")
    card = (tmp_path / "net/README.md").read_text()
    assert f"Step {measured['step']}, split `test` of `digits`, 360 images." in card
    assert f"| top-1 accuracy | {measured['top1']:.2%} |" in card
    tiny_config.eval.views = 2
    export_folder(tiny_config, trained, "best", tmp_path / "mirrored")  # which the run has not measured
    assert "Not measured by the run" in (tmp_path / "mirrored/README.md").read_text()
    trained.rename(tmp_path / "gone")
    from resattn_jax.data import pipelines

    monkeypatch.setattr(pipelines, "open_source", None)
    here = resattn_jax.load(tmp_path / "net")
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(here.logits(images), there.logits(images))
    assert here.config.to_dict() == there.config.to_dict()
    assert here.spec.to_plain() == there.spec.to_plain()
    with pytest.raises(UsageError, match="is the workdir of a run; choose another --output"):
        export_folder(tiny_config, tmp_path / "gone", "best", tmp_path / "gone")


def test_what_is_no_net_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"holds no config.json: it is no workdir of a run, and no exported net"):
        resattn_jax.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    Run(tmp_path).write("config.json", '{"seed": 0}')
    with pytest.raises(UsageError, match="has no 'batch_size'"):
        resattn_jax.load(tmp_path)


def test_a_large_picture_is_resized_and_cropped_as_in_the_evaluation(tiny_config, one_device):
    """A streamed set: the shorter side is size / crop_fraction, the centre is cut out."""
    tiny_config.data.mean, tiny_config.data.std = (0.0,), (1.0,)
    spec = plain_spec((8, 8, 3), resident=False, crop_fraction=0.5)
    tiny_config.eval.crop_fraction = 0.5
    from resattn_jax.data.pictures import Picture
    from resattn_jax.data.pipelines import eval_transform
    from resattn_jax.experiment import build
    from resattn_jax.runtime import make_mesh

    variables = build(tiny_config, spec, make_mesh(one_device)).initial_state().variables
    net = Classifier(tiny_config, spec, variables)
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (40, 60, 3), np.uint8)
    [seen] = eval_transform(tiny_config, net.spec)(Picture(encoded(PIL.Image.fromarray(large))))
    by_hand = PIL.Image.fromarray(large).resize((24, 16), PIL.Image.Resampling.BILINEAR).crop((8, 4, 16, 12))
    np.testing.assert_array_equal(seen, np.asarray(by_hand))
    logits = net.model.apply(net.variables, np.float32(by_hand)[None] / 255, train=False)
    np.testing.assert_allclose(net.logits(large), logits, rtol=1e-4, atol=1e-5)


# ---- What lies inside of the net.


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 14, 14, 3), np.uint8)


def test_features_are_what_the_last_layer_reads(net, pictures):
    head = jax.tree.map(np.asarray, net.variables["params"]["head"])
    features = net.features(pictures)
    assert (features.shape, features.dtype) == ((3, 16), np.float32)
    logits = net.model.apply(net.variables, np.float32(pictures[:, 3:11, 3:11]) / 255, train=False)  # the centre
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net.features(pictures, "head"), logits, rtol=1e-4, atol=1e-5)
    assert np.abs(net.logits(pictures) - jax.nn.log_softmax(logits)).max() > 0.01  # of ten views
    assert net.features(pictures, "stage1_unit1").shape == (3, 4, 4, 16)
    assert net.features([]).shape == (0, 16)
    np.testing.assert_array_equal(net.features(pictures[0]), net.features([PIL.Image.fromarray(pictures[0])]))


def test_an_unknown_map_is_told_with_those_near_it(net, pictures):
    with pytest.raises(UsageError, match=r"no map 'stage1_atention1/mask' \(did you mean 'stage1_attention1/mask'\?\)"):
        net.features(pictures, "stage1_atention1/mask")
    with pytest.raises(UsageError, match=r"there are .*embedding.*, and those within an attention module"):
        net.maps(pictures, ["embedding", "layer4"])


def test_attention_is_trunk_mask_and_their_product(net, pictures):
    [(name, found)] = net.attention(pictures).items()
    assert (name,) == net.modules == ("stage1_attention1",)
    assert {part.shape for part in (found.trunk, found.mask, found.product)} == {(3, 4, 4, 16)}
    assert 0 < found.mask.min() < found.mask.max() < 1
    np.testing.assert_allclose(found.product, (1 + found.mask) * found.trunk, rtol=1e-5)
    np.testing.assert_array_equal(found.mask, net.features(pictures, "stage1_attention1/mask"))


def test_a_class_activation_map_adds_up_to_the_logit(net, pictures):
    logits, bias = net.features(pictures, "head"), np.asarray(net.variables["params"]["head"]["bias"])
    for given, labels in ((2, [2, 2, 2]), ("3", [3, 3, 3]), ([0, "1", 2], [0, 1, 2]), (None, logits.argmax(-1))):
        maps = net.cam(pictures, given)
        assert (maps.shape, maps.dtype) == ((3, 4, 4), np.float32)
        np.testing.assert_allclose(maps.mean((1, 2)) + bias[labels], logits[[0, 1, 2], labels], rtol=1e-4, atol=1e-5)
    for given, message in (("7", "no class '7'"), (4, "no class number 4; they are 0 to 3"), ([0], "1 classes for 3")):
        with pytest.raises(UsageError, match=message):
            net.cam(pictures, given)


def test_each_of_many_is_told_in_order_and_broken_ones_do_not_end_it(net, pictures, monkeypatch):
    from resattn_jax import classifier

    monkeypatch.setattr(classifier, "BATCH", 4)  # so that there are several batches, one of broken pictures alone
    many = [pictures[0], "nowhere.png", *pictures, *["nowhere.png"] * 7, pictures[2]]
    drawn = []
    found = net.predict_each(drawn.append(i) or image for i, image in enumerate(many))
    one = next(found)
    assert len(drawn) == 8  # two batches ahead and no more
    found = [one, *found]
    assert len(found) == len(many)
    for image, row in zip(many, found, strict=True):
        if isinstance(image, str):
            assert isinstance(row, UsageError)
            assert "nowhere.png cannot be read" in str(row)
        else:
            np.testing.assert_allclose(row, net.predict(image)[0], rtol=1e-4, atol=1e-6)


def test_batches_are_filled_up_so_that_there_are_few_programs(net, pictures):
    for count in (5, 6, 7, 8):
        net.predict(np.resize(pictures, (count, 14, 14, 3)))
        net.features(np.resize(pictures, (count, 14, 14, 3)))
    assert net._predict._cache_size() == 1
    assert net._maps(("embedding",))._cache_size() == 1
