"""What a net is said to look at is what PyTorch computes there, from the same weights (public_net, torch_reference)."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import examples, plain_recipe, plain_spec

torch = pytest.importorskip("torch")

import public_net  # noqa: E402
import torch_reference as reference  # noqa: E402

from configs import cifar10_ra92  # noqa: E402
from resattn_jax.classifier import Classifier  # noqa: E402
from resattn_jax.convert import to_torch  # noqa: E402
from resattn_jax.data.resident import ResidentEval  # noqa: E402
from resattn_jax.experiment import build  # noqa: E402
from resattn_jax.intermediates import attention_modules, maps  # noqa: E402
from resattn_jax.mask_statistics import summarise  # noqa: E402
from resattn_jax.models import NETS  # noqa: E402
from resattn_jax.models.network import ResidualAttentionNetwork  # noqa: E402
from resattn_jax.runtime import make_mesh  # noqa: E402

BOUND = 1e-5  # relative error of a map, ours in float32 and theirs in float64


def error(ours, theirs):
    """Relative error in the Euclidean norm; theirs is [B, C, H, W]."""
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def weights_of(variables):
    return reference.to_tensors(variables["params"]) | reference.to_tensors(variables["batch_stats"])


@pytest.fixture
def branches(monkeypatch):
    """{module: (T, M)} of the pass that the reference makes next."""
    seen, mask = {}, reference._mask

    def recording(spec, weights, at, x, trunk, train, depth):
        m = mask(spec, weights, at, x, trunk, train, depth)
        seen[at.removesuffix("/mask")] = trunk, m
        return m

    monkeypatch.setattr(reference, "_mask", recording)
    return seen


def test_masks_of_the_public_net(monkeypatch):
    """ra92_cifar by the public code's own names, where every sigmoid is that of a mask: six of them, in order."""
    config = cifar10_ra92.get_config()
    spec = plain_spec((32, 32, 3), mean=np.float32([0.5]), std=np.float32([0.25]))
    model = ResidualAttentionNetwork(NETS["ra92_cifar"], num_classes=10)
    variables = reference.random_variables(model, (32, 32, 3))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    ours = Classifier(config, spec, variables).attention(images)

    masks, sigmoid = [], torch.sigmoid
    monkeypatch.setattr(torch, "sigmoid", lambda y: masks.append(sigmoid(y)) or masks[-1])
    state = {name: torch.from_numpy(np.array(a, np.float64)) for name, a in to_torch(variables, "ra92_cifar").items()}
    with torch.no_grad():
        public_net.logits(state, reference.to_nchw((np.float64(images) / 255 - 0.5) / 0.25))
    assert list(ours) == [
        *("stage1_attention1", "stage2_attention1", "stage2_attention2"),
        *("stage3_attention1", "stage3_attention2", "stage3_attention3"),
    ]
    assert [a.mask.shape[1:] for a in ours.values()] == [(32, 32, 128)] + [(16, 16, 256)] * 2 + [(8, 8, 512)] * 3
    assert [error(a.mask, mask) < BOUND for a, mask in zip(ours.values(), masks, strict=True)] == [True] * 6


