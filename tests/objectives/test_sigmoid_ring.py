"""The sigmoid loss in pieces, on one device and around the ring of several: always the plain one."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from tests.objectives.rig import Compared, compared, comparison, scalars
from tests.tiny import assert_trees_close, layout_of, unit
from vlpjax.errors import UserError
from vlpjax.objectives.contrastive import Sigmoid

B, E = 32, 6
RNG = np.random.default_rng(0)
FEATURES = {name: unit(RNG.normal(size=(B, E))).astype(np.float32) for name in ("image", "text")}
BATCH = {"label": RNG.integers(0, 12, B).astype(np.int32)}
HEADS = scalars(logit_scale=np.log(7.0), logit_bias=-2.0)


@pytest.fixture(scope="module")
def plain() -> Compared:
    """The loss that gathers all texts, on one device."""
    return compared(Sigmoid(same="label"), FEATURES, HEADS, batch=BATCH)


def assert_equal(ours: Compared, plain: Compared) -> None:
    np.testing.assert_allclose(ours.loss.value, plain.loss.value, rtol=1e-6)
    assert_trees_close(ours.gradients, plain.gradients, rtol=1e-5, atol=1e-7)
    assert_trees_close(dict(ours.loss.metrics), dict(plain.loss.metrics), rtol=1e-6)


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_value_and_gradients_do_not_depend_on_the_number_of_chunks(plain: Compared, chunks: int) -> None:
    assert_equal(compared(Sigmoid(same="label", chunks=chunks), FEATURES, HEADS, batch=BATCH), plain)


@pytest.mark.parametrize(
    ("chunks", "devices", "sizes"),
    [
        (1, 8, {}),
        (2, 2, {}),
        (4, 8, {"replica": 2, "fsdp": 4}),
        (8, 4, {"fsdp": 2, "tensor": 2}),
        (16, 8, {}),
    ],
)
def test_nor_on_the_number_of_devices(
    plain: Compared, chunks: int, devices: int, sizes: dict[str, int]
) -> None:
    objective, layout = Sigmoid(same="label", chunks=chunks), layout_of(devices, **sizes)
    assert_equal(compared(objective, FEATURES, HEADS, batch=BATCH, layout=layout), plain)


def compiled(chunks: int, devices: int) -> str:
    layout = layout_of(devices)
    placed = jax.device_put(FEATURES, layout.sharding("batch"))
    function = jax.jit(comparison(Sigmoid(chunks=chunks), HEADS, layout=layout))
    text: str = function.lower(placed, HEADS["params"], HEADS["params"], {}).compile().as_text()
    return text


def test_texts_travel_and_are_never_gathered() -> None:
    """Eight devices hold logits of [B / 8, B / 8]; with 16 chunks of [B / 8, B / 16]."""
    eight, sixteen = compiled(8, 8), compiled(16, 8)
    for text in (eight, sixteen):
        assert "collective-permute" in text and not re.search(r" all-gather(-start)?\(", text)
        assert f"f32[{B // 8},{B}]" not in text and f"f32[{B},{E}]" not in text
    assert f"f32[{B // 8},{B // 8}]" in eight
    assert f"f32[{B // 8},{B // 8}]" not in sixteen and f"f32[{B // 8},{B // 16}]" in sixteen


def test_chunks_that_do_not_divide_become_smaller(plain: Compared) -> None:
    ours = compared(Sigmoid(same="label", chunks=5), FEATURES, HEADS, batch=BATCH)  # 8 of 4 examples
    np.testing.assert_allclose(ours.loss.value, plain.loss.value, rtol=1e-6)
    with pytest.raises(UserError, match="1 or more"):
        Sigmoid(chunks=0)
