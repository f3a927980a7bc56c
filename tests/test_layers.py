"""The layers, on cases small enough to work out by hand."""

import dataclasses
import functools
import typing

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resattn_jax.models import NETS
from resattn_jax.models.layers import (
    INITIALIZERS,
    BatchNorm,
    Conv,
    Linear,
    max_pool,
    max_pool_by_slices,
    max_pool_by_window,
    upsample_bilinear,
)
from resattn_jax.models.nets import Pointwise, Pooling, Upsampling
from resattn_jax.models.network import AttentionModule, PreActivationUnit, attention_activation


def maps(rows):
    """[H, W] numbers as a map [1, H, W, 1]."""
    return jnp.asarray(rows, jnp.float32)[None, :, :, None]


def rows(x):
    return np.asarray(x)[0, :, :, 0].tolist()


def assert_same_outputs_and_gradients(functions, *arguments):
    """Outputs, and what flows back to every argument from one gradient, up to rounding."""
    results = []
    for function in functions:
        y, back = jax.vjp(function, *arguments)
        results.append((y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))))
    for ours, theirs in zip(*results, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# Upsampling: corners stay corners (align_corners), output i of n lies at i * (size - 1) / (n - 1).


@pytest.mark.parametrize(
    ("line", "length", "expected"),
    [
        ([5], 1, [5]),
        ([5], 4, [5, 5, 5, 5]),
        ([1, 9], 1, [1]),  # a single output lies at position 0, as in PyTorch
        ([0, 6], 2, [0, 6]),
        ([0, 6], 3, [0, 3, 6]),
        ([0, 6], 4, [0, 2, 4, 6]),
        ([0, 4, 12], 5, [0, 2, 4, 8, 12]),
        ([0, 3, 9], 4, [0, 2, 5, 9]),
        ([0, 6, 12, 18], 7, [0, 3, 6, 9, 12, 15, 18]),
        ([0, 1, 2, 3, 4], 3, [0, 2, 4]),
    ],
)
@pytest.mark.parametrize("upsampling", typing.get_args(Upsampling))
def test_upsampling_keeps_corners(line, length, expected, upsampling):
    across = upsample_bilinear(maps([line]), (1, length), upsampling=upsampling)
    down = upsample_bilinear(maps([[v] for v in line]), (length, 1), upsampling=upsampling)
    np.testing.assert_allclose(rows(across), [expected], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rows(down), [[v] for v in expected], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upsampling", typing.get_args(Upsampling))
def test_upsampling_is_bilinear(upsampling):
    expected = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    ours = upsample_bilinear(maps([[0, 2], [6, 8]]), (3, 3), upsampling=upsampling)
    np.testing.assert_allclose(rows(ours), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "shape"), [((4, 5), (8, 9)), ((2, 1), (5, 4)), ((1, 3), (1, 6)), ((7, 6), (4, 6))])
def test_upsampling_by_either_program_is_the_same(size, shape):
    assert_same_outputs_and_gradients(
        [functools.partial(upsample_bilinear, shape=shape, upsampling=u) for u in typing.get_args(Upsampling)],
        jax.random.normal(jax.random.key(0), (2, *size, 3)),
    )


def test_upsampling_leaves_examples_and_channels_apart():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), jnp.float32)
    whole = upsample_bilinear(x, (7, 9))
    assert whole.shape == (2, 7, 9, 5)
    one = upsample_bilinear(x[1:, :, :, 3:4], (7, 9))
    np.testing.assert_allclose(whole[1:, :, :, 3:4], one, rtol=1e-6, atol=1e-6)


def test_upsampling_computes_in_the_type_of_its_input():
    for upsampling in typing.get_args(Upsampling):
        y = upsample_bilinear(jnp.ones((1, 2, 2, 1), jnp.bfloat16), (4, 4), upsampling=upsampling)
        assert y.dtype == jnp.bfloat16


# Max-pooling with window 3 and stride 2. Caffe pads nothing on the left and lets the last window reach over the edge
# ("ceil"); PyTorch pads one on both sides ("both").

FOUR = np.arange(16).reshape(4, 4)
FIVE = np.arange(25).reshape(5, 5)
SEVEN = np.arange(49).reshape(7, 7)


