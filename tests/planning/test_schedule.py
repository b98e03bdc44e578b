"""The schedule on paper: what overlaps, what waits, and that loops multiply."""

from __future__ import annotations

import pytest

from vlpjax.planning.hlo import Computation, Instruction, read_program
from vlpjax.planning.schedule import Timeline, play


class Round:
    """A cycle, a byte moved and a kernel take a second each."""

    def compute(self, cycles: int) -> float:
        return float(cycles)

    def collective(self, kind: str, size: int, groups: tuple[tuple[int, ...], ...]) -> tuple[str, float]:
        return "x", float(size)

    def kernel(self, instruction: Instruction, computation: Computation) -> tuple[str, float, float]:
        return instruction.name, 7.0, 1.0

    def host(self, size: int) -> float:
        return float(size)

    def memory(self, size: int) -> float:
        return size / 2


def times(cycles: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


def played(body: str, more: str = "") -> Timeline:
    text = f"{more}\nENTRY %main (x: s8[4]) -> s8[4] {{\n  %x = s8[4]{{0}} parameter(0)\n{body}\n}}\n"
    return play(read_program(text), Round())


GATHER = "replica_groups={{0,1}}, dimensions={0}"


def test_a_collective_in_one_instruction_stops_everything() -> None:
    line = played(
        f"  %a = s8[4]{{0}} add(%x, %x), {times(10)}\n"
        f"  %g = s8[8]{{0}} all-gather(%a), {GATHER}\n"
        f"  ROOT %b = s8[8]{{0}} add(%g, %g), {times(5)}"
    )
    assert (line.seconds, line.cycles, line.exposed) == (10 + 8 + 5, 15, 8)
    total = line.collectives["all-gather", "x"]
    assert (total.count, total.amount, total.seconds) == (1, 8, 8)


@pytest.mark.parametrize(("between", "exposed"), [(3, 5), (8, 0), (20, 0)])
def test_a_collective_between_start_and_done_is_hidden_by_what_is_computed_there(
    between: int, exposed: int
) -> None:
    line = played(
        f"  %s = (s8[4]{{0}}, s8[8]{{0}}) all-gather-start(%x), {GATHER}\n"
        f"  %a = s8[4]{{0}} add(%x, %x), {times(between)}\n"
        "  %g = s8[8]{0} all-gather-done(%s)\n"
        f"  ROOT %b = s8[8]{{0}} add(%g, %g), {times(5)}"
    )
    assert line.exposed == exposed
    assert line.seconds == between + exposed + 5
    assert line.collectives["all-gather", "x"].amount == 8


def test_collectives_share_the_links_and_wait_for_one_another() -> None:
    line = played(
        f"  %s = (s8[4]{{0}}, s8[8]{{0}}) all-gather-start(%x), {GATHER}\n"
        f"  %t = (s8[4]{{0}}, s8[8]{{0}}) all-gather-start(%x), {GATHER}\n"
        f"  %a = s8[4]{{0}} add(%x, %x), {times(10)}\n"
        "  %g = s8[8]{0} all-gather-done(%s)\n"
        "  ROOT %h = s8[8]{0} all-gather-done(%t)"
    )
    assert (line.seconds, line.exposed) == (16, 6)


FUSED = f"""
%start (p: s8[4]) -> (s8[4], s8[8]) {{
  %p = s8[4]{{0}} parameter(0)
  %g.0 = s8[8]{{0}} all-gather(%p), channel_id=5, {GATHER}, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %c = (s8[4]{{0}}, s8[8]{{0}}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}}

%step (q: s8[4]) -> s8[4] {{
  %q = s8[4]{{0}} parameter(0)
  %g.1 = s8[8]{{0}} all-gather(%q), channel_id=5, {GATHER}, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %d = s8[4]{{0}} add(%q, %q)
}}

%done (r: s8[4]) -> s8[8] {{
  %r = s8[4]{{0}} parameter(0)
  %g.2 = s8[8]{{0}} all-gather(%r), channel_id=5, {GATHER}, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %e = s8[8]{{0}} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}}

%scatter (o: s8[8]) -> s8[4] {{
  %o = s8[8]{{0}} parameter(0)
  %sum = s8[8]{{0}} all-reduce(%o), channel_id=6, replica_groups={{{{0,1}}}}
  ROOT %part = s8[4]{{0}} dynamic-slice(%sum)
}}
"""


def test_a_collective_that_is_spread_over_fusions_counts_once() -> None:
    line = played(
        "  %s = (s8[4]{0}, s8[8]{0}) fusion(%x), kind=kCustom, calls=%start\n"
        f"  %a = s8[4]{{0}} fusion(%x), kind=kOutput, calls=%step, {times(3)}\n"
        f"  %b = s8[4]{{0}} fusion(%a), kind=kOutput, calls=%step, {times(2)}\n"
        "  ROOT %g = s8[8]{0} fusion(%b), kind=kCustom, calls=%done",
        FUSED,
    )
    assert line.collectives["all-gather", "x"].count == 1
    assert (line.cycles, line.seconds, line.exposed) == (5, 8, 3)


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter_of_the_whole() -> None:
    line = played(
        "  %w = s8[8]{0} broadcast(%x), dimensions={}, " + times(1) + "\n"
        "  ROOT %g = s8[4]{0} fusion(%w), kind=kCustom, calls=%scatter",
        FUSED,
    )
    assert {key: total.amount for key, total in line.collectives.items()} == {("reduce-scatter", "x"): 8}


def test_loops_multiply_and_the_longest_branch_counts() -> None:
    more = f"""
%body (p: s8[4]) -> s8[4] {{
  %p = s8[4]{{0}} parameter(0)
  %g.0 = s8[8]{{0}} all-gather(%p), {GATHER}
  %k = s8[4]{{0}} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %d = s8[4]{{0}} add(%p, %p), {times(3)}
}}

%short (q: s8[4]) -> s8[4] {{
  ROOT %q = s8[4]{{0}} parameter(0)
}}

%condition (r: s8[4]) -> pred[] {{
  ROOT %r = pred[] parameter(0)
}}
"""
    count = 'backend_config={"known_trip_count":{"n":"6"}}'
    line = played(
        f"  %w = s8[4]{{0}} while(%x), condition=%condition, body=%body, {count}\n"
        "  ROOT %c = s8[4]{0} conditional(%w, %w), branch_computations={%short, %body}",
        more,
    )
    assert line.cycles == 7 * 3
    assert line.collectives["all-gather", "x"].count == 7
    assert line.kernels["k", ""].amount == 7 * 7
    assert (line.seconds, line.exposed) == (7 * (8 + 1 + 3), 7 * 8)
    assert line.endless == 0


def test_a_fusion_counts_by_its_own_estimate_or_by_that_of_its_parts() -> None:
    more = f"""
%inside (p: s8[4]) -> s8[4] {{
  %p = s8[4]{{0}} parameter(0)
  ROOT %d = s8[4]{{0}} add(%p, %p), {times(30)}
}}
"""
    own = played(f"  ROOT %f = s8[4]{{0}} fusion(%x), kind=kLoop, calls=%inside, {times(20)}", more)
    parts = played("  ROOT %f = s8[4]{0} fusion(%x), kind=kLoop, calls=%inside", more)
    assert (own.cycles, parts.cycles) == (20, 30)


def test_what_has_no_estimate_is_read_and_written_once_and_said() -> None:
    line = played("  ROOT %s = s8[4]{0} sort(%x)")
    assert line.seconds == 4
    assert line.untimed["sort", ""].amount == 4
    line = played('  ROOT %s = s8[4]{0} custom-call(%x), custom_call_target="Unheard"')
    assert (line.seconds, line.untimed["custom-call Unheard", ""].amount) == (4, 4)


def test_slices_of_stacks_in_the_host_s_memory_are_copied_there_and_back() -> None:
    line = played(
        '  %h = s8[8,4]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"\n'
        "  %i = s32[] constant(0)\n"
        "  %s = ((s8[8,4]{1,0:S(5)}, s8[4]{0}, s32[]), s8[8,4]{1,0:S(5)}, u32[]) "
        "dynamic-update-slice-start(%h, %x, %i)\n"
        "  %d = s8[8,4]{1,0:S(5)} dynamic-update-slice-done(%s)\n"
        "  %t = ((s8[8,4]{1,0:S(5)}, s32[]), s8[1,4]{1,0}, u32[]) dynamic-slice-start(%d, %i)\n"
        f"  %a = s8[4]{{0}} add(%x, %x), {times(3)}\n"
        "  ROOT %g = s8[1,4]{1,0} dynamic-slice-done(%t)"
    )
    assert {key[0]: total.amount for key, total in line.host.items()} == {
        "to the host": 4,
        "from the host": 4,
    }
    assert (line.seconds, line.exposed, line.untimed) == (8, 5, {})


def test_copies_to_the_host_wait_for_one_another() -> None:
    start = "(s8[4]{0:S(5)}, s8[4]{0}, u32[]) copy-start(%x)"
    line = played(
        f"  %s = {start}\n  %t = {start}\n  %g = s8[4]{{0:S(5)}} copy-done(%s)\n"
        "  ROOT %h = s8[4]{0:S(5)} copy-done(%t)"
    )
    assert line.seconds == 8


def test_marks_and_copies_to_the_fast_memory_count_no_time() -> None:
    line = played(
        '  %m = s8[4]{0} custom-call(), custom_call_target="AllocateBuffer"\n'
        "  %s = (s8[4]{0:S(1)}, s8[4]{0}, u32[]) copy-start(%x)\n"
        "  ROOT %g = s8[4]{0:S(1)} copy-done(%s)"
    )
    assert line == Timeline()


def test_copies_to_the_host_run_beside_and_are_waited_for() -> None:
    line = played(
        "  %s = (s8[4]{0:S(5)}, s8[4]{0}, u32[]) copy-start(%x)\n"
        f"  %a = s8[4]{{0}} add(%x, %x), {times(3)}\n"
        "  ROOT %g = s8[4]{0:S(5)} copy-done(%s)"
    )
    assert line.host["to the host", ""].amount == 4
    assert (line.seconds, line.exposed) == (4, 1)
