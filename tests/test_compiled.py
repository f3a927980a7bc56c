"""What is counted in a compiled TPU program, on programs small enough to count by hand."""

import importlib
import re

import jax
import pytest

from benchmarks.compiled import build_step, compile_step
from benchmarks.hlo import arrays, count_all_reduces, hbm_traffic, largest

TYPES = {
    "MAP": "bf16[128,8,8,32]{0,3,2,1:T(8,128)(2,1)}",
    "MAP_ON_CHIP": "bf16[128,8,8,32]{0,3,2,1:T(8,128)(2,1)S(1)}",
    "ROWS_ON_CHIP": "bf16[128,2,8,32]{0,3,2,1:T(8,128)(2,1)S(1)}",
    "ROW": "bf16[128,1,8,32]{0,3,2,1:T(8,128)(2,1)}",
    "ROW_ON_CHIP": "bf16[128,1,8,32]{0,3,2,1:T(8,128)(2,1)S(1)}",
    "KERNEL": "f32[1,1,32,32]{3,2,1,0:T(8,128)}",
    "VECTOR": "f32[32]{0:T(128)}",
    "VECTOR_ON_CHIP": "f32[32]{0:T(128)S(1)}",
    "INT": "s32[]{:T(128)S(6)}",
    "FLOAT": "f32[]{:T(128)}",
}

MAP = 128 * 8 * 8 * 32 * 2  # bytes
ROW = MAP // 8


def hlo(text: str) -> str:
    """With the types written out."""
    return re.sub(r"[A-Z_]+", lambda match: TYPES.get(match[0], match[0]), text)


# A copy and two rows of a map brought to the chip, a convolution, an all-reduce, a fusion that reads a row of a map.
STEP = hlo("""
HloModule jit_steps, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = FLOAT parameter(0)
  %b = FLOAT parameter(1)
  ROOT %add.1 = FLOAT add(%a, %b)
}

%fused_slice (p.0: bf16[128,8,8,32], p.1: s32[]) -> bf16[128,1,8,32] {
  %p.0 = MAP parameter(0)
  %p.1 = INT parameter(1)
  %zero = INT constant(0)
  %row = ROW dynamic-slice(%p.0, %zero, %p.1, %zero, %zero), dynamic_slice_sizes={128,1,8,32}
  ROOT %negate = ROW negate(%row)
}

%fused_convolution (q.0: bf16[128,8,8,32], q.1: f32[1,1,32,32]) -> (f32[32], bf16[128,8,8,32]) {
  %q.0 = MAP_ON_CHIP parameter(0)
  %q.1 = KERNEL parameter(1)
  %convolution = MAP convolution(%q.0, %q.1), window={size=1x1}, dim_labels=b01f_01io->b01f
  %none = FLOAT constant(0)
  %reduce = VECTOR reduce(%convolution, %none), dimensions={0,1,2}, to_apply=%sum
  ROOT %both = (VECTOR, MAP) tuple(%reduce, %convolution)
}

ENTRY %main (image: bf16[128,8,8,32], kernel: f32[1,1,32,32], i: s32[]) -> (f32[32], /*index=1*/bf16[128,1,8,32]) {
  %image = MAP parameter(0), metadata={op_name="arrays[\\'image (1)\\']"}
  %kernel = KERNEL parameter(1)
  %i = INT parameter(2)
  %copy-start = (MAP_ON_CHIP, MAP, u32[]{:S(2)}) copy-start(%image)
  %slice-start = ((MAP), ROWS_ON_CHIP, s32[]{:S(2)}) slice-start(%image), slice={[0:128], [0:2], [0:8], [0:32]}
  %copy-done = MAP_ON_CHIP copy-done(%copy-start)
  %slice-done = ROWS_ON_CHIP slice-done(%slice-start)
  %fusion.1 = (VECTOR_ON_CHIP, /*index=1*/MAP) fusion(%copy-done, %kernel), kind=kOutput, calls=%fused_convolution, \
metadata={op_name="jit(steps)/jvp(Net)/stage1_unit1/conv1/dot_general"}
  %sums = VECTOR_ON_CHIP get-tuple-element(%fusion.1), index=0
  %map = MAP get-tuple-element(%fusion.1), index=1
  %all-reduce-start = VECTOR all-reduce-start(%sums), replica_groups={{0,1}}, to_apply=%sum
  %all-reduce-done = VECTOR all-reduce-done(%all-reduce-start)
  %fusion.2 = ROW fusion(%map, %i), kind=kLoop, calls=%fused_slice
  ROOT %out = (VECTOR, ROW) tuple(%all-reduce-done, %fusion.2)
}
""")

