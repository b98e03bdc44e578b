"""The causal text transformer of CLIP (arXiv 2103.00020): a sentence becomes the feature of its last token."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Block, named, norm
from vlpjax.models.stack import Stack
from vlpjax.parallel.attention import causal


class TextTransformer(nn.Module):
    """Token ids to features, with causal attention and pooling at the end-of-text token.

    Pooling finds the last token that is not padding, so it works with any tokenizer whose sequences end in
    an end-of-text token; it does not need that token to have the largest id.

    Attributes:
      vocabulary: number of token ids.
      length: longest sequence; the position table has this many rows.
      width, depth, heads: of the transformer.  ``mlp_ratio`` is the MLP's hidden width over ``width``.
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      activation: of the MLPs.
      dropout: in training, share of each branch's output, and of the embedded tokens, that is zeroed.
      norm: ``"layer"`` or ``"rms"``, and its ``epsilon``.
      pad_id: the id that fills sequences up.
      dtype: compute type; None is float32.
    """

    vocabulary: int
    length: int
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    embedding: int | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    norm: str = "layer"
    epsilon: float = 1e-6
    pad_id: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], *, train: bool = False
    ) -> dict[str, Float[Array, ...]]:
        """Encodes a batch of padded sequences.

        Returns:
          ``"tokens"`` [B, L, D] after the final norm, ``"pooled"`` [B, D] at the end of text, ``"embedding"``
          [B, E] projected into the joint space (equal to ``"pooled"`` without a projection).

        Raises:
          UserError: sequences longer than ``length``.
        """
        if ids.shape[-1] > self.length:
            raise UserError(f"The text tower takes {self.length} tokens, but the batch has {ids.shape[-1]}.")
        table = named(nn.initializers.normal(0.02), "vocabulary", "embed")
        embed = nn.Embed(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=table, name="token_embedding"
        )
        positions = self.param(
            "position_embedding",
            named(nn.initializers.normal(0.01), "position", "embed"),
            (self.length, self.width),
        )
        tokens = embed(ids) + positions[: ids.shape[-1]].astype(self.dtype or jnp.float32)  # [B, L, D]
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        interval = causal(ids.shape[-1])
        block = functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=round(self.mlp_ratio * self.width),
            depth=self.depth,
            activation=self.activation,
            dropout=self.dropout,
            norm=self.norm,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        tokens = Stack(block, self.depth)(tokens, interval, train=train).tokens
        tokens = norm("final_norm", self.norm, self.dtype, self.epsilon)(tokens)
        last = jnp.maximum(jnp.sum(ids != self.pad_id, axis=-1) - 1, 0)  # [B]
        pooled = jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]  # [B, D]
        embedding = pooled
        if self.embedding is not None:
            embedding = Projection(self.embedding, self.dtype, name="projection")(pooled)  # [B, E]
        return {"tokens": tokens, "pooled": pooled, "embedding": embedding}
