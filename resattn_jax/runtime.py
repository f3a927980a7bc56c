"""The machine a run is on: processes, devices, the mesh, and JAX's settings for them."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import pathlib
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax.errors import RunError, reason

LOST_AFTER = 30  # seconds without a sign of life from a process until JAX ends the others
_START_AGAIN = (
    "most likely another process of the run died. Start them all again: the run goes on from its newest checkpoint"
)


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other hosts of a cluster, if there is one, and keeps compiled programs for the next start.

    Cloud TPU, GKE and Slurm are found without any argument; elsewhere every host is given the address (HOST:PORT) of
    the first, how many there are, and which one it is. When one of them dies, the others end too, with status 1.
    Call before anything else uses JAX.
    """
    waits = {"heartbeat_timeout_seconds": LOST_AFTER, "shutdown_timeout_seconds": LOST_AFTER}
    if coordinator_address:
        jax.distributed.initialize(coordinator_address, num_processes, process_id, **waits)
    else:
        with contextlib.suppress(ValueError):  # "coordinator_address should be defined": there is no cluster
            jax.distributed.initialize(**waits)
    if jax.distributed.is_initialized():
        ctypes.CDLL(None).signal(signal.SIGABRT, _end_after_abort)
    if jax.config.jax_compilation_cache_dir is None:  # JAX_COMPILATION_CACHE_DIR is not set
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "resattn_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


@functools.cache
def events() -> collections.Counter[str]:
    """How often JAX has reported each of its events (`jax.monitoring`), counted from the first call on."""
    counter = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counter.update([event]))
    return counter


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_after_abort(_: int) -> None:
    """JAX aborts the process when another one is lost, from a thread of its own, whatever the main thread waits for.

    This is C's signal handler: Python's own would wait for the main thread.
    """
    os.write(2, f"error: JAX ended this process, for the reason logged above; {_START_AGAIN}\n".encode())
    os._exit(1)


@contextlib.contextmanager
def device_faults(memory_advice: str) -> Iterator[None]:
    """Turns what devices and the network between them do to a program into a RunError of one line.

    memory_advice: what to say where a device has no memory left: what was asked of it, and what would ask for less.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = reason(error)
        if "RESOURCE_EXHAUSTED" in said:
            raise RunError(f"a device is out of memory {memory_advice} ({said})") from error
        if jax.process_count() > 1:
            raise RunError(f"{_START_AGAIN} ({said})") from error
        raise


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts (or those given) in one axis, "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def compute_dtype(name: str) -> jnp.dtype:
    """ "auto" is bfloat16 on accelerators and float32 on the CPU, which has no fast bfloat16."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def default_steps_per_dispatch() -> int:
    """50 on accelerators; 1 on the CPU, where XLA runs the body of a loop on one core."""
    return 1 if jax.default_backend() == "cpu" else 50


@functools.cache
def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What `jax.jit` tells XLA about the programs of a step on these devices; None: nothing.

    On the CPU XLA gives sums, products and convolutions to YNNPACK. For sums that is right; its convolutions take up to
    twice the time of Eigen's, their weight gradients 2 to 17 times. On TPUs maps are brought to the chip whole instead
    of in slices, which moves 5 % fewer bytes. An XLA without the option keeps its defaults.
    """
    options = {
        "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
        "tpu": {"xla_tpu_sliced_prefetch_max_slices": "1"},
    }.get(mesh.devices.flat[0].platform)
    if options:
        try:
            jax.jit(lambda: 0, out_shardings=NamedSharding(mesh, P()), compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:  # no such option
            return None
    return options


def describe_devices(mesh: Mesh) -> str:
    """Such as '8 TPU v5 lite (2 hosts)'."""
    kind = mesh.devices.flat[0].device_kind
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {kind}{hosts}"
