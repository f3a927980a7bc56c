"""ONNX graphs of the nets, run by ONNX Runtime, against the nets' own logits."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import plain_spec, random_variables

from configs import digits
from resattn_jax.augment import normalize
from resattn_jax.errors import UsageError
from resattn_jax.export.folder import write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.models import NETS as NAMED
from resattn_jax.models.network import ResidualAttentionNetwork
from resattn_jax.run import Run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from resattn_jax.export.onnx_graph import to_onnx  # noqa: E402

ERROR = 1e-5  # the largest, beside the largest logit

# Nets, their images, and how many nodes their graphs may have. Maps of odd sizes have halves that are no halves.
NETS = {
    "ra_tiny": ("ra_tiny", (8, 8, 1), {}, 200),
    "double skip, channel": ("ra_tiny", (9, 15, 3), {"wiring": "double_skip", "attention": "channel"}, 220),
    "spatial, nal": ("ra_tiny", (8, 13, 3), {"attention": "spatial", "learning": "nal"}, 230),
    "local convolutions": ("ra_tiny", (8, 8, 1), {"mask": "local_convolutions"}, 200),
    "ra92_cifar": ("ra92_cifar", (32, 32, 3), {}, 500),
    "ra56": ("ra56", (224, 224, 3), {}, 370),
    "resnext": ("ra_tiny", (8, 8, 1), {"unit": "resnext"}, 170),
}


def run(graph, images):
    """The logits that ONNX Runtime gives for a graph that the checker has passed."""
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return logits


@pytest.mark.parametrize(("name", "shape", "options", "most"), NETS.values(), ids=NETS)
def test_the_graph_gives_the_nets_logits(name, shape, options, most):
    """The net upsamples by gathers, the graph by products, and norms that follow convolutions are part of them."""
    mean, std = np.float32([0.4]), np.float32([0.25])
    spec = dataclasses.replace(NAMED[name], **options)
    model = ResidualAttentionNetwork(spec, num_classes=10)
    products = model.clone(upsampling="products")
    variables = random_variables(model, shape)
    graph = to_onnx(
        lambda images: products.apply(variables, normalize(images, mean, std), train=False), shape, ("images", "logits")
    )
    assert len(graph.graph.node) <= most
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 17)]
    images = np.random.default_rng(0).integers(0, 256, (1 if name == "ra56" else 3, *shape), np.uint8)
    standardised = (np.float32(images) / 255 - 0.4) / 0.25
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, standardised)
    for count in {1, len(images)}:  # the batch is symbolic
        found = run(graph, images[:count])
        assert (found.dtype, found.shape) == (np.float32, (count, 10))
        np.testing.assert_allclose(found, logits[:count], rtol=0, atol=ERROR * np.abs(logits).max())


def test_a_mean_image_is_part_of_the_graph():
    mean = np.random.default_rng(0).random((4, 6, 3), np.float32)
    weights = np.random.default_rng(1).random((3, 5), np.float32)
    graph = to_onnx(
        lambda images: jnp.sum(normalize(images, mean, np.float32([0.5])), (1, 2)) @ weights,
        mean.shape,
        ("images", "logits"),
    )
    images = np.random.default_rng(2).integers(0, 256, (2, 4, 6, 3), np.uint8)
    np.testing.assert_allclose(run(graph, images), ((images / 255 - mean) / 0.5).sum((1, 2)) @ weights, rtol=1e-4)


def test_an_operation_without_a_translation_is_named():
    with pytest.raises(NotImplementedError, match=r"^sin, which the net uses, has no translation to ONNX$"):
        to_onnx(lambda images: jnp.sin(images.astype(jnp.float32)), (8, 8, 1), ("images", "logits"))
    with pytest.raises(NotImplementedError, match=r"^such a product has no translation"):
        to_onnx(lambda images: jnp.matmul(images, images), (8, 8, 8), ("images", "logits"))


def test_without_onnx_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resattn_jax.export.onnx_graph", None)
    net = TrainedNet(config=digits.get_config(), spec=plain_spec(), variables={}, step=1, metrics={})
    with pytest.raises(UsageError, match=r"^ONNX needs the package onnx, .*: pip install -e '\.\[onnx\]'$"):
        write_folder(Run(tmp_path / "net"), net, ["onnx"])
    assert not (tmp_path / "net").exists()
