"""Tables of which rows are looked up by number: tokens, types, places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.mesh import constrain


class Embedding(nn.Embed):
    """``nn.Embed`` whose table is gathered before the look-up, in the compute type.

    A table lies on the mesh by its features, what is looked up by its examples.  Where these do not share their axes in
    the same order, XLA can only go from one to the other by holding all of what was looked up on every device; the
    table is smaller.  Its vocabulary stays sharded.
    """

    def __call__(self, inputs: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
        table = jnp.asarray(self.embedding, self.dtype)
        rows: jax.Array = jnp.take(constrain(table, "vocabulary", None), inputs, axis=0)
        return rows
