"""The settings of the machine a run is on."""

import types

import jax
import numpy as np

from resattn_jax import runtime


def test_the_options_of_the_cpu_leave_convolutions_to_eigen_and_change_no_result():
    options = runtime.compiler_options(runtime.make_mesh(jax.devices()[:1]))
    assert options
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(2, 8, 8, 32)).astype(np.float32), rng.normal(size=(3, 3, 32, 32)).astype(np.float32)

    def convolution_and_sums(x, k):
        y = jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y, (y**2).sum((0, 1, 2))

    by_default = jax.jit(convolution_and_sums).lower(x, k).compile()
    compiled = jax.jit(convolution_and_sums, compiler_options=options).lower(x, k).compile()
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).astype(np.float64)
    y = sum(padded[:, i : i + 8, j : j + 8] @ k[i, j] for i in range(3) for j in range(3))
    for program in by_default, compiled:
        for ours, expected in zip(program(x, k), (y, (y**2).sum((0, 1, 2))), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
    in_a_fusion_for_ynnpack = [" convolution(" not in p.as_text().partition("ENTRY")[2] for p in (by_default, compiled)]
    assert in_a_fusion_for_ynnpack == [True, False]


def test_gpus_and_an_xla_without_the_option_have_none(monkeypatch):
    gpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
    assert runtime.compiler_options.__wrapped__(gpu) is None

    def unknown(*_, **__):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")

    monkeypatch.setattr(jax, "jit", unknown)
    assert runtime.compiler_options.__wrapped__(runtime.make_mesh(jax.devices()[:1])) is None
