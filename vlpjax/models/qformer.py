"""The Q-Former of BLIP-2 (arXiv 2301.12597): learned queries read an image, and share their attention with a text.

Queries and text stand in one sequence, queries first, so that all three masks of the paper's figure 2 are intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.embedding import Embedding
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Attention, Mlp, named, norm
from vlpjax.parallel.attention import Interval, prefix

MASKS = ("bidirectional", "unimodal", "causal")


def qformer_interval(mask: str, queries: int, lengths: Int[Array, " batch"], count: int) -> Interval:
    """What each of ``queries`` queries and ``count`` text tokens behind them sees.

    Args:
      mask: ``"bidirectional"`` (image-text matching): everything; ``"unimodal"`` (contrastive): queries see
        queries, text sees text; ``"causal"`` (text generation): queries see queries, text sees queries and the text
        up to itself.  Padding behind ``lengths`` is never seen.

    Raises:
      UserError: an unknown mask.
    """
    if mask not in MASKS:
        raise UserError(f"The Q-Former's mask is {mask!r}; there are {', '.join(map(repr, MASKS))}.")
    place = jnp.arange(queries + count, dtype=jnp.int32)[None]  # [1, Q + L]
    text = place >= queries
    end = queries + lengths[:, None].astype(jnp.int32)  # [B, 1]
    if mask == "bidirectional":
        return Interval(jnp.zeros_like(place + end), jnp.broadcast_to(end, (len(lengths), queries + count)))
    if mask == "unimodal":
        return Interval(jnp.where(text, queries, 0) + 0 * end, jnp.where(text, end, queries))
    return Interval(jnp.zeros_like(place + end), jnp.where(text, jnp.minimum(place + 1, end), queries))


class QFormerBlock(nn.Module):
    """Attention of queries and text to one another, of queries to the image, and an MLP for each; norms come after.

    Attributes:
      heads, mlp_dim, depth, activation, epsilon, dropout, dtype: of :class:`QFormer`.
      cross: whether queries attend to the image.
    """

    heads: int
    mlp_dim: int
    depth: int
    cross: bool
    activation: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch queries_and_text width"],
        queries: int,
        interval: Interval | None,
        image: Float[Array, "batch patches image_width"] | None,
        image_interval: Interval | None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch queries_and_text width"]:
        """One block; the first ``queries`` tokens are queries, the others text."""
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def add(name: str, x: jax.Array, branch: jax.Array) -> jax.Array:
            total: jax.Array = norm(name, "layer", self.dtype, self.epsilon)(x + drop(branch))
            return total

        def mixing(name: str) -> Attention:
            return Attention(self.heads, depth=self.depth, dtype=self.dtype, name=name)

        def mlp(name: str, x: jax.Array) -> jax.Array:
            inner = Mlp(self.mlp_dim, self.depth, self.activation, dtype=self.dtype, name=name)
            return add(f"{name}_norm", x, inner(x))

        tokens = add("attention_norm", tokens, mixing("attention")(tokens, interval).tokens)
        parts = []
        if queries:
            asked = tokens[:, :queries]
            if self.cross:
                if image is None:
                    raise UserError("The Q-Former's queries need the tokens of an image.")
                mixed = mixing("cross_attention")(asked, image_interval, image)
                asked = add("cross_norm", asked, mixed.tokens)
            parts.append(mlp("mlp", asked))
        if tokens.shape[1] > queries:
            parts.append(mlp("text_mlp", tokens[:, queries:]))
        return jnp.concatenate(parts, axis=1)


class QFormer(nn.Module):
    """Image tokens to a few query tokens; reads, matches or continues a text as well if it has a ``vocabulary``.

    Attributes:
      queries: number of learned queries.
      width, depth, heads, mlp_dim: of the transformer (BERT-base in the paper).
      cross_every: queries attend to the image in every ``cross_every``-th block, the first included.
      vocabulary, length: token ids and positions of texts; without a vocabulary there are no parameters for texts.
      embedding: width of the joint space that queries and text are projected into; None projects nothing.
      activation, epsilon: of MLPs and norms.
      dropout: in training, share of each branch's output, and of the embedded tokens, that is zeroed.
      pad_id: the id that fills texts up, at their end.
      dtype: compute type; None is float32.
    """

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    cross_every: int = 2
    vocabulary: int | None = None
    length: int = 512
    embedding: int | None = None
    activation: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.0
    pad_id: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "batch patches image_width"] | None = None,
        ids: Int[Array, "batch length"] | None = None,
        *,
        mask: str = "bidirectional",
        lengths: Int[Array, " batch"] | None = None,
        image_lengths: Int[Array, " batch"] | None = None,
        hidden: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Reads an image, a text or both.

        Args:
          image: tokens of the image tower; without them there are no queries and the text is read alone.
          ids: padded texts.
          mask: who sees whom, of :func:`qformer_interval`.
          lengths: of the texts, without padding; None counts the ids that are not ``pad_id``.
          image_lengths: how many of each row's image tokens are no padding; None is all.
          hidden: layers to read out; -1 is the last.

        Returns:
          With an image ``"tokens"`` [B, Q, D], ``"pooled"`` [B, D], their mean, and ``"embedding"`` [B, Q, E], each
          query projected (of which BLIP-2 takes the one that is most similar to the text).  With a text
          ``"text_tokens"`` [B, L, D], ``"text_pooled"`` [B, D], the first of them, and ``"text_embedding"`` [B, E].
          If asked for, ``"hidden"``, a dict of [B, Q + L, D] by layer.

        Raises:
          UserError: neither image nor text, a text without a vocabulary or that is too long, an unknown mask.
        """
        if image is None and ids is None:
            raise UserError("The Q-Former was given neither an image nor a text.")
        for layer in hidden:
            if not -self.depth <= layer < self.depth:
                raise UserError(
                    f"Layer {layer} was asked for, but the Q-Former has layers 0 to {self.depth - 1}."
                )
        queries = 0 if image is None else self.queries
        parts = []
        interval = image_interval = None
        if image is not None:
            parts.append(self._queries(len(image)))
            if image_lengths is not None:
                image_interval = prefix(image_lengths, queries)
        if ids is not None:
            parts.append(self._embed(ids))
            if lengths is None:
                lengths = jnp.sum(ids != self.pad_id, axis=-1)
            interval = qformer_interval(mask, queries, lengths, ids.shape[1])
        tokens = jnp.concatenate(parts, axis=1)  # [B, Q + L, D]
        tokens = norm("embedding_norm", "layer", self.dtype, self.epsilon)(tokens)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        states = []
        for index in range(self.depth):
            block = QFormerBlock(
                self.heads,
                self.mlp_dim,
                self.depth,
                index % self.cross_every == 0,
                self.activation,
                self.epsilon,
                self.dropout,
                self.dtype,
                name=f"block_{index}",
            )
            tokens = block(tokens, queries, interval, image, image_interval, train=train)
            states.append(tokens)
        outputs: dict[str, Any] = {}
        if image is not None:
            asked = tokens[:, :queries]
            outputs |= {
                "tokens": asked,
                "pooled": jnp.mean(asked, axis=1, dtype=jnp.float32).astype(asked.dtype),
            }
            outputs["embedding"] = self._project("projection", asked)
        if ids is not None:
            text = tokens[:, queries:]
            outputs |= {"text_tokens": text, "text_pooled": text[:, 0]}
            outputs["text_embedding"] = self._project("text_projection", text[:, 0])
        if hidden:
            outputs["hidden"] = {layer: states[layer] for layer in hidden}
        return outputs

    def _queries(self, batch: int) -> jax.Array:
        """The learned queries, for every example."""
        initial = named(nn.initializers.normal(0.02), None, None, "embed")
        queries = self.param("query_tokens", initial, (1, self.queries, self.width))
        return jnp.broadcast_to(queries.astype(self.dtype or jnp.float32), (batch, self.queries, self.width))

    def _embed(self, ids: jax.Array) -> jax.Array:
        """Token and position embeddings of texts."""
        if self.vocabulary is None:
            raise UserError("The Q-Former was given a text, but has no vocabulary.")
        if ids.shape[1] > self.length:
            raise UserError(
                f"The Q-Former takes texts of {self.length} tokens, but the batch has {ids.shape[1]}."
            )
        table = named(nn.initializers.normal(0.02), "vocabulary", "embed")
        tokens = Embedding(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=table, name="token_embedding"
        )(ids)
        initial = named(nn.initializers.normal(0.02), "position", "embed")
        positions = self.param("position_embedding", initial, (self.length, self.width))
        embedded: jax.Array = tokens + positions[: ids.shape[1]].astype(tokens.dtype)
        return embedded

    def _project(self, name: str, tokens: jax.Array) -> jax.Array:
        """Into the joint space, with a bias as in BLIP-2."""
        if self.embedding is None:
            return tokens
        projected: jax.Array = Projection(self.embedding, self.dtype, True, name=name)(tokens)
        return projected
