"""Masked language modelling hides what it should, and its loss is that of the formula."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import TOWER, Bound
from vlpjax.errors import UserError
from vlpjax.models.text import MaskedLanguageHead, TextTransformer
from vlpjax.models.vit import ViT
from vlpjax.objectives.base import Context
from vlpjax.objectives.masked_language import MaskedLanguage, hide_tokens

V, L, MASK = 40, 12, 39
RNG = np.random.default_rng(0)
IDS = RNG.integers(3, MASK, (32, L)).astype(np.int32)
IDS[:, 0] = 2  # a special token
for row, length in enumerate(RNG.integers(4, L + 1, 32)):
    IDS[row, length:] = 0
BATCH = {"text": IDS}
FIELDS: dict[str, Any] = dict(
    vocabulary=V, length=L, width=16, depth=1, heads=2, mlp_ratio=2.0, causal=False, mask_padding=True
)


def towers(**fields: Any) -> dict[str, Any]:
    return {"text": TextTransformer(**{**FIELDS, **fields})}


def test_hidden_tokens_are_masked_replaced_or_left_in_the_published_shares() -> None:
    ids = jnp.tile(jnp.arange(3, 35), (512, 1))
    keys = jax.random.split(jax.random.key(0), 512)
    hideable = jnp.ones(32, bool).at[:2].set(False)
    read, chosen = map(
        np.asarray,
        jax.jit(jax.vmap(lambda key, ids: hide_tokens(key, ids, hideable, 0.15, MASK, V)))(keys, ids),
    )
    assert np.all(chosen.sum(axis=1) == round(0.15 * 30)) and not chosen[:, :2].any()
    np.testing.assert_array_equal(read[~chosen], np.asarray(ids)[~chosen])
    masked, kept = np.mean(read[chosen] == MASK), np.mean(read[chosen] == np.asarray(ids)[chosen])
    assert abs(masked - (0.8 + 0.1 / V)) < 0.03 and abs(kept - (0.1 + 0.1 / V)) < 0.03


def test_runs_leave_padding_and_special_tokens_alone() -> None:
    keys = jax.random.split(jax.random.key(0), len(IDS))
    hide = jax.jit(jax.vmap(lambda k, i, h: hide_tokens(k, i, h, 0.5, MASK, V, in_spans=True)))
    _, chosen = hide(keys, IDS, IDS > 2)
    assert np.all(chosen <= (IDS > 2))
    np.testing.assert_array_equal(chosen.sum(axis=1), np.maximum(np.round(0.5 * (IDS > 2).sum(axis=1)), 1))


def test_a_run_goes_on_behind_a_special_token_and_hides_one_token_at_least() -> None:
    keys = jax.random.split(jax.random.key(0), 256)
    ids, hideable = jnp.arange(3, 3 + L), np.arange(L) % 3 == 2  # four of twelve

    @jax.jit
    def hide(ratio: jax.Array) -> jax.Array:
        draw = jax.vmap(lambda key: hide_tokens(key, ids, hideable, ratio, MASK, V, in_spans=True)[1])
        return draw(keys)

    for ratio, count in ((0.5, 2), (0.01, 1)):
        chosen = np.asarray(hide(jnp.float32(ratio)))
        assert np.all(chosen.sum(axis=1) == count) and np.all(chosen <= hideable)
    assert set(np.flatnonzero(chosen.any(axis=0))) == set(np.flatnonzero(hideable))


def hidden_of(bound: Bound, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens the loss hides, and the logarithms of what is predicted at all places [B, L, V], in float64."""

    def run(context: Context) -> Any:
        keys = context.row_keys("tokens", len(IDS))
        hide = jax.vmap(lambda key, ids, hideable: hide_tokens(key, ids, hideable, ratio, MASK, V))
        read, chosen = hide(keys, IDS, IDS > 2)
        return chosen, context.student.call("text", read)["tokens"]

    chosen, tokens = bound.evaluate(run, bound.params, BATCH)
    table = bound.params["text"]["token_embedding"]["embedding"]
    logits = MaskedLanguageHead(V).apply({"params": bound.params["masked_head"]}, tokens, table)
    exponentials = np.exp(np.asarray(logits, np.float64))
    return np.asarray(chosen), np.log(exponentials / exponentials.sum(axis=-1, keepdims=True))


