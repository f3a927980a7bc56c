"""Reads the text of a compiled XLA program: which bytes one step moves through HBM, and how many all-reduces there are.

An instruction moves what it reads from and writes to HBM, with arrays padded to tiles as they lie in memory; the
memory on the chip is free. An operand counts once per instruction, although a convolution may read it again. A slice
or a gather counts only the part that it takes. On a GPU an instruction is a kernel, calls of cuDNN and cuBLAS included,
which XLA's `cost_analysis` leaves out; its caches are not known to the program, and nothing is free.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text: `name = type opcode(operands), attributes`. operands are names of instructions."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, key: str) -> str:
        """The computation that an attribute such as `calls=%name` names; empty where there is none."""
        match = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """The place in the Python program it comes from, such as 'jit(steps)/…/stage1_unit1/conv1/dot_general'."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The cycles that XLA's compiler for TPUs expects it to take; 0 where it says none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True)
class Array:
    """The size of an array in memory, padded to whole tiles. space: the memory it lies in, 0 for HBM."""

    bytes: int
    space: int


Computation = dict[str, Instruction]  # by the instruction's name
Program = dict[str, Computation]  # by the computation's name


# ---- The text.

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type such as 'bf16[128,8,8,32]{0,3,2,1:T(8,128)(2,1)S(1)}', those of a tuple in order.

    The braces hold the dimensions from the fastest to the slowest, the tile of the fastest ones, and the space.
    """
    found = []
    for kind, shape, order, layout in _ARRAY.findall(type_text):
        sizes = [int(n) for n in shape.split(",") if n]
        physical = [sizes[int(i)] for i in reversed([i for i in order.split(",") if i])] if order else sizes
        tiled = re.search(r"T\(([\d,]+)\)", layout)
        if tiled:
            tile = [int(n) for n in tiled[1].split(",")]
            physical = [1] * (len(tile) - len(physical)) + physical
            whole, last = physical[: -len(tile)], physical[-len(tile) :]
            physical = whole + [-(-n // t) * t for n, t in zip(last, tile, strict=True)]
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(-(-math.prod(physical) * _bits(kind, layout) // 8), int(space[1]) if space else 0))
    return found


def _bits(kind: str, layout: str) -> int:
    """The bits of one element: those of its type, unless the layout stores it in others, as E(4) does."""
    stored = re.search(r"E\((\d+)\)", layout)
    digits = re.search(r"\d+", kind)
    return int(stored[1] if stored else digits[0] if digits else {"pred": 8}.get(kind, 0))


def parse_hlo(text: str) -> tuple[Program, str]:
    """The computations of a module's text, and the name of the entry computation."""
    program: Program = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = program.setdefault(head[1], {})
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
    return program, entry


def _closing(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"no bracket closes the one at {start} of {text[:100]!r}")


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _parameters(computation: Computation) -> dict[int, Instruction]:
    """The parameters by their number."""
    return {int(i.operands[0]): i for i in computation.values() if i.opcode == "parameter"}


# ---- The bytes of a step.


def hbm_traffic(text: str) -> list[tuple[int, Instruction]]:
    """(bytes moved through HBM, instruction) for each time that one step executes an instruction that moves any.

    A step is the body of the entry computation's loop over the steps of a dispatch, or the whole entry computation if
    there is no such loop. The loop is known by its length, which is an argument. Loops inside a step have constant
    lengths, and each turn counts.
    """
    program, entry = parse_hlo(text)
    loops = [i for i in program[entry].values() if i.opcode == "while" and not _trips(program, i)]
    bodies = [loop.called("body") for loop in loops] or [entry]
    return max((list(_traffic(program, body)) for body in bodies), key=total_bytes)


def all_traffic(text: str) -> list[tuple[int, Instruction]]:
    """As `hbm_traffic`, with the memory on a TPU's chip counted as HBM is."""
    return hbm_traffic(text.replace("S(1)", ""))


def total_bytes(traffic: Iterable[tuple[int, Instruction]]) -> int:
    """The sum of the bytes that `hbm_traffic` gives."""
    return sum(size for size, _ in traffic)


def _traffic(program: Program, name: str) -> Iterator[tuple[int, Instruction]]:
    """As `hbm_traffic`, for one execution of the computation `name`. Of a conditional, the largest branch counts."""
    computation = program[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode == "while":
            for part in instruction.called("condition"), instruction.called("body"):
                yield from list(_traffic(program, part)) * (_trips(program, instruction) or 1)
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"[\w.-]+", branches[1]) if branches else []
            names = names or [instruction.called(f"{truth}_computation") for truth in ("true", "false")]
            yield from max((list(_traffic(program, branch)) for branch in names), key=total_bytes)
        elif opcode == "call" or (opcode == "async-start" and instruction.called("calls")):
            yield from _traffic(program, instruction.called("to_apply") or instruction.called("calls"))
        elif size := _instruction_bytes(program, computation, instruction):
            yield size, instruction


