"""What is counted in a program compiled for a GPU, on a step small enough to count by hand; it needs no GPU."""

import importlib
from types import SimpleNamespace

import jax
import pytest

from benchmarks import compiled
from benchmarks.hlo import hbm_traffic

# A convolution by cuDNN, its sums, apart and in pairs, their second stage, a loop of three turns, a cast of
# a slice, a product by cuBLAS.
STEP = """
HloModule jit_steps, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%add_pairs (a.0: f32[], a.1: f32[], b.0: f32[], b.1: f32[]) -> (f32[], f32[]) {
  %a.0 = f32[] parameter(0)
  %a.1 = f32[] parameter(1)
  %b.0 = f32[] parameter(2)
  %b.1 = f32[] parameter(3)
  %sum.0 = f32[] add(%a.0, %b.0)
  %sum.1 = f32[] add(%a.1, %b.1)
  ROOT %sums = (f32[], f32[]) tuple(%sum.0, %sum.1)
}

%fused_pairs (s.0: bf16[512,32,32,64]) -> ((f32[32,64], f32[32,64]), pred[512,32,32,64]) {
  %s.0 = bf16[512,32,32,64]{3,2,1,0} parameter(0)
  %s.1 = f32[512,32,32,64]{3,2,1,0} convert(%s.0)
  %s.2 = f32[16384,32,64]{2,1,0} bitcast(%s.1)
  %nought = f32[] constant(0)
  %pairs = (f32[32,64]{1,0}, f32[32,64]{1,0}) reduce(%s.2, %s.2, %nought, %nought), dimensions={0}, \
to_apply=%add_pairs
  %noughts = bf16[512,32,32,64]{3,2,1,0} broadcast(%nought), dimensions={}
  %positive = pred[512,32,32,64]{3,2,1,0} compare(%s.0, %noughts), direction=GT
  ROOT %all = ((f32[32,64]{1,0}, f32[32,64]{1,0}), pred[512,32,32,64]{3,2,1,0}) tuple(%pairs, %positive)
}

%fused_sums (p.0: bf16[512,32,32,64]) -> (f32[32,64], f32[32,64]) {
  %p.0 = bf16[512,32,32,64]{3,2,1,0} parameter(0)
  %wide = f32[512,32,32,64]{3,2,1,0} convert(%p.0)
  %square = f32[512,32,32,64]{3,2,1,0} multiply(%wide, %wide)
  %rows = f32[16384,32,64]{2,1,0} bitcast(%wide)
  %squares = f32[16384,32,64]{2,1,0} bitcast(%square)
  %zero = f32[] constant(0)
  %first = f32[32,64]{1,0} reduce(%rows, %zero), dimensions={0}, to_apply=%add
  %second = f32[32,64]{1,0} reduce(%squares, %zero), dimensions={0}, to_apply=%add
  ROOT %both = (f32[32,64]{1,0}, f32[32,64]{1,0}) tuple(%first, %second)
}

%fused_sum (q.0: f32[32,64]) -> f32[64] {
  %q.0 = f32[32,64]{1,0} parameter(0)
  %none = f32[] constant(0)
  ROOT %reduce = f32[64]{0} reduce(%q.0, %none), dimensions={0}, to_apply=%add
}

%fused_cast (u.0: f32[1000000]) -> bf16[4096] {
  %u.0 = f32[1000000]{0} parameter(0)
  %u.1 = bf16[1000000]{0} convert(%u.0)
  ROOT %u.2 = bf16[4096]{0} slice(%u.1), slice={[8192:12288]}
}

%fused_next (r.0: s32[]) -> s32[] {
  %r.0 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %next = s32[] add(%r.0, %one)
}

%fused_less (t.0: s32[]) -> pred[] {
  %t.0 = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%t.0, %three), direction=LT
}

%condition (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %wrapped_compare = pred[] fusion(%i), kind=kLoop, calls=%fused_less
}

%body (d: (s32[])) -> (s32[]) {
  %d = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %wrapped_add = s32[] fusion(%j), kind=kLoop, calls=%fused_next
  ROOT %result = (s32[]) tuple(%wrapped_add)
}

ENTRY %main (image: bf16[512,32,32,64], kernel: bf16[64,3,3,64], head: f32[64,10], i: s32[], long: f32[1000000]) \
-> (f32[64], f32[512,10]) {
  %image = bf16[512,32,32,64]{3,2,1,0} parameter(0)
  %kernel = bf16[64,3,3,64]{3,2,1,0} parameter(1)
  %head = f32[64,10]{1,0} parameter(2)
  %i.1 = s32[] parameter(3)
  %long = f32[1000000]{0} parameter(4)
  %loop_slice_fusion = bf16[4096]{0} fusion(%long), kind=kLoop, calls=%fused_cast
  %conv = (bf16[512,32,32,64]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(steps)/jvp/stem_conv"}
  %map = bf16[512,32,32,64]{3,2,1,0} get-tuple-element(%conv), index=0
  %input_reduce_fusion = (f32[32,64]{1,0}, f32[32,64]{1,0}) fusion(%map), kind=kInput, calls=%fused_sums
  %input_reduce_fusion.2 = ((f32[32,64]{1,0}, f32[32,64]{1,0}), pred[512,32,32,64]{3,2,1,0}) fusion(%map), \
kind=kInput, calls=%fused_pairs
  %first.1 = f32[32,64]{1,0} get-tuple-element(%input_reduce_fusion), index=0
  %input_reduce_fusion.1 = f32[64]{0} fusion(%first.1), kind=kInput, calls=%fused_sum
  %start = (s32[]) tuple(%i.1)
  %loop = (s32[]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %rows.1 = f32[512,64]{1,0} bitcast(%input_reduce_fusion.1)
  %gemm = (f32[512,10]{1,0}, s8[33554432]{0}) custom-call(%rows.1, %head), custom_call_target="__cublas$gemm"
  %logits = f32[512,10]{1,0} get-tuple-element(%gemm), index=0
  ROOT %out = (f32[64]{0}, f32[512,10]{1,0}) tuple(%input_reduce_fusion.1, %logits)
}
"""

