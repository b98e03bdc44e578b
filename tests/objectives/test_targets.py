"""Targets against plain loops in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import PATCH, Bound, outputs_of, textures
from vlpjax.errors import UserError
from vlpjax.objectives.masked_image import MaskedPrediction
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Features, OrientedGradients, Pixels, distance, oriented_gradients

IMAGES = np.asarray(textures(jax.random.key(0), 3))


def histograms(images: np.ndarray, bins: int, cell: int) -> np.ndarray:
    """Votes counted one pixel at a time."""
    count, height, width, channels = images.shape
    out = np.zeros((count, height // cell, width // cell, channels, bins))
    for image, row, column, channel in np.ndindex(images.shape):
        plane = images[image, :, :, channel].astype(np.float64)
        above, below = abs(row - 1), height - 1 - abs(height - 1 - (row + 1))
        left, right = abs(column - 1), width - 1 - abs(width - 1 - (column + 1))
        down, along = plane[below, column] - plane[above, column], plane[row, right] - plane[row, left]
        turn = np.degrees(np.arctan2(down, along)) % 180
        vote = int(turn // (180 / bins)) % bins
        out[image, row // cell, column // cell, channel, vote] += np.hypot(down, along)
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


@pytest.mark.parametrize(("bins", "cell"), [(9, 4), (6, 8)])
def test_oriented_gradients_are_counted_votes(bins: int, cell: int) -> None:
    np.testing.assert_allclose(
        oriented_gradients(IMAGES, bins, cell), histograms(IMAGES, bins, cell), atol=2e-3
    )


def test_a_flat_image_has_no_gradients_and_a_ramp_one_direction() -> None:
    flat = oriented_gradients(jnp.ones((1, 8, 8, 1)), cell=4)
    assert not np.any(flat)
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (1, 8, 8, 1))
    down = np.asarray(oriented_gradients(ramp, bins=9, cell=4))[0, 0, 0, 0]
    np.testing.assert_allclose(down, np.eye(9)[4], atol=1e-6)  # 90 of 180 degrees


def test_a_patchs_cells_stand_together() -> None:
    target = OrientedGradients(bins=3, cell=2)
    truth = target.truth(None, jnp.asarray(IMAGES), (4, 4))  # type: ignore[arg-type]
    cells = oriented_gradients(jnp.asarray(IMAGES), 3, 2)
    assert truth.shape == (3, 16, target.features((4, 4), 3))
    np.testing.assert_array_equal(truth[:, 5], cells[:, 2:4, 2:4].reshape(3, -1))


def test_distances_are_the_formulas() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 4, 5)) * 2
    gap = np.abs(x - y)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    expected = {
        "l1": gap.mean(-1),
        "l2": (gap**2).mean(-1),
        "smooth_l1": np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean(-1),
        "cosine": 1 - cosine,
    }
    for kind, value in expected.items():
        np.testing.assert_allclose(distance(jnp.asarray(x), jnp.asarray(y), kind), value, rtol=1e-5)


def test_a_teachers_tokens_are_standardised_and_carry_no_gradient() -> None:
    batch = {"image": jnp.asarray(IMAGES)}
    objective = MaskedPrediction(RandomPatches(0.5), Features(width=32, teacher="ema"), patch=PATCH)
    bound = Bound(objective, batch, teacher="ema", mask_token=True)
    tokens = np.asarray(
        outputs_of(bound.params["image"], jnp.asarray(IMAGES), {"mask_token": True})["tokens"]
    )
    truth = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    draw = bound.evaluate(
        lambda context: objective.mask(context.row_keys("mask", 3), (4, 4)), bound.params, None
    )
    mask = np.asarray(draw)
    zeros = {**bound.params, "masked_head": jax.tree.map(jnp.zeros_like, bound.params["masked_head"])}
    gap = np.abs(truth)
    huber = np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean(-1)
    loss = bound.loss(zeros, batch).value
    assert mask.sum() == 3 * 8
    np.testing.assert_allclose(loss, huber[mask].mean(), rtol=1e-5)
    grads = jax.grad(lambda params: bound.loss(params, batch).value)(zeros)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["image"]))  # only through the teacher


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"Pixels.distance is 'l3'"):
        Pixels(distance="l3")
    with pytest.raises(UserError, match="does not divide a patch of 4x4"):
        OrientedGradients(cell=3).features((4, 4), 3)
