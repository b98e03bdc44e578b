"""Pictures of masked objectives: what is seen stays, what is hidden is grey, then the prediction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.patches import cut, join
from vlpjax.objectives.masked_image import pictures
from vlpjax.objectives.targets import Features, Pixels, Target, standardized_patches

IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3))
SIZE, GRID = (4, 4), (2, 3)
MASK = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
PIXELS = jnp.repeat(jnp.repeat(MASK.reshape(2, *GRID), 4, axis=1), 4, axis=2)[..., None]


@pytest.mark.parametrize("standardize", [True, False])
def test_a_perfect_prediction_is_the_image(standardize):
    target = Pixels(standardize=standardize)
    patches = cut(IMAGES, SIZE)
    shown = pictures(target, IMAGES, MASK, standardized_patches(patches) if standardize else patches, 4)
    np.testing.assert_array_equal(shown["original"], IMAGES)
    np.testing.assert_allclose(shown["reconstructed"], IMAGES, atol=1e-6)


def test_only_hidden_patches_change():
    shown = pictures(Pixels(standardize=False), IMAGES, MASK, jnp.full((2, 6, 48), 7.0), 4)
    np.testing.assert_array_equal(shown["reconstructed"], np.where(PIXELS, 7.0, IMAGES))
    mean = np.broadcast_to(np.mean(IMAGES, axis=(1, 2), keepdims=True), IMAGES.shape)
    np.testing.assert_allclose(shown["masked"], np.where(PIXELS, mean, IMAGES), atol=1e-6)
    np.testing.assert_array_equal(join(cut(IMAGES, SIZE), GRID, SIZE), IMAGES)


def test_what_is_no_pixels_has_no_picture():
    with pytest.raises(UserError, match="Target predicts no pixels"):
        pictures(Target(), IMAGES, MASK, jnp.zeros((2, 6, 48)), 4)
    assert Features.pixels is Target.pixels
