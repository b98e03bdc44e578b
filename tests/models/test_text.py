"""The text tower: causal, read at the end of the text, and blind to what comes after."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.text import TextTransformer

TOWER = TextTransformer(vocabulary=20, length=8, width=16, depth=2, heads=2, embedding=8)
IDS = np.array([[5, 6, 7, 1, 0, 0, 0, 0], [3, 9, 1, 0, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7, 8, 1]], np.int32)


@pytest.fixture(scope="module")
def variables() -> Any:
    return TOWER.init(jax.random.key(0), IDS)


def test_outputs_by_name(variables: Any) -> None:
    outputs = TOWER.apply(variables, IDS)
    assert {name: x.shape for name, x in outputs.items()} == {
        "tokens": (3, 8, 16),
        "pooled": (3, 16),
        "embedding": (3, 8),
    }


def test_the_feature_is_the_token_at_the_end_of_the_text(variables: Any) -> None:
    outputs = TOWER.apply(variables, IDS)
    for row, end in enumerate((3, 2, 7)):
        np.testing.assert_array_equal(outputs["pooled"][row], outputs["tokens"][row, end])


def test_no_token_sees_a_later_one(variables: Any) -> None:
    changed = IDS.copy()
    changed[2, 5] = 19
    before, after = (TOWER.apply(variables, ids)["tokens"][2] for ids in (IDS, changed))
    np.testing.assert_array_equal(before[:5], after[:5])
    assert all(np.any(before[place] != after[place]) for place in (5, 6, 7))


def test_padding_does_not_matter_and_words_do(variables: Any) -> None:
    short = TOWER.apply(variables, IDS[:2, :4])["embedding"]  # no padding beyond the longest text
    whole = TOWER.apply(variables, IDS[:2])["embedding"]
    np.testing.assert_allclose(short, whole, rtol=1e-5, atol=1e-6)
    changed = IDS[:2].copy()
    changed[:, 0] += 1
    other = TOWER.apply(variables, changed)["embedding"]
    assert float(np.min(np.abs(np.asarray(other - whole)).max(axis=1))) > 1e-4


def test_the_end_of_text_need_not_be_the_largest_id(variables: Any) -> None:
    largest = IDS.copy()
    largest[0, 1] = 19
    outputs = TOWER.apply(variables, largest)
    np.testing.assert_array_equal(outputs["pooled"][0], outputs["tokens"][0, 3])


def test_another_padding_id(variables: Any) -> None:
    ids = np.where(IDS == 0, 11, IDS)
    outputs = TOWER.clone(pad_id=11).apply(variables, ids)
    np.testing.assert_array_equal(outputs["pooled"][1], outputs["tokens"][1, 2])


def test_dropout_is_for_training(variables: Any) -> None:
    tower = TOWER.clone(dropout=0.5)
    np.testing.assert_array_equal(
        tower.apply(variables, IDS)["pooled"], TOWER.apply(variables, IDS)["pooled"]
    )
    first, second = (
        tower.apply(variables, IDS, train=True, rngs={"dropout": jax.random.key(seed)})["pooled"]
        for seed in (0, 1)
    )
    assert np.any(first != second)


def test_texts_that_are_too_long_are_told(variables: Any) -> None:
    with pytest.raises(UserError, match="takes 8 tokens, but the batch has 9"):
        TOWER.apply(variables, np.ones((1, 9), np.int32))
