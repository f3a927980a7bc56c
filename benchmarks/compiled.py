"""Compiles the train step of a config for TPU chips that need not be there, and counts what it moves and computes.

    python -m benchmarks.compiled --config=configs/cifar10_ra92.py --topology=v5e:2x4 [--batch_per_chip=128]
        [--config.key=value …] [--text=FILE] [--largest=20]

The TPU compiler comes with `pip install -e '.[tpu]'`; it runs on any machine, for minutes. The program is that of a
run on TPUs, with the loop over the steps of a dispatch; the figures are those of one step, the body of this loop. Only
the shape of the data set is needed, not the set. The last line of the output is a JSON object.

hbm_gigabytes_per_image is counted in the compiled text, as benchmarks/hlo.py says. The roofline is the speed that the
chip's published rates allow for these bytes or for the arithmetic that XLA counts, whichever takes longer. It leaves
out the time spent waiting for other chips; a run cannot be faster. hbm_gigabytes_per_chip is the memory held at once:
arguments, outputs and temporaries, without the code.
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

from benchmarks.hlo import count_all_reduces, hbm_traffic, largest, total_bytes

if TYPE_CHECKING:  # imported where they are needed: JAX reads the environment, and takes seconds
    import jax
    import ml_collections

    from resattn_jax.runtime import Platform

# bfloat16 FLOP/s and HBM bytes/s of a chip, published at https://cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e.
CHIPS = {
    "v4": (275e12, 1228e9),  # 32 GB
    "v5e": (197e12, 819e9),  # 16 GB
    "v5p": (459e12, 2765e9),  # 95 GB
    "v6e": (918e12, 1640e9),  # 32 GB
}

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
        compiled, seconds = compile_step(config, devices)
    except (UsageError, jax.errors.JaxRuntimeError) as error:  # such as more memory than a chip has
        fail(error)
    text = compiled.as_text()
    assert text is not None
    if options.text:
        pathlib.Path(options.text).write_text(text)
    if options.largest:
        print(largest(text, options.batch_per_chip, options.largest))
    found = figures(compiled, text, options.topology, len(devices), options.batch_per_chip)
    print(json.dumps({**found, "compile_seconds": round(seconds, 1)}))


def define_flags() -> None:
    """Adds the flags of this command to those of main.py."""
    from absl import flags

    flags.DEFINE_string("topology", "v5e:2x4", f"GENERATION:SHAPE, such as v5e:16x16; {', '.join(CHIPS)}.")
    flags.DEFINE_integer("batch_per_chip", 128, "Images per chip and step, in place of config.batch_size.", 1)
    flags.DEFINE_string("text", None, "Write the compiled program to this file.")
    flags.DEFINE_integer("largest", 0, "Print this many rows of a table of where the bytes go.")


def find_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as v5e:2x4, for the compiler alone. Sets the environment; call before JAX."""
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        fail(f"the topology {topology!r} is not known; write v5e:2x4 or the like, of {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        fail("the TPU compiler is not installed: pip install -e '.[tpu]'")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no Cloud TPU VM to ask about itself
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any will do
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one process could have
    }

    import jax
    from jax.experimental import topologies

    megacore = {"chip_config_name": "megacore"} if generation == "v4" else {}  # a chip's two cores as one device
    try:
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


def compile_step(
    config: ml_collections.ConfigDict, devices: list[jax.Device], platform: Platform | None = None
) -> tuple[jax.stages.Compiled, float]:
    """The train step of a run's config, compiled for `devices`, and the seconds that compiling it took."""
    import numpy as np

    from resattn_jax.data.pipelines import describe, spec_of
    from resattn_jax.experiment import build
    from resattn_jax.runtime import compile_timed, make_mesh

    if config.data.name in SETS:
        split = Shapes(*SETS[config.data.name])
        spec = spec_of(config, split, split)
        if config.data.mean_image:
            spec = dataclasses.replace(spec, mean=np.zeros(spec.image_shape, np.float32))
    else:
        spec = describe(config)
    experiment = build(config, spec, make_mesh(devices), platform)
    compiled = compile_timed(experiment.train_steps, *experiment.train_shapes())
    return compiled.program, compiled.seconds


def figures(compiled: jax.stages.Compiled, text: str, topology: str, chips: int, batch_per_chip: int) -> dict[str, Any]:
    """The JSON fields that say what a compiled step moves, holds and computes, without the time to compile it."""
    flops_per_second, bytes_per_second = CHIPS[topology.partition(":")[0]]
    moved = total_bytes(hbm_traffic(text)) / batch_per_chip
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None
    assert memory is not None
    computed = cost["flops"] / batch_per_chip
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    seconds = {"memory": moved / bytes_per_second, "arithmetic": computed / flops_per_second}
    bound = max(seconds, key=seconds.__getitem__)
    return {
        "topology": topology,
        "chips": chips,
        "global_batch": chips * batch_per_chip,
        "all_reduces": count_all_reduces(text),
        "hbm_gigabytes_per_image": round(moved / 1e9, 5),
        "gigaflops_per_image": round(computed / 1e9, 4),
        "hbm_gigabytes_per_chip": round((held - memory.alias_size_in_bytes) / 1e9, 3),
        "images_per_second_per_chip_roofline": round(1 / seconds[bound]),
        "bound": bound,
    }


def fail(message: object) -> NoReturn:
    """Ends the program with one line."""
    sys.exit(f"error: {(str(message).strip() or repr(message)).splitlines()[0]}")


if __name__ == "__main__":
    main(sys.argv)
