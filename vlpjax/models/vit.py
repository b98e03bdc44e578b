"""The Vision Transformer (arXiv 2010.11929), with the pieces that contrastive pretraining adds to it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Attention, Block, Mlp, named, norm
from vlpjax.models.patches import PatchEmbedding
from vlpjax.models.stack import Stack

# Width, depth and heads of the published sizes; MLPs are four times as wide (arXiv 2010.11929 table 1,
# 2106.04560 table 2 for Ti and S).
_SIZES = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16),
}


def variant(name: str) -> dict[str, Any]:
    """The fields of a published size, such as ``variant("S/16")``, to be spread into ``spec(ViT, ...)``."""
    size, _, patch = name.partition("/")
    if size not in _SIZES or not patch.isdigit():
        raise UserError(
            f"There is no ViT variant {name!r}; write a size of {', '.join(_SIZES)} and a patch: 'S/16'."
        )
    return {**_SIZES[size], "patch": int(patch)}


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then an MLP: "MAP" of "Scaling ViT", arXiv 2106.04560."""

    heads: int
    mlp_dim: int
    activation: str = "gelu"
    norm: str = "layer"
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        width = tokens.shape[-1]
        query = self.param(
            "query", named(nn.initializers.normal(width**-0.5), None, None, "embed"), (1, 1, width)
        )
        query = jnp.broadcast_to(query.astype(tokens.dtype), (tokens.shape[0], 1, width))
        pooled = Attention(self.heads, dtype=self.dtype, name="attention")(query, memory=tokens).tokens
        normed = norm("mlp_norm", self.norm, self.dtype, self.epsilon)(pooled)
        return (pooled + Mlp(self.mlp_dim, activation=self.activation, dtype=self.dtype, name="mlp")(normed))[
            :, 0
        ]


class ViT(nn.Module):
    """Images to features.

    Attributes:
      image_size: height and width that the position table is made for, in pixels.
      patch: height and width of a patch, in pixels.
      stem: ``"linear"`` projects each patch; ``"conv"`` reaches the same grid through 3x3 convolutions
        ("Early Convolutions Help Transformers See Better", arXiv 2106.14881) with ``stem_channels`` (by
        default doubling up to ``width``), ``stem_strides`` (by default all 2; their product is ``patch``) and
        ``stem_norm`` (``"batch"``, ``"layer"`` or ``"rms"``).
      width, depth, heads: of the transformer.  ``mlp_ratio`` is the MLP's hidden width over ``width``.
      pool: ``"cls"`` (a learned class token), ``"mean"``, or ``"map"`` (attention with a learned query).
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      patch_bias: whether the patch projection has a bias (CLIP's has none).
      pre_norm: LayerNorm before the first block, as in CLIP.
      activation: of the MLPs.
      dropout: in training, share of each branch's output that is zeroed.
      patch_dropout: in training, share of the patch tokens that is left out ("FLIP", arXiv 2212.00794);
        positions are added before, a class token always stays.
      norm: ``"layer"`` or ``"rms"``, and its ``epsilon``.
      dtype: compute type; None is float32.
    """

    image_size: int = 224
    patch: int = 16
    stem: str = "linear"
    stem_channels: tuple[int, ...] = ()
    stem_strides: tuple[int, ...] = ()
    stem_norm: str = "batch"
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    pool: str = "cls"
    embedding: int | None = None
    patch_bias: bool = False
    pre_norm: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    patch_dropout: float = 0.0
    norm: str = "layer"
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> dict[str, Float[Array, ...]]:
        """Encodes a batch of images.

        Returns:
          ``"tokens"`` [B, N, D] after the final norm (patches only), ``"pooled"`` [B, D], ``"embedding"``
          [B, E] projected into the joint space (equal to ``"pooled"`` without a projection).

        Raises:
          UserError: images of another size than ``image_size``, or an unknown ``pool``.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise UserError(
                f"The image tower takes {self.image_size} pixels, but the batch has {images.shape[1:3]}."
            )
        if self.pool not in ("cls", "mean", "map"):
            raise UserError(f"ViT.pool is {self.pool!r}; there are 'cls', 'mean' and 'map'.")
        tokens = PatchEmbedding(
            patch=self.patch,
            width=self.width,
            stem=self.stem,
            channels=self.stem_channels,
            strides=self.stem_strides,
            stem_norm=self.stem_norm,
            bias=self.patch_bias,
            dtype=self.dtype,
            name="patches",
        )(images, train=train)  # [B, N, D]
        tokens = self._add_positions(tokens)
        if train and self.patch_dropout:
            tokens = self._drop_patches(tokens)
        if self.pre_norm:
            tokens = norm("pre_norm", self.norm, self.dtype, self.epsilon)(tokens)
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
        tokens = Stack(block, self.depth)(tokens, train=train).tokens
        tokens = norm("final_norm", self.norm, self.dtype, self.epsilon)(tokens)
        if self.pool == "cls":
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        elif self.pool == "mean":
            pooled = jnp.mean(tokens, axis=1, dtype=jnp.float32).astype(tokens.dtype)
        else:
            pooled = AttentionPool(
                self.heads,
                round(self.mlp_ratio * self.width),
                self.activation,
                self.norm,
                self.epsilon,
                self.dtype,
                name="pool_head",
            )(tokens)
        embedding = pooled
        if self.embedding is not None:
            embedding = Projection(self.embedding, self.dtype, name="projection")(pooled)  # [B, E]
        return {"tokens": tokens, "pooled": pooled, "embedding": embedding}

    def _add_positions(self, tokens: jax.Array) -> jax.Array:
        """Adds the learned position table, the class token's row included, and the class token itself."""
        initial, axes = nn.initializers.normal(self.width**-0.5), (None, "position", "embed")
        classes = int(self.pool == "cls")
        shape = (1, tokens.shape[1] + classes, self.width)
        positions = self.param("position_embedding", named(initial, *axes), shape).astype(tokens.dtype)
        if classes:
            cls = self.param("class_token", named(initial, None, None, "embed"), (1, 1, self.width))
            cls = jnp.broadcast_to(cls.astype(tokens.dtype), (tokens.shape[0], 1, self.width))
            tokens = jnp.concatenate([cls, tokens], axis=1)
        return tokens + positions

    def _drop_patches(self, tokens: jax.Array) -> jax.Array:
        """Keeps int(N (1 - patch_dropout)) random patches per image, in their order, and the class token."""
        classes = int(self.pool == "cls")
        patches = tokens[:, classes:]
        batch, count = patches.shape[:2]
        kept = max(1, int(count * (1 - self.patch_dropout)))
        noise = jax.random.uniform(self.make_rng("dropout"), (batch, count))
        chosen = jnp.sort(jnp.argsort(noise, axis=1)[:, :kept], axis=1)  # [B, kept]
        patches = jnp.take_along_axis(patches, chosen[..., None], axis=1)
        return jnp.concatenate([tokens[:, :classes], patches], axis=1)