@pytest.mark.parametrize(
    ("padding", "square", "expected"),
    [
        ("ceil", [[1, 2], [3, 4]], [[4]]),
        ("both", [[1, 2], [3, 4]], [[4]]),
        ("both", [[7]], [[7]]),
        ("ceil", FOUR, [[10, 11], [14, 15]]),
        ("both", FOUR, [[5, 7], [13, 15]]),
        ("ceil", FIVE, [[12, 14], [22, 24]]),
        ("both", FIVE, [[6, 8, 9], [16, 18, 19], [21, 23, 24]]),
        ("ceil", SEVEN, [[16, 18, 20], [30, 32, 34], [44, 46, 48]]),
        ("both", SEVEN, [[8, 10, 12, 13], [22, 24, 26, 27], [36, 38, 40, 41], [43, 45, 47, 48]]),
    ],
)
@pytest.mark.parametrize("pooling", typing.get_args(Pooling))
def test_max_pooling(padding, square, expected, pooling):
    assert rows(max_pool(maps(square), padding=padding, pooling=pooling)) == expected


@pytest.mark.parametrize("pooling", typing.get_args(Pooling))
def test_padding_never_wins(pooling):
    """All values lie below zero, so that a padding with zeros would show."""
    assert rows(max_pool(maps(FOUR - 100), padding="ceil", pooling=pooling)) == [[-90, -89], [-86, -85]]
    assert rows(max_pool(maps(FOUR - 100), padding="both", pooling=pooling)) == [[-95, -93], [-87, -85]]


@pytest.mark.parametrize("pooling", typing.get_args(Pooling))
def test_window_two_without_padding(pooling):
    """The pool of ra92_cifar_pooled; an odd last row is left out."""
    assert rows(max_pool(maps(FOUR), window=2, padding="valid", pooling=pooling)) == [[5, 7], [13, 15]]
    assert rows(max_pool(maps(FIVE), window=2, padding="valid", pooling=pooling)) == [[6, 8], [16, 18]]


@pytest.mark.parametrize(("window", "pad"), [(3, (1, 1)), (3, (0, 1)), (3, (0, 0)), (2, (0, 0))])
@pytest.mark.parametrize("size", [6, 7])
def test_max_pooling_by_either_program_is_the_same(window, pad, size):
    """Two programs for one thing: the same maxima, and the gradient goes to the same places."""
    pads = [(0, 0), pad, pad, (0, 0)]
    assert_same_outputs_and_gradients(
        [functools.partial(pool, window=window, pads=pads) for pool in (max_pool_by_window, max_pool_by_slices)],
        jax.random.normal(jax.random.key(0), (2, size, size, 3)),
    )


@pytest.mark.parametrize(("window", "padding"), [(3, "ceil"), (2, "valid")])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_a_map_of_one_cannot_be_pooled(window, padding, shape):
    with pytest.raises(ValueError, match=f"too small.*{shape[0]}x{shape[1]}"):
        max_pool(jnp.zeros((1, *shape, 1)), window=window, padding=padding)


# Convolution: no bias, (k - 1) / 2 zeros on both sides, whatever the stride.


def test_convolution_pads_both_sides_alike():
    """A kernel of ones sums its window; on 4x4 with stride 2 the first window hangs over the left and upper edge."""
    kernel = {"params": {"kernel": jnp.ones((3, 3, 1, 1))}}
    ones = jnp.ones((1, 4, 4, 1))
    assert rows(Conv(1, 3).apply(kernel, ones)) == [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert rows(Conv(1, 3, stride=2).apply(kernel, ones)) == [[4, 6], [6, 9]]


def test_convolution_is_no_flipped_correlation():
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 1] = 1  # the pixel above
    out = Conv(1, 3).apply({"params": {"kernel": kernel}}, maps([[1, 2], [3, 4]]))
    assert rows(out) == [[0, 0], [1, 2]]


