"""The train step of a config, compiled for TPU chips that are not there: what it would move and compute.

    python -m benchmarks.compiled --config=configs/cifar10_ra92.py --topology=v5e:2x4 [--batch_per_chip=128]
        [--config.key=value …] [--text=FILE] [--largest=20]

Needs `pip install -e '.[tpu]'` and no TPU: its compiler runs on any machine, for minutes. The program is that of a run
on TPUs, the loop over the steps of a dispatch included; counted is the body of this loop, one step. The data set is not
needed, its shape is. The last line of the output is a JSON object.

hbm_gigabytes_per_image is counted in the compiled text: what each instruction reads and writes outside the memory on
the chip, padded to tiles as it lies there. An operand counts once an instruction, though a convolution may read it
again, and only the part that a slice or a gather takes of it. The roofline is what the published rates of the chip
allow for these bytes or for XLA's count of the arithmetic, whichever takes longer, without waiting for other chips; a
run cannot be faster. hbm_gigabytes_per_chip is held at once: arguments, outputs and temporaries, without the code.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator

# Published of a chip: bfloat16 FLOP/s, HBM bytes/s; https://cloud.google.com/tpu/docs/v4, …/v5e, …/v5p and …/v6e.
CHIPS = {
    "v4": (275e12, 1228e9),  # 32 GB
    "v5e": (197e12, 819e9),  # 16 GB
    "v5p": (459e12, 2765e9),  # 95 GB
    "v6e": (918e12, 1640e9),  # 32 GB
}

SETS = {  # (training examples, image shape, classes), for sets that are not on board
    "cifar10": (50_000, (32, 32, 3), 10),
    "cifar100": (50_000, (32, 32, 3), 100),
    "imagenet2012": (1_281_167, None, 1000),
}


# ---- The compiled text.


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text: name = type opcode(operands), attributes. operands are names."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as calls=%name names."""
        match = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return match and match[1]

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, such as 'jit(steps)/…/stage1_unit1/conv1/dot_general'."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Array:
    """The size of an array as it lies in memory, padded to whole tiles; space 0 is HBM, 1 is on the chip."""

    bytes: int
    space: int


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type, a tuple's in order: 'bf16[128,8,8,32]{0,3,2,1:T(8,128)(2,1)S(1)}'.

    The braces hold the dimensions from the fastest to the slowest, the tile of the fastest ones, and the space.
    """
    found = []
    for kind, shape, order, layout in _ARRAY.findall(type_text):
        sizes = [int(n) for n in shape.split(",") if n]
        physical = [sizes[int(i)] for i in reversed([i for i in order.split(",") if i])] if order else sizes
        tile = re.search(r"T\(([\d,]+)\)", layout)
        if tile:
            tile = [int(n) for n in tile[1].split(",")]
            physical = [1] * (len(tile) - len(physical)) + physical
            whole, last = physical[: -len(tile)], physical[-len(tile) :]
            physical = whole + [-(-n // t) * t for n, t in zip(last, tile, strict=True)]
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(-(-math.prod(physical) * _bits(kind, layout) // 8), int(space[1]) if space else 0))
    return found


def _bits(kind: str, layout: str) -> int:
    """Of one element; the layout may pack or widen it: E(4)."""
    stored = re.search(r"E\((\d+)\)", layout)
    digits = re.search(r"\d+", kind)
    return int(stored[1] if stored else digits[0] if digits else {"pred": 8}.get(kind, 0))


def parse_hlo(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {instruction's name: instruction}} of a module's text, and the entry computation's name."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _LINE.match(line)):
            end = _closing(line, match.end()) if line[match.end()] == "(" else line.index(" ", match.end())
            type_text, rest = line[match.end() : end], line[end:].lstrip()
            opcode, _, _ = rest.partition("(")
            close = _closing(rest, len(opcode))
            inside = rest[len(opcode) + 1 : close - 1]
            operands = (inside,) if opcode in ("parameter", "constant") else tuple(re.findall(r"%([\w.-]+)", inside))
            instruction = Instruction(match[2], type_text, opcode, operands, rest[close:], bool(match[1]))
            current[instruction.name] = instruction
    return computations, entry


def _closing(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"no bracket closes the one at {start} of {text[:100]!r}")


# ---- What it moves.

_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_PARTS = {"slice", "dynamic-slice", "gather", "slice-start"}  # read so much of the first operand as they give back

_PASSED_ON = {"copy-start", "copy-done", "slice-start", "slice-done", "bitcast", "get-tuple-element"}


def hbm_traffic(text: str) -> Iterator[tuple[int, Instruction]]:
    """(bytes read from and written to HBM, instruction) for each instruction that one step executes.

    A step is the body of the entry computation's loop that runs as often as its arguments say, if there is one, else
    the entry computation. Loops within are multiplied out.
    """
    computations, entry = parse_hlo(text)
    loops = [i for i in computations[entry].values() if i.opcode == "while" and not _trips(computations, i)]
    bodies = [loop.called("body") for loop in loops] or [entry]
    return max((list(_traffic(computations, body)) for body in bodies), key=_total)


def _traffic(computations, name: str) -> Iterator[tuple[int, Instruction]]:
    here = computations[name]
    for instruction in here.values():
        opcode = instruction.opcode
        if opcode == "while":
            for part in instruction.called("condition"), instruction.called("body"):
                for size, inner in _traffic(computations, part):
                    yield size * (_trips(computations, instruction) or 1), inner
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"[\w.-]+", branches[1]) if branches else []
            names = names or [instruction.called(f"{truth}_computation") for truth in ("true", "false")]
            yield from max((list(_traffic(computations, branch)) for branch in names), key=_total)
        elif opcode == "call" or (opcode == "async-start" and instruction.called("calls")):
            yield from _traffic(computations, instruction.called("to_apply") or instruction.called("calls"))
        elif size := _instruction_bytes(computations, here, instruction):
            yield size, instruction


def _total(traffic: list[tuple[int, Instruction]]) -> int:
    return sum(size for size, _ in traffic)


def _trips(computations, loop: Instruction) -> int | None:
    """How often a loop that counts up from 0 runs, where that is a constant of the program."""
    condition = computations[loop.called("condition")]
    root = next(i for i in condition.values() if i.root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
        bound = condition[root.operands[1]]
        return int(bound.operands[0]) if bound.opcode == "constant" else None
    return None


def _instruction_bytes(computations, here: dict[str, Instruction], instruction: Instruction) -> int:
    """What one instruction that calls nothing but a fusion reads from and writes to HBM."""
    opcode, results = instruction.opcode, arrays(instruction.type)
    if opcode in _MOVES_NOTHING or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    operands = [arrays(here[name].type) for name in dict.fromkeys(instruction.operands)]
    reads = [_in_hbm(operand) for operand in operands]
    if opcode == "copy-start":  # (destination, source, context)
        return _in_hbm(results[:1]) + reads[0]
    if opcode == "slice-start":  # ((source), destination, context); what is read is what is written
        return _in_hbm(results[1:2]) + min(reads[0], results[1].bytes)
    if opcode in _PARTS:
        return _in_hbm(results) + min(reads[0], results[0].bytes) + sum(reads[1:])
    if opcode == "dynamic-update-slice":  # in place
        return sum(reads[1:]) + _in_hbm(results, at_most=operands[1][0].bytes)
    if opcode != "fusion":
        return _in_hbm(results) + sum(reads)
    fused = computations[instruction.called("calls")]
    parameters = _parameters(fused)
    read = {}
    for i, name in enumerate(instruction.operands):  # an operand given twice is one array in memory
        whole = _in_hbm(arrays(here[name].type))
        part = min(whole, _read(computations, fused, parameters[i])) if whole else 0
        read[name] = max(part, read.get(name, 0))
    return sum(read.values()) + sum(
        _in_hbm([result], at_most=limit)
        for result, limit in zip(results, _written(computations, fused, len(results)), strict=True)
    )


def _in_hbm(found: list[Array], at_most: float = math.inf) -> int:
    return sum(min(array.bytes, at_most) for array in found if array.space == 0)


def _parameters(computation: dict[str, Instruction]) -> dict[int, Instruction]:
    return {int(i.operands[0]): i for i in computation.values() if i.opcode == "parameter"}


def _read(computations, fused: dict[str, Instruction], value: Instruction) -> float:
    """How many bytes of a value inside a fusion are looked at: all, unless only slices of it are taken."""
    total = 0
    for user in fused.values():
        if user.opcode == "parameter" or value.name not in user.operands:
            continue
        first_only = user.operands.index(value.name) == 0 and user.operands.count(value.name) == 1
        if user.opcode in _PARTS and first_only:
            total += sum(array.bytes for array in arrays(user.type))
        elif user.opcode == "dynamic-update-slice" and first_only:
            pass  # in place: the rest stays where it is
        elif user.opcode == "bitcast":
            total += _read(computations, fused, user)
        elif user.opcode == "fusion":
            inner = computations[user.called("calls")]
            parameters = _parameters(inner)
            for i, name in enumerate(user.operands):
                if name == value.name:
                    total += _read(computations, inner, parameters[i])
        else:
            return math.inf
    return total


def _written(computations, fused: dict[str, Instruction], results: int) -> list[float]:
    """An upper bound of the bytes that a fusion writes of each result: the update's, where it updates one in place."""

    def limit(computation, instruction: Instruction) -> float:
        if instruction.opcode == "bitcast":
            return limit(computation, computation[instruction.operands[0]])
        if instruction.opcode == "fusion":
            inner = computations[instruction.called("calls")]
            return limit(inner, next(i for i in inner.values() if i.root))
        if instruction.opcode == "dynamic-update-slice":
            return arrays(computation[instruction.operands[1]].type)[0].bytes
        return math.inf

    root = next(i for i in fused.values() if i.root)
    if root.opcode == "tuple":
        return [limit(fused, fused[name]) for name in root.operands]
    return [limit(fused, root)] if results == 1 else [math.inf] * results


