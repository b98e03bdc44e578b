"""A plain convolutional image tower: what a Vision Transformer is not yet worth at the size of small drawings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.heads import Projection
from vlpjax.models.layers import activation, batch_norm, named, norm
from vlpjax.models.positions_2d import pair


def convolve(
    images: Float[Array, "batch height width channels"],
    channels: Sequence[int],
    strides: Sequence[int],
    *,
    kind: str = "batch",
    nonlinearity: str = "relu",
    dtype: Any = None,
    train: bool = False,
) -> Float[Array, "batch rows columns features"]:
    """3x3 convolutions, each followed by a norm and an activation, as children of the module that calls.

    Args:
      channels, strides: one of each per convolution.
      kind: ``"batch"`` (statistics of the global batch in training, running ones otherwise), or a kind of
        :func:`vlpjax.models.layers.norm`, under which examples stay independent.
      nonlinearity: a key of :data:`vlpjax.models.layers.ACTIVATIONS`.
    """
    for step, (features, stride) in enumerate(zip(channels, strides, strict=True)):
        images = nn.Conv(
            features,
            kernel_size=(3, 3),
            strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            use_bias=False,
            dtype=dtype,
            kernel_init=named(nn.initializers.he_normal(), None, None, None, "embed"),
            name=f"convolution_{step}",
        )(images)
        if kind == "batch":
            images = batch_norm(f"norm_{step}", train, dtype=dtype)(images)
        else:
            images = norm(f"norm_{step}", kind, dtype)(images)
        images = activation(nonlinearity)(images)
    return images


class ConvNet(nn.Module):
    """Images to features through 3x3 convolutions.

    Attributes:
      image_size: height and width in pixels, or both as one number.
      channels, strides: one per convolution.
      pool: ``"mean"`` over positions, or ``"flatten"``: all positions side by side, so that the embedding knows
        where things are.  Drawings that fill their frame are told apart by that.
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      stem_norm: after each convolution: see :func:`convolve`.
      activation: after each norm.
      norm: of the features of each position at the end: a kind of :func:`vlpjax.models.layers.norm`.
      dropout: in training, share of the pooled features that is zeroed.
      dtype: compute type; None is float32.
    """

    image_size: int | tuple[int, int]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    pool: str = "mean"
    embedding: int | None = None
    stem_norm: str = "batch"
    activation: str = "relu"
    norm: str = "rms"
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> dict[str, Float[Array, ...]]:
        """Encodes a batch of images.

        Returns:
          ``"tokens"`` [B, N, D], one per position of the last grid; ``"pooled"`` [B, D], or [B, N D] when
          flattened; ``"embedding"`` [B, E] (equal to ``"pooled"`` without a projection).

        Raises:
          UserError: images of another size, an unknown ``pool``, or not as many strides as channels.
        """
        if images.shape[1:3] != pair(self.image_size):
            raise UserError(
                f"The image tower takes {self.image_size} pixels, but the batch has {images.shape[1:3]}."
            )
        if self.pool not in ("mean", "flatten"):
            raise UserError(f"ConvNet.pool is {self.pool!r}; there are 'mean' and 'flatten'.")
        if len(self.channels) != len(self.strides):
            raise UserError(
                f"ConvNet.channels has {len(self.channels)} entries, but there are {len(self.strides)} strides: "
                f"{self.strides}."
            )
        grid = convolve(
            images,
            self.channels,
            self.strides,
            kind=self.stem_norm,
            nonlinearity=self.activation,
            dtype=self.dtype,
            train=train,
        )
        tokens = norm("final_norm", self.norm, self.dtype)(rearrange(grid, "b h w c -> b (h w) c"))
        if self.pool == "mean":
            pooled = jnp.mean(tokens, axis=1, dtype=jnp.float32).astype(tokens.dtype)
        else:
            pooled = rearrange(tokens, "b n d -> b (n d)")
        embedding = nn.Dropout(self.dropout, deterministic=not train)(pooled)
        if self.embedding is not None:
            embedding = Projection(self.embedding, self.dtype, name="projection")(embedding)  # [B, E]
        return {"tokens": tokens, "pooled": pooled, "embedding": embedding}