def test_a_convolution_of_one_pixel_is_a_matrix_product():
    kernel = jnp.asarray([[1.0, 10.0], [2.0, 20.0]])[None, None]
    x = jnp.asarray([[[1.0, 1.0], [5.0, 5.0], [0.0, 3.0]]])[None]  # 1x3 pixels of two channels
    conv = Conv(2, 1, stride=2)
    np.testing.assert_array_equal(conv.apply({"params": {"kernel": kernel}}, x), [[[[3, 30], [6, 60]]]])


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize(("size", "expected"), [(1, 1), (2, 1), (7, 4), (8, 4)])
def test_a_stride_of_two_leaves_half_rounded_up(kernel_size, size, expected):
    out = jax.eval_shape(
        lambda x: Conv(4, kernel_size, stride=2).init_with_output(jax.random.key(0), x)[0], jnp.zeros((1, size, 8, 3))
    )
    assert out.shape == (1, expected, 4, 4)


def test_groups_do_not_see_each_other():
    kernel = {"params": {"kernel": jnp.ones((3, 3, 1, 2))}}
    x = jnp.concatenate([jnp.ones((1, 3, 3, 1)), 10 * jnp.ones((1, 3, 3, 1))], -1)
    assert Conv(2, 3, groups=2).apply(kernel, x)[0, 1, 1].tolist() == [9, 90]


# Mask activations (paper, equations 4 to 6).


def test_mixed_attention_is_a_sigmoid():
    out = attention_activation(maps([[0, np.log(3), -np.log(3)]]), "mixed")
    np.testing.assert_allclose(rows(out), [[0.5, 0.75, 0.25]], rtol=1e-6)


def test_channel_attention_has_length_one_at_each_position():
    x = jnp.asarray([[[[3.0, -4.0], [0.0, 2.0]]]])
    np.testing.assert_allclose(attention_activation(x, "channel"), [[[[0.6, -0.8], [0.0, 1.0]]]], rtol=1e-6)


def test_channel_attention_bears_a_position_of_zeros():
    x = jnp.zeros((1, 1, 1, 4))
    value, gradient = jax.value_and_grad(lambda x: attention_activation(x, "channel").sum())(x)
    assert value == 0
    assert np.isfinite(gradient).all()


def test_spatial_attention_normalises_each_map():
    """Two channels [4, 6] and [-10, 30] have means 5 and 10 and deviations 1 and 20: both become sigmoid([-1, 1])."""
    x = jnp.asarray([[[[4.0, -10.0], [6.0, 30.0]]]])
    low, high = 1 / (1 + np.exp(1)), 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(attention_activation(x, "spatial"), [[[[low, low], [high, high]]]], rtol=1e-5)


def test_spatial_attention_leaves_examples_apart():
    one = jnp.asarray([[[[4.0], [6.0]]], [[[400.0], [600.0]]]])
    np.testing.assert_allclose(
        attention_activation(one, "spatial")[:1], attention_activation(one[:1], "spatial"), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["mixed", "channel", "spatial"])
def test_mask_activations_keep_the_type(kind):
    assert attention_activation(jnp.ones((1, 2, 2, 4), jnp.bfloat16), kind).dtype == jnp.bfloat16


