"""Positions on a grid: tables and how they are resized, sines and cosines, and angles for rotary attention.

Resizing is a product with one matrix per axis.  The matrices are written out here, because libraries disagree
on the details (`jax.image.resize` takes another cubic kernel than PyTorch, and treats borders differently), and
published towers resize their tables with PyTorch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.positions import Rotation

METHODS = ("bilinear", "bicubic")
SINCOS_FORMS = ("big_vision", "mae")
ROTARY_FORMS = ("patches", "centred")

# Keys' cubic kernel: PyTorch's plain resize takes -0.75, its antialiased one (and Pillow) -0.5.
_CUBIC, _CUBIC_ANTIALIAS = -0.75, -0.5


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be written as one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _kernel(xp: ModuleType, x: Any, method: str, a: float) -> Any:
    """The triangle, or Keys' cubic with parameter ``a``, at distances ``x`` in samples."""
    x = xp.abs(x)
    if method == "bilinear":
        return xp.maximum(1 - x, 0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return xp.where(x <= 1, near, xp.where(x < 2, far, 0))


def _weights(
    xp: ModuleType, index: Any, size: Any, samples: int, method: str, antialias: bool, dtype: Any
) -> Any:
    """Weights [..., samples] of the old samples in sample ``index`` of ``size`` new ones; see `resize_weights`."""
    if method not in METHODS:
        raise UserError(f"Positions are resized by {method!r}; there are {', '.join(map(repr, METHODS))}.")
    source = xp.arange(samples)
    step = samples / xp.asarray(size, dtype)  # old samples per new one
    centre = ((xp.asarray(index, dtype) + 0.5) * step - 0.5)[..., None]
    if antialias:  # the kernel grows when shrinking; what lies beyond the border is left out
        stretch = xp.maximum(step, 1)[..., None]
        weights = _kernel(xp, (source - centre) / stretch, method, _CUBIC_ANTIALIAS)
        return weights / weights.sum(axis=-1, keepdims=True)
    first = xp.floor(centre)
    weights = xp.zeros((*centre.shape[:-1], samples), dtype)
    for offset in (0, 1) if method == "bilinear" else (-1, 0, 1, 2):  # beyond the border, the border repeats
        tap = xp.clip(first + offset, 0, samples - 1)
        weights = weights + xp.where(source == tap, _kernel(xp, centre - first - offset, method, _CUBIC), 0)
    return weights


def resize_weights(
    index: Float[Array, "*shape"] | Int[Array, "*shape"],
    size: Int[Array, "*shape"] | int,
    samples: int,
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "*shape {samples}"]:
    """How much of each old sample is in a new one, when a line of ``samples`` is resized to ``size``.

    Samples stand at the centres of equal cells ("align_corners=False").  Differentiable and traceable in ``index``
    and ``size``, so that each image of a batch can have a size of its own.

    Args:
      index: which new samples, from 0 to ``size - 1``.
      size: how many new samples there are; broadcast against ``index``.
      method: ``"bilinear"`` or ``"bicubic"``.
      antialias: average over all old samples that a new one covers, when shrinking.
    """
    shape = jnp.broadcast_shapes(jnp.shape(index), jnp.shape(size))
    index, size = jnp.broadcast_to(index, shape), jnp.broadcast_to(size, shape)
    return _weights(jnp, index, size, samples, method, antialias, jnp.float32)


def resize_matrix(samples: int, size: int, method: str = "bicubic", antialias: bool = False) -> np.ndarray:
    """The matrix [size, samples], in float64, that resizes a line of ``samples``: see :func:`resize_weights`."""
    index = np.arange(size)
    return _weights(np, index, np.full(size, size), samples, method, antialias, np.float64)


def resize_positions(
    table: Float[Array, "*leading rows columns width"],
    grid: tuple[int, int],
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "*leading new_rows new_columns width"]:
    """A table of positions for another grid, equal to PyTorch's ``interpolate(..., align_corners=False)``.

    Args:
      table: rows and columns of the old grid; without class tokens.
      grid: rows and columns of the new one.
      method: ``"bilinear"`` or ``"bicubic"``.
      antialias: as SigLIP 2 and timm do, and most of `transformers` does not.

    Raises:
      UserError: an unknown method.
    """
    rows, columns = table.shape[-3:-1]
    if (rows, columns) == tuple(grid):
        return table
    down = jnp.asarray(resize_matrix(rows, grid[0], method, antialias), table.dtype)
    along = jnp.asarray(resize_matrix(columns, grid[1], method, antialias), table.dtype)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("yr,xc,...rcd->...yxd", down, along, table, precision=exact)


def sample_positions(
    table: Float[Array, "rows columns width"],
    positions: Int[Array, "batch tokens 2"],
    grids: Int[Array, "batch tokens 2"],
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "batch tokens width"]:
    """For each token its row of the table that :func:`resize_positions` would make for its image's grid.

    Args:
      positions: row and column of each token.
      grids: rows and columns of the image that each token belongs to; positions beyond it count as its border.
    """
    rows, columns, width = table.shape
    positions = jnp.clip(positions, 0, grids - 1)  # of padding, they may be anything
    down = resize_weights(positions[..., 0], grids[..., 0], rows, method, antialias)  # [B, N, R]
    along = resize_weights(positions[..., 1], grids[..., 1], columns, method, antialias)  # [B, N, C]
    weights = (down[..., :, None] * along[..., None, :]).reshape(*down.shape[:-1], rows * columns)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("bnp,pd->bnd", weights, table.reshape(rows * columns, width), precision=exact)


def sincos_positions(
    positions: Float[Array, "*shape axes"] | Int[Array, "*shape axes"], width: int, form: str = "big_vision"
) -> Float[Array, "*shape {width}"]:
    """Fixed positions: ``[sin x, cos x, sin y, cos y]``, a quarter of the features each; x is the column.

    With one axis, a place in a text, it is ``[sin x, cos x]`` ("Attention Is All You Need", arXiv 1706.03762).

    Args:
      positions: row and column, or a place.
      form: of the wavelengths, which grow geometrically from 2 pi.  ``"big_vision"``: the last is 2 pi 10000 ("Better
        plain ViT baselines for ImageNet-1k", arXiv 2205.01580).  ``"mae"``: the last is one step before that ("Masked
        Autoencoders Are Scalable Vision Learners", arXiv 2111.06377).

    Raises:
      UserError: a width that twice the number of axes does not divide, or an unknown form.
    """
    if form not in SINCOS_FORMS:
        raise UserError(f"sincos_form is {form!r}; there are {', '.join(map(repr, SINCOS_FORMS))}.")
    parts = 2 * positions.shape[-1]
    count = width // parts
    if width % parts or count < 2:
        raise UserError(
            f"Positions by sines and cosines need a width that {parts} divides, at least {2 * parts}; it is {width}."
        )
    rates = 10000.0 ** (-np.arange(count) / (count - 1 if form == "big_vision" else count))
    places = jnp.asarray(positions, jnp.float32)[..., ::-1, None]  # [..., axes, 1], the last axis first
    angles = places * jnp.asarray(rates, jnp.float32)  # [..., axes, W / 2 axes]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape[:-1], width)


def grid_positions(rows: int, columns: int) -> Int[Array, "tokens 2"]:
    """Row and column of every patch of a grid, in reading order."""
    return jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), axis=-1).reshape(
        -1, 2
    )


