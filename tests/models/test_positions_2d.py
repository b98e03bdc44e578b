"""Positions on a grid: resized as PyTorch does, and angles that mean what they say."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlpjax.errors import UserError
from vlpjax.models.positions import rotate
from vlpjax.models.positions_2d import (
    grid_positions,
    resize_matrix,
    resize_positions,
    resize_weights,
    rotation_2d,
    sample_positions,
    sincos_positions,
)

RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(size=(6, 5, 8)).astype(np.float32)
HOW = [(method, antialias) for method in ("bilinear", "bicubic") for antialias in (False, True)]


@pytest.mark.parametrize(("method", "antialias"), HOW)
@pytest.mark.parametrize("grid", [(9, 13), (3, 2), (4, 11), (6, 5), (1, 1)])
def test_tables_are_resized_as_pytorch_does(grid: tuple[int, int], method: str, antialias: bool) -> None:
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(TABLE).permute(2, 0, 1)[None],
        size=grid,
        mode=method,
        align_corners=False,
        antialias=antialias,
    )[0].permute(1, 2, 0)
    ours = resize_positions(jnp.asarray(TABLE), grid, method, antialias)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_a_table_of_the_same_grid_is_left_alone() -> None:
    assert resize_positions(table := jnp.asarray(TABLE), (6, 5)) is table


@pytest.mark.parametrize(("method", "antialias"), HOW)
def test_each_image_of_a_row_samples_its_own_resized_table(method: str, antialias: bool) -> None:
    grids = [(3, 2), (9, 4)]
    whole = np.concatenate(
        [resize_positions(TABLE, grid, method, antialias).reshape(-1, 8) for grid in grids]
    )
    positions = jnp.concatenate([grid_positions(*grid) for grid in grids])[None]
    token_grids = np.repeat(grids, [rows * columns for rows, columns in grids], axis=0)[None]
    sampled = jax.jit(sample_positions, static_argnums=(3, 4))(
        TABLE, positions, token_grids, method, antialias
    )
    np.testing.assert_allclose(sampled[0], whole, atol=2e-6)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(HOW))
def test_a_constant_stays_constant_and_a_line_is_mirrored_alike(
    samples: int, size: int, how: tuple[str, bool]
) -> None:
    matrix = resize_matrix(samples, size, *how)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-12)


def test_weights_can_be_traced() -> None:
    """Sizes may be known only when the program runs; the weights are those of the matrix."""
    weights = jax.jit(lambda size: resize_weights(jnp.arange(4), size, 7))(4)
    np.testing.assert_allclose(weights, resize_matrix(7, 4), atol=1e-6)


def test_patches_are_counted_in_reading_order() -> None:
    assert grid_positions(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize(("form", "last"), [("big_vision", 1e-4), ("mae", 1e-3)])
def test_sines_and_cosines(form: str, last: float) -> None:
    """Quarters are sin x, cos x, sin y, cos y; rates fall from 1 to 1/10000, or end one step before."""
    row, column = 3.0, 2.0
    features = np.asarray(sincos_positions(np.array([row, column]), 16, form)).reshape(4, 4)
    rates = np.geomspace(1, last, 4)
    wanted = [np.sin(column * rates), np.cos(column * rates), np.sin(row * rates), np.cos(row * rates)]
    np.testing.assert_allclose(features, wanted, atol=1e-6)


def test_places_in_a_text_have_sines_then_cosines() -> None:
    rates = np.geomspace(1, 1e-4, 8)
    wanted = [[*np.sin(place * rates), *np.cos(place * rates)] for place in range(5)]
    np.testing.assert_allclose(sincos_positions(np.arange(5)[:, None], 16), wanted, atol=1e-6)


def test_turned_products_depend_on_differences_of_rows_and_columns() -> None:
    query, key = jnp.asarray(RANDOM.normal(size=(2, 1, 1, 1, 16)), jnp.float32)

    def product(at: tuple[int, int], to: tuple[int, int]) -> Any:
        turned = [
            rotate(x, rotation_2d(jnp.asarray([[where]]), jnp.asarray([[[9, 9]]]), 16))
            for x, where in ((query, at), (key, to))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product((1, 2), (3, 7)) == pytest.approx(product((5, 0), (7, 5)), abs=1e-5)
    assert product((1, 2), (3, 7)) != pytest.approx(product((2, 1), (7, 3)), abs=1e-2)


def test_half_of_the_angles_follow_the_row_and_half_the_column() -> None:
    turned = rotation_2d(jnp.asarray([[[2, 0], [0, 3]]]), jnp.asarray([[[4, 4]]]), 16, base=100.0)
    assert turned.cos.shape == (1, 2, 8)
    rates = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(turned.sin[0, 0], [*np.sin(2 * rates), 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(turned.sin[0, 1], [0, 0, 0, 0, *np.sin(3 * rates)], atol=1e-6)


def test_centred_angles_are_those_of_dinov3() -> None:
    """2 pi times the patch's centre in [-1, 1]: the middle does not turn, whatever the number of patches."""
    turned = rotation_2d(grid_positions(3, 4)[None], jnp.asarray([[[3, 4]]]), 16, 100.0, "centred")
    rates = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(turned.sin[0, 4, :4], 0, atol=1e-6)  # the middle row
    np.testing.assert_allclose(turned.sin[0, 4, 4:], np.sin(2 * np.pi * -0.75 * rates), atol=1e-6)
    np.testing.assert_allclose(turned.cos[0, 11, :4], np.cos(2 * np.pi * (2 / 3) * rates), atol=1e-6)


def test_what_does_not_work_is_told() -> None:
    with pytest.raises(UserError, match="'lanczos'.*'bilinear', 'bicubic'"):
        resize_positions(jnp.asarray(TABLE), (2, 2), "lanczos")
    with pytest.raises(UserError, match="'moco'.*'big_vision', 'mae'"):
        sincos_positions(np.zeros(2), 16, "moco")
    with pytest.raises(UserError, match="it is 18"):
        sincos_positions(np.zeros(2), 18)
    where = jnp.zeros((1, 1, 2), jnp.int32)
    with pytest.raises(UserError, match="it is 6"):
        rotation_2d(where, where + 1, 6)
    with pytest.raises(UserError, match="'spiral'.*'patches', 'centred'"):
        rotation_2d(where, where + 1, 8, form="spiral")