@pytest.mark.parametrize(("learning", "factor"), [("arl", 1.5), ("nal", 0.5)])
def test_attention_learning(learning, factor):
    """A module without units, and a mask whose weights are zero: M = sigmoid(0) = 1/2.

    Attention residual learning gives (1 + M) * T, naive attention learning M * T.
    """
    spec = dataclasses.replace(NETS["ra_tiny"], p=0, t=0, r=0, last=0, learning=learning)
    norm = functools.partial(BatchNorm, train=False)
    unit = functools.partial(PreActivationUnit, 8, conv=Conv, norm=norm)
    module = AttentionModule(spec, 0, unit, Conv, norm, max_pool, upsample_bilinear)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 2, 8)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    np.testing.assert_allclose(module.apply(zeros, x), factor * x, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_1x1_convolution_is_a_product_over_channels(stride):
    """Whether it is computed as a matrix product or as a convolution."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((1, 1, 3, 6))
    expected = np.einsum("bhwc,cd->bhwd", x[:, ::stride, ::stride], kernel[0, 0])
    for pointwise in typing.get_args(Pointwise):
        conv = Conv(6, 1, stride, pointwise=pointwise)
        ours = conv.apply({"params": {"kernel": np.float32(kernel)}}, np.float32(x))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_1x1_convolution_by_either_program_is_the_same(stride):
    rng = np.random.default_rng(0)
    x, kernel = (np.float32(rng.standard_normal(shape)) for shape in [(2, 5, 4, 32), (1, 1, 32, 48)])
    convs = [Conv(48, 1, stride, pointwise=pointwise) for pointwise in typing.get_args(Pointwise)]
    assert_same_outputs_and_gradients(
        [lambda x, kernel, conv=conv: conv.apply({"params": {"kernel": kernel}}, x) for conv in convs], x, kernel
    )


def test_other_convolutions_are_not_asked():
    """A 3x3 kernel, or one of groups, is a convolution in either program."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    for options in {"kernel_size": 3}, {"kernel_size": 1, "groups": 2}:
        outputs = [
            Conv(8, pointwise=pointwise, **options).init_with_output(jax.random.key(1), x)[0]
            for pointwise in typing.get_args(Pointwise)
        ]
        np.testing.assert_array_equal(*outputs)


# Initialisation. A kernel [3, 3, 64, 128] reads 576 values a position and is read by 1,152.


@pytest.mark.parametrize(("init", "variance"), [("he_fan_in", 2 / 576), ("he_fan_out", 2 / 1152)])
def test_he_initialisation(init, variance):
    """He et al. (2015), equations 10 and 14: normal with variance 2 / fan."""
    kernel = Conv(128, 3, initializer=init).init(jax.random.key(0), jnp.zeros((1, 1, 1, 64)))["params"]["kernel"]
    assert kernel.shape == (3, 3, 64, 128)
    assert np.var(kernel) == pytest.approx(variance, rel=0.03)
    assert np.mean(kernel) == pytest.approx(0, abs=1e-3)
    assert np.abs(kernel).max() > 4 * variance**0.5  # a normal distribution is not cut off


def test_the_default_initialisation_of_pytorch():
    """torch.nn.Conv2d: kaiming_uniform_(a=sqrt(5)), that is uniform within 1/sqrt(fan_in)."""
    kernel = Conv(128, 3, initializer="pytorch").init(jax.random.key(0), jnp.zeros((1, 1, 1, 64)))["params"]["kernel"]
    bound = 1 / 24
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    assert np.var(kernel) == pytest.approx(bound**2 / 3, rel=0.03)


def test_the_default_initialisation_of_a_linear_layer_of_pytorch():
    """torch.nn.Linear: weight and bias uniform within 1/sqrt(in_features)."""
    params = Linear(2000, initializer="pytorch").init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    for leaf in params["kernel"], params["bias"]:
        assert 0.99 / 8 < np.abs(leaf).max() <= 1 / 8
        assert np.var(leaf) == pytest.approx(1 / 192, rel=0.06)


def test_a_linear_layer_starts_without_bias_elsewhere():
    params = Linear(10, initializer="he_fan_in").init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    assert not params["bias"].any()


def test_a_group_reads_its_own_channels_only():
    """fan_in of a convolution in 32 groups is that of one group: 9 * 64 / 32."""
    kernel = Conv(2048, 3, groups=32, initializer="pytorch").init(jax.random.key(0), jnp.zeros((1, 1, 1, 64)))
    assert np.abs(kernel["params"]["kernel"]).max() == pytest.approx(1 / np.sqrt(18), rel=1e-3)


def test_weights_of_another_shape_or_none_are_told_and_no_initializer_is_traced(monkeypatch):
    layer, x = Conv(4, 1), jnp.ones((1, 2, 2, 3))
    kernel = jnp.ones((1, 1, 3, 4))
    monkeypatch.setitem(INITIALIZERS, "he_fan_in", lambda *_: pytest.fail("it was"))
    np.testing.assert_array_equal(layer.apply({"params": {"kernel": kernel}}, x), np.full((1, 2, 2, 4), 3))
    with pytest.raises(flax.errors.ScopeParamShapeError, match="kernel"):
        layer.apply({"params": {"kernel": kernel[:, :, :2]}}, x)
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="kernel"):
        layer.apply({"params": {"other": kernel}}, x)
