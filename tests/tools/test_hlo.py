"""The parser of compiled programs, on a text small enough to count by hand, and on a real program."""

import jax
import jax.numpy as jnp
import pytest

from tools.hlo import Program, array_bytes

TEXT = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[8,4], p.1: s32[]) -> f32[4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,4]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,4}
  ROOT %flat = f32[4]{0} bitcast(%row)
}

%inner (i.0: (s32[], f32[4])) -> (s32[], f32[4]) {
  %i.0 = (s32[], f32[4]{0}) parameter(0)
  %i.1 = f32[4]{0} get-tuple-element(%i.0), index=1
  %i.2 = s32[] get-tuple-element(%i.0), index=0
  %twice = f32[4]{0} add(%i.1, %i.1)
  ROOT %i.3 = (s32[], f32[4]{0}) tuple(%i.2, %twice)
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%body (b.0: (s32[], f32[8,4], bf16[4,6], f32[4])) -> (s32[], f32[8,4], bf16[4,6], f32[4]) {
  %b.0 = (s32[], f32[8,4]{1,0}, bf16[4,6]{1,0:T(8,128)(2,1)}, /*index=3*/f32[4]{0}) parameter(0)
  %b.1 = s32[] get-tuple-element(%b.0), index=0
  %b.2 = f32[8,4]{1,0} get-tuple-element(%b.0), index=1
  %b.3 = bf16[4,6]{1,0:T(8,128)(2,1)} get-tuple-element(%b.0), index=2
  %taken = f32[4]{0} fusion(%b.2, %b.1), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/forward/row"}
  %product = bf16[4,4]{1,0} dot(%b.3, %b.3), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %lib = (bf16[4,4]{1,0}, s8[4096]{0}) custom-call(%b.3, %b.3), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %sum = f32[4]{0} all-reduce(%taken), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%condition
  %in = (s32[], f32[4]{0}) tuple(%b.1, %sum)
  %loop = (s32[], f32[4]{0}) while(%in), condition=%condition, body=%inner, \
backend_config={"known_trip_count":{"n":"5"}}
  %b.4 = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %b.5 = (s32[], f32[8,4]{1,0}, bf16[4,6]{1,0}, f32[4]{0}) tuple(%b.1, %b.2, %b.3, %b.4)
}

ENTRY %main (a: (s32[], f32[8,4], bf16[4,6], f32[4])) -> (s32[], f32[8,4], bf16[4,6], f32[4]) {
  %a = (s32[], f32[8,4]{1,0}, bf16[4,6]{1,0}, f32[4]{0}) parameter(0)
  ROOT %steps = (s32[], f32[8,4]{1,0}, bf16[4,6]{1,0}, f32[4]{0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.fixture
def kernels():
    program = Program.parse(TEXT)
    return {kernel.instruction.name: kernel for kernel in program.kernels(program.step)}


class TestByHand:
    def test_the_step_is_the_longest_loop(self):
        program = Program.parse(TEXT)
        assert (program.entry, program.step) == ("main", "body")
        assert program.loops() == ["main", "body", "inner"] and program.loops("inner") == ["inner"]

    def test_kinds(self, kernels):
        assert {name: kernel.kind for name, kernel in kernels.items()} == {
            "taken": "fusion",
            "product": "product",
            "lib": "product",
            "sum": "collective",
            "twice": "other",
        }
        assert kernels["taken"].instruction.scope == "jit(f)/forward/row"

    def test_bytes(self, kernels):
        """A slice counts as the row it takes; a library's workspace does not count; loop bodies count per trip."""
        assert kernels["taken"].bytes == 16 + 4 + 16
        assert kernels["product"].bytes == kernels["lib"].bytes == 2 * 48 + 32
        assert kernels["sum"].bytes == 32
        assert (kernels["twice"].bytes, kernels["twice"].times) == (48, 5)

    def test_flops_by_type(self, kernels):
        assert kernels["product"].flops == kernels["lib"].flops == {"bf16": 2 * 4 * 4 * 6}
        assert not kernels["twice"].flops

    def test_array_bytes(self):
        assert array_bytes("(s32[], /*index=1*/bf16[3,5]{1,0:T(8,128)}, pred[7]{0}, f8e4m3fn[2]{0})") == 4 + 30 + 7 + 2
        assert array_bytes("(u4[3]{0}, token[])") == 2

    def test_other_texts_are_refused(self):
        with pytest.raises(ValueError, match="no ENTRY"):
            Program.parse("module @jit_f { }")


@pytest.mark.optimized
def test_a_real_program_agrees_with_xla():
    """FLOPs and bytes agree with the compiler's cost analysis."""

    def f(x, w):
        return jnp.tanh(x @ w) @ w.T

    shapes = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 32), jnp.float32)
    compiled = jax.jit(f).lower(*shapes).compile()
    program = Program.parse(compiled.as_text())
    kernels = list(program.kernels(program.entry))
    assert sum(kernel.flops.get("f32", 0) for kernel in kernels) == 2 * 2 * 64 * 128 * 32
    assert sum(kernel.bytes for kernel in kernels) == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.1)
