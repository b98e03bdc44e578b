"""Losses and attention at scale: what a device needs falls with the number of devices, as the compiler says."""

from __future__ import annotations

import functools
import itertools

import jax
import pytest

from tools.bench_parallel import FORMS, main, temporary_bytes

BATCH, FEATURES = 512, 32
COUNTS = (1, 2, 4, 8)


@functools.cache
def needed(name: str, devices: int) -> int:
    """Bytes per device of a form."""
    return temporary_bytes(FORMS[name], jax.devices()[:devices], BATCH, FEATURES)


@pytest.mark.parametrize("name", FORMS)
def test_more_devices_need_less_memory_each(name: str) -> None:
    sizes = [needed(name, count) for count in COUNTS]
    for fewer, more in itertools.pairwise(sizes):
        assert more < 1.2 * fewer, sizes  # the compiler may keep a buffer more of what is half as large
    assert sizes[0] > 4 * sizes[-1], sizes


def test_a_device_never_holds_the_logits_of_all_pairs() -> None:
    pairs = 4 * BATCH**2
    assert needed("softmax", 1) > pairs > needed("softmax", 8)
    assert pairs > needed("sigmoid_ring", 1)  # in chunks on one device too
    assert needed("softmax_groups", 8) < needed("softmax", 8)


def test_around_the_ring_no_device_holds_the_texts_of_all() -> None:
    """Wide features of few examples, which are larger than their logits."""
    sizes = {
        name: temporary_bytes(FORMS[name], jax.devices()[:8], 128, 4096)
        for name in ("sigmoid", "sigmoid_ring")
    }
    everyone = 4 * 128 * 4096
    assert sizes["sigmoid"] > everyone > sizes["sigmoid_ring"], sizes


def test_the_table_has_a_row_per_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--forms=softmax,sigmoid_ring", "--batch=64", "--features=8", "--devices=1,8"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-5:-3] == ["1", "8"]
    assert [row[:44].strip() for row in rows] == [FORMS["softmax"].title, FORMS["sigmoid_ring"].title]
    with pytest.raises(SystemExit):
        main(["--forms=softmx"])
    assert "there is no 'softmx' among the forms" in capsys.readouterr().err
    assert main(["--devices=1,9"]) == 2
    assert capsys.readouterr().err == "error: --devices names '9'; there are 1 to 8.\n"
