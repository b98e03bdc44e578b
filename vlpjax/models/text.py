"""The text transformer: a sentence becomes features per token and one feature of the whole.

Fields make of one module the causal tower of CLIP (arXiv 2103.00020), the bidirectional ones of SigLIP (arXiv
2303.15343) and BERT (arXiv 1810.04805), and their forms with cross-attention to image tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.embedding import Embedding
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Block, activation, dense, named, norm
from vlpjax.models.positions_2d import sincos_positions
from vlpjax.models.stack import Stack
from vlpjax.parallel.attention import Interval, causal, intersect, prefix

POOLS = ("eot", "cls", "mean", "last")


class TextTransformer(nn.Module):
    """Token ids to features.

    Pooling ``"eot"`` finds the last token that is not padding, so it works with any tokenizer whose sequences end in
    an end-of-text token; it does not need that token to have the largest id.

    Attributes:
      vocabulary: number of token ids.
      length: longest sequence; the position table has this many rows.
      positions: ``"learned"`` (a table) or ``"sincos"`` (:func:`vlpjax.models.positions_2d.sincos_positions`).
      embed_scale: factor of the token embeddings; ``width ** 0.5`` in "Attention Is All You Need", arXiv 1706.03762.
      width, depth, heads: of the transformer.
      mlp_ratio: the MLP's hidden width over ``width``; ``mlp_dim`` is that width itself and wins if given.
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      activation, gated: of the MLPs.
      dropout: in training, share of each branch's output, and of the embedded tokens, that is zeroed.
      norm: ``"layer"``, ``"rms"`` or ``"rms_offset"``, and its ``epsilon``.
      pad_id: the id that fills sequences up, at their end.
      dtype: compute type; None is float32.
      causal: whether a token sees only itself and what stands before it.
      pool: what ``"pooled"`` is read from: ``"eot"`` (the end of the text), ``"cls"`` (the first position), ``"mean"``
        (all that is not padding) or ``"last"`` (the last position whatever it holds, as in SigLIP).
      eos_id: if given, ``"eot"`` reads the first token with this id (and where there is none, the last that is no
        padding): for tokenizers that pad with the end-of-text token.
      mask_padding: whether padding is hidden from the other tokens.  A causal tower whose padding stands at the end
        does not need it; SigLIP is trained without.
      projection_bias: whether the projection into the joint space has a bias.
      order: where norms stand, as in :class:`vlpjax.models.layers.Block`.
      types: rows of the table of token types that is added to the tokens (BERT's segments A and B); 0 has none.
      embedding_norm: a norm on the sum of the embeddings, as in BERT.
      final_norm: a norm after the last block.
      pooler: BERT's dense layer with tanh on what was pooled.
      cross: whether each block also attends to a memory, such as image tokens (ALBEF, arXiv 2107.07651; BLIP, arXiv
        2201.12086).
      drop_path: stochastic depth of the last block.
      scan, remat: as in :class:`vlpjax.models.stack.Stack`.
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
    causal: bool = True
    pool: str = "eot"
    eos_id: int | None = None
    mask_padding: bool = False
    projection_bias: bool = False
    mlp_dim: int | None = None
    gated: bool = False
    order: str = "pre"
    types: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    pooler: bool = False
    cross: bool = False
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    positions: str = "learned"
    embed_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch length"],
        *,
        types: Int[Array, "batch length"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        memory: Float[Array, "batch memory memory_width"] | None = None,
        memory_lengths: Int[Array, " batch"] | None = None,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Encodes a batch of padded sequences.

        Args:
          types: type of each token, below ``types``; None is type 0 everywhere.
          lengths: tokens per sequence that are no padding; None counts the ids that are not ``pad_id``.
          mask: which tokens each token sees, for what is no interval; it further restricts the fields' mask.
          memory: tokens that a tower with ``cross`` attends to, the first ``memory_lengths`` of each row if given.
          hidden, attention: layers whose tokens and attention weights are returned; -1 is the last block.

        Returns:
          ``"tokens"`` [B, L, D] after the final norm, ``"pooled"`` [B, D], ``"embedding"`` [B, E] projected into
          the joint space (equal to ``"pooled"`` without a projection).  If asked for: ``"hidden"``, a dict of
          [B, L, D] by layer, straight from the blocks, and ``"attention"``, a dict of [B, H, L, L].

        Raises:
          UserError: sequences longer than ``length``, an unknown ``pool`` or kind of ``positions``, types for a tower
            that has none.
        """
        if self.pool not in POOLS:
            raise UserError(
                f"TextTransformer.pool is {self.pool!r}; there are {', '.join(map(repr, POOLS))}."
            )
        count = ids.shape[-1]
        if lengths is None:
            lengths = jnp.sum(ids != self.pad_id, axis=-1)  # [B]
        tokens = self._embed(ids, types)  # [B, L, D]
        if self.embedding_norm:
            tokens = norm("embedding_norm", self.norm, self.dtype, self.epsilon)(tokens)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        block = functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=self.mlp_dim or round(self.mlp_ratio * self.width),
            depth=self.depth,
            activation=self.activation,
            gated=self.gated,
            order=self.order,
            cross=self.cross,
            dropout=self.dropout,
            norm=self.norm,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        context: dict[str, Any] = {} if mask is None else {"mask": mask}
        if memory is not None:
            context["memory"] = memory
            if memory_lengths is not None:
                context["memory_interval"] = prefix(memory_lengths, count)
        stack = Stack(block, self.depth, self.scan, self.remat, self.drop_path)
        stacked = stack(
            tokens, self._interval(lengths, count), hidden=hidden, weights=attention, train=train, **context
        )
        tokens = stacked.tokens
        if self.final_norm:
            tokens = norm("final_norm", self.norm, self.dtype, self.epsilon)(tokens)
        pooled = self._pool(ids, lengths, tokens)  # [B, D]
        if self.pooler:
            pooled = dense(
                self.width, ("embed", None), stddev=self.width**-0.5, name="pooler", dtype=self.dtype
            )(pooled)
            pooled = jnp.tanh(pooled)
        embedding = pooled
        if self.embedding is not None:
            project = Projection(self.embedding, self.dtype, self.projection_bias, name="projection")
            embedding = project(pooled)  # [B, E]
        outputs: dict[str, Any] = {"tokens": tokens, "pooled": pooled, "embedding": embedding}
        if hidden:
            outputs["hidden"] = stacked.hidden
        if attention:
            outputs["attention"] = stacked.weights
        return outputs

    def _embed(self, ids: jax.Array, types: jax.Array | None) -> jax.Array:
        """The sum of token, position and type embeddings."""
        if ids.shape[-1] > self.length:
            raise UserError(f"The text tower takes {self.length} tokens, but the batch has {ids.shape[-1]}.")
        if types is not None and not self.types:
            raise UserError("The text tower was given token types, but has types=0.")
        table = named(nn.initializers.normal(0.02), "vocabulary", "embed")
        tokens = Embedding(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=table, name="token_embedding"
        )(ids)
        tokens = self.embed_scale * tokens + self._positions(ids.shape[-1]).astype(tokens.dtype)  # [B, L, D]
        if self.types:
            kinds = Embedding(
                self.types,
                self.width,
                dtype=self.dtype,
                embedding_init=named(nn.initializers.normal(0.02), None, "embed"),
                rows=None,
                name="type_embedding",
            )
            tokens = tokens + kinds(jnp.zeros_like(ids) if types is None else types)
        return tokens

    def _positions(self, count: int) -> Float[Array, "{count} width"]:
        """What tells the first ``count`` places apart."""
        if self.positions == "sincos":
            return sincos_positions(jnp.arange(count)[:, None], self.width)
        if self.positions != "learned":
            raise UserError(
                f"TextTransformer.positions is {self.positions!r}; there are 'learned' and 'sincos'."
            )
        initial = named(nn.initializers.normal(0.01), "position", "embed")
        table: jax.Array = self.param("position_embedding", initial, (self.length, self.width))
        return table[:count]

    def _interval(self, lengths: jax.Array, count: int) -> Interval | None:
        """What each token sees."""
        earlier = causal(count) if self.causal else None
        if not self.mask_padding:
            return earlier
        text = prefix(lengths, count)
        return text if earlier is None else intersect(earlier, text)

    def _pool(self, ids: jax.Array, lengths: jax.Array, tokens: jax.Array) -> jax.Array:
        """One feature per sequence."""
        if self.pool == "cls":
            return tokens[:, 0]
        if self.pool == "last":
            return tokens[:, -1]
        if self.pool == "mean":
            text = jnp.arange(tokens.shape[1]) < lengths[:, None]  # [B, L]
            total = jnp.sum(jnp.where(text[..., None], tokens, 0), axis=1, dtype=jnp.float32)
            return (total / jnp.maximum(lengths, 1)[:, None]).astype(tokens.dtype)
        place = jnp.maximum(lengths - 1, 0)  # [B]
        if self.eos_id is not None:
            ends = ids == self.eos_id
            place = jnp.where(jnp.any(ends, axis=-1), jnp.argmax(ends, axis=-1), place)
        pooled: jax.Array = jnp.take_along_axis(tokens, place[:, None, None], axis=1)[:, 0]
        return pooled


class MaskedLanguageHead(nn.Module):
    """Predicts the tokens of a text from their features: dense, activation, norm, and a decoder with bias.

    Source: "BERT", arXiv 1810.04805, section 3.1.

    Attributes:
      vocabulary: number of token ids.
      tied: whether the decoder is the tower's table of token embeddings, which the call then takes.
      activation, norm, epsilon: as in the tower.
      dtype: compute type of everything but the logits, which are float32.
    """

    vocabulary: int
    tied: bool = True
    activation: str = "gelu"
    norm: str = "layer"
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        table: Float[Array, "vocabulary width"] | None = None,
    ) -> Float[Array, "batch length vocabulary"]:
        """Logits of every token id at every place.

        Args:
          table: token embeddings, ``variables["params"]["token_embedding"]["embedding"]`` of the text tower, if
            ``tied``.

        Raises:
          UserError: a table that is missing, of another size, or not expected.
        """
        if self.tied != (table is not None):
            raise UserError(
                f"A MaskedLanguageHead with tied={self.tied} was called {'without' if self.tied else 'with'} a table."
            )
        width = tokens.shape[-1]
        if table is not None and table.shape != (self.vocabulary, width):
            raise UserError(
                f"The head's table has shape {table.shape}, but vocabulary and width are {(self.vocabulary, width)}."
            )
        features = dense(width, ("embed", None), stddev=width**-0.5, name="dense", dtype=self.dtype)(tokens)
        features = norm("norm", self.norm, self.dtype, self.epsilon)(activation(self.activation)(features))
        if table is None:
            initial = named(nn.initializers.normal(0.02), "vocabulary", "embed")
            table = self.param("embedding", initial, (self.vocabulary, width))
        bias = self.param("bias", named(nn.initializers.zeros, "vocabulary"), (self.vocabulary,))
        logits = jnp.einsum(
            "bld,vd->blv", features, table.astype(features.dtype), preferred_element_type=jnp.float32
        )
        return logits + bias
