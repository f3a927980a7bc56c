"""Weights in and out on the command line's side: import, measure, export, and starting one run from another's."""

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, built, eval_stream

import resattn_jax
from configs import digits, imagenet_ra56
from resattn_jax.checkpoint import Reader, Writer
from resattn_jax.convert import read_torch, to_torch, write_torch
from resattn_jax.errors import UsageError
from resattn_jax.experiment import create_state
from resattn_jax.export.folder import TrainedNet, write_folder
from resattn_jax.fine_tune import start_from
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.modes.evaluate import evaluate_checkpoint
from resattn_jax.modes.export import export_folder, export_torch
from resattn_jax.modes.import_ import import_torch
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.run import Run

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def variables():
    """Random variables of ra92_cifar for grey pictures and ten classes."""
    shapes = variable_shapes(create_model("ra92_cifar", num_classes=10), (8, 8, 1))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.uniform(0.01, 0.1, s.shape).astype(np.float32), shapes)


def fresh_state(experiment, model):
    """The state of step 0 of another model."""
    return create_state(model, experiment.optimizer, (8, 8, 1), seed=0, ema=True)


@pytest.fixture
def cifar_net_on_digits():
    c = digits.get_config()
    c.model.name = "ra92_cifar"
    return c


def test_an_imported_net_is_opened_and_exported_without_its_data(variables, tmp_path):
    """ImageNet is not here: classes are called by their numbers, and the rest is as the config has it."""
    c = imagenet_ra56.get_config()
    c.model.name, c.data.image_size, c.data.dir = "ra92_cifar", 32, str(tmp_path)
    colour = {**variables["params"]["stem_conv"], "kernel": np.repeat(variables["params"]["stem_conv"]["kernel"], 3, 2)}
    variables = {**variables, "params": {**variables["params"], "stem_conv": colour}}
    write_torch(tmp_path / "in.safetensors", to_torch(variables, "ra92_cifar"))
    import_torch(c, tmp_path / "run", str(tmp_path / "in.safetensors"))
    assert not (tmp_path / "run/data.json").exists()  # so that an evaluation asks the data for its classes
    net = resattn_jax.load(tmp_path / "run")
    assert net.labels == tuple("0123456789")
    assert (net.spec.eval_shape, net.spec.crop_fraction) == ((32, 32, 3), 0.875)
    np.testing.assert_array_equal(net.spec.mean, np.float32([0.485, 0.456, 0.406]))
    export_folder(c, tmp_path / "run", "newest", tmp_path / "net", ["safetensors"])
    assert_same_bits(dict(resattn_jax.load(tmp_path / "net").variables), variables)
    assert "license: unknown" in (tmp_path / "net/README.md").read_text()
    c.data.image_size = None
    with pytest.raises(UsageError, match="imagenet2012 is not prepared in "):
        export_folder(c, tmp_path / "run", "newest", tmp_path / "other")


def test_an_imported_checkpoint_is_measured_and_exported_to_the_same_bits(
    cifar_net_on_digits, variables, one_device, tmp_path
):
    state_dict = to_torch(variables, "ra92_cifar")
    write_torch(tmp_path / "in.safetensors", state_dict)
    said = import_torch(cifar_net_on_digits, tmp_path / "run", str(tmp_path / "in.safetensors"))
    assert "parameters of ra92_cifar" in said

    cifar_net_on_digits.eval.max_examples = 20
    cifar_net_on_digits.eval.batch_size = 20
    measured = evaluate_checkpoint(cifar_net_on_digits, tmp_path / "run", "newest", one_device)
    experiment, test = built(cifar_net_on_digits, one_device), eval_stream(cifar_net_on_digits, one_device)
    images = (np.asarray(test.arrays["image"][:20], np.float32) / 255 - 0.306) / 0.377
    logits = jax.jit(lambda v, x: experiment.model.apply(v, x, train=False))(variables, images)
    labels = np.asarray(test.arrays["label"][:20])
    assert measured["top1"] == pytest.approx(np.mean(np.argmax(logits, -1) == labels))

    export_torch(cifar_net_on_digits, tmp_path / "run", "newest", str(tmp_path / "out.safetensors"))
    out = read_torch(tmp_path / "out.safetensors")
    assert out.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(out[name], array, err_msg=name)