def test_the_loss_is_the_cross_entropy_over_all_hidden_tokens_of_the_batch() -> None:
    bound = Bound(MaskedLanguage(V, MASK, special=(2,), ratio=0.3), BATCH, towers=towers())
    chosen, likelihood = hidden_of(bound, 0.3)
    np.testing.assert_array_equal(chosen.sum(axis=1), np.maximum(np.round(0.3 * (IDS > 2).sum(axis=1)), 1))
    loss = bound.loss(bound.params, BATCH)
    errors = -np.take_along_axis(likelihood, IDS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss.value, errors[chosen].mean(), rtol=1e-5)
    hits = likelihood.argmax(axis=-1) == IDS
    np.testing.assert_allclose(loss.metrics["accuracy"], hits[chosen].mean(), rtol=1e-5)
    assert abs(errors[chosen].mean() - errors[IDS > 2].mean()) > 1e-3, "the test could not tell"


def test_the_table_of_embeddings_is_the_decoder_and_learns_from_it() -> None:
    bound = Bound(MaskedLanguage(V, MASK, special=(2,)), BATCH, towers=towers())
    assert "embedding" not in bound.params["masked_head"]
    grads = jax.grad(lambda params: bound.loss(params, BATCH).value)(bound.params)
    table = grads["text"]["token_embedding"]["embedding"]
    unread = np.setdiff1d(np.arange(V), IDS)
    assert np.all(np.any(table[unread] != 0, axis=1)), "ids that are never read are decoded all the same"


def test_a_teacher_that_is_the_student_adds_its_own_entropy() -> None:
    objective = MaskedLanguage(V, MASK, special=(2,), teacher="ema", soft=1.0)
    soft = Bound(objective, BATCH, teacher="ema", towers=towers())
    value, grads = jax.value_and_grad(lambda params: soft.loss(params, BATCH).value)(soft.params)
    # The cross-entropy of a distribution with itself has no gradient.
    assert all(np.all(np.abs(leaf) < 1e-6) for leaf in jax.tree.leaves(grads))
    chosen, likelihood = hidden_of(soft, 0.15)
    entropy = -(np.exp(likelihood) * likelihood).sum(axis=-1)
    np.testing.assert_allclose(value, entropy[chosen].mean(), rtol=1e-5)


def test_the_text_attends_to_the_image() -> None:
    images = {"image": jnp.asarray(RNG.normal(size=(32, 16, 16, 3)), jnp.float32)}
    both = {**towers(cross=True), "image": ViT(**TOWER)}
    bound = Bound(MaskedLanguage(V, MASK, image="image"), {**BATCH, **images}, towers=both)
    grads = jax.grad(lambda images: bound.loss(bound.params, {**BATCH, "image": images}).value)(
        images["image"]
    )
    assert np.all(np.any(grads != 0, axis=(1, 2, 3)))


def test_hidden_words_are_learned() -> None:
    """Every text counts upwards from a random number: what is hidden stands between its neighbours."""

    def count(key: jax.Array) -> dict[str, jax.Array]:
        return {"text": jax.random.randint(key, (64, 1), 3, MASK - L) + jnp.arange(L)}

    bound = Bound(MaskedLanguage(V, MASK), BATCH, towers=towers())
    losses = bound.train(count, steps=200, rate=1e-2)
    assert losses[-10:].mean() < 0.4 * losses[0], losses[-10:].mean()


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="mask_id is 40"):
        MaskedLanguage(V, V)
    with pytest.raises(UserError, match="shares are"):
        MaskedLanguage(V, MASK, shares=(0.8, 0.3))
    with pytest.raises(UserError, match="ratio is 0"):
        MaskedLanguage(V, MASK, ratio=0.0)
    with pytest.raises(UserError, match="asks for the teacher 'emma'.*'ema'"):
        Bound(MaskedLanguage(V, MASK, teacher="emma"), BATCH, teacher="ema", towers=towers())
    with pytest.raises(Exception, match="sees both sides"):
        Bound(MaskedLanguage(V, MASK), BATCH, towers=towers(causal=True))
