"""SimMIM and BEiT: hidden patches are replaced by one token, and only they are predicted and counted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import (
    GRID,
    PATCH,
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
from tests.tiny import assert_trees_close, experiment_of, layout_of, random_batch
from vlpjax.config import spec
from vlpjax.models.image_tokenizers import DiscreteVAEEncoder, RandomProjectionTokenizer
from vlpjax.models.patches import cut, join
from vlpjax.models.vit import ViT
from vlpjax.objectives.masked_image import MaskedPrediction
from vlpjax.objectives.masking import BlockWise, RandomCells
from vlpjax.objectives.targets import Pixels, TokenIds
from vlpjax.step import gradients

PIXELS = Pixels(standardize=False, distance="l1")
CELLS = RandomCells(0.6, 2)
IMAGES = textures(jax.random.key(0), 8)
CODES = 32
BLOCKS = BlockWise(0.4, 2)


@pytest.fixture(scope="module")
def simmim() -> Bound:
    return Bound(MaskedPrediction(CELLS, PIXELS, patch=PATCH), {"image": IMAGES}, mask_token=True)


def masks_of(bound: Bound, policy: Any = CELLS) -> np.ndarray:
    """Which patches of eight images the loss hides."""
    draw = bound.evaluate(lambda context: policy(context.row_keys("mask", 8), GRID), bound.params, None)
    return np.asarray(draw)


def test_the_loss_is_that_of_a_plain_loop_over_hidden_pixels(simmim: Bound) -> None:
    mask, head = masks_of(simmim), simmim.params["masked_head"]["prediction"]
    tokens = outputs_of(simmim.params["image"], IMAGES, {"mask_token": True}, masked=jnp.asarray(mask))
    predicted = np.asarray(tokens["tokens"]) @ head["kernel"] + head["bias"]
    rebuilt = np.asarray(join(jnp.asarray(predicted), GRID, (PATCH, PATCH)))
    hidden = np.repeat(np.repeat(mask.reshape(8, *GRID), PATCH, 1), PATCH, 2)
    total, count = 0.0, 0
    for image, row, column in np.argwhere(hidden):
        total += float(np.abs(np.asarray(IMAGES) - rebuilt)[image, row, column].sum())
        count += 1
    loss = simmim.loss(simmim.params, {"image": IMAGES})
    np.testing.assert_allclose(loss.value, total / count / 3, rtol=1e-5)


@pytest.mark.parametrize("policy", [CELLS, BLOCKS], ids=lambda policy: type(policy).__name__)
def test_what_is_not_seen_counts_and_nothing_else(policy: Any) -> None:
    batch = {"image": IMAGES, "errors": jnp.zeros((8, N))}
    bound = Bound(MaskedPrediction(policy, Given(), patch=PATCH), batch, mask_token=True)
    weights, seen = weights_and_seen(bound, IMAGES)
    np.testing.assert_array_equal(seen, ~masks_of(bound, policy))
    np.testing.assert_allclose(weights, ~seen / np.sum(~seen), rtol=1e-6)


def test_joining_is_the_inverse_of_cutting() -> None:
    np.testing.assert_array_equal(join(cut(IMAGES, (PATCH, PATCH)), GRID, (PATCH, PATCH)), IMAGES)
    clip = jnp.stack([IMAGES, IMAGES + 1, IMAGES, IMAGES], axis=1)
    np.testing.assert_array_equal(join(cut(clip, (4, 8), 2), (4, 2), (4, 8), 2), clip)


def test_hidden_pixels_are_not_seen_and_everything_else_is(simmim: Bound) -> None:
    tower = ViT(**TOWER, mask_token=True)
    mask = CELLS(jax.random.split(jax.random.key(0), 8), GRID)
    variables = {"params": simmim.params["image"]}
    encode = jax.jit(lambda images: tower.apply(variables, images, masked=mask)["tokens"])
    hidden = jnp.repeat(jnp.repeat(mask.reshape(8, *GRID), PATCH, axis=1), PATCH, axis=2)[..., None]
    np.testing.assert_array_equal(encode(IMAGES), encode(jnp.where(hidden, 50.0, IMAGES)))
    assert np.all(np.any(encode(IMAGES) != encode(jnp.where(hidden, IMAGES, 0.0)), axis=(1, 2)))


def beit() -> Bound:
    towers = {
        "image": ViT(**{**TOWER, "mask_token": True}),
        "tokenizer": RandomProjectionTokenizer(PATCH, vocabulary=CODES, width=8),
    }
    objective = MaskedPrediction(BLOCKS, TokenIds(CODES), patch=PATCH)
    return Bound(objective, {"image": IMAGES}, teacher="tokenizer", towers=towers)


def test_ids_of_hidden_patches_are_learned_and_the_tokenizer_is_not() -> None:
    bound = beit()
    tokenizer = {name: np.array(leaf) for name, leaf in bound.params["tokenizer"]["projection"].items()}
    losses = bound.train(lambda key: {"image": textures(key)}, steps=150)
    assert losses[:5].mean() > 0.9 * np.log(CODES)
    assert losses[-20:].mean() < 0.8 * np.log(CODES), losses[-20:].mean()
    for name, leaf in tokenizer.items():
        np.testing.assert_array_equal(bound.params["tokenizer"]["projection"][name], leaf)


def test_nearest_codes_do_not_depend_on_brightness_and_contrast() -> None:
    tokenizer = RandomProjectionTokenizer(PATCH, vocabulary=CODES)
    variables = tokenizer.init(jax.random.key(0), IMAGES)
    encode = jax.jit(lambda images: tokenizer.apply(variables, images)["ids"])
    ids = encode(IMAGES)
    np.testing.assert_array_equal(ids, encode(2 * IMAGES + 3))
    assert ids.shape == (8, N) and len(np.unique(ids)) > CODES // 4


def test_the_discrete_vae_gives_one_id_per_eight_pixels() -> None:
    encoder = DiscreteVAEEncoder(vocabulary=8192)
    outputs, variables = jax.eval_shape(
        lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 112, 112, 3)))
    )
    assert outputs["ids"].shape == (2, 196)
    assert len(variables["params"]) == 2 + 8 * 4 + 3  # input, output, four per block, three that widen
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    assert 50e6 < count < 58e6, count


def test_micro_batches_with_unequal_counts_have_the_gradient_of_the_whole_batch() -> None:
    objective = spec(
        MaskedPrediction,
        mask=spec(BlockWise, ratio=0.4, smallest=12),
        target=spec(Pixels, standardize=False, distance="l1"),
        patch=2,
    )
    config = step_config(objective)
    config.towers.image.mask_token, config.towers.image.patch = True, 2
    start = start_of(config)

    def grads(accumulate: int, devices: int = 1) -> Any:
        config.accumulate = accumulate
        experiment, layout = experiment_of(config), layout_of(devices)

        def run(state: Any, batch: Any) -> Any:
            with layout.activate():
                return gradients(experiment, state, batch)

        return jax.jit(run)(start, jax.device_put(random_batch(), layout.sharding("batch")))

    whole, _, expected = grads(1)
    assert whole["masked"].metrics["masked"] < int(0.4 * 64), "the images should not all hide equally much"
    for accumulate, devices in ((4, 1), (1, 8)):
        parts, _, found = grads(accumulate, devices)
        np.testing.assert_allclose(parts["masked"].value, whole["masked"].value, rtol=1e-5)
        assert_trees_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_tower_without_a_mask_token_is_refused() -> None:
    with pytest.raises(Exception, match="mask_token=False"):
        Bound(MaskedPrediction(CELLS, PIXELS, patch=PATCH), {"image": IMAGES})
