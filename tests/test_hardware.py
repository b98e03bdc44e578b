"""The table of chips: found by name and by what JAX calls them, and its figures agree with one another."""

from __future__ import annotations

import pytest

from vlpjax.errors import UserError
from vlpjax.hardware import CHIPS, chip_named, chip_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_chip_is_found_by_what_jax_calls_it(kind: str, name: str) -> None:
    chip = chip_of(kind)
    assert chip is not None
    assert chip.name == name


def test_an_unknown_device_has_no_figures() -> None:
    assert chip_of("cpu") is None
    assert chip_of("NVIDIA A100-SXM4-40GB") is None
    with pytest.raises(UserError, match=r"'v5x'; there are v5e, v5p"):
        chip_named("v5x")


def test_names_are_found_in_any_case() -> None:
    assert chip_named("tpu7x") is CHIPS["TPU7x"]


@pytest.mark.parametrize(
    ("name", "sizes", "rings"),
    [
        ("v5p", (4, 4, 8), [True, True, True]),
        ("v5p", (2, 4, 4), [False, False, False]),
        ("v5e", (16, 16), [True, True]),
        ("v6e", (8, 16), [False, True]),
        ("v6e", (4, 4), [False, False]),
    ],
)
def test_cubes_and_whole_pods_close_to_rings(name: str, sizes: tuple[int, ...], rings: list[bool]) -> None:
    assert CHIPS[name].rings(sizes) == rings


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_peaks_are_dense_and_figures_are_of_one_chip(chip) -> None:
    # Eight-bit operations are at most twice as many; sparse figures given as dense would be four times.
    for faster in (chip.int8_ops, chip.fp8_flops):
        assert faster is None or 1 <= faster / chip.bf16_flops < 2.01
    assert 10 < chip.hbm_bytes / 2**30 < 300
    assert 0.01 < chip.ici_bandwidth / chip.hbm_bandwidth < 0.2
    assert chip.dcn_bandwidth < chip.ici_bandwidth
    assert chip.clock_hz is None or 1.4e9 < chip.clock_hz < 2.3e9
    assert chip.sources
