"""The machine a run is on: processes, devices, the mesh, the platform, signals, and JAX's settings for them."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resattn_jax import __version__
from resattn_jax.errors import RunError, UsageError, reason
from resattn_jax.rules import shortened

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
    Call before anything else uses JAX. Raises UsageError when JAX finds no device.
    """
    waits: dict[str, Any] = {"heartbeat_timeout_seconds": LOST_AFTER, "shutdown_timeout_seconds": LOST_AFTER}
    if coordinator_address:
        jax.distributed.initialize(coordinator_address, num_processes, process_id, **waits)
    else:
        with contextlib.suppress(ValueError):  # "coordinator_address should be defined": there is no cluster
            jax.distributed.initialize(**waits)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second: a build for GPUs without one
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(
            f"JAX finds no device for JAX_PLATFORMS={shortened(wanted)} ({reason(error)}); set it to cpu or to nothing,"
            " or install what it needs: pip install -e '.[cuda13]' or '.[tpu]'"
        ) from error
    if jax.distributed.is_initialized():
        ctypes.CDLL(None).signal(signal.SIGABRT, _end_after_abort)
    keep_programs()


def keep_programs() -> None:
    """Keeps compiled programs for the next start: in JAX_COMPILATION_CACHE_DIR or in the home folder.

    JAX by itself keeps what took it a second to compile; a start has a dozen programs that take less, each time anew.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] is None:  # JAX_COMPILATION_CACHE_DIR is not set
        with contextlib.suppress(RuntimeError):  # there is no home folder, and so no cache
            caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            if caches.is_absolute():  # as the XDG specification asks for
                jax.config.update("jax_compilation_cache_dir", str(caches / "resattn_jax"))


def kept_folder() -> pathlib.Path | None:
    """Where decoded data is kept, beside the compiled programs; None where these are not kept, or in a bucket."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return pathlib.Path(folder) / "decoded"


@functools.cache
def _events() -> collections.Counter[tuple[str, int]]:
    """How often JAX has reported each event (`jax.monitoring`) in each thread, counted from the first call on."""
    counter: collections.Counter[tuple[str, int]] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counter.update([(event, threading.get_ident())]))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """What the devices of a mesh are good at. A net for devices that are not here is built by giving it theirs.

    compute_dtype: what config.model.dtype=auto means. steps_per_dispatch: of a resident set, by default.
    loops: whether the body of a loop is as fast as the same outside of one.
    pointwise, pooling, upsampling, sums: which of the programs for the same numbers a layer is (models/layers.py).
    computes_anew: whether XLA works a value out in every kernel that reads it, so that a barrier behind it pays.
    packs: whether a dispatch of many steps keeps the state as a few long arrays (packed.py).
    compiler_options: what `jax.jit` tells XLA about the programs of a step.
    shares_host_memory: whether an array on a device may be the very memory that was put there.
    """

    name: str
    compute_dtype: str
    steps_per_dispatch: int
    loops: bool
    pointwise: str
    pooling: str
    upsampling: str
    sums: str = "apart"
    computes_anew: bool = False
    packs: bool = False
    compiler_options: tuple[tuple[str, str], ...] = ()
    shares_host_memory: bool = False

    @property
    def layers(self) -> dict[str, Any]:
        """The keyword arguments of `create_model` that say which programs the layers are."""
        return {name: getattr(self, name) for name in ("pointwise", "pooling", "upsampling", "sums")}

    def dtype(self, name: str) -> jnp.dtype:
        """What config.model.dtype means here."""
        return jnp.dtype(self.compute_dtype if name == "auto" else name)