def test_import_tells_of_what_it_cannot_take(cifar_net_on_digits, variables, tmp_path):
    path = str(tmp_path / "in.safetensors")
    state_dict = to_torch(variables, "ra92_cifar")
    del state_dict["fc.bias"]
    write_torch(path, state_dict)
    with pytest.raises(UsageError, match=r"missing: fc\.bias"):
        import_torch(cifar_net_on_digits, tmp_path / "run", path)
    cifar_net_on_digits.model.wiring = "paper"
    with pytest.raises(UsageError, match=r"config\.model\.wiring is 'paper', but the PyTorch net has 'double_skip'"):
        import_torch(cifar_net_on_digits, tmp_path / "run", path)
    cifar_net_on_digits.model.wiring = None
    cifar_net_on_digits.model.name = "ra56"
    with pytest.raises(UsageError, match="has no net 'ra56'; it has ra56_double_skip"):
        import_torch(cifar_net_on_digits, tmp_path / "run", path)
    assert not (tmp_path / "run").exists()


def test_a_run_cannot_go_on_from_an_imported_checkpoint_but_can_start_from_it(tiny_config, one_device, tmp_path):
    experiment = built(tiny_config, one_device)
    state = experiment.initial_state()
    with Writer(tmp_path / "imported" / "checkpoints") as checkpoints:
        checkpoints.save_model(0, jax.tree.map(lambda x: x + 1, dict(state.variables)))
    with pytest.raises(UsageError, match=r"no run can go on from it;.*--config.init_from"):
        train_and_evaluate(tiny_config, tmp_path / "imported", one_device)

    started, fresh = start_from(state, str(tmp_path / "imported"), tiny_config)
    assert fresh == []
    for old, new in zip(jax.tree.leaves(state.variables), jax.tree.leaves(started.variables), strict=True):
        np.testing.assert_array_equal(new, old + 1)
    for ours, averaged in zip(jax.tree.leaves(started.variables), jax.tree.leaves(started.ema), strict=True):
        np.testing.assert_array_equal(ours, averaged)


def test_fine_tuning_takes_what_fits_and_lists_what_does_not(tiny_config, one_device, tmp_path):
    """A run on ten classes gives its weights to a net of seven, all but the head's."""
    train_and_evaluate(tiny_config, tmp_path / "first", one_device)
    experiment = built(tiny_config, one_device)
    seven = fresh_state(experiment, experiment.model.clone(num_classes=7))
    started, fresh = start_from(seven, f"{tmp_path / 'first'}:best", tiny_config)
    assert sorted(fresh) == [
        "params/head/bias starts fresh: (7,) here, (10,) there",
        "params/head/kernel starts fresh: (16, 7) here, (16, 10) there",
    ]
    with Reader(tmp_path / "first" / "checkpoints") as checkpoints:
        given = checkpoints.read_eval_variables(checkpoints.find("best")[0])
    np.testing.assert_array_equal(started.params["stem_conv"]["kernel"], given["params"]["stem_conv"]["kernel"])
    np.testing.assert_array_equal(started.params["head"]["kernel"], seven.params["head"]["kernel"])

    tiny_config.init_from = str(tmp_path / "first")
    tiny_config.total_steps, tiny_config.schedule.warmup, tiny_config.augment.mixup_off_last = 2, "1 steps", "0 steps"
    assert train_and_evaluate(tiny_config, tmp_path / "second", one_device)["step"] == 2


def test_another_nets_checkpoint_is_refused(tiny_config, one_device, tmp_path):
    experiment = built(tiny_config, one_device)
    with Writer(tmp_path / "first" / "checkpoints") as checkpoints:
        checkpoints.save_model(0, dict(experiment.initial_state().variables))
    other = create_model("ra_tiny", num_classes=10, p=0, t=1, last=0)
    state = fresh_state(experiment, other)
    with pytest.raises(UsageError, match=r"only 0% of the parameters are in .*: it is of another net"):
        start_from(state, str(tmp_path / "first"), tiny_config)
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere, and no net on board has this name"):
        start_from(state, str(tmp_path / "nowhere"), tiny_config)


def test_a_run_starts_from_a_net_on_board_and_from_an_exported_folder(tiny_config, one_device, tmp_path):
    tiny_config.model.name = "ra_tiny"
    shapes = built(tiny_config, one_device).abstract_state()
    state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), one_device[0]), shapes)
    net = resattn_jax.load("digits/ra_tiny")
    folder = tmp_path / "exported"
    write_folder(Run(folder), TrainedNet(config=net.config, spec=net.spec, variables=net.variables, step=1, metrics={}))
    for source in ("digits/ra_tiny", "digits/ra_tiny:best", str(folder)):
        started, _ = start_from(state, source, tiny_config)
        assert_same_bits(started.variables, net.variables)
    with pytest.raises(UsageError, match=r"is an exported net, which has no checkpoint '7'"):
        start_from(state, f"{folder}:7", tiny_config)
