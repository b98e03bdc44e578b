"""Links and kernels: times that arithmetic gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vlpjax.planning.hlo import Shape, read_program
from vlpjax.planning.prices import DIE_TO_DIE, HOP_SECONDS, ChipPrices, Links, attention_work

RATE = 1e9
MANY = 10**12  # bytes, beside which the hops take no time


class Device:
    """A chip at a place of a torus, in a slice."""

    def __init__(self, coords: tuple[int, ...], slice_index: int = 0):
        self.coords, self.slice_index = coords, slice_index


def torus(shape: tuple[int, ...], mesh: dict[str, int], slices: int = 1, devices: int = 1) -> Links:
    """A mesh whose devices are numbered along the torus, the last axis fastest, but for those of a chip."""
    places = [
        Device(place, index)
        for index in range(slices)
        for place in np.ndindex(*shape)
        for _ in range(devices)
    ]

    class Mesh:
        devices: Any = np.array(places, dtype=object).reshape(tuple(mesh.values()))
        shape = mesh

    return Links.of(Mesh, RATE, RATE / 10, lambda sizes: [size % 4 == 0 for size in sizes])


def test_groups_are_named_by_the_mesh_axes_that_they_lie_on() -> None:
    links = torus((4, 4), dict(fsdp=4, ring=2, tensor=2))
    assert links.axes((0, 1)) == "tensor"
    assert links.axes((0, 4, 8, 12)) == "fsdp"
    assert links.axes((0, 1, 2, 3)) == "ring+tensor"
    assert links.axes(range(16)) == "fsdp+ring+tensor"


def test_a_gather_fills_both_directions_of_every_axis_that_closes() -> None:
    links = torus((4, 4), dict(fsdp=16))
    ring, line, all_ = [(0, 1, 2, 3)], [(0, 1)], [tuple(range(16))]
    assert links.seconds("all-gather", MANY, ring) == pytest.approx(MANY * 3 / 4 / (2 * RATE))
    assert links.seconds("all-gather", MANY, line) == pytest.approx(MANY / 2 / RATE)
    assert links.seconds("all-gather", MANY, all_) == pytest.approx(MANY * 15 / 16 / (4 * RATE))
    assert links.seconds("reduce-scatter", MANY, ring) == links.seconds("all-gather", MANY, ring)
    assert links.seconds("all-reduce", MANY, ring) == pytest.approx(
        2 * links.seconds("all-gather", MANY, ring)
    )


def test_groups_that_lie_between_one_another_share_the_links() -> None:
    links = torus((6,), dict(fsdp=3, tensor=2))
    expected = MANY * 2 / 3 / (RATE / 2)
    assert links.seconds("all-gather", MANY, [(0, 2, 4), (1, 3, 5)]) == pytest.approx(expected)


def test_a_part_of_a_ring_is_a_line() -> None:
    links = torus((8,), dict(fsdp=2, tensor=4))
    part, spread = [(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert links.seconds("all-gather", MANY, part) == pytest.approx(MANY * 3 / 4 / RATE)
    # Four that lie around the whole ring close, but two groups of them share it.
    assert links.seconds("all-gather", MANY, spread) == pytest.approx(MANY * 3 / 4 / (2 * RATE / 2))
    assert links.seconds("all-to-all", MANY, part) == pytest.approx(2 * MANY / 2 / RATE)


def test_the_devices_of_a_chip_share_its_links() -> None:
    links = torus((4,), dict(fsdp=4, tensor=2), devices=2)
    one, both, chip = [(0, 2, 4, 6), (1, 3, 5, 7)], [tuple(range(8))], [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert links.seconds("all-gather", MANY, one) == pytest.approx(MANY * 3 / 4 / (2 * RATE / 2))
    assert links.seconds("all-gather", MANY, both) == pytest.approx(MANY * 7 / 8 / (2 * RATE))
    assert links.seconds("all-gather", MANY, chip) == pytest.approx(MANY / 2 / (DIE_TO_DIE * RATE))
    assert links.seconds("all-reduce", MANY, chip) == 2 * links.seconds("all-gather", MANY, chip)
    # Two chips of two devices on either side, each with half of its bytes for the other one, over two links.
    assert links.seconds("all-to-all", MANY, both) == pytest.approx(4 * MANY / 2 / (2 * RATE))
    around = [(device, (device + 2) % 8) for device in range(8)]
    assert links.seconds("collective-permute", MANY, around) == pytest.approx(2 * MANY / RATE)
    swap = [(0, 1), (1, 0)]
    assert links.seconds("collective-permute", MANY, swap) == pytest.approx(MANY / (DIE_TO_DIE * RATE))


def test_all_to_all_is_what_crosses_the_middle() -> None:
    links = torus((8,), dict(fsdp=8))
    # Four chips on either side, each with half of its bytes for the other one, over two links.
    assert links.seconds("all-to-all", MANY, [tuple(range(8))]) == pytest.approx(
        4 * MANY / 2 / (2 * RATE) / 1
    )


def test_a_permutation_takes_its_longest_way_around_the_ring() -> None:
    links = torus((8,), dict(fsdp=8))
    shift = [(index, (index + 1) % 8) for index in range(8)]
    assert links.seconds("collective-permute", MANY, shift) == pytest.approx(MANY / RATE)
    assert links.seconds("collective-permute", MANY, [(0, 5)]) == pytest.approx(3 * MANY / RATE)


def test_small_messages_take_their_hops() -> None:
    links = torus((8,), dict(fsdp=8))
    assert links.seconds("all-gather", 8, [tuple(range(8))]) == pytest.approx(4 * HOP_SECONDS, rel=1e-2)


def test_slices_exchange_over_the_network_what_is_left_after_their_own_exchange() -> None:
    links = torus((4,), dict(replica=2, fsdp=4), slices=2)
    both = [tuple(range(8))]
    inside = links.seconds("all-gather", MANY, [(0, 1, 2, 3)])
    assert links.seconds("all-gather", MANY, both) == pytest.approx(inside + MANY / 4 / 2 / (RATE / 10))
    assert links.axes((0, 4)) == "replica"
    # An all-to-all has nothing that is the same for two: every device sends half of its bytes itself.
    inner = links.seconds("all-to-all", MANY, [(0, 1, 2, 3)])
    assert links.seconds("all-to-all", MANY, both) == pytest.approx(inner + MANY / 2 / (RATE / 10))
    faster = replace(links, network=RATE)
    assert faster.seconds("all-reduce", MANY, [(0, 4)]) == pytest.approx(2 * MANY / 2 / RATE)


def test_attention_kernels_are_told_by_their_names_and_shapes() -> None:
    q, k = Shape("bf16", (2, 8, 512, 128)), Shape("bf16", (2, 8, 1024, 128))
    table = Shape("s32", (64, 4, 1))
    product = 2 * 2 * 8 * 512 * 1024 * 128

    def work(name: str, *operands: Shape) -> float:
        found = attention_work(name, operands)
        assert found is not None
        return found.flops

    assert work("splash_mha_fwd_residuals", table, q, k, k) == 2 * product
    assert work("splash_mha_dq", table, q, k, k) == 3 * product
    assert work("interval_flash_key_value_gradient", table, q, k, k) == 4 * product
    assert work("flash_backward", q, k, k) == 5 * product
    assert attention_work("rms_norm", (q, k)) is None
    assert attention_work("flash_forward", (q,)) is None


def priced(name: str, more: str = "") -> tuple[str, float, float]:
    """A kernel of three inputs, on a chip of which attention sees a quarter of all pairs at half of the peak."""
    array = "bf16[8,512,128]{2,1,0}"
    text = (
        f"ENTRY %m (q: bf16[8,512,128]) -> bf16[8,512,128] {{\n  %q = {array} parameter(0)\n  ROOT %k.1 = {array} "
        'custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", '
        f'metadata={{op_name="jit(f)/{name}/pallas_call"}}{more}\n}}\n'
    )
    links = torus((4,), dict(fsdp=4))
    prices = ChipPrices(1e9, 1e12, RATE, RATE / 100, links, efficiency=0.5, attention_share=0.25)
    computation = read_program(text)["m"]
    return prices.kernel(computation.root, computation)


def test_kernels_of_attention_take_their_share_of_the_peak_and_others_their_bytes() -> None:
    pairs = 2 * 2 * 8 * 512 * 512 * 128 / 4
    assert priced("flash_forward") == ("flash_forward", pairs, pytest.approx(pairs / 0.5e12))
    moved = 4 * 8 * 512 * 128 * 2
    assert priced("rms_norm") == ("rms_norm", 0, pytest.approx(moved / RATE))
    stated = ', backend_config={"cost_estimate":{"flops":"1000000000000"}}'
    assert priced("products", stated) == ("products", 1e12, pytest.approx(2.0))
