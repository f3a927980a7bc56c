"""Compiles the train step of a config for chips that need not be there, and counts what it moves and computes.

    python -m benchmarks.compiled --config=configs/cifar10_ra92.py --topology=v5e:2x4 [--batch_per_chip=128]
        [--config.key=value …] [--text=FILE] [--largest=20]
    python -m benchmarks.compiled --config=configs/cifar10_ra92.py --topology=h100 --batch_per_chip=512

The TPU compiler comes with `pip install -e '.[tpu]'`, the GPU's with '.[cuda13]'; they run on any machine, for
minutes. The program is that of a run there, with the loop over the steps of a dispatch; the figures are those of one
step, the body of this loop. Only the shape of the data set is needed, not the set. The last line of the output is a
JSON object.

hbm_gigabytes_per_image is counted in the compiled text, as benchmarks/hlo.py says. The roofline is the speed that the
chip's published rates allow for these bytes or for the arithmetic, whichever takes longer. It leaves out the time spent
waiting for other chips; a run cannot be faster. hbm_gigabytes_per_chip is the memory held at once: arguments, outputs
and temporaries, without the code.

A TPU's program says how many cycles XLA expects of each instruction: their sum is the second bound, at the clock that
the published arithmetic implies, for instructions that run one after the other. touched_gigabytes_per_image are the
bytes of all instructions in HBM and on the chip. A GPU's program says what its kernels are; a small one touches less
than 2 MB, so that starting it takes longer than its bytes. cuDNN's choice of algorithms is made on a GPU, not here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.hlo import all_traffic, count_all_reduces, hbm_traffic, largest, total_bytes

if TYPE_CHECKING:  # imported where they are needed: JAX reads the environment, and takes seconds
    import jax
    import ml_collections

    from benchmarks.hlo import Instruction
    from resattn_jax.experiment import Experiment
    from resattn_jax.runtime import Platform


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates a second. flops: in bfloat16; bytes: of HBM; clock: cycles of a TPU's cores, None of a GPU."""

    flops: float
    bytes: float
    clock: float | None = None


# https://cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e: the clock is FLOP/s over those of all matrix units a cycle.
# https://www.nvidia.com/en-us/data-center/h100/, SXM, without sparsity.
CHIPS = {
    "v4": Chip(275e12, 1228e9, 1.05e9),  # 32 GB
    "v5e": Chip(197e12, 819e9, 1.5e9),  # 16 GB
    "v5p": Chip(459e12, 2765e9, 1.75e9),  # 95 GB
    "v6e": Chip(918e12, 1640e9, 1.75e9),  # 32 GB
    "h100": Chip(989e12, 3350e9),  # 80 GB
}
SMALL = 2_000_000  # bytes: an H100 moves them in less than a microsecond

SETS = {  # (training examples, image shape, classes) of the data sets that need not be there
    "cifar10": (50_000, (32, 32, 3), 10),
    "cifar100": (50_000, (32, 32, 3), 100),
    "imagenet2012": (1_281_167, None, 1000),
}


def main(argv: list[str]) -> None:
    """Compiles the step that the command line asks for, and prints its figures."""
    from absl import flags

    from resattn_jax.cli import parse_config
    from resattn_jax.errors import UsageError

    define_flags()
    try:
        config = parse_config(argv)
    except UsageError as error:
        fail(error)
    options = flags.FLAGS
    devices = find_devices(options.topology)
    config.batch_size = len(devices) * options.batch_per_chip
    if config.data.name not in {*SETS, "digits", "synthetic"}:
        fail(f"the shape of {config.data.name} is not known here; {', '.join(SETS)}, digits and synthetic are")

    import jax  # after find_devices, which sets the environment that JAX reads

    try:
        experiment = build_step(config, devices)
        compiled, seconds = compile_step(experiment)
    except (UsageError, jax.errors.JaxRuntimeError) as error:  # such as more memory than a chip has
        fail(error)
    text = compiled.as_text()
    assert text is not None
    if options.text:
        pathlib.Path(options.text).write_text(text)
    if options.largest:
        print(largest(text, options.batch_per_chip, options.largest))
    found = figures(experiment, compiled, text, options.topology, options.batch_per_chip)
    print(json.dumps({**found, "compile_seconds": round(seconds, 1)}))


def define_flags() -> None:
    """Adds the flags of this command to those of main.py."""
    from absl import flags

    flags.DEFINE_string("topology", "v5e:2x4", f"h100, or GENERATION:SHAPE, such as v5e:16x16; {', '.join(CHIPS)}.")
    flags.DEFINE_integer("batch_per_chip", 128, "Images per chip and step, in place of config.batch_size.", 1)
    flags.DEFINE_string("text", None, "Write the compiled program to this file.")
    flags.DEFINE_integer("largest", 0, "Print this many rows of a table of where the bytes go.")


