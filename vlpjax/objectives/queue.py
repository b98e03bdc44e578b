"""A queue of what earlier batches left behind, such as the keys that MoCo contrasts with; it is a ring of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlpjax.errors import UserError
from vlpjax.mesh import constrain


def enqueue(state: Mapping[str, Any], owner: str, **values: jax.Array) -> dict[str, Any]:
    """The state with a batch's values in place of the oldest, which carry no gradient.

    Args:
      state: per name of ``values`` an array whose first dimension is the queue's, and ``"oldest"``, the place that is
        overwritten next.  Whatever else it has stays as it is.
      owner: whose queue it is, for messages.
      values: arrays with the examples on the first dimension.

    Raises:
      UserError: a queue that is shorter than a batch.
    """
    first = next(iter(values))
    size, count = len(state[first]), len(values[first])
    if count > size:
        raise UserError(f"{owner}.queue is {size}, which cannot hold a batch of {count}.")
    places = (state["oldest"] + jnp.arange(count)) % size

    def put(name: str, value: jax.Array) -> jax.Array:
        # Every device keeps the whole queue.
        value = constrain(jax.lax.stop_gradient(value), *[None] * value.ndim)
        array: jax.Array = state[name].at[places].set(value.astype(state[name].dtype))
        return array

    entered = {name: put(name, value) for name, value in values.items()}
    return {**state, **entered, "oldest": (state["oldest"] + count) % size}