def count_all_reduces(text: str) -> int:
    """Of the whole module; one that is split into a start and a done counts once."""
    computations, _ = parse_hlo(text)
    return sum(i.opcode in ("all-reduce", "all-reduce-start") for c in computations.values() for i in c.values())


def largest(text: str, images: int, count: int) -> str:
    """A table of where the bytes go: MB per image by what the instructions come from, the largest first.

    A copy to or from the chip goes by the instruction that made what it copies.
    """
    computations, _ = parse_hlo(text)
    by_name = {name: i for computation in computations.values() for name, i in computation.items()}
    totals, times = Counter(), Counter()
    for size, instruction in hbm_traffic(text):
        origin = instruction
        while origin.opcode in _PASSED_ON and origin.operands[0] in by_name:
            origin = by_name[origin.operands[0]]
        path = origin.op_name.split("/")
        direction = "backward" if any(p.startswith("transpose") for p in path) else "forward"
        layer = next((p for p in path if re.match(r"(stage|tail|stem|head)", p)), "")
        kind = re.sub(r"[\d.]+$", "", instruction.name)
        key = f"{kind:32.32} {direction:9}{layer:18} {'/'.join(path[-2:])}"
        totals[key] += size
        times[key] += 1
    lines = [f"{size / images / 1e6:9.3f} {times[key]:5}  {key}" for key, size in totals.most_common(count)]
    return "\n".join([f"{'MB/image':>9} {'times':>5}  instruction, origin", *lines])


