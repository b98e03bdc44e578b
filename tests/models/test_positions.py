"""Rotary positions: products depend on distances only, and scalings and sections do what their papers say."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.positions import Linear, Llama3, Rotary, Yarn, rotate

D = 16
POSITIONS = np.arange(12)[None]


def products(rotary: Rotary, positions: Any) -> np.ndarray:
    """Of one query with one key, at every pair of positions."""
    random = np.random.default_rng(0)
    query, key = (np.tile(random.normal(size=(1, 1, 1, D)), (1, positions.shape[-1], 1, 1)) for _ in range(2))
    rotation = rotary(jnp.asarray(positions), D)
    return np.einsum(
        "bqhd,bkhd->qk", rotate(jnp.asarray(query), rotation), rotate(jnp.asarray(key), rotation)
    )


@pytest.mark.parametrize("rotary", [Rotary(), Rotary(base=50.0, fraction=0.5), Rotary(scaling=Yarn(4.0, 64))])
def test_products_depend_on_the_distance_only(rotary: Rotary) -> None:
    near, far = products(rotary, POSITIONS), products(rotary, POSITIONS + 1000)
    np.testing.assert_allclose(near, far, atol=1e-3)
    for distance in range(1, 12):
        diagonal = np.diagonal(near, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(near[0]) > 0.1


def test_turning_is_by_position_times_frequency() -> None:
    x = np.zeros((1, 3, 1, 8), np.float32)
    x[..., 1] = 1.0
    turned = rotate(jnp.asarray(x), Rotary(base=81.0)(jnp.asarray([[0, 1, 5]]), 8))
    angles = np.array([0, 1, 5]) / 3  # the second of four frequencies: 81 ** -(2 / 8)
    np.testing.assert_allclose(turned[0, :, 0, 1], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(turned[0, :, 0, 5], np.sin(angles), atol=1e-6)


def test_a_fraction_leaves_the_other_features_alone() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 12, 2, D))
    turned = rotate(x, Rotary(fraction=0.25)(jnp.asarray(POSITIONS), D))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert np.all(np.abs(turned - x)[0, 1:, :, :4] > 0)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_bfloat16_turns_as_float32_does(fraction: float) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 12, 2, D), jnp.bfloat16)
    rotation = Rotary(fraction=fraction)(jnp.asarray(POSITIONS), D)

    def turned(x: jax.Array) -> jax.Array:
        return rotate(x, rotation).astype(jnp.float32)

    expected, back = jax.vjp(turned, x.astype(jnp.float32))
    found, back_found = jax.vjp(turned, x)
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(
        back_found(expected)[0].astype(jnp.float32), back(expected)[0], rtol=1e-2, atol=1e-2
    )


def test_linear_scaling_is_a_smaller_position() -> None:
    scaled = Rotary(scaling=Linear(4.0))(jnp.asarray(4 * POSITIONS), D)
    plain = Rotary()(jnp.asarray(POSITIONS), D)
    np.testing.assert_allclose(scaled.cos, plain.cos, atol=1e-5)


def test_llama3_keeps_fast_angles_and_slows_slow_ones() -> None:
    plain = Rotary(base=500_000.0).frequencies(128)
    scaled = Rotary(base=500_000.0, scaling=Llama3(8.0, 1.0, 4.0, 8192)).frequencies(128)
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled < plain)[between]) and np.all((scaled > plain / 8)[between])


def test_yarn_blends_by_index_and_warms_the_attention() -> None:
    yarn = Yarn(16.0, 4096)
    plain, scaled = Rotary().frequencies(128), Rotary(scaling=yarn).frequencies(128)
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[:20], 1.0)  # more than 32 turns within 4,096 positions
    np.testing.assert_allclose(ratio[46:], 1 / 16)  # less than one turn
    assert np.all(np.diff(ratio[20:47]) < 0)
    np.testing.assert_allclose(np.diff(ratio[22:45], 2), 0, atol=1e-9)  # a straight ramp
    assert yarn.amplitude == pytest.approx(0.1 * math.log(16) + 1)
    origin = Rotary(scaling=yarn)(jnp.zeros((1, 1), jnp.int32), 128)
    np.testing.assert_allclose(origin.cos, yarn.amplitude, rtol=1e-6)


SECTIONS = (2, 3, 3)


def test_equal_coordinates_are_text() -> None:
    for interleaved in (False, True):
        rotary = Rotary(sections=SECTIONS, interleaved=interleaved)
        three = rotary(jnp.broadcast_to(jnp.asarray(POSITIONS), (3, 1, 12)), D)
        for turned in (rotary(jnp.asarray(POSITIONS), D), Rotary()(jnp.asarray(POSITIONS), D)):
            np.testing.assert_array_equal(three.cos, turned.cos)
            np.testing.assert_array_equal(three.sin, turned.sin)


@pytest.mark.parametrize(
    ("interleaved", "owners"), [(False, [0, 0, 1, 1, 1, 2, 2, 2]), (True, [0, 1, 2, 0, 1, 2, 0, 1])]
)
def test_each_angle_follows_its_coordinate(interleaved: bool, owners: list[int]) -> None:
    sections = (3, 3, 2) if interleaved else SECTIONS
    rotary = Rotary(sections=sections, interleaved=interleaved)
    positions = np.stack([POSITIONS, 3 * POSITIONS + 1, 7 * POSITIONS])  # [3, 1, 12]
    found = rotary(jnp.asarray(positions), D)
    for angle, owner in enumerate(owners):
        alone = Rotary()(jnp.asarray(positions[owner]), D)
        np.testing.assert_allclose(found.cos[..., angle], alone.cos[..., angle], atol=1e-6)


def test_what_interleaving_leaves_over_is_time() -> None:
    assert Rotary(sections=(24, 20, 20), interleaved=True).coordinates(64)[60:].tolist() == [0] * 4
    counts = np.bincount(Rotary(sections=(24, 20, 20), interleaved=True).coordinates(64))
    assert counts.tolist() == [24, 20, 20]


@pytest.mark.parametrize(
    ("rotary", "shape", "message"),
    [
        (Rotary(sections=(2, 3, 4)), (1, 12), r"\(2, 3, 4\); for 8 angles"),
        (Rotary(fraction=0.2), (1, 12), "turns 3 of 16 features"),
        (Rotary(), (3, 1, 12), r"\(3, 1, 12\); these rotary ones take \[batch, tokens\]"),
        (Rotary(sections=SECTIONS), (2, 1, 12), r"or \[3, batch, tokens\]"),
    ],
)
def test_mistakes_are_told(rotary: Rotary, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rotary(jnp.zeros(shape, jnp.int32), D)
