"""What stands between an image tower and a language model: tokens of one go in, tokens for the other come out.

All take tokens [batch, tokens, width] and give tokens; where these stand on a grid matters, they take its height and
width too (by default a square), row by row.  They follow one another in ``nn.Sequential``: InternVL's connector is
``nn.Sequential([PixelShuffle(2), MlpConnector(width, input_norm=True)])``.  The Q-Former, which reads texts as well,
is in :mod:`vlpjax.models.qformer`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.layers import Attention, Mlp, activation, dense, named, norm
from vlpjax.parallel.attention import prefix

Grid = tuple[int, int]  # rows and columns of tokens


def grid_of(tokens: int, grid: Grid | None = None) -> Grid:
    """The grid that so many tokens stand on; None is a square.

    Raises:
      UserError: a grid of another number of tokens, or a number that is no square.
    """
    if grid is None:
        side = math.isqrt(tokens)
        grid = (side, side)
        if side * side != tokens:
            raise UserError(
                f"{tokens} tokens are no square; say on which grid they stand, as (rows, columns)."
            )
    if grid[0] * grid[1] != tokens:
        raise UserError(f"A grid of {grid[0]} x {grid[1]} was given for {tokens} tokens.")
    return grid


class LinearConnector(nn.Module):
    """One linear map per token, as in LLaVA (arXiv 2304.08485).

    Attributes:
      width: of the new tokens.
      bias: whether the map has one.
      dtype: compute type.
    """

    width: int
    bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens out"]:
        """Maps every token."""
        stddev = tokens.shape[-1] ** -0.5
        project = dense(
            self.width, ("embed", "joint"), stddev=stddev, name="projection", bias=self.bias, dtype=self.dtype
        )
        out: jax.Array = project(tokens)
        return out


class MlpConnector(nn.Module):
    """Two linear maps with an activation between, per token, as in LLaVA 1.5 (arXiv 2310.03744).

    Attributes:
      width: of the new tokens.
      hidden: width between the maps; None is ``width``.
      activation: a key of :data:`vlpjax.models.layers.ACTIVATIONS`.
      bias: whether the maps have one.
      input_norm: a LayerNorm before the first map, as in InternVL 1.5 (arXiv 2404.16821), and its ``epsilon``.
      dtype: compute type.
    """

    width: int
    hidden: int | None = None
    activation: str = "gelu"
    bias: bool = True
    input_norm: bool = False
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens out"]:
        """Maps every token."""
        if self.input_norm:
            tokens = norm("input_norm", "layer", self.dtype, self.epsilon)(tokens)
        hidden = self.hidden or self.width
        options: dict[str, Any] = dict(bias=self.bias, dtype=self.dtype)
        up = dense(hidden, ("embed", "mlp"), stddev=tokens.shape[-1] ** -0.5, name="up", **options)
        down = dense(self.width, ("mlp", "joint"), stddev=hidden**-0.5, name="down", **options)
        out: jax.Array = down(activation(self.activation)(up(tokens)))
        return out


class PixelShuffle(nn.Module):
    """Puts the tokens of each square of ``factor`` x ``factor`` behind one another into one token; no parameters.

    Channels come in the order (row in the square, column in the square, channel), rows outermost: that of InternVL
    1.5 (arXiv 2404.16821) and of Idefics3 (arXiv 2408.12637).

    Attributes:
      factor: side of the square; there are ``factor ** 2`` times fewer tokens, as many times wider.
    """

    factor: int = 2

    def __call__(
        self, tokens: Float[Array, "batch tokens width"], grid: Grid | None = None
    ) -> Float[Array, "batch fewer wider"]:
        """Merges.

        Args:
          grid: rows and columns that the tokens stand on; None is a square.

        Raises:
          UserError: rows or columns that ``factor`` does not divide.
        """
        rows, columns = grid_of(tokens.shape[1], grid)
        if rows % self.factor or columns % self.factor:
            raise UserError(
                f"A grid of {rows} x {columns} does not divide into squares of factor={self.factor}."
            )
        batch, _, width = tokens.shape
        shape = (batch, rows // self.factor, self.factor, columns // self.factor, self.factor, width)
        squares = tokens.reshape(shape).swapaxes(2, 3)  # [B, H/f, W/f, f, f, D]
        return squares.reshape(batch, -1, self.factor**2 * width)


def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """Row ``i`` averages over ``floor(i size / bins) <= index < ceil((i + 1) size / bins)``; [bins, size]."""
    index = np.arange(bins)
    start, end = index * size // bins, -(-(index + 1) * size // bins)
    place = np.arange(size)
    inside = (place >= start[:, None]) & (place < end[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


class AdaptiveAveragePool(nn.Module):
    """Averages tokens over the cells of a coarser grid; no parameters.

    Cells overlap by up to one row and column where the grids do not divide, as in PyTorch's ``adaptive_avg_pool2d``.

    Attributes:
      grid: rows and columns of the new tokens.
    """

    grid: Grid

    def __call__(
        self, tokens: Float[Array, "batch tokens width"], grid: Grid | None = None
    ) -> Float[Array, "batch cells width"]:
        """Averages; ``grid`` is what the tokens stand on, None a square."""
        rows, columns = grid_of(tokens.shape[1], grid)
        batch, _, width = tokens.shape
        cells = jnp.einsum(
            "ih,jw,bhwd->bijd",
            pooling_matrix(rows, self.grid[0]),
            pooling_matrix(columns, self.grid[1]),
            tokens.reshape(batch, rows, columns, width).astype(jnp.float32),
        )
        return cells.reshape(batch, -1, width).astype(tokens.dtype)


class PerceiverResampler(nn.Module):
    """Learned latents attend to any number of tokens, and to themselves, and come out as so many tokens.

    Source: "Flamingo", arXiv 2204.14198, section 2.1 and appendix A.1.1.

    Attributes:
      latents: number of tokens that come out.
      depth, heads, head_dim: of the blocks; ``head_dim`` None is the tokens' width over ``heads``.
      mlp_ratio: the MLP's hidden width over the tokens'.
      times: rows of the table of time embeddings, one per frame; None adds none.
      activation: of the MLPs; squared ReLU in the paper.
      epsilon: of the LayerNorms.
      dtype: compute type.
    """

    latents: int = 64
    depth: int = 6
    heads: int = 8
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    times: int | None = None
    activation: str = "squared_relu"
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"] | Float[Array, "batch frames tokens width"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch latents width"]:
        """Resamples.

        Args:
          tokens: of an image, or of the frames of a video.
          lengths: how many tokens (of the frames, counted through) are no padding; None is all.

        Raises:
          UserError: more frames than ``times``.
        """
        width = tokens.shape[-1]
        frames = tokens if tokens.ndim == 4 else tokens[:, None]  # [B, T, N, D]
        if self.times is not None:
            if frames.shape[1] > self.times:
                raise UserError(f"The resampler takes {self.times} frames, but was given {frames.shape[1]}.")
            initial = named(nn.initializers.normal(0.02), "position", "embed")
            times = self.param("time_embedding", initial, (self.times, width))
            frames = frames + times[: frames.shape[1], None].astype(frames.dtype)
        media = frames.reshape(frames.shape[0], -1, width)  # [B, T N, D]
        initial = named(nn.initializers.normal(0.02), None, "embed")
        queries = self.param("latents", initial, (self.latents, width)).astype(self.dtype or jnp.float32)
        latents = jnp.broadcast_to(queries, (media.shape[0], *queries.shape))  # [B, Q, D]
        seen = None if lengths is None else prefix(lengths + self.latents, self.latents)
        for index in range(self.depth):
            block = _ResamplerBlock(
                self.heads,
                self.head_dim,
                round(self.mlp_ratio * width),
                self.depth,
                self.activation,
                self.epsilon,
                self.dtype,
                name=f"block_{index}",
            )
            latents = block(latents, media, seen)
        out: jax.Array = norm("final_norm", "layer", self.dtype, self.epsilon)(latents)
        return out


class _ResamplerBlock(nn.Module):
    """Latents attend to media and latents, then an MLP; each adds to the latents."""

    heads: int
    head_dim: int | None
    mlp_dim: int
    depth: int
    activation: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, latents: jax.Array, media: jax.Array, seen: Any) -> jax.Array:
        def normed(name: str, x: jax.Array) -> jax.Array:
            out: jax.Array = norm(name, "layer", self.dtype, self.epsilon)(x)
            return out

        queries = normed("attention_norm", latents)
        # Latents stand first among the keys, so that media and their padding end in an interval.
        keys = jnp.concatenate([queries, normed("media_norm", media)], axis=1)  # [B, Q + M, D]
        attention = Attention(
            self.heads,
            head_dim=self.head_dim,
            bias=False,
            out_bias=False,
            depth=self.depth,
            dtype=self.dtype,
            name="attention",
        )
        latents = latents + attention(queries, seen, keys).tokens
        mlp = Mlp(self.mlp_dim, self.depth, self.activation, bias=False, dtype=self.dtype, name="mlp")
        return latents + mlp(normed("mlp_norm", latents))