BY_HAND = {
    "copy-start": MAP,  # read; written to the chip
    "slice-start": 2 * ROW,  # read; written to the chip
    "fusion.1": 32 * 128 * 4 + MAP,  # the kernel read, its rows of 32 padded to 128; the map written
    "all-reduce-start": 128 * 4,  # written, 32 padded to 128; read from the chip
    "fusion.2": ROW + ROW,  # read and written
}


def in_a_loop(limit: str) -> str:
    """A program that copies a map, then overwrites one of its rows with another so many times."""
    return hlo(f"""
%condition (c: (s32[], s32[], bf16[128,8,8,32])) -> pred[] {{
  %c = (INT, INT, MAP) parameter(0)
  %i = INT get-tuple-element(%c), index=0
  %limit = INT {limit}
  ROOT %less = pred[]{{:T(512)S(6)}} compare(%i, %limit), direction=LT
}}

%body (b: (s32[], s32[], bf16[128,8,8,32])) -> (s32[], s32[], bf16[128,8,8,32]) {{
  %b = (INT, INT, MAP) parameter(0)
  %j = INT get-tuple-element(%b), index=0
  %one = INT constant(1)
  %next = INT add(%j, %one)
  %n = INT get-tuple-element(%b), index=1
  %x = MAP get-tuple-element(%b), index=2
  %row = ROW_ON_CHIP slice(%x), slice={{[0:128], [0:1], [0:8], [0:32]}}
  %y = MAP dynamic-update-slice(%x, %row, %one, %one, %one, /*index=5*/%one)
  ROOT %result = (INT, INT, MAP) tuple(%next, %n, %y)
}}

ENTRY %main (p: bf16[128,8,8,32], steps: s32[]) -> bf16[128,8,8,32] {{
  %p = MAP parameter(0)
  %steps = INT parameter(1)
  %zero = INT constant(0)
  %copy = MAP copy(%p)
  %start = (INT, INT, MAP) tuple(%zero, %steps, %copy)
  %loop = (INT, INT, MAP) while(%start), condition=%condition, body=%body
  ROOT %out = MAP get-tuple-element(%loop), index=2
}}
""")


@pytest.mark.parametrize(
    ("text", "size", "space"),
    [
        ("bf16[128,8,8,32]{0,3,2,1:T(8,128)(2,1)S(1)}", MAP, 1),
        ("bf16[128,8,8,32]{3,2,1,0:T(8,128)(2,1)}", 4 * MAP, 0),  # 32 channels in 128 lanes
        ("bf16[128,8,6,32]{0,2,3,1:T(8,128)(2,1)}", MAP, 0),  # 6 columns in 8
        ("f32[32]{0:T(128)}", 512, 0),
        ("f32[300]{0:T(256)}", 2048, 0),
        ("f32[]{:T(128)S(6)}", 512, 6),
        ("pred[4,128]{1,0:T(8,128)(4,1)}", 1024, 0),
        ("s4[8,128]{1,0:T(8,128)(8,1)E(4)}", 512, 0),
        ("u8[3,5]{1,0}", 15, 0),
        ("f8e4m3fn[3,5]", 15, 0),
    ],
)
def test_size_of_an_array_in_tiles(text, size, space):
    (array,) = arrays(text)
    assert (array.bytes, array.space) == (size, space)


def test_bytes_that_cross_hbm_are_those_counted_by_hand():
    assert {instruction.name: size for size, instruction in hbm_traffic(STEP)} == BY_HAND


def test_all_reduces_are_counted_once():
    assert count_all_reduces(STEP) == 1


def test_the_table_of_the_largest_names_where_bytes_come_from():
    line = next(line for line in largest(STEP, 128, 10).splitlines() if "stage1_unit1" in line)
    size = f"{BY_HAND['fusion.1'] / 128 / 1e6:.3f}"
    assert line.split() == [size, "1", "fusion", "forward", "stage1_unit1", "conv1/dot_general"]


def test_a_loop_of_known_length_is_multiplied_out():
    text = in_a_loop("constant(8)")
    # The copy reads and writes the map; a turn reads a row and writes one in place, and between they are on the chip.
    assert sum(size for size, _ in hbm_traffic(text)) == 2 * MAP + 8 * (ROW + ROW)


def test_of_a_dispatch_of_many_steps_one_is_counted():
    text = in_a_loop("get-tuple-element(%c), index=1")
    assert sum(size for size, _ in hbm_traffic(text)) == ROW + ROW


@pytest.mark.parametrize("name", ["cifar10_ra92", "imagenet_ra56"])
def test_the_step_of_a_config_is_compiled_without_its_data(name, monkeypatch):
    """A resident and a streamed set. Here for two CPU devices, where the compiler joins no all-reduces."""
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.update(name="ra_tiny", p=0, t=0, r=0, last=0)
    config.batch_size = 4
    compiled, _ = compile_step(build_step(config, jax.devices()[:2]))
    assert count_all_reduces(compiled.as_text()) > 0
