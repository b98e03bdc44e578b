"""Links and kernels: times that arithmetic gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vlpjax.planning.hlo import Shape
from vlpjax.planning.prices import HOP_SECONDS, Links, attention_work

RATE = 1e9
MANY = 10**12  # bytes, beside which the hops take no time


class Device:
    """A chip at a place of a torus, in a slice."""

    def __init__(self, coords: tuple[int, ...], slice_index: int = 0):
        self.coords, self.slice_index = coords, slice_index


def torus(shape: tuple[int, ...], mesh: dict[str, int], slices: int = 1) -> Links:
    """A mesh whose devices are numbered along the torus, the last axis fastest."""
    places = [Device(place, index) for index in range(slices) for place in np.ndindex(*shape)]

    class Mesh:
        devices: Any = np.array(places, dtype=object).reshape(tuple(mesh.values()))
        shape = mesh

    return Links.of(Mesh, RATE, RATE / 10, lambda size: size % 4 == 0)


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
    links = torus((4,), dict(fsdp=2, tensor=2))
    assert links.seconds("all-gather", MANY, [(0, 2), (1, 3)]) == pytest.approx(MANY / 2 / (RATE / 2))


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
