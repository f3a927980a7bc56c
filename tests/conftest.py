"""Tests run on eight CPU devices, strictly: no silent promotion of ranks or types, and a warning is an error.

Compiled programs are kept between tests.
"""

import gc
import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "xla"

# Also for the programs that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the time goes into compiling small programs
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

gc.set_threshold(200_000, 50, 1000)  # tracing makes millions of small objects; collecting them took a third of the time

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


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
def one_device():
    return jax.devices()[:1]


@pytest.fixture(scope="session")
def tfds_dir():
    """A folder with prepared TFDS sets, cifar10 among them; tests of real data are skipped without it."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not (pathlib.Path(folder) / "cifar10").is_dir():
        pytest.skip("TFDS_DATA_DIR names no folder with cifar10")
    return folder
