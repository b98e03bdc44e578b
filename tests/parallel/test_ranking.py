"""The best of scores that are seen a block at a time are those of a stable sort of all of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.parallel.ranking import merge_best, nothing_yet

SCORES = np.random.default_rng(0).integers(0, 6, (4, 23)).astype(np.float32)  # many are equal


@pytest.mark.parametrize(("k", "block"), [(1, 5), (7, 5), (7, 2), (7, 23)])
def test_blocks_give_the_order_of_a_stable_sort(k: int, block: int) -> None:
    best = nothing_yet(4, k)
    for start in range(0, 23, block):
        best = merge_best(best, jnp.asarray(SCORES[:, start : start + block]), jnp.int32(start))
    order = np.argsort(-SCORES, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(best[1], order)
    np.testing.assert_array_equal(best[0], np.take_along_axis(SCORES, order, axis=1))


def test_places_that_nothing_has_taken_have_no_score() -> None:
    scores, _ = merge_best(nothing_yet(4, 5), jnp.asarray(SCORES[:, :2]), jnp.int32(0))
    np.testing.assert_array_equal(np.isinf(scores), [[False, False, True, True, True]] * 4)
