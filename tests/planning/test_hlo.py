"""The reader of compiled programs: instructions, loops, and groups of devices in every form that XLA writes."""

from __future__ import annotations

import pytest

from vlpjax.errors import UserError
from vlpjax.planning.hlo import Shape, device_groups, read_program, shapes_in
from vlpjax.planning.products import product_flops

LOOP = """HloModule jit_f, is_scheduled=true

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%state)
}, execution_thread="sparsecore"

%condition (state.1: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(9)
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%index, %bound), direction=LT
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %start = s32[]{:T(128)} constant(2)
  %state.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%start, %x)
  %kernel = (f32[4,2]{1,0}, bf16[8,128]{1,0}) custom-call(%x, /*index=1*/%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 128}"
}}, metadata={op_name="jit(f)/attention/pallas_call" stack_frame_id=4}, backend_config={"x":["estimated_cycles"]}
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%state.2), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1, backend_config={"window_config":{"estimated_cycles":"841"}}
}
"""  # noqa: E501


def test_a_program_is_read_with_its_types_operands_and_attributes() -> None:
    program = read_program(LOOP)
    main = program[program.entry]
    assert set(program.computations) == {"body", "condition", "main"}
    assert main.root.name == "out"
    assert main.root.cycles == 841
    kernel = main.instructions["kernel"]
    assert kernel.opcode == "custom-call"
    assert kernel.operands == ("x", "x")
    assert kernel.shapes == (Shape("f32", (4, 2)), Shape("bf16", (8, 128)))
    assert kernel.bytes == 4 * 2 * 4 + 8 * 128 * 2
    assert kernel.attribute("custom_call_target") == "tpu_custom_call"
    assert kernel.op_name == "jit(f)/attention/pallas_call"  # which stands two lines further down
    assert main.operand_shapes(kernel) == (Shape("bf16", (8, 128)),) * 2


def test_trip_counts_are_those_of_the_comparison_or_of_what_the_compiler_states() -> None:
    program = read_program(LOOP)
    main = program[program.entry]
    assert program.trip_count(main, main.instructions["while.1"]) == 9 - 2
    stated = read_program(
        LOOP.replace("body=%body, ", 'body=%body, backend_config={"known_trip_count":{"n":"33"}}, ')
    )
    assert stated.trip_count(stated["main"], stated["main"].instructions["while.1"]) == 33
    reversed_ = LOOP.replace("compare(%index, %bound), direction=LT", "compare(%bound, %index), direction=GE")
    program = read_program(reversed_)
    assert program.trip_count(program["main"], program["main"].instructions["while.1"]) == 9 - 2 + 1
    by_three = LOOP.replace("tuple(%state)", "tuple(%next, %state)").replace(
        "  ROOT %tuple.1",
        "  %three = s32[] constant(3)\n  %old = s32[] get-tuple-element(%state), index=0\n"
        "  %next = s32[] add(%old, %three)\n  ROOT %tuple.1",
    )
    program = read_program(by_three)
    assert program.trip_count(program["main"], program["main"].instructions["while.1"]) == 3
    of_data = read_program(LOOP.replace("s32[]{:T(128)} constant(9)", "s32[]{:T(128)} copy(%state.1)"))
    assert of_data.trip_count(of_data["main"], of_data["main"].instructions["while.1"]) is None


def groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    text = f"ENTRY %m (x: f32[8]) -> f32[8] {{\n  ROOT %g = f32[8]{{0}} all-gather(%x), {attributes}\n}}\n"
    return device_groups(read_program(text)["m"].root)


def test_groups_of_devices_in_every_form() -> None:
    explicit = ((0, 2, 4, 6), (1, 3, 5, 7))
    assert groups("replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}") == explicit
    assert groups("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}") == explicit
    assert groups("replica_groups=mesh['a'=1,'b'=4,'c'=2] {'b'}, dimensions={0}") == explicit
    assert groups("replica_groups=[4,2]<=[8], dimensions={0}") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}") == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert groups("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}") == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    )
    assert groups("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'a'}") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert groups("source_target_pairs={{0,1},{1,2},{2,0}}") == ((0, 1), (1, 2), (2, 0))
    assert groups("replica_groups={}, dimensions={0}") == ()


def test_bytes_of_types() -> None:
    assert (
        sum(shape.bytes for shape in shapes_in("(bf16[2,3]{1,0}, f32[], s4[8], pred[5]{0:T(512)})"))
        == 12 + 4 + 4 + 5
    )


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(UserError, match="no computation begins with ENTRY"):
        read_program("HloModule nothing\n")


def flops(operands: str, line: str) -> float:
    text = f"ENTRY %m (x: f32[8]) -> f32[8] {{\n{operands}\n  ROOT %p = {line}\n}}\n"
    program = read_program(text)
    return product_flops(program, program["m"], program["m"].root)


def test_flops_of_products_leave_out_padding_and_holes() -> None:
    matrices = "  %a = bf16[64,32]{1,0} parameter(0)\n  %b = bf16[32,16]{1,0} parameter(1)"
    expected = 2 * 64 * 32 * 16
    assert flops(matrices, "bf16[64,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf") == expected
    assert (
        flops(matrices, "bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}")
        == expected
    )
    # A product of five pairs of matrices, as a convolution over a dilated window of which one place is never padding.
    batched = "  %a = bf16[5,64,32]{2,1,0} parameter(0)\n  %b = bf16[5,32,16]{2,1,0} parameter(1)"
    window = "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf"
    assert flops(batched, f"bf16[5,64,16]{{2,1,0}} convolution(%a, %b), {window}") == 5 * expected
    # A window of three with one zero on either side: 2 + 3 + 3 + 2 pairs along a side of four.
    image = "  %a = f32[1,4,4,8]{3,2,1,0} parameter(0)\n  %b = f32[3,3,8,16]{3,2,1,0} parameter(1)"
    line = "f32[1,4,4,16]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    assert flops(image, line) == 2 * 8 * 16 * (2 + 3 + 3 + 2) ** 2
