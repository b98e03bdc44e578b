"""The parts of CoCa: an attention pooler with many queries and a text decoder that is cut in two.

The lower half of the decoder sees text only and ends in a vector for contrast; the upper half also attends to the image
and ends in the vocabulary.

Source: "CoCa: Contrastive Captioners are Image-Text Foundation Models", arXiv 2205.01917.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.embedding import Embedding
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Attention, Block, named, norm
from vlpjax.models.stack import Stack
from vlpjax.parallel.attention import causal


class QueryPool(nn.Module):
    """Learned queries attend to all tokens: as many features as queries.

    Attributes:
      queries: their number.
      width: of the features.
      heads: of the attention.
      epsilon: of the norms of queries, tokens and results.
      dtype: compute type; None is float32.
    """

    queries: int
    width: int
    heads: int
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens token_width"]
    ) -> Float[Array, "batch {self.queries} {self.width}"]:
        """Pools."""
        initial = named(nn.initializers.normal(self.width**-0.5), None, None, "embed")
        query = self.param("query", initial, (1, self.queries, self.width)).astype(tokens.dtype)
        query = jnp.broadcast_to(query, (tokens.shape[0], *query.shape[1:]))

        def normed(name: str, x: jax.Array) -> jax.Array:
            result: jax.Array = norm(name, "layer", self.dtype, self.epsilon)(x)
            return result

        attention = Attention(self.heads, epsilon=self.epsilon, dtype=self.dtype, name="attention")
        pooled = attention(normed("query_norm", query), memory=normed("token_norm", tokens)).tokens
        return normed("norm", pooled)


class PooledImage(nn.Module):
    """An image tower whose tokens are pooled twice at once: into one vector for contrast, and into a decoder's memory.

    Attributes:
      tower: gives ``"tokens"`` [B, N, D]; a ViT with ``pool="none"``.
      queries: of the memory; one more makes the vector.
      width, heads: of the pooler.
      embedding: width of the joint space.
      epsilon: of norms.
      dtype: compute type of the pooler; None is float32.
    """

    tower: nn.Module
    queries: int = 256
    width: int = 768
    heads: int = 8
    embedding: int = 768
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> dict[str, Any]:
        """Encodes a batch.

        Returns:
          the tower's outputs, ``"memory"`` [B, queries, width], ``"pooled"`` [B, width] and ``"embedding"`` [B, E].
        """
        outputs = self.tower(images, train=train)
        pool = QueryPool(self.queries + 1, self.width, self.heads, self.epsilon, self.dtype, name="pool")
        pooled = pool(outputs["tokens"])
        vector = pooled[:, 0]
        embedding = Projection(self.embedding, self.dtype, name="projection")(vector)
        return {**outputs, "memory": pooled[:, 1:], "pooled": vector, "embedding": embedding}


class UnimodalText(nn.Module):
    """The lower half of CoCa's decoder: causal, with a learned token at the end that sees the whole text.

    The last token sees what is no padding, and no other token sees it.  It has no position, so that its feature does
    not depend on how far texts are padded.

    Attributes:
      vocabulary: number of token ids.
      length: longest text; rows of the position table.
      width, depth, heads: of the transformer.
      mlp_ratio: the MLP's hidden width over ``width``.
      embedding: width of the joint space.
      activation, dropout, epsilon: of the blocks.
      pad_id: the id that fills texts up, at their end.
      scan, remat: as in :class:`vlpjax.models.stack.Stack`.
      dtype: compute type; None is float32.
    """

    vocabulary: int
    length: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    embedding: int = 768
    activation: str = "gelu"
    dropout: float = 0.0
    epsilon: float = 1e-6
    pad_id: int = 0
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(self, ids: Int[Array, "batch length"], *, train: bool = False) -> dict[str, jax.Array]:
        """Encodes a batch of padded texts.

        Returns:
          ``"tokens"`` [B, L, D] after the last block, which the upper half continues; ``"pooled"`` [B, D] of the last
          token, normed; ``"embedding"`` [B, E].

        Raises:
          UserError: texts longer than ``length``.
        """
        batch, count = ids.shape
        if count > self.length:
            raise UserError(f"The text tower takes {self.length} tokens, but the batch has {count}.")
        table = named(nn.initializers.normal(0.02), "vocabulary", "embed")
        tokens = Embedding(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=table, name="token_embedding"
        )(ids)
        initial = named(nn.initializers.normal(0.01), "position", "embed")
        positions = self.param("position_embedding", initial, (self.length, self.width))
        tokens = tokens + positions[:count].astype(tokens.dtype)
        initial = named(nn.initializers.normal(0.01), None, None, "embed")
        last = self.param("class_token", initial, (1, 1, self.width)).astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(last, (batch, 1, self.width))], axis=1)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        stacked = Stack(
            functools.partial(
                Block, heads=self.heads, mlp_dim=round(self.mlp_ratio * self.width), depth=self.depth,
                activation=self.activation, dropout=self.dropout, epsilon=self.epsilon, dtype=self.dtype,
            ),
            self.depth,
            self.scan,
            self.remat,
        )(tokens, None, mask=self._mask(ids), train=train)  # fmt: skip
        pooled = norm("final_norm", "layer", self.dtype, self.epsilon)(stacked.tokens[:, -1])
        embedding = Projection(self.embedding, self.dtype, name="projection")(pooled)
        return {"tokens": stacked.tokens[:, :-1], "pooled": pooled, "embedding": embedding}

    def _mask(self, ids: jax.Array) -> jax.Array:
        """Which tokens each sees, [B, L + 1, L + 1]."""
        batch, count = ids.shape
        earlier = jnp.tril(jnp.ones((count, count + 1), bool))
        text = jnp.concatenate([ids != self.pad_id, jnp.ones((batch, 1), bool)], axis=1)  # [B, L + 1]
        return jnp.concatenate([jnp.broadcast_to(earlier, (batch, count, count + 1)), text[:, None]], axis=1)


class CaptionDecoder(nn.Module):
    """The upper half of CoCa's decoder: causal, attends to the image in every block, ends in the vocabulary.

    Attributes:
      vocabulary: number of token ids.
      depth, heads: of the transformer, whose width is that of its input.
      mlp_ratio, activation, dropout, epsilon: of the blocks.
      scan, remat: as in :class:`vlpjax.models.stack.Stack`.
      dtype: compute type; None is float32.
    """

    vocabulary: int
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    epsilon: float = 1e-6
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        memory: Float[Array, "batch memory memory_width"],
        *,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        """Continues the tokens of a text.

        Returns:
          ``"tokens"`` [B, L, D] after the final norm, and ``"kernel"`` [D, vocabulary], whose product gives the logits
          of the next token; losses take it piece by piece.
        """
        width = tokens.shape[-1]
        stacked = Stack(
            functools.partial(
                Block, heads=self.heads, mlp_dim=round(self.mlp_ratio * width), depth=self.depth, cross=True,
                activation=self.activation, dropout=self.dropout, epsilon=self.epsilon, dtype=self.dtype,
            ),
            self.depth,
            self.scan,
            self.remat,
        )(tokens, causal(tokens.shape[1]), memory=memory, train=train)  # fmt: skip
        initial = named(nn.initializers.normal(width**-0.5), "embed", "vocabulary")
        kernel = self.param("kernel", initial, (width, self.vocabulary))
        tokens = norm("final_norm", "layer", self.dtype, self.epsilon)(stacked.tokens)
        return {"tokens": tokens, "kernel": kernel}
