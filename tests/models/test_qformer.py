"""The Q-Former: what may influence what under each of its masks, and what it tells about bad input."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.qformer import QFormer, qformer_interval

QUERIES, LENGTH = 3, 5
MODEL = QFormer(queries=QUERIES, width=16, depth=3, heads=2, mlp_dim=24, vocabulary=11, length=6, embedding=4)
IMAGE = np.random.default_rng(0).standard_normal((1, 6, 10)).astype(np.float32)
IDS = np.array([[4, 7, 2, 9, 0]], np.int32)  # the last is padding
TEXT = 4


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(0), IMAGE, IDS)


# In one batch: the example, the example with another token at each place, and with another image.
PLACES = np.arange(LENGTH)
CHANGED_IDS = np.where(PLACES[:, None] == PLACES, np.where(PLACES < TEXT, 10, 0), IDS)
BATCH_IDS = np.concatenate([IDS, CHANGED_IDS, IDS]).astype(np.int32)
BATCH_IMAGES = np.concatenate([IMAGE] * (1 + LENGTH) + [IMAGE + 1])


@functools.partial(jax.jit, static_argnames="mask")
def run(variables: Any, mask: str) -> jax.Array:
    """All tokens after the last block, queries and then text, of the batch."""
    return MODEL.apply(variables, BATCH_IMAGES, BATCH_IDS, mask=mask, hidden=(-1,))["hidden"][-1]


def outputs(variables: Any, mask: str) -> jax.Array:
    """All tokens of the example itself."""
    return run(variables, mask)[0]


def influence(variables: Any, mask: str) -> np.ndarray:
    """[output, input]: whether an output depends on an input, of the text."""
    found = np.asarray(run(variables, mask))
    return (np.abs(found[1:-1] - found[0]).max(axis=-1) > 0).T


def image_influence(variables: Any, mask: str) -> np.ndarray:
    """Whether each output depends on the image."""
    found = np.asarray(run(variables, mask))
    return np.abs(found[-1] - found[0]).max(axis=-1) > 0


QUERY, WORD = slice(0, QUERIES), slice(QUERIES, QUERIES + TEXT)


def test_matching_lets_everything_see_everything(variables: Any) -> None:
    assert influence(variables, "bidirectional")[: QUERIES + TEXT, :TEXT].all()
    assert image_influence(variables, "bidirectional").all()


def test_contrast_keeps_queries_and_text_apart(variables: Any) -> None:
    found = influence(variables, "unimodal")
    assert not found[QUERY].any()
    assert found[WORD, :TEXT].all()
    seen = image_influence(variables, "unimodal")
    assert seen[QUERY].all() and not seen[WORD].any()


def test_generation_lets_text_see_queries_and_earlier_text(variables: Any) -> None:
    found = influence(variables, "causal")
    assert not found[QUERY].any()
    np.testing.assert_array_equal(found[WORD, :TEXT], np.tril(np.ones((TEXT, TEXT), bool)))
    assert image_influence(variables, "causal")[: QUERIES + TEXT].all()


@pytest.mark.parametrize("mask", ["bidirectional", "unimodal", "causal"])
def test_the_interval_is_the_mask_written_out(mask: str) -> None:
    lengths = jnp.array([TEXT, 2])
    seen = np.asarray(qformer_interval(mask, QUERIES, lengths, LENGTH).mask(QUERIES + LENGTH))
    for row, length in enumerate((TEXT, 2)):
        for query in range(QUERIES + length):
            for key in range(QUERIES + LENGTH):
                asks, asked = query < QUERIES, key < QUERIES
                allowed = {
                    "bidirectional": True,
                    "unimodal": asks == asked,
                    "causal": asked or (not asks and key <= query),
                }[mask]
                assert seen[row, query, key] == (allowed and key < QUERIES + length), (query, key)


def test_what_sees_nothing_of_the_other_is_as_if_alone(variables: Any) -> None:
    image_alone = jax.jit(lambda v: MODEL.apply(v, IMAGE)["tokens"][0])(variables)
    text_alone = jax.jit(lambda v: MODEL.apply(v, ids=IDS)["text_tokens"][0])(variables)
    np.testing.assert_allclose(outputs(variables, "unimodal")[QUERY], image_alone, atol=2e-6)
    np.testing.assert_allclose(outputs(variables, "causal")[QUERY], image_alone, atol=2e-6)
    np.testing.assert_allclose(outputs(variables, "unimodal")[WORD], text_alone[:TEXT], atol=2e-6)


def test_every_second_block_looks_at_the_image(variables: Any) -> None:
    crossing = [f"block_{n}" for n in range(3) if "cross_attention" in variables["params"][f"block_{n}"]]
    assert crossing == ["block_0", "block_2"]


def test_outputs_by_name(variables: Any) -> None:
    found = jax.eval_shape(lambda v: MODEL.apply(v, IMAGE, IDS), variables)
    assert {name: x.shape for name, x in found.items()} == {
        "tokens": (1, QUERIES, 16),
        "pooled": (1, 16),
        "embedding": (1, QUERIES, 4),
        "text_tokens": (1, LENGTH, 16),
        "text_pooled": (1, 16),
        "text_embedding": (1, 4),
    }


def test_padded_image_tokens_are_not_seen(variables: Any) -> None:
    longer = np.concatenate([IMAGE, 7 * np.ones((1, 2, 10), np.float32)], axis=1)
    padded = jax.jit(lambda v: MODEL.apply(v, longer, image_lengths=np.array([6]))["tokens"][0])(variables)
    np.testing.assert_allclose(padded, outputs(variables, "causal")[QUERY], atol=2e-6)


def test_bad_input_is_told(variables: Any) -> None:
    with pytest.raises(UserError, match="neither an image nor a text"):
        MODEL.apply(variables)
    with pytest.raises(UserError, match="mask is 'all'; there are 'bidirectional'"):
        MODEL.apply(variables, IMAGE, IDS, mask="all")
    with pytest.raises(UserError, match="no vocabulary"):
        MODEL.clone(vocabulary=None).apply(variables, IMAGE, IDS)
    with pytest.raises(UserError, match="texts of 6 tokens, but the batch has 7"):
        MODEL.apply(variables, IMAGE, np.ones((1, 7), np.int32))
    with pytest.raises(UserError, match="Layer 3 was asked for"):
        MODEL.apply(variables, IMAGE, hidden=(3,))
