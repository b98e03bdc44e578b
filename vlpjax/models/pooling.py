"""From many tokens to one per image: attention with a learned query, and pooling within the segments of a row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.models.layers import Attention, Mlp, named, norm


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then an MLP: "MAP" of "Scaling ViT", arXiv 2106.04560.

    Attributes:
      heads: of the attention.
      mlp_dim, activation, gated: of the MLP, which is added to what was pooled.
      norm: kind of norm before the MLP, and its ``epsilon``.
      dtype: compute type.
    """

    heads: int
    mlp_dim: int
    activation: str = "gelu"
    norm: str = "layer"
    epsilon: float = 1e-6
    dtype: Any = None
    gated: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        members: Bool[Array, "batch segments tokens"] | None = None,
    ) -> Float[Array, "batch *segments width"]:
        """Pools.

        Args:
          members: which tokens belong to which segment; None pools all tokens into one feature per row.
        """
        width, queries = tokens.shape[-1], 1 if members is None else members.shape[1]
        query = self.param(
            "query", named(nn.initializers.normal(width**-0.5), None, None, "embed"), (1, 1, width)
        )
        query = jnp.broadcast_to(query.astype(tokens.dtype), (tokens.shape[0], queries, width))
        attention = Attention(self.heads, epsilon=self.epsilon, dtype=self.dtype, name="attention")
        pooled = attention(query, memory=tokens, mask=members).tokens  # [B, S, D]
        normed = norm("mlp_norm", self.norm, self.dtype, self.epsilon)(pooled)
        mlp = Mlp(self.mlp_dim, activation=self.activation, gated=self.gated, dtype=self.dtype, name="mlp")
        pooled = pooled + mlp(normed)
        return pooled[:, 0] if members is None else pooled


def segment_members(
    segment_ids: Int[Array, "batch tokens"], segments: int
) -> Bool[Array, "batch {segments} tokens"]:
    """Which tokens belong to the segments 1 to ``segments``; 0 is padding and belongs to none."""
    return segment_ids[:, None, :] == jnp.arange(1, segments + 1)[:, None]


def mean_pool(
    tokens: Float[Array, "batch tokens width"],
    members: Bool[Array, "batch segments tokens"] | None = None,
) -> Float[Array, "batch *segments width"]:
    """The mean of all tokens, or of each segment's (zero for a segment without tokens); summed in float32."""
    if members is None:
        return jnp.mean(tokens, axis=1, dtype=jnp.float32).astype(tokens.dtype)
    shares = members / jnp.maximum(members.sum(axis=-1, keepdims=True), 1)  # [B, S, N], float32
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("bsn,bnd->bsd", shares, tokens.astype(jnp.float32), precision=exact).astype(
        tokens.dtype
    )