def find_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as v5e:2x4, for the compiler alone. It sets the environment; call before JAX."""
    generation, _, shape = topology.partition(":")
    gpu = generation in CHIPS and CHIPS[generation].clock is None
    if generation not in CHIPS or not re.fullmatch("" if gpu else r"\d+(x\d+){1,2}", shape):
        fail(f"the topology {topology!r} is not known; write h100, v5e:2x4 or the like, of {', '.join(CHIPS)}")
    package, extra = ("jax_cuda13_plugin", "cuda13") if gpu else ("libtpu", "tpu")
    if importlib.util.find_spec(package) is None:
        fail(f"the compiler for {generation} is not installed: pip install -e '.[{extra}]'")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no Cloud TPU VM to ask about itself
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any will do
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one process could have
    }

    import jax
    from jax.experimental import topologies

    try:
        if gpu:  # <generation>.textproto: what XLA has to know of one, a GpuTargetConfigProto
            config = pathlib.Path(__file__).with_name(f"{generation}.textproto").read_text()
            return topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices
        megacore = {"chip_config_name": "megacore"} if generation == "v4" else {}  # a chip's two cores as one device
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore).devices
    except jax.errors.JaxRuntimeError as error:
        fail(f"the topology {topology!r} is not known: {error}")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A split of a set that is not there: its shape, without its pictures."""

    examples: int
    image_shape: tuple[int, int, int] | None
    classes: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))

    def __len__(self) -> int:
        return self.examples


def build_step(
    config: ml_collections.ConfigDict, devices: list[jax.Device], platform: Platform | None = None
) -> Experiment:
    """What a run's config describes, for `devices`, without its data."""
    import numpy as np

    from resattn_jax.data.pipelines import describe, spec_of
    from resattn_jax.experiment import build
    from resattn_jax.runtime import make_mesh

    if config.data.name in SETS:
        split = Shapes(*SETS[config.data.name])
        spec = spec_of(config, split, split)
        if config.data.mean_image:
            spec = dataclasses.replace(spec, mean=np.zeros(spec.image_shape, np.float32))
    else:
        spec = describe(config)
    return build(config, spec, make_mesh(devices), platform)


def compile_step(experiment: Experiment) -> tuple[jax.stages.Compiled, float]:
    """The compiled train step, and the seconds that compiling it took."""
    from resattn_jax.runtime import compile_timed

    compiled = compile_timed(experiment.train_steps, *experiment.train_shapes())
    return compiled.program, compiled.seconds


def figures(
    experiment: Experiment, compiled: jax.stages.Compiled, text: str, topology: str, batch_per_chip: int
) -> dict[str, Any]:
    """The JSON fields that say what a compiled step moves, holds and computes, without the time to compile it."""
    chip, chips = CHIPS[topology.partition(":")[0]], experiment.mesh.size
    traffic = hbm_traffic(text)
    moved, computed = total_bytes(traffic) / batch_per_chip, flops(experiment, compiled) / batch_per_chip
    memory = compiled.memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    seconds = {"memory": moved / chip.bytes, "arithmetic": computed / chip.flops}
    bound = max(seconds, key=seconds.__getitem__)
    return {
        "topology": topology,
        "chips": chips,
        "global_batch": chips * batch_per_chip,
        "all_reduces": count_all_reduces(text),
        **(_cycles(text, chip.clock, batch_per_chip) if chip.clock else kernels(traffic)),
        "hbm_gigabytes_per_image": round(moved / 1e9, 5),
        "gigaflops_per_image": round(computed / 1e9, 4),
        "hbm_gigabytes_per_chip": round((held - memory.alias_size_in_bytes) / 1e9, 3),
        "images_per_second_per_chip_roofline": round(1 / seconds[bound]),
        "bound": bound,
    }


def flops(experiment: Experiment, compiled: jax.stages.Compiled) -> float:
    """Of a step on one chip: XLA's count, or the multiply-adds of a forward pass and of a gradient twice as long."""
    from resattn_jax.models.count import count_multiply_adds

    if cost := compiled.cost_analysis():
        return cost["flops"]
    multiply_adds = count_multiply_adds(experiment.model, experiment.spec.image_shape)
    return 6 * multiply_adds * experiment.batch_size / experiment.mesh.size


def kernels(traffic: list[tuple[int, Instruction]]) -> dict[str, Any]:
    """How many kernels a GPU starts in a step, and how many of them touch few bytes."""
    return {"kernels": len(traffic), "small_kernels": sum(size < SMALL for size, _ in traffic)}


def _cycles(text: str, clock: float, batch_per_chip: int) -> dict[str, Any]:
    traffic = all_traffic(text)
    cycles = sum(instruction.cycles for _, instruction in traffic)
    return {
        "touched_gigabytes_per_image": round(total_bytes(traffic) / batch_per_chip / 1e9, 5),
        "megacycles": round(cycles / 1e6, 3),
        "images_per_second_per_chip_by_cycles": round(batch_per_chip * clock / cycles),
    }


def fail(message: object) -> NoReturn:
    """Ends the program with one line."""
    sys.exit(f"error: {(str(message).strip() or repr(message)).splitlines()[0]}")


if __name__ == "__main__":
    main(sys.argv)
