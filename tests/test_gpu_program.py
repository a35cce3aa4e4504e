"""What `benchmarks/gpu_program.py` reads from a program, and what `benchmarks/gpu_plan.py` makes of it."""

from __future__ import annotations

from benchmarks import gpu_plan, gpu_program

PROGRAM = """HloModule jit_f

%fused_slice (p0: bf16[8,64], p1: f32[64]) -> bf16[8,32] {
  %p0 = bf16[8,64]{1,0} parameter(0), metadata={op_name="x"}
  %p1 = f32[64]{0} parameter(1)
  %cut.1 = bf16[8,32]{1,0} slice(%p0), slice={[0:8], [0:32]}
  %cut.2 = f32[32]{0} slice(%p1), slice={[0:32]}
  %wide = f32[8,32]{1,0} convert(%cut.1)
  %again = f32[64]{0} negate(%p1)
  ROOT %sum = bf16[8,32]{1,0} convert(%wide)
}

ENTRY %main.1 (x: bf16[8,64], v: f32[64], k: bf16[32,16]) -> bf16[8,16] {
  %x = bf16[8,64]{1,0} parameter(0), sharding={replicated}
  %v = f32[64]{0} parameter(1)
  %k = bf16[32,16]{1,0} parameter(2)
  %half = bf16[8,32]{1,0} fusion(%x, %v), kind=kLoop, calls=%fused_slice, metadata={op_name="f"}
  %product = (bf16[8,16]{1,0}, u8[100]{0}) custom-call(%half, %k), custom_call_target="__cublas$lt$matmul"
  ROOT %y = bf16[8,16]{1,0} get-tuple-element(%product), index=0
}
"""


def test_bytes_and_operations_of_a_program() -> None:
    half = 8 * 32 * 2
    fusion = half + half + 64 * 4  # of the first operand a half is read, of the second all
    product = half + 32 * 16 * 2 + 8 * 16 * 2 + 100
    assert gpu_program.read(PROGRAM) == gpu_program.Program(started=2, moved=fusion + product)


def test_a_table_has_the_nets_of_which_both_forms_are_known() -> None:
    def line(net: str, form: str, moved: float) -> dict[str, object]:
        return dict(net=net, what='step', form=form, moved=moved, started=7, memory=2**30)

    lines = [line('a', 'flaxnets', 3e9), line('a', 'plain', 4e9), line('b', 'flaxnets', 1e9)]
    table = gpu_plan.table(lines)
    assert '| step | `a` | 3.0 / 4.0 | 0.75 | 7 / 7 | 1.00 / 1.00 |' in table
    assert '`b`' not in table and '0.75 of the bytes of plain Flax (geometric mean of 1 net)' in table