# ---- The program.


def compile_step(config, devices):
    """The compiled train step of a config over `devices`, and the seconds that took. The config is a run's."""
    from unittest import mock

    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from resattn_jax import experiment
    from resattn_jax.data import pipelines
    from resattn_jax.data.sources import Examples
    from resattn_jax.runtime import make_mesh
    from resattn_jax.train_step import make_train_steps

    class Shapes:
        """Stands for a split of a set that is not there: its shape, without its pictures."""

        def __init__(self, name):
            self.examples, self.image_shape, classes = SETS[name]
            self.class_names = tuple(map(str, range(classes)))

        def __len__(self):
            return self.examples

        def __getitem__(self, row):
            return b"", 0  # only the label is looked at

    def open_source(name, split, data_dir, open_it=pipelines.open_source):
        return Shapes(name) if name in SETS else open_it(name, split, data_dir)

    def read(source, read_it=pipelines.read):
        if not isinstance(source, Shapes):
            return read_it(source)
        images = np.zeros((len(source), *source.image_shape), np.uint8)
        return Examples(images, np.zeros(len(source), np.int32), source.class_names)

    with mock.patch.multiple(pipelines, open_source=open_source, read=read):
        built = experiment.build(config, jax.devices("cpu")[:1])
    built = dataclasses.replace(built, mesh=make_mesh(devices))

    def shapes(tree, spec):
        sharding = NamedSharding(built.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    room = config.steps_per_dispatch or built.train.max_steps_per_dispatch or 50  # 50: a run's default on TPUs
    steps = make_train_steps(built.model, built.optimizer, built.recipe, built.mesh, built.train.take, room)
    batches = built.train.train_batches(config.seed, 0, 0, config.batch_size, room)
    arguments = shapes(built.train.arrays, P()), shapes(batches, P(None, "data")), shapes(np.int32(0), P())
    began = time.perf_counter()
    compiled = steps.lower(built.abstract_state(), *arguments).compile()
    return compiled, time.perf_counter() - began


def figures(compiled, text: str, topology: str, chips: int, batch_per_chip: int) -> dict[str, object]:
    """What the compiled step moves, holds and computes."""
    flops_per_second, bytes_per_second = CHIPS[topology.partition(":")[0]]
    moved = _total(hbm_traffic(text)) / batch_per_chip
    computed = compiled.cost_analysis()["flops"] / batch_per_chip
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    seconds = {"memory": moved / bytes_per_second, "arithmetic": computed / flops_per_second}
    bound = max(seconds, key=seconds.get)
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


def fail(message: object) -> None:
    """Ends the program with one line."""
    sys.exit(f"error: {(str(message).strip() or repr(message)).splitlines()[0]}")


def main(argv: list[str]) -> None:
    """Compiles, and prints the figures."""
    from absl import flags

    from main import parse
    from resattn_jax.errors import UsageError

    flags.DEFINE_string("topology", "v5e:2x4", f"GENERATION:SHAPE, such as v5e:16x16; {', '.join(CHIPS)}.")
    flags.DEFINE_integer("batch_per_chip", 128, "Images a chip and step, in place of config.batch_size.", 1)
    flags.DEFINE_string("text", None, "Write the compiled program here.")
    flags.DEFINE_integer("largest", 0, "Print so many rows of a table of where the bytes go.")
    try:
        config, _ = parse(argv)
    except UsageError as error:
        fail(error)
    options = flags.FLAGS
    generation, _, shape = options.topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        fail(f"the topology {options.topology!r} is not known; write v5e:2x4 or the like, of {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        fail("the TPU compiler is not installed: pip install -e '.[tpu]'")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no Cloud TPU VM to ask about itself
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one process could have
    }

    import jax
    from jax.experimental import topologies

    megacore = {"chip_config_name": "megacore"} if generation == "v4" else {}  # a chip's two cores as one device
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology, **megacore).devices
    except jax.errors.JaxRuntimeError as error:
        fail(f"the topology {options.topology!r} is not known: {error}")
    config.batch_size = len(devices) * options.batch_per_chip
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16"  # as on a TPU; here it would mean the CPU's
    if config.data.name not in {*SETS, "digits", "synthetic"}:
        fail(f"the shape of {config.data.name} is not known here; {', '.join(SETS)}, digits and synthetic are")
    try:
        compiled, seconds = compile_step(config, devices)
    except (UsageError, jax.errors.JaxRuntimeError) as error:  # such as more memory than a chip has
        fail(error)
    text = compiled.as_text()
    if options.text:
        with open(options.text, "w") as file:
            file.write(text)
    if options.largest:
        print(largest(text, options.batch_per_chip, options.largest))
    found = figures(compiled, text, options.topology, len(devices), options.batch_per_chip)
    print(json.dumps({**found, "compile_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main(sys.argv)
