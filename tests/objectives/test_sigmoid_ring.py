"""The sigmoid loss in pieces, on one device and around the ring of several: always the plain one."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.comparing import compared, gradient_of
from tests.tiny import assert_trees_close, layout_of, unit
from vlpjax.errors import UserError
from vlpjax.objectives.contrastive import Sigmoid

B, E = 32, 6
RNG = np.random.default_rng(0)
FEATURES = {name: unit(RNG.normal(size=(B, E))).astype(np.float32) for name in ("image", "text")}
BATCH = {"label": RNG.integers(0, 12, B).astype(np.int32)}
HEADS = {"logit_scale": np.log(7.0), "logit_bias": -2.0}


@pytest.fixture(scope="module")
def plain() -> Any:
    """The loss that gathers all texts, on one device."""
    return compared(Sigmoid(same="label"), FEATURES, BATCH, HEADS)


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_value_and_gradients_do_not_depend_on_the_number_of_chunks(plain: Any, chunks: int) -> None:
    ours = compared(Sigmoid(same="label", chunks=chunks), FEATURES, BATCH, HEADS)
    np.testing.assert_allclose(ours[0].value, plain[0].value, rtol=1e-6)
    assert_trees_close(ours[1:], plain[1:], rtol=1e-5, atol=1e-7)
    assert_trees_close(dict(ours[0].metrics), dict(plain[0].metrics), rtol=1e-6)


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
def test_nor_on_the_number_of_devices(plain: Any, chunks: int, devices: int, sizes: dict[str, int]) -> None:
    ours = compared(Sigmoid(same="label", chunks=chunks), FEATURES, BATCH, HEADS, layout_of(devices, **sizes))
    np.testing.assert_allclose(ours[0].value, plain[0].value, rtol=1e-6)
    assert_trees_close(ours[1:], plain[1:], rtol=1e-5, atol=1e-7)
    assert_trees_close(dict(ours[0].metrics), dict(plain[0].metrics), rtol=1e-6)


def compiled(chunks: int, devices: int) -> str:
    layout = layout_of(devices)
    params = {f"loss_{name}": {"value": jnp.float32(value)} for name, value in HEADS.items()}
    placed = jax.device_put(FEATURES, layout.sharding("batch"))
    return jax.jit(gradient_of(Sigmoid(chunks=chunks), layout)).lower(placed, params, {}).compile().as_text()


def test_texts_travel_and_are_never_gathered() -> None:
    """Eight devices hold logits of [B / 8, B / 8]; with 16 chunks of [B / 8, B / 16]."""
    eight, sixteen = compiled(8, 8), compiled(16, 8)
    for text in (eight, sixteen):
        assert "collective-permute" in text and not re.search(r" all-gather(-start)?\(", text)
        assert f"f32[{B // 8},{B}]" not in text and f"f32[{B},{E}]" not in text
    assert f"f32[{B // 8},{B // 8}]" in eight
    assert f"f32[{B // 8},{B // 8}]" not in sixteen and f"f32[{B // 8},{B // 16}]" in sixteen


def test_chunks_that_do_not_divide_become_smaller(plain: Any) -> None:
    ours = compared(Sigmoid(same="label", chunks=5), FEATURES, BATCH, HEADS)  # 8 of 4 examples
    np.testing.assert_allclose(ours[0].value, plain[0].value, rtol=1e-6)
    with pytest.raises(UserError, match="1 or more"):
        Sigmoid(chunks=0)
