"""Every net has the size it is published with: trainable parameters, batch statistics and multiply-adds, exactly.

The figures were counted from the published definitions themselves: the authors' Caffe prototxt files, the public
PyTorch code (without the shortcut convolutions it holds and does not use) and pytorchcv. Those of the nets that nobody
published were counted twice, by arithmetic over their residual units and from PyTorch modules of the public code put
together at that depth.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from helpers import trace

from resattn_jax.models import NETS, create_model, model_names
from resattn_jax.models.count import count_multiply_adds, count_parameters
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.models.nets import Stage
from resattn_jax.models.network import ResidualAttentionNetwork


class Golden(NamedTuple):
    classes: int
    image_shape: tuple[int, int, int]
    parameters: int
    statistics: int  # running means and variances
    giga_multiply_adds: float


GOLDEN = {
    # Authors' Caffe nets: Attention-56, Attention-92, AttentionNeXt-56, AttentionNeXt-92.
    "ra56": Golden(1000, (224, 224, 3), 31_810_728, 72_704, 6.271),
    "ra92": Golden(1000, (224, 224, 3), 52_466_344, 133_632, 10.534),
    "ranext56": Golden(1000, (224, 224, 3), 31_318_824, 98_432, 6.419),
    "ranext92": Golden(1000, (224, 224, 3), 52_102_952, 171_136, 10.704),
    # pytorchcv: resattnet128 to resattnet452.
    "ra128": Golden(1000, (224, 224, 3), 65_294_504, 182_272, 14.899),
    "ra164": Golden(1000, (224, 224, 3), 78_122_664, 230_912, 19.264),
    "ra200": Golden(1000, (224, 224, 3), 90_950_824, 279_552, 23.630),
    "ra236": Golden(1000, (224, 224, 3), 103_778_984, 328_192, 27.995),
    "ra452": Golden(1000, (224, 224, 3), 182_285_224, 637_696, 44.386),
    # Public PyTorch code: ResidualAttentionModel_56, _92, _448input, _92_32input_update, _92_32input.
    "ra56_double_skip": Golden(10, (224, 224, 3), 29_782_218, 72_704, 6.269),
    "ra92_double_skip": Golden(10, (224, 224, 3), 50_437_834, 133_632, 10.532),
    "ra92_448": Golden(10, (448, 448, 3), 50_782_410, 140_288, 12.824),
    "ra92_cifar": Golden(10, (32, 32, 3), 12_170_730, 61_056, 1.089),
    "ra92_cifar_pooled": Golden(10, (32, 32, 3), 12_172_266, 61_056, 0.275),
    # Modules of the public PyTorch code at other depths.
    "ra56_cifar": Golden(10, (32, 32, 3), 7_202_794, 32_896, 0.694),
    "ra128_cifar": Golden(10, (32, 32, 3), 15_125_354, 81_920, 1.464),
    "ra164_cifar": Golden(10, (32, 32, 3), 18_079_978, 102_784, 1.839),
    "ra236_cifar": Golden(10, (32, 32, 3), 23_989_226, 144_512, 2.588),
    # The paper's CIFAR nets, whose widths are fitted: it prints 1.9M for 92 and 5.1M for 236. By arithmetic alone.
    "ra56_cifar_slim": Golden(10, (32, 32, 3), 1_030_394, 14_912, 0.123),
    "ra92_cifar_slim": Golden(10, (32, 32, 3), 1_841_274, 27_072, 0.212),
    "ra128_cifar_slim": Golden(10, (32, 32, 3), 2_652_154, 39_232, 0.301),
    "ra164_cifar_slim": Golden(10, (32, 32, 3), 3_463_034, 51_392, 0.390),
    "ra236_cifar_slim": Golden(10, (32, 32, 3), 5_084_794, 75_712, 0.568),
    "ra452_cifar_slim": Golden(10, (32, 32, 3), 10_181_242, 158_656, 0.984),
    # Ours; by arithmetic alone.
    "ra_tiny": Golden(10, (8, 8, 1), 221_098, 5_504, 0.005),
}


def test_every_net_has_golden_figures():
    assert sorted(GOLDEN) == sorted(model_names())


@pytest.mark.parametrize("name", model_names())
def test_parameters_statistics_logits_and_multiply_adds(name):
    """Multiply-adds are counted over the traced forward pass: a convolution left out or run twice shows, and so does
    a wrong map size.
    """
    golden = GOLDEN[name]
    model = create_model(name, num_classes=golden.classes)
    logits, variables = trace(model, golden.image_shape)
    assert count_parameters(variables["params"]) == golden.parameters
    assert count_parameters(variables["batch_stats"]) == golden.statistics
    assert logits.shape == (2, golden.classes)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((logits, variables)))
    count = count_multiply_adds(model, golden.image_shape, variables)
    assert round(count / 1e9, 3) == golden.giga_multiply_adds


@pytest.mark.parametrize("name", ["ra56", "ra92", "ra92_cifar", "ra56_cifar_slim"])
def test_the_wirings_have_equal_parameters(name):
    """They differ in sums alone (and in how the poolings pad)."""
    models = [create_model(name, num_classes=10, wiring=wiring) for wiring in ("paper", "double_skip")]
    paper, double_skip = (variable_shapes(model, GOLDEN[name].image_shape) for model in models)
    assert paper == double_skip


def test_multiply_adds_are_those_of_weights_alone():
    """By hand, one stage of 64 channels at mask depth 1 on 8x8: neither norms nor the interpolation count.

    A unit of 64 does 64 * 16 + 16 * 16 * 9 + 16 * 64 = 4,352 a position; the first one, from 32,
    32 * 16 + 16 * 16 * 9 + 16 * 64 + 32 * 64 = 5,888. Two of the six units of the module lie at the bottom, on 4x4.
    """
    spec = dataclasses.replace(NETS["ra_tiny"], stages=(Stage(64, modules=1, depth=1, stride=1),))
    convolutions = 64 * (3 * 32 * 9 + 5_888 + 4 * 4_352 + 2 * 64 * 64) + 16 * 2 * 4_352
    model = ResidualAttentionNetwork(spec, num_classes=10)
    assert count_multiply_adds(model, (8, 8, 3)) == convolutions + 64 * 10
