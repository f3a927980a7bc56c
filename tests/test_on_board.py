"""The nets on board: what is said of them is so, and a name is not taken for a path or the other way round."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import sklearn.datasets
from helpers import ROOT

import resattn_jax
from resattn_jax.data.sources import open_source, read
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import read_weights, write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.run import Run

ON_BOARD = resattn_jax.pretrained()


def test_digits_are_read_off_scikit_learns_own_images():
    """All 1,797, four fifths of which it was trained on; 16 is black there."""
    digits = sklearn.datasets.load_digits()
    found = resattn_jax.load("digits/ra_tiny").predict(np.float32(digits.images / 16)[..., None]).argmax(-1)
    assert np.mean(found == digits.target) > 0.995


@pytest.mark.parametrize("said", ON_BOARD, ids=lambda said: said.name)
def test_what_is_said_of_a_net_is_so(said):
    net = resattn_jax.load(said.name)
    assert (net.config.model.name, net.config.data.name) == (said.net, said.data)
    if said.data == "digits":  # the set on board
        test = read(open_source("digits", net.config.data.eval_split))
        assert said.examples == len(test.labels)
        assert said.top1 == pytest.approx(np.mean(net.predict(test.images).argmax(-1) == test.labels))
    folder = ROOT / "resattn_jax/weights" / said.name
    assert said.size == (folder / "model.safetensors").stat().st_size < 5_000_000
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {str(array.dtype) for array in arrays.values()} == {"float16"}
    card = (folder / "README.md").read_text()
    assert f"**{said.top1:.2%}**" in card
    assert Run(folder).result["command"] in card
    assert str(said).startswith(f"{said.name}: {said.net} on {said.data}, top-1 {said.top1:.2%} of ")


def test_weights_of_half_precision_are_read_as_float32(tmp_path):
    net = resattn_jax.load("digits/ra_tiny")
    variables = jax.tree.map(np.array, dict(net.variables))
    kernel = variables["params"]["head"]["kernel"]
    kernel += np.float32(1 / 3)
    taken = TrainedNet(config=net.config, spec=net.spec, variables=variables, step=1, metrics={})
    write_folder(Run(tmp_path), taken, dtype=np.float16)
    back = read_weights(Run(tmp_path))["params"]["head"]["kernel"]
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, kernel, rtol=2**-11, atol=1e-7)
    assert back[0, 0] != kernel[0, 0]


def test_a_folder_goes_before_a_name_and_an_unknown_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resattn_jax.load("digits/ra_tiny").labels == tuple("0123456789")
    says = r"no folder digits/tiny, .* \(did you mean 'digits/ra_tiny'\?\): digits/ra_tiny"
    with pytest.raises(UsageError, match=says):
        resattn_jax.load("digits/tiny")
    (tmp_path / "digits/ra_tiny").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"digits/ra_tiny holds no config.json"):
        resattn_jax.load("digits/ra_tiny")