def rotation_2d(
    positions: Int[Array, "batch tokens 2"],
    grids: Int[Array, "#batch #tokens 2"],
    head_dim: int,
    base: float = 10000.0,
    form: str = "patches",
    scale: Float[Array, ""] | float = 1.0,
) -> Rotation:
    """Angles of 2-D rotary positions: the first half of a head's angles turns by the row, the second by the column.

    There are ``head_dim / 2`` angles; feature ``i`` is paired with ``i + head_dim / 2``.  Within an axis angle ``j`` is
    ``coordinate * base ** (-j / (head_dim / 4))``.

    Args:
      positions: row and column of each token.
      grids: rows and columns of its image.
      base: of the wavelengths.
      form: of the coordinates.  ``"patches"``: rows and columns are counted from 0 (Qwen2-VL, arXiv 2409.12191).
        ``"centred"``: the centre of the patch, in [-1, 1] across the image, times 2 pi (DINOv3, arXiv 2508.10104,
        whose base is 100).
      scale: factor of the coordinates.

    Raises:
      UserError: a head whose width 4 does not divide, or an unknown form.
    """
    if form not in ROTARY_FORMS:
        raise UserError(f"rotary_form is {form!r}; there are {', '.join(map(repr, ROTARY_FORMS))}.")
    if head_dim % 4:
        raise UserError(f"2-D rotary positions need heads whose width 4 divides; it is {head_dim}.")
    coordinates = positions.astype(jnp.float32)
    if form == "centred":
        coordinates = 2 * np.pi * (2 * (coordinates + 0.5) / grids - 1)
    if not (isinstance(scale, float) and scale == 1.0):
        coordinates = coordinates * scale
    rates = base ** (-np.arange(head_dim // 4) / (head_dim // 4))
    angles = coordinates[..., None] * jnp.asarray(rates, jnp.float32)  # [B, N, 2, head_dim / 4]
    angles = angles.reshape(*angles.shape[:-2], head_dim // 2)
    return Rotation(jnp.cos(angles), jnp.sin(angles))