CPU = Platform(
    name="cpu",
    compute_dtype="float32",  # there is no fast bfloat16
    steps_per_dispatch=1,
    loops=False,  # XLA runs the body of a loop on one core, that of an unrolled one too: ten times the time
    pointwise="product",
    pooling="slices",
    upsampling="products",
    computes_anew=True,
    # XLA gives sums, products and convolutions to YNNPACK. For sums that is right; its convolutions take up to twice
    # the time of Eigen's, their weight gradients 2 to 17 times. It also takes barriers out before it fuses.
    compiler_options=(
        ("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"),
        ("xla_disable_hlo_passes", "cse_barrier_expander"),
    ),
    shares_host_memory=True,
)
GPU = Platform(
    name="gpu",
    compute_dtype="bfloat16",
    steps_per_dispatch=50,
    loops=True,
    pointwise="convolution",
    pooling="slices",
    upsampling="gathers",
    sums="together",
    packs=True,
)
TPU = Platform(
    name="tpu",
    compute_dtype="bfloat16",
    steps_per_dispatch=50,
    loops=True,
    pointwise="product",
    pooling="window",
    upsampling="products",
    # Maps are brought to the chip whole instead of in slices, which moves 5 % fewer bytes. 1 is the same on a v5e, but
    # ends the compiler's process for a v5p.
    compiler_options=(("xla_tpu_sliced_prefetch_max_slices", "0"),),
)
PORTABLE = Platform(  # what every compiler and exporter understands
    name="portable",
    compute_dtype="float32",
    steps_per_dispatch=1,
    loops=True,
    pointwise="convolution",
    pooling="window",
    upsampling="gathers",
)
PLATFORMS = {platform.name: platform for platform in (CPU, GPU, TPU, PORTABLE)}


def platform_of(mesh: Mesh) -> Platform:
    """The platform of a mesh's devices; of a kind that is not known here the portable one."""
    return PLATFORMS.get(mesh.devices.flat[0].platform, PORTABLE)


@functools.cache
def compiler_options(platform: Platform, mesh: Mesh) -> dict[str, str] | None:
    """The platform's options for `jax.jit`; None where it has none, or this XLA does not know them."""
    options = dict(platform.compiler_options)
    if not options:
        return None
    try:
        jax.jit(lambda: 0, out_shardings=NamedSharding(mesh, P()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, the seconds that took, and whether the compilation cache had it."""

    program: Any
    seconds: float
    cached: bool


def compile_timed(function: Any, *arguments: Any) -> Compiled:
    """Compiles a jitted function for arguments or their shapes."""
    began = time.perf_counter()
    return _compile(function.lower(*arguments), began)


def compile_meanwhile(function: Any, *arguments: Any) -> concurrent.futures.Future[Compiled]:
    """Traces a jitted function for arguments or their shapes, and compiles it in a thread while the caller goes on.

    XLA needs no Python for it, so that neither waits for the other.
    """
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    thread = concurrent.futures.ThreadPoolExecutor(1, "compile")
    compiling = thread.submit(_compile, lowered, began)
    thread.shutdown(wait=False)  # it ends when it has compiled
    return compiling


def _compile(lowered: jax.stages.Lowered, began: float) -> Compiled:
    hit = "/jax/compilation_cache/cache_hits", threading.get_ident()
    hits = _events()[hit]
    program = lowered.compile()
    return Compiled(program, time.perf_counter() - began, _events()[hit] > hits)


def agreed(number: int, *, due: bool) -> int:
    """The signal that any host has got, 0 for none. Many hosts ask each other, and only when something else is due."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if due else 0


def describe_devices(mesh: Mesh) -> str:
    """Such as '8 TPU v5 lite (2 hosts)'."""
    kind = mesh.devices.flat[0].device_kind
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {kind}{hosts}"


def describe_versions(mesh: Mesh) -> dict[str, str]:
    """What a run depends on beside its config: the devices, and the versions of what computes."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    system = os.uname()
    python = f"{'.'.join(map(str, sys.version_info[:3]))} on {system.sysname} {system.machine}"
    return {"devices": describe_devices(mesh), "resattn_jax": __version__, **versions, "python": python}
