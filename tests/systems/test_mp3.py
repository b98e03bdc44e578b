"""MP3: no position leaks in, only context patches are looked at, and places are learned from content."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import GRID, PATCH, Bound, N, outputs_of, textures
from vlpjax.models.patches import cut, join
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.predictive import PositionPrediction

IMAGES = textures(jax.random.key(0), 4)
FIELDS = dict(positions="none", class_tokens=0)


def objective(ratio: float) -> PositionPrediction:
    return PositionPrediction(RandomPatches(ratio), GRID, patch=PATCH)


@pytest.fixture(scope="module")
def mp3() -> Bound:
    return Bound(objective(0.75), {"image": IMAGES}, **FIELDS)


def tokens_of(bound: Bound, images: jax.Array, seen: jax.Array) -> jax.Array:
    tokens: jax.Array = outputs_of(bound.params["image"], images, FIELDS, keys=seen)["tokens"]
    return tokens


def contexts(count: int = 4, size: int = 4) -> jax.Array:
    return ~RandomPatches(1 - size / N)(jax.random.split(jax.random.key(1), count), GRID)


def test_shuffled_patches_have_shuffled_outputs(mp3: Bound) -> None:
    order, seen = jax.random.permutation(jax.random.key(2), N), contexts()
    shuffled = join(cut(IMAGES, (PATCH, PATCH))[:, order], GRID, (PATCH, PATCH))
    expected = tokens_of(mp3, IMAGES, seen)[:, order]
    np.testing.assert_allclose(tokens_of(mp3, shuffled, seen[:, order]), expected, atol=1e-5)


def test_a_patch_outside_the_context_moves_its_own_output_only(mp3: Bound) -> None:
    seen = contexts()
    moved = jnp.argmin(seen, axis=1)  # the first patch that is not in the context
    patches = cut(IMAGES, (PATCH, PATCH))
    changed = patches.at[jnp.arange(4), moved].add(1.0)
    before = tokens_of(mp3, IMAGES, seen)
    after = tokens_of(mp3, join(changed, GRID, (PATCH, PATCH)), seen)
    differs = np.any(np.asarray(before != after), axis=-1)
    np.testing.assert_array_equal(differs, np.arange(N) == np.asarray(moved)[:, None])
    context = patches.at[jnp.arange(4), jnp.argmax(seen, axis=1)].add(1.0)
    assert np.all(np.any(tokens_of(mp3, join(context, GRID, (PATCH, PATCH)), seen) != before, axis=-1))


def test_the_loss_is_the_cross_entropy_of_all_patches_places_from_a_quarter_of_them(mp3: Bound) -> None:
    seen = mp3.evaluate(
        lambda context: ~RandomPatches(0.75)(context.row_keys("context", 4), GRID), mp3.params, None
    )
    assert np.all(seen.sum(axis=1) == N // 4)
    head = mp3.params["masked_head"]["prediction"]
    logits = np.asarray(tokens_of(mp3, IMAGES, seen), np.float64) @ head["kernel"] + head["bias"]
    likelihood = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)  # [B, N, N]
    loss = mp3.loss(mp3.params, {"image": IMAGES})
    np.testing.assert_allclose(loss.value, -np.log(np.einsum("bnn->bn", likelihood)).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["accuracy"], np.mean(logits.argmax(axis=-1) == np.arange(N)))


def test_at_the_start_every_place_is_equally_likely(mp3: Bound) -> None:
    head = objective(0.75).heads()["head"]
    made = head.init(jax.random.key(0), jnp.zeros((1, N, 32)))["params"]["prediction"]["kernel"].unbox()
    assert not np.any(made)
    params = {**mp3.params, "masked_head": jax.tree.map(jnp.zeros_like, mp3.params["masked_head"])}
    np.testing.assert_allclose(mp3.loss(params, {"image": IMAGES}).value, np.log(N), rtol=1e-6)


def placed(key: jax.Array) -> dict[str, jax.Array]:
    """Textures that are brighter at the top and redder on the right: a patch shows where it is, less its ground."""
    row, column = jnp.meshgrid(jnp.arange(16) / 8 - 1, jnp.arange(16) / 8 - 1, indexing="ij")
    ramp = jnp.stack([row + column, row, row - column], axis=-1)
    return {"image": textures(key, 32) + ramp}


def test_places_are_learned_and_more_context_helps() -> None:
    def accuracy(ratio: float) -> float:
        bound = Bound(objective(ratio), {"image": IMAGES}, **FIELDS)
        bound.train(placed, steps=200, rate=3e-3)
        return float(bound.loss(bound.params, placed(jax.random.key(9))).metrics["accuracy"])

    whole, quarter = accuracy(0.0), accuracy(0.75)
    assert whole > quarter + 0.2 > 8 / N, (whole, quarter)


def test_towers_that_know_positions_are_refused() -> None:
    with pytest.raises(Exception, match="knows no positions"):
        Bound(objective(0.5), {"image": IMAGES}, class_tokens=0)
    with pytest.raises(Exception, match=r"grid is \(2, 8\), but the images have \(4, 4\)"):
        Bound(PositionPrediction(RandomPatches(), (2, 8), patch=PATCH), {"image": IMAGES}, **FIELDS)
    with pytest.raises(Exception, match=r"ratio=0.99 of 16 patches leaves none"):
        Bound(objective(0.99), {"image": IMAGES}, **FIELDS)
    with pytest.raises(Exception, match=r"causal=True.*patch_dropout=0.0"):
        Bound(objective(0.5), {"image": IMAGES}, **FIELDS, causal=True)
    with pytest.raises(Exception, match=r"causal=False.*patch_dropout=0.5"):
        Bound(objective(0.5), {"image": IMAGES}, **FIELDS, patch_dropout=0.5)
