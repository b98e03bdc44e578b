"""Tables of which rows are looked up by number: tokens, types, places."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.parallel.copies import look_up


class Embedding(nn.Embed):
    """``nn.Embed`` on a mesh, in the compute type.

    A table lies there by its features, what is looked up by its examples.  From one to the other XLA often finds no way
    but to hold all of what was looked up on every device; see :func:`vlpjax.parallel.copies.look_up`.

    Attributes:
      over: logical axes of the first dimensions of what is looked up.
      rows: logical axis of the table's rows; that of its features is ``"embed"``.
    """

    over: tuple[str, ...] = ("frames",)
    rows: str | None = "vocabulary"

    def __call__(self, inputs: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
        return look_up(jnp.asarray(self.embedding, self.dtype), inputs, *self.over, rows=self.rows)
