"""The light decoder of masked autoencoders: from the patches that were seen to what all of them should hold.

With ``cross`` its blocks also attend to the tokens of a second view, which makes it the decoder of cross-view
completion.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.layers import Block, dense, named, norm
from vlpjax.models.positions_2d import grid_positions, sincos_positions
from vlpjax.models.stack import Stack


def put_back(
    tokens: Float[Array, "batch kept width"],
    restore: Int[Array, "batch patches"],
    filling: Float[Array, "#batch 1 width"],
) -> Float[Array, "batch patches width"]:
    """Every kept token at its own place, ``filling`` at all others.

    Args:
      restore: place of every patch among the kept ones; places from ``kept`` on stand for patches that were left out.
    """
    kept = tokens.shape[1]
    found = jnp.take_along_axis(tokens, jnp.minimum(restore, kept - 1)[..., None], axis=1)
    return jnp.where((restore < kept)[..., None], found, filling.astype(tokens.dtype))


class MAEDecoder(nn.Module):
    """Mask tokens at the places of the patches that were left out, fixed positions, blocks, a linear prediction.

    Attributes:
      features: numbers that are predicted per patch (pixels of a patch times channels).
      width, depth, heads, mlp_ratio: of the blocks.
      sincos_form: see :func:`vlpjax.models.positions_2d.sincos_positions`.
      cross: whether every block attends to a second view, normed by the block and never updated ("CroCo", arXiv
        2210.10716, section 3.2).
      norm, epsilon, activation: of the blocks.
      scan, remat: as in :class:`vlpjax.models.stack.Stack`.
      dtype: compute type; None is that of the tokens.

    Parameters: ``embed`` (from the encoder's width, for both views), ``mask_token`` [1, 1, width], ``block_{n}`` (or
    ``blocks``), ``norm``, ``prediction``.

    Source: "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3.
    """

    features: int
    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    sincos_form: str = "mae"
    cross: bool = False
    norm: str = "layer"
    epsilon: float = 1e-6
    activation: str = "gelu"
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch kept encoder_width"],
        restore: Int[Array, "batch patches"],
        grid: tuple[int, int],
        *,
        prefix: Float[Array, "batch prefix encoder_width"] | None = None,
        memory: Float[Array, "batch memory encoder_width"] | None = None,
        memory_places: Int[Array, "batch memory"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch patches features"]:
        """Predicts all patches, in reading order.

        Args:
          tokens: of the patches that were seen, in a random order.
          restore: as in :func:`put_back`.
          grid: rows and columns of patches.
          prefix: class tokens, which take part and have no position.
          memory: tokens of the second view, in reading order unless ``memory_places`` says which patch each is of.

        Raises:
          UserError: a grid of another number of patches, or a second view that is missing or not expected.
        """
        if restore.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"The decoder was given {restore.shape[1]} patches for a grid of {grid[0]}x{grid[1]}."
            )
        if self.cross != (memory is not None):
            raise UserError(
                f"A decoder with cross={self.cross} was called {'without' if self.cross else 'with'} the tokens of a "
                "second view, its memory."
            )
        dtype = self.dtype or tokens.dtype
        embed = dense(self.width, (None, "embed"), stddev=tokens.shape[-1] ** -0.5, name="embed", dtype=dtype)
        initial = named(nn.initializers.normal(0.02), None, None, "embed")
        mask_token = self.param("mask_token", initial, (1, 1, self.width))
        positions = sincos_positions(grid_positions(*grid), self.width, self.sincos_form)  # [N, W]
        full = put_back(embed(tokens), restore, mask_token)  # [B, N, W]
        full = full + positions.astype(full.dtype)
        count = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            full = jnp.concatenate([embed(prefix), full], axis=1)  # [B, P + N, W]
        shared: dict[str, Any] = {}
        if memory is not None:
            where = positions if memory_places is None else positions[memory_places]
            shared["memory"] = embed(memory) + where.astype(full.dtype)  # [B, M, W]
        full = self._stack(dtype)(full, train=train, **shared).tokens
        full = norm("norm", self.norm, dtype, self.epsilon)(full)[:, count:]
        axes, stddev = ("embed", None), self.width**-0.5
        predicted = dense(self.features, axes, stddev=stddev, name="prediction", dtype=dtype)(full)
        return predicted.astype(jnp.float32)  # [B, N, features]

    def _stack(self, dtype: Any) -> Stack:
        block = functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=round(self.mlp_ratio * self.width),
            depth=self.depth,
            cross=self.cross,
            memory_norm=self.cross,
            activation=self.activation,
            norm=self.norm,
            epsilon=self.epsilon,
            dtype=dtype,
        )
        return Stack(block, self.depth, scan=self.scan, remat=self.remat)


class PatchPrediction(nn.Module):
    """One linear layer per token: the head of SimMIM (arXiv 2111.09886), BEiT (arXiv 2106.08254) and their kin.

    Attributes:
      features: numbers that are predicted per token.
      stddev: of the kernel's initial values; 0 starts with the same prediction for all tokens.
      dtype: compute type; None is that of the tokens.  Predictions are float32.
    """

    features: int
    stddev: float = 0.02
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens features"]:
        dtype = self.dtype or tokens.dtype
        layer = dense(self.features, ("embed", None), stddev=self.stddev, name="prediction", dtype=dtype)
        predicted: jax.Array = layer(tokens)
        return predicted.astype(jnp.float32)