VARIANTS = {
    "paper": {},
    "double skip": {"wiring": "double_skip"},
    "resnext, spatial, nal": {"unit": "resnext", "attention": "spatial", "learning": "nal"},
    "local convolutions, channel, no units beside": {
        "mask": "local_convolutions", "attention": "channel", "p": 0, "t": 0, "last": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_trunk_mask_and_product_of_every_variant(options, branches):
    """On maps of odd sizes; recomputing units in the backward pass (remat) changes nothing here."""
    spec = dataclasses.replace(NETS["ra_tiny"], **options)
    model = ResidualAttentionNetwork(spec, num_classes=10, remat=True)
    variables = reference.random_variables(model, (17, 11, 3))
    images = np.random.default_rng(0).integers(0, 256, (2, 17, 11, 3), np.uint8)
    names = attention_modules(spec)

    def wanted(variables, images):
        found = maps(model, plain_recipe(), variables, images)
        return {k: found[k] for k in [f"{n}/{part}" for n in names for part in ("trunk", "mask", "product")]}

    ours = jax.jit(wanted)(variables, images)
    with torch.no_grad():
        reference.logits(spec, weights_of(variables), reference.to_nchw(np.float64(images) / 255))
    assert list(branches) == names
    for name, (trunk, mask) in branches.items():
        product = mask * trunk if spec.learning == "nal" else (1 + mask) * trunk
        assert error(ours[f"{name}/trunk"], trunk) < BOUND
        assert error(ours[f"{name}/mask"], mask) < BOUND
        assert error(ours[f"{name}/product"], product) < BOUND


def test_the_summary_of_a_split(tiny_config, branches, monkeypatch):
    """Over eight devices, the last batch not full, against what PyTorch gives for all examples at once: responses,
    masks, and loss and top-1 when a module has the mean of its masks.
    """
    tiny_config.eval.batch_size = 16
    tiny_config.model.name = "ra_tiny"
    data = plain_spec((8, 8, 1))
    experiment = build(tiny_config, data, make_mesh())
    variables = reference.random_variables(experiment.model, (8, 8, 1))
    rng = np.random.default_rng(0)
    split = examples(rng.integers(0, 256, (37, 8, 8, 1), np.uint8), rng.integers(0, 10, 37, np.int32), data.class_names)
    stream = ResidentEval(split, batch_size=16, max_examples=None, mesh=experiment.mesh)
    assert experiment.mesh.size == 8
    summary = summarise(experiment, variables, stream)

    spec, x = experiment.model.spec, reference.to_nchw(np.float64(split.images) / 255)
    labels = torch.from_numpy(np.int64(split.labels))

    def measured():
        with torch.no_grad():
            logits = reference.logits(spec, weights_of(variables), x)
        return logits, float(torch.nn.functional.cross_entropy(logits, labels))

    logits, loss = measured()
    assert summary.examples == 37
    assert summary.top1 == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert summary.loss == pytest.approx(loss, rel=1e-5)
    recorded, means, attention = dict(branches), reference._mask, reference._attention
    outputs = {}
    monkeypatch.setattr(reference, "_attention", lambda s, w, at, *a: outputs.setdefault(at, attention(s, w, at, *a)))
    measured()
    assert list(summary.modules) == list(recorded) == ["stage1_attention1", "stage2_attention1"]
    for i, (name, (trunk, mask)) in enumerate(recorded.items(), 1):
        ours = summary.modules[name]
        theirs = {
            "trunk": trunk.abs().mean(),
            "product": ((1 + mask) * trunk).abs().mean(),
            "output": outputs[name].abs().mean(),
            "mask_mean": mask.mean(),
            "mask_std": mask.std(correction=0),
            "mask_std_over_examples": mask.var(0, correction=0).mean().sqrt(),
        }
        for field, value in theirs.items():
            assert getattr(ours, field) == pytest.approx(float(value), rel=1e-4), field
        assert ours.near_zero == pytest.approx(float((mask.abs() < 0.1).double().mean()), abs=1e-3)
        assert ours.near_one == pytest.approx(float(((1 - mask).abs() < 0.1).double().mean()), abs=1e-3)
        assert ours.shape == (*mask.shape[2:], mask.shape[1])
        assert summary.responses[f"stage{i}"] == ours.output

        def given(spec, weights, at, *rest, name=name, mean=mask.mean(0, keepdim=True)):
            return mean if at == f"{name}/mask" else means(spec, weights, at, *rest)

        with monkeypatch.context() as m:
            m.setattr(reference, "_mask", given)
            m.setattr(reference, "_attention", attention)
            logits, loss_without = measured()
        assert ours.loss_mean_mask == pytest.approx(loss_without, rel=1e-5)
        assert abs(loss_without - loss) > 1e-4 * loss  # so the bound would show that nothing was replaced
        assert ours.top1_mean_mask == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
