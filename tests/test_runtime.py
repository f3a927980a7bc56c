"""The settings of the machine a run is on."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, plain_spec

from resattn_jax import runtime
from resattn_jax.experiment import build


def test_the_options_of_the_cpu_leave_convolutions_to_eigen_and_change_no_result():
    options = runtime.compiler_options(runtime.CPU, runtime.make_mesh(jax.devices()[:1]))
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


def test_a_barrier_of_the_cpus_programs_stays_until_they_are_fused():
    """What is behind one is worked out once, not again in each kernel that uses it."""
    mesh = runtime.make_mesh(jax.devices()[:1])

    def scaled(scale, *arrays):
        return [jax.lax.optimization_barrier(scale**2 + 1) * array for array in arrays]

    arguments = np.float32(3), np.ones(5, np.float32), np.ones(7, np.float32)
    program = jax.jit(scaled, compiler_options=runtime.compiler_options(runtime.CPU, mesh)).lower(*arguments).compile()
    assert " opt-barrier(" in program.as_text()
    assert [float(array[0]) for array in program(*arguments)] == [10, 10]


def test_gpus_and_an_xla_without_the_option_have_none(monkeypatch):
    mesh = runtime.make_mesh(jax.devices()[:1])
    assert runtime.compiler_options(runtime.GPU, mesh) is None

    def unknown(*_, **__):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")

    monkeypatch.setattr(jax, "jit", unknown)
    assert runtime.compiler_options.__wrapped__(runtime.CPU, mesh) is None


def test_the_platform_is_that_of_the_meshs_devices_and_another_can_be_given(tiny_config, one_device):
    """A net built here for a GPU, a TPU or an exporter: its programs are theirs, its numbers and weights ours."""
    mesh = runtime.make_mesh(one_device)
    assert runtime.platform_of(mesh) is runtime.CPU
    tiny_config.model.dtype = "float32"
    images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    here = build(tiny_config, plain_spec(), mesh)
    variables = here.initial_state().variables
    expected = here.model.apply(variables, images, train=False)
    for platform in (runtime.GPU, runtime.TPU, runtime.PORTABLE):
        there = build(tiny_config, plain_spec(), mesh, platform)
        assert {key: getattr(there.model, key) for key in platform.layers} == platform.layers
        assert there.steps_per_dispatch == platform.steps_per_dispatch
        logits = there.model.apply(variables, images, train=False)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert build(tiny_config, plain_spec(), mesh, runtime.TPU).model.dtype == np.float32
    tiny_config.model.dtype = "auto"
    assert str(build(tiny_config, plain_spec(), mesh, runtime.TPU).model.dtype) == "bfloat16"


def test_no_module_but_this_one_asks_what_the_devices_are():
    asking = [p.name for p in (ROOT / "resattn_jax").rglob("*.py") if "default_backend(" in p.read_text("utf-8")]
    assert asking == []


KEPT = """
import jax
from resattn_jax import runtime
runtime.keep_programs()
jax.jit(lambda x: 3 * x)(2.0)
"""


@pytest.mark.parametrize(("least", "programs"), [(None, 1), ("60", 0)])
def test_the_smallest_program_is_kept_unless_the_user_says_how_long_it_has_to_take(least, programs, tmp_path):
    """JAX by itself keeps only what took it a second to compile."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    if least:
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = least
    subprocess.run([sys.executable, "-c", KEPT], cwd=ROOT, env=environment, check=True)
    assert len(list(tmp_path.glob("resattn_jax/*lambda*-cache"))) == programs
