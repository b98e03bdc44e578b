"""NEPA: causal, shifted by one, and kept from collapsing by the stop-gradient alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import Bound, N, outputs_of, textures
from vlpjax.objectives.predictive import NextEmbedding, next_embedding_loss

IMAGES = textures(jax.random.key(0), 8)
FIELDS = dict(
    causal=True, class_tokens=1, positions="rotary", rotary_form="centred", rotary_base=100.0, qk_norm="layer_plain",
    epsilon=1e-12,
)  # fmt: skip


@pytest.fixture(scope="module")
def nepa() -> Bound:
    return Bound(NextEmbedding(), {"image": IMAGES}, **FIELDS)


def hidden_of(bound: Bound, images: jax.Array) -> np.ndarray:
    """Outputs of the class token and of all patches: [B, 1 + N, D]."""
    outputs = outputs_of(bound.params["image"], images, FIELDS)
    return np.concatenate([outputs["prefix"], outputs["tokens"]], axis=1)


@pytest.mark.parametrize("patch", [0, 6, N - 1])
def test_a_patch_changes_its_own_output_and_later_ones_only(nepa: Bound, patch: int) -> None:
    row, column = divmod(patch, 4)
    changed = IMAGES.at[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].add(1.0)
    before, after = hidden_of(nepa, IMAGES), hidden_of(nepa, changed)
    np.testing.assert_array_equal(before[:, : patch + 1], after[:, : patch + 1])
    assert np.all(np.any(before[:, patch + 1 :] != after[:, patch + 1 :], axis=-1))


def test_the_next_embedding_costs_minus_one_and_the_own_more() -> None:
    embedded = jax.random.normal(jax.random.key(0), (4, N, 8))
    np.testing.assert_allclose(next_embedding_loss(3.0 * embedded, embedded).value, -1.0, atol=1e-6)
    assert next_embedding_loss(jnp.roll(embedded, 1, axis=1), embedded).value > -0.5


def test_the_objective_shifts_by_one_and_leaves_the_last_output_out(nepa: Bound) -> None:
    hidden = hidden_of(nepa, IMAGES)[:, :-1].astype(np.float64)
    outputs = outputs_of(nepa.params["image"], IMAGES, FIELDS, embedded=True)
    truth = np.asarray(outputs["patch_embeddings"], np.float64)
    cosines = (hidden * truth).sum(-1) / np.linalg.norm(hidden, axis=-1) / np.linalg.norm(truth, axis=-1)
    np.testing.assert_allclose(nepa.loss(nepa.params, {"image": IMAGES}).value, -cosines.mean(), rtol=1e-4)


def test_without_the_stop_gradient_the_embeddings_collapse() -> None:
    def spread(objective: NextEmbedding) -> float:
        bound = Bound(objective, {"image": IMAGES}, **FIELDS)
        bound.train(lambda key: {"image": textures(key, 32)}, steps=600, rate=3e-3)
        return float(bound.loss(bound.params, {"image": IMAGES}).metrics["spread"])

    kept, collapsed = spread(NextEmbedding()), spread(NextEmbedding(stop_gradient=False))
    assert kept > 0.1 and collapsed < 0.02, (kept, collapsed)


def test_the_next_patch_is_predicted_better_than_by_the_mean_direction(nepa: Bound) -> None:
    bound = Bound(NextEmbedding(), {"image": IMAGES}, **FIELDS)
    bound.train(lambda key: {"image": textures(key, 32)}, steps=200, rate=3e-3)
    embedded = outputs_of(bound.params["image"], IMAGES, FIELDS, embedded=True)["patch_embeddings"]
    directions = embedded / jnp.linalg.norm(embedded, axis=-1, keepdims=True)
    mean = jnp.broadcast_to(directions.mean(axis=(0, 1)), embedded.shape)
    by_mean = next_embedding_loss(mean, embedded).value
    assert bound.loss(bound.params, {"image": IMAGES}).value < by_mean - 0.1


def test_qk_norm_learns_nothing(nepa: Bound) -> None:
    assert set(nepa.params["image"]["block_0"]["attention"]) == {"query", "key", "value", "out"}


def test_towers_that_see_the_future_or_leave_patches_out_are_refused() -> None:
    with pytest.raises(Exception, match="needs a causal tower"):
        Bound(NextEmbedding(), {"image": IMAGES}, class_tokens=1)
    with pytest.raises(Exception, match="needs a class token"):
        Bound(NextEmbedding(), {"image": IMAGES}, causal=True)
    with pytest.raises(Exception, match="leaves patches out: patch_dropout=0.5"):
        Bound(NextEmbedding(), {"image": IMAGES}, **FIELDS, patch_dropout=0.5)
