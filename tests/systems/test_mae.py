"""MAE: hidden patches are not seen, only they are learned from, and they are predicted better than by their mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import (
    GRID,
    PATCH,
    SIZE,
    TOWER,
    Bound,
    Given,
    N,
    outputs_of,
    start_of,
    step_config,
    textures,
    weights_and_seen,
)
from tests.tiny import assert_trees_close, experiment_of, layout_of, random_batch, take_steps
from vlpjax.config import Config, spec
from vlpjax.errors import UserError
from vlpjax.models.mae import MAEDecoder, put_back
from vlpjax.models.patches import cut
from vlpjax.models.vit import ViT
from vlpjax.objectives.masked_image import MaskedAutoencoding
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels, standardized_patches
from vlpjax.state import TrainState
from vlpjax.step import gradients

OBJECTIVE = MaskedAutoencoding(
    RandomPatches(0.75), Pixels(), patch=PATCH, decoder_width=32, decoder_depth=1, decoder_heads=2
)
IMAGES = textures(jax.random.key(0), 8)


@pytest.fixture(scope="module")
def mae() -> Bound:
    return Bound(OBJECTIVE, {"image": IMAGES}, class_tokens=1)


def test_what_was_kept_is_put_back_at_its_own_place() -> None:
    tokens = jax.random.normal(jax.random.key(1), (8, N, 3))
    split = RandomPatches(0.75).split(jax.random.split(jax.random.key(0), 8), N)
    kept = jnp.take_along_axis(tokens, split.keep[..., None], axis=1)
    full = put_back(kept, split.restore, jnp.full((1, 1, 3), 7.0))
    np.testing.assert_array_equal(full, np.where(split.mask[..., None], 7.0, tokens))
    assert np.all(split.mask.sum(axis=1) == N - N // 4)


def test_pixels_of_hidden_patches_do_not_reach_the_encoder(mae: Bound) -> None:
    split = RandomPatches(0.75).split(jax.random.split(jax.random.key(0), 8), N)
    tower = ViT(**TOWER, class_tokens=1)
    variables = {"params": mae.params["image"]}
    encode = jax.jit(lambda images: tower.apply(variables, images, keep=split.keep)["tokens"])
    pixels = jnp.repeat(jnp.repeat(split.mask.reshape(8, *GRID), PATCH, axis=1), PATCH, axis=2)[..., None]
    np.testing.assert_array_equal(encode(IMAGES), encode(jnp.where(pixels, 1e3, IMAGES)))
    assert np.any(encode(IMAGES) != encode(jnp.where(pixels, IMAGES, 0.0)))


@pytest.mark.parametrize("masked_only", [True, False])
def test_a_quarter_is_seen_and_what_is_not_seen_counts(masked_only: bool) -> None:
    objective = replace(OBJECTIVE, target=Given(), masked_only=masked_only)
    bound = Bound(objective, {"image": IMAGES, "errors": jnp.zeros((8, N))}, class_tokens=1)
    weights, seen = weights_and_seen(bound, IMAGES)
    assert np.all(seen.sum(axis=1) == N // 4)
    expected = ~seen / (8 * (N - N // 4)) if masked_only else np.full((8, N), 1 / (8 * N))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def standardized(images: jax.Array) -> np.ndarray:
    pixels = np.asarray(cut(images, (PATCH, PATCH)), np.float64)
    return (pixels - pixels.mean(-1, keepdims=True)) / np.sqrt(pixels.var(-1, ddof=1, keepdims=True) + 1e-6)


def test_the_loss_is_the_formula(mae: Bound) -> None:
    split = mae.evaluate(
        lambda context: OBJECTIVE.mask.split(context.row_keys("mask", 8), N), mae.params, None
    )
    seen = outputs_of(mae.params["image"], IMAGES, {"class_tokens": 1}, keep=split.keep)
    decoder = OBJECTIVE.heads()["decoder"]
    predicted = decoder.apply(
        {"params": mae.params["masked_decoder"]}, seen["tokens"], split.restore, GRID, prefix=seen["prefix"]
    )
    errors = np.square(np.asarray(predicted) - standardized(IMAGES)).mean(axis=-1)
    loss = mae.loss(mae.params, {"image": IMAGES}).value
    np.testing.assert_allclose(loss, errors[np.asarray(split.mask)].mean(), rtol=1e-5)


def test_targets_are_standardised_with_the_unbiased_variance() -> None:
    truth = standardized_patches(cut(IMAGES, (PATCH, PATCH)))
    np.testing.assert_allclose(truth, standardized(IMAGES), atol=1e-5)
    size = PATCH * PATCH * 3
    np.testing.assert_allclose(np.mean(np.square(truth)), (size - 1) / size, rtol=1e-3)  # what the mean costs


def test_hidden_patches_are_predicted_better_than_by_their_mean() -> None:
    mae = Bound(OBJECTIVE, {"image": IMAGES}, class_tokens=1)
    losses = mae.train(lambda key: {"image": textures(key)}, steps=300)
    size = PATCH * PATCH * 3
    assert losses[0] > 0.95
    assert losses[-20:].mean() < 0.7 * (size - 1) / size, losses[-20:].mean()


def config(**changes: Any) -> Config:
    objective = spec(
        MaskedAutoencoding, mask=spec(RandomPatches, ratio=0.75), target=spec(Pixels), patch=PATCH, decoder_width=32,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    return step_config(objective, **changes)


@pytest.fixture(scope="module")
def start() -> TrainState:
    return start_of(config())


def test_eight_devices_train_as_one(start: TrainState) -> None:
    one, eight = (take_steps(config(), layout_of(devices), steps=2, start=start) for devices in (1, 8))
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
    assert one.losses[0] != one.losses[1]


def test_four_micro_batches_have_the_gradient_of_the_whole_batch(start: TrainState) -> None:
    def grads(accumulate: int) -> Any:
        experiment = experiment_of(config(accumulate=accumulate))
        return jax.jit(lambda state, batch: gradients(experiment, state, batch))(start, random_batch())

    (whole, _, expected), (parts, _, found) = grads(1), grads(4)
    np.testing.assert_allclose(parts["masked"].value, whole["masked"].value, rtol=1e-5)
    assert_trees_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_decoder_says_which_grid_it_was_given() -> None:
    decoder = MAEDecoder(features=3, width=8, depth=1, heads=2)
    with pytest.raises(Exception, match="16 patches for a grid of 3x3"):
        decoder.init(jax.random.key(0), jnp.zeros((1, 4, 8)), jnp.zeros((1, N), jnp.int32), (3, 3))


@pytest.mark.parametrize(("cross", "memory"), [(False, jnp.zeros((1, N, 8))), (True, None)])
def test_the_decoder_says_whether_it_takes_a_second_view(cross: bool, memory: jax.Array | None) -> None:
    decoder = MAEDecoder(features=3, width=8, depth=1, heads=2, cross=cross)
    with pytest.raises(UserError, match=f"decoder with cross={cross} .* second view"):
        decoder.init(
            jax.random.key(0), jnp.zeros((1, 4, 8)), jnp.zeros((1, N), jnp.int32), GRID, memory=memory
        )


def test_images_that_the_patch_does_not_divide_are_refused(mae: Bound) -> None:
    with pytest.raises(Exception, match=r"MaskedAutoencoding.patch is 4, but the batch has images of shape"):
        mae.loss(mae.params, {"image": jnp.zeros((2, SIZE + 1, SIZE, 3))})