def _trips(program: Program, loop: Instruction) -> int | None:
    """The number of turns of a loop that XLA knows, or that counts up from 0 to a constant; None for any other loop."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = program[loop.called("condition")]
    root = _root(condition)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
        bound = condition[root.operands[1]]
        return int(bound.operands[0]) if bound.opcode == "constant" else None
    return None


# ---- The bytes of an instruction.

_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_PARTS = {"slice", "dynamic-slice", "gather", "slice-start"}  # read as much of the first operand as they return
_ALL = 1 << 62  # bytes, more than any array has


def _instruction_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """The bytes that one instruction of `computation` moves. It calls no computation, unless it is a fusion."""
    opcode, results = instruction.opcode, arrays(instruction.type)
    if opcode in _MOVES_NOTHING or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    if opcode == "fusion":
        return _fusion_bytes(program, computation, instruction)
    if opcode == "custom-call" and 'custom_call_target="__cu' in instruction.attributes:
        results = results[:1]  # behind the result of cuDNN or cuBLAS comes the memory that they may use between
    operands = [arrays(computation[name].type) for name in dict.fromkeys(instruction.operands)]
    reads = [_in_hbm(operand) for operand in operands]
    if opcode == "copy-start":  # its type: (destination, source, context)
        return _in_hbm(results[:1]) + reads[0]
    if opcode == "slice-start":  # its type: ((source), destination, context); it reads as much as it writes
        return _in_hbm(results[1:2]) + min(reads[0], results[1].bytes)
    if opcode in _PARTS:
        return _in_hbm(results) + min(reads[0], results[0].bytes) + sum(reads[1:])
    if opcode == "dynamic-update-slice":  # in place
        return sum(reads[1:]) + _in_hbm(results, at_most=operands[1][0].bytes)
    return _in_hbm(results) + sum(reads)


def _fusion_bytes(program: Program, computation: Computation, fusion: Instruction) -> int:
    """The bytes that a fusion moves: those parts of its operands and results that it reads and writes."""
    fused = program[fusion.called("calls")]
    parameters = _parameters(fused)
    read: dict[str, int] = {}
    for i, name in enumerate(fusion.operands):  # an operand given twice is one array in memory
        whole = _in_hbm(arrays(computation[name].type))
        part = min(whole, _bytes_read(program, fused, parameters[i])) if whole else 0
        read[name] = max(part, read.get(name, 0))
    results = arrays(fusion.type)
    limits = _bytes_written(program, fused)
    return sum(read.values()) + sum(
        _in_hbm([result], at_most=limit) for result, limit in zip(results, limits, strict=True)
    )


def _in_hbm(found: list[Array], at_most: int = _ALL) -> int:
    """The bytes of those arrays that lie in HBM, none counted for more than `at_most`."""
    return sum(min(array.bytes, at_most) for array in found if array.space == 0)


def _bytes_read(program: Program, fused: Computation, value: Instruction) -> int:
    """The bytes of a value that a fusion reads: those of its slices if it only takes slices, else _ALL or more."""
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
            total += _bytes_read(program, fused, user)
        elif user.opcode == "convert":
            (before,), (after,) = arrays(value.type), arrays(user.type)
            total += _bytes_read(program, fused, user) * before.bytes // after.bytes
        elif user.opcode == "fusion":
            inner = program[user.called("calls")]
            parameters = _parameters(inner)
            for i, name in enumerate(user.operands):
                if name == value.name:
                    total += _bytes_read(program, inner, parameters[i])
        else:
            return _ALL
    return total


def _bytes_written(program: Program, fused: Computation) -> list[int]:
    """An upper bound of the bytes that a fusion writes of each result: the update's size if it updates in place."""

    def limit(computation: Computation, instruction: Instruction) -> int:
        if instruction.opcode == "bitcast":
            return limit(computation, computation[instruction.operands[0]])
        if instruction.opcode == "fusion":
            inner = program[instruction.called("calls")]
            return limit(inner, _root(inner))
        if instruction.opcode == "dynamic-update-slice":
            return arrays(computation[instruction.operands[1]].type)[0].bytes
        return _ALL

    root, limits = _root(fused), []
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        parts = len(arrays(fused[name].type))  # many of a tuple within the tuple, as a reduction of two maps gives
        limits += [limit(fused, fused[name])] if parts == 1 else [_ALL] * parts
    return limits


# ---- Summaries.

_PASSED_ON = {"copy-start", "copy-done", "slice-start", "slice-done", "bitcast", "get-tuple-element"}


def count_all_reduces(text: str) -> int:
    """The number of all-reduces in a module; one that is split into a start and a done counts once."""
    program, _ = parse_hlo(text)
    return sum(i.opcode in ("all-reduce", "all-reduce-start") for c in program.values() for i in c.values())


def largest(text: str, images: int, count: int) -> str:
    """A table of the `count` largest sources of traffic, in MB per image. images: how many a step takes per chip.

    A copy to or from the chip is listed under the instruction that made its operand.
    """
    program, _ = parse_hlo(text)
    by_name = {name: i for computation in program.values() for name, i in computation.items()}
    totals: Counter[str] = Counter()
    times: Counter[str] = Counter()
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