MAP = 512 * 32 * 32 * 64 * 2  # bytes
BY_HAND = [
    ("conv", MAP + 64 * 3 * 3 * 64 * 2 + MAP),  # the map and the kernel read, the map written
    ("input_reduce_fusion", MAP + 2 * 32 * 64 * 4),  # read once for both sums
    ("input_reduce_fusion.2", MAP + 2 * 32 * 64 * 4 + MAP // 2),  # a byte says what is over 0
    ("input_reduce_fusion.1", 32 * 64 * 4 + 64 * 4),
    ("loop_slice_fusion", 4096 * 4 + 4096 * 2),  # what it casts of the long array
    *[("wrapped_compare", 4 + 1), ("wrapped_add", 4 + 4)] * 3,
    ("gemm", 512 * 64 * 4 + 64 * 10 * 4 + 512 * 10 * 4),  # without the 32 MB that cuBLAS may use between
]


def test_kernels_and_their_bytes_are_those_counted_by_hand():
    counted = [(instruction.name, size) for size, instruction in hbm_traffic(STEP)]
    assert sorted(counted) == sorted(BY_HAND)


def test_kernels_that_touch_less_than_two_megabytes_are_small():
    assert compiled.kernels(hbm_traffic(STEP)) == {"kernels": 12, "small_kernels": 9}


def test_the_arithmetic_of_a_step_is_that_of_the_forward_pass_and_twice_that_backward(monkeypatch):
    """Where XLA counts none: of ra56_cifar_slim's 0.123 G multiply-adds an image (README), two operations each."""
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    config = importlib.import_module("configs.cifar10_ra92").get_config()
    config.model.name, config.batch_size = "ra56_cifar_slim", 64
    experiment = compiled.build_step(config, jax.devices()[:2])
    by_hand = (1 + 2) * 2 * 0.123e9 * 32
    assert compiled.flops(experiment, SimpleNamespace(cost_analysis=lambda: None)) == pytest.approx(by_hand, rel=5e-3)


def test_a_topology_that_is_not_known_is_told_in_a_line():
    for topology in "h200", "h100:2x2", "v5e", "":
        with pytest.raises(SystemExit, match="write h100, v5e:2x4 or the like"):
            compiled.find_devices(topology)


def test_a_compiler_that_is_not_installed_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[cuda13\]'"):
        compiled.find_devices("h100")
