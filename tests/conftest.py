"""Tests run on eight CPU devices, strictly: no silent promotion of ranks or types, and a warning is an error.

Compiled programs are kept between tests.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "xla"

# Also for the programs that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Most of the time goes into compiling small programs; with these it is half. Wide vectors are long to compile.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # nobody asks a program which line wrote an operation
QUICK_TO_COMPILE = "--xla_cpu_opt_preset=fast_compile --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later XLA may end the process: it is unknown there
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
if platform.machine() == "x86_64":
    QUICK_TO_COMPILE += " --xla_cpu_max_isa=AVX2"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

gc.set_threshold(200_000, 50, 1000)  # tracing makes millions of small objects; collecting them took a third of the time

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers():
    """One more than xdist would start, since some tests wait for programs that they start; no more than 8."""
    return min((yield) + 1, 8)


def pytest_sessionfinish():
    """Garbage is looked for once. Pytest does it five times, and among all that JAX keeps each takes a second."""
    gc.collect()
    gc.freeze()


BUILT = {}  # the first experiment with the same programs

# What of a config is in none of them; the lengths neither, where the rate is constant.
NOT_COMPILED = ("seed", "log_every", "tracker", "watchdog_minutes", "eval.every", "eval.max_examples", "checkpoint")
NOT_COMPILED += ("data.workers", "data.broken", "init_from")
LENGTHS = ("total_epochs", "total_steps")


def built_with_shared_programs(build, config, spec, mesh, platform=None):
    """`experiment.build`; what it jits is traced and compiled once for all experiments with the same programs."""
    from resattn_jax.config import flatten
    from resattn_jax.models.nets import NETS

    experiment = build(config, spec, mesh, platform)
    aside = NOT_COMPILED + LENGTHS * (config.schedule.name == "constant")
    compiled = {key: value for key, value in flatten(config).items() if not key.startswith(aside)}
    steps = experiment.durations("schedule.warmup"), experiment.recipe.mixup_until
    key = json.dumps([compiled, spec.to_plain(), steps]), mesh, platform, NETS.get(config.model.name)
    first = BUILT.setdefault(key, experiment)
    if first is not experiment:
        experiment = dataclasses.replace(experiment, model=first.model, optimizer=first.optimizer)
        shared = ("train_steps", "sam_steps", "eval_step", "first_inputs", "_shapes")
        vars(experiment).update({name: getattr(first, name) for name in shared})
    return experiment


@pytest.fixture
def tiny_config(monkeypatch):
    """A run of 12 steps on digits with a net of four residual units, every option of the recipe in use."""
    from configs import digits
    from resattn_jax.models.nets import NETS, Spec, Stage, Stem

    stage = Stage(16, modules=1, depth=1, stride=2)
    monkeypatch.setitem(NETS, "ra_micro", Spec(stem=Stem(8, 3), stages=(stage,), p=0, t=1, last=0))
    c = digits.get_config()
    c.model.name = "ra_micro"
    c.total_epochs, c.total_steps = None, 12
    c.batch_size = 32
    c.augment.mixup_alpha = 0.2
    c.augment.mixup_off_last = "4 steps"
    c.optimizer.clip_norm = 5.0
    c.schedule.warmup = "3 steps"
    c.log_every = "4 steps"
    c.eval.every = "6 steps"
    c.eval.batch_size = 100
    return c


@pytest.fixture
def shared_programs(monkeypatch):
    """Runs with the same programs on the same devices share them, so that later ones trace and compile nothing.

    For tests of what a run does, not of what it computes: a test that replaces a part of the net or of the step must
    not use it.
    """
    import helpers

    from resattn_jax import experiment
    from resattn_jax.modes import train

    shared = functools.partial(built_with_shared_programs, experiment.build)
    for module in (helpers, experiment, train):
        monkeypatch.setattr(module, "build", shared)


@pytest.fixture
def one_device():
    return jax.devices()[:1]


@pytest.fixture(scope="session")
def tfds_dir():
    """A folder with prepared TFDS sets, cifar10 among them; tests of real data are skipped without it."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not (pathlib.Path(folder) / "cifar10").is_dir():
        pytest.skip("TFDS_DATA_DIR names no folder with cifar10")
    return folder
