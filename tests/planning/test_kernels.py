"""What attention kernels take by their schedules: tiles that are computed, masked, skipped, and the matrix units."""

from __future__ import annotations

import pytest

from vlpjax.planning.kernels import CORES, Core, Tile

LONG = Tile(512, 1024, whole=1000, masked=1500)


def counted(length: int) -> float:
    """Cycles of one head under a causal mask, tile by tile."""
    cycles = 0
    for row in range(0, length, LONG.queries):
        for column in range(0, length, LONG.keys):
            if column + LONG.keys <= row + 1:
                cycles += LONG.whole
            elif column < row + LONG.queries:
                cycles += LONG.masked
    return cycles


@pytest.mark.parametrize("length", [1024, 4096, 8192, 65_536])
def test_a_causal_mask_leaves_the_tiles_that_counting_leaves(length: int) -> None:
    assert LONG.cycles(length * length, length, 0.5) == pytest.approx(counted(length))


def test_without_a_mask_every_tile_is_whole() -> None:
    assert LONG.cycles(8 * 4096 * 4096, 4096, 1.0) == 8 * 8 * 4 * LONG.whole


def test_kernels_that_hold_all_logits_skip_none() -> None:
    short = Tile(256, 256, whole=100, masked=150, skips=False)
    assert short.cycles(3 * 256 * 256, 256, 1.0) == 300
    assert short.cycles(3 * 256 * 256, 256, 0.5) == 450


def test_the_matrix_units_decide_where_they_need_longer() -> None:
    pairs = 16.0 * 512 * 1024
    rate = 2 * 4 * 256 * 256
    busy = Core(2, 256, {"forward": Tile(512, 1024, whole=10, masked=10)})
    # Heads of 128 features take as long as heads of 256, in units that are so wide.
    assert busy.cycles("forward", 2, pairs, 1024, 128, 1.0, rate) == 2 * 2 * pairs * 256 / rate
    slow = Core(2, 256, {"forward": Tile(512, 1024, whole=10**6, masked=10**6)})
    assert slow.cycles("forward", 2, pairs, 1024, 128, 1.0, rate) == 16 * 10**6 / 2


def test_other_kernels_and_wider_heads_are_not_known() -> None:
    core = CORES["v5p"]
    assert core.cycles("splash_mha_fwd", 2, 1e9, 4096, 128, 0.5, 1e5) is None
    assert core.cycles("interval_flash_forward", 2, 1e9, 4096, 192, 0.5, 1e5) is None
