"""The queue of earlier batches: a ring that takes several arrays at once, and the same on every device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import assert_trees_equal, layout_of
from vlpjax.errors import UserError
from vlpjax.objectives.queue import enqueue

EMPTY = {"keys": jnp.zeros((10, 3)), "labels": jnp.full(10, -1), "oldest": jnp.int32(6), "seen": jnp.int32(5)}
KEYS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def test_a_batch_takes_the_oldest_places_around_the_end_and_nothing_else_changes() -> None:
    after = enqueue(EMPTY, "Some", keys=KEYS[:6], labels=jnp.arange(6, dtype=jnp.int8))
    places = [6, 7, 8, 9, 0, 1]
    np.testing.assert_array_equal(after["keys"][jnp.asarray(places)], KEYS[:6])
    np.testing.assert_array_equal(after["labels"], [4, 5, -1, -1, -1, -1, 0, 1, 2, 3])
    assert not np.any(after["keys"][2:6])
    assert (after["oldest"], after["seen"]) == (2, 5)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, EMPTY)


def test_what_is_queued_carries_no_gradient_and_every_device_has_all_of_it() -> None:
    layout = layout_of(8)

    def put(keys: jax.Array) -> dict[str, jax.Array]:
        with layout.activate():
            return enqueue(EMPTY, "Some", keys=2 * keys)

    gradient = jax.grad(lambda keys: jnp.sum(put(keys)["keys"]))(jnp.asarray(KEYS))
    np.testing.assert_array_equal(gradient, 0.0)
    spread = jax.jit(put)(jax.device_put(KEYS, layout.sharding("batch")))
    assert spread["keys"].sharding.is_fully_replicated
    assert_trees_equal(spread, enqueue(EMPTY, "Some", keys=2 * KEYS))


def test_a_queue_shorter_than_a_batch_is_told() -> None:
    with pytest.raises(UserError, match=r"Some.queue is 10, which cannot hold a batch of 11"):
        enqueue(EMPTY, "Some", keys=jnp.zeros((11, 3)))
