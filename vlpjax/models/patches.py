"""From pixels to tokens: linear projection of patches or tubelets, or a stem of small convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.convnet import convolve
from vlpjax.models.layers import dense, named
from vlpjax.models.positions_2d import pair, resize_matrix


def resize_kernel(
    kernel: Float[Array, "pixels width"],
    base: tuple[int, int],
    patch: tuple[int, int],
    tubelet: int = 1,
    method: str = "bilinear",
    antialias: bool = False,
) -> Float[Array, "new_pixels width"]:
    """A patch projection for another patch size, through the pseudo-inverse of the resizing of images.

    When the patch grows, a resized patch gives with the new kernel exactly the token that the patch gave with the
    old one; when it shrinks, the nearest in the least-squares sense.

    Args:
      kernel: of patches flattened as [time, height, width, channels].
      base, patch: old and new height and width, in pixels.
      tubelet: number of frames per patch, which stays.
      method, antialias: of the resizing: see :func:`vlpjax.models.positions_2d.resize_weights`.

    Source: "FlexiViT: One Model for All Patch Sizes", arXiv 2212.08013, equation 4.
    """
    if base == patch:
        return kernel
    out = kernel.shape[-1]
    down, along = (
        jnp.asarray(np.linalg.pinv(resize_matrix(old, new, method, antialias).T), kernel.dtype)
        for old, new in zip(base, patch, strict=True)
    )
    kernel = kernel.reshape(tubelet, *base, -1, out)  # [t, p, q, c, D]
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("yp,xq,tpqcd->tyxcd", down, along, kernel, precision=exact).reshape(-1, out)


def inflate_kernel(
    kernel: Float[Array, "pixels width"], tubelet: int, how: str = "central"
) -> Float[Array, "frames_pixels width"]:
    """A projection of tubelets made of one of patches, that gives a still image the token it had.

    Args:
      kernel: of patches flattened as [height, width, channels].
      tubelet: number of frames per patch.
      how: ``"central"`` puts the kernel at the middle frame and zeros elsewhere; ``"average"`` puts a share of it at
        every frame.

    Raises:
      UserError: an unknown ``how``.

    Source: "ViViT: A Video Vision Transformer", arXiv 2103.15691, equations 8 and 9.
    """
    if how == "average":
        return repeat(kernel / tubelet, "pixels d -> (t pixels) d", t=tubelet)
    if how != "central":
        raise UserError(f"Kernels are not inflated by {how!r}; there are 'central' and 'average'.")
    zeros = jnp.zeros((tubelet, *kernel.shape), kernel.dtype)
    return zeros.at[tubelet // 2].set(kernel).reshape(-1, kernel.shape[-1])


def cut(
    images: Float[Array, "batch *frames height width channels"], patch: tuple[int, int], tubelet: int = 1
) -> Float[Array, "batch patches pixels"]:
    """Patches in reading order (frames first), each flattened as [time, height, width, channels].

    Raises:
      UserError: a number of pixels or frames that cannot be cut without a rest.
    """
    height, width = images.shape[-3:-1]
    if height % patch[0] or width % patch[1]:
        shown = patch[0] if patch[0] == patch[1] else f"{patch[0]}x{patch[1]}"
        raise UserError(f"Images of {height}x{width} pixels cannot be cut into patches of {shown}.")
    if images.ndim == 4:
        return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch[0], q=patch[1])
    if images.shape[1] % tubelet:
        raise UserError(f"{images.shape[1]} frames cannot be cut into tubelets of {tubelet}.")
    pattern = "b (f t) (h p) (w q) c -> b (f h w) (t p q c)"
    return rearrange(images, pattern, t=tubelet, p=patch[0], q=patch[1])


def join(
    patches: Float[Array, "batch patches pixels"],
    grid: tuple[int, int],
    patch: tuple[int, int],
    tubelet: int = 1,
) -> Float[Array, "batch *frames height width channels"]:
    """The inverse of :func:`cut`: images, or clips if there are more patches than one grid or tubelet has.

    Args:
      grid: rows and columns of patches.

    Raises:
      UserError: patches that fill no grid, or pixels that fill no patch.
    """
    rows, columns = grid
    count, pixels = patches.shape[1:]
    if count % (rows * columns) or pixels % (tubelet * math.prod(patch)):
        raise UserError(
            f"{count} patches of {pixels} numbers cannot be joined on a grid of {rows}x{columns} patches of "
            f"{patch[0]}x{patch[1]} pixels."
        )
    sizes = dict(h=rows, w=columns, p=patch[0], q=patch[1])
    if count == rows * columns and tubelet == 1:
        return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", **sizes)
    return rearrange(patches, "b (f h w) (t p q c) -> b (f t) (h p) (w q) c", t=tubelet, **sizes)


class FlexibleProjection(nn.Module):
    """The linear projection of patches whose kernel is stored for another patch size, and resized when used.

    Attributes:
      features: width of a token.
      base, patch: height and width of the patches that the kernel is stored for, and of those that come.
      tubelet: number of frames per patch.
      bias: whether there is one.
      dtype: compute type.
    """

    features: int
    base: tuple[int, int]
    patch: tuple[int, int]
    tubelet: int = 1
    bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch patches pixels"]) -> Float[Array, "batch patches width"]:
        stored = pixels.shape[-1] // math.prod(self.patch) * math.prod(self.base)
        initial = named(nn.initializers.normal(stored**-0.5), None, "embed")
        kernel = self.param("kernel", initial, (stored, self.features))
        kernel = resize_kernel(kernel, self.base, self.patch, self.tubelet)
        dtype = self.dtype or jnp.result_type(pixels, kernel)
        tokens = jnp.dot(pixels.astype(dtype), kernel.astype(dtype))
        if self.bias:
            bias = self.param("bias", named(nn.initializers.zeros, "embed"), (self.features,))
            tokens = tokens + bias.astype(dtype)
        return tokens


class PatchEmbedding(nn.Module):
    """Cuts images, or clips of frames, into a grid of patches and makes a token of each.

    Attributes:
      patch: side of a patch in pixels, or its height and width; must divide the image's sides.
      width: of a token.
      stem: ``"linear"`` is one projection per patch (a matrix product, which is what a convolution of stride
        ``patch`` amounts to).  ``"conv"`` is a stack of 3x3 convolutions with ReLU, then a projection ("Early
        Convolutions Help Transformers See Better", arXiv 2106.14881).
      channels: of the convolutions; by default they double up to ``width``.
      strides: of the convolutions; their product is ``patch``; by default all are 2.
      stem_norm: after each convolution: ``"batch"`` (that paper's choice; statistics of the global batch, and
        running ones in evaluation), ``"layer"`` or ``"rms"`` (examples stay independent).
      bias: of the linear projection.
      dtype: compute type.
      tubelet: number of frames per patch.
      base: size of the patches that the kernel is stored for; None is ``patch``.
    """

    patch: int | tuple[int, int]
    width: int
    stem: str = "linear"
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    stem_norm: str = "batch"
    bias: bool = False
    dtype: Any = None
    tubelet: int = 1
    base: int | tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch *frames height width channels"], *, train: bool = False
    ) -> Float[Array, "batch patches width"]:
        """Makes tokens.

        Args:
          images: [B, H, W, C], clips [B, T, H, W, C], or what :func:`cut` makes of them: [B, N, pixels].

        Raises:
          UserError: images that cannot be cut, or settings that contradict each other.
        """
        patch = pair(self.patch)
        if self.stem not in ("linear", "conv"):
            raise UserError(f"ViT.stem is {self.stem!r}; there are 'linear' and 'conv'.")
        pixels = images if images.ndim == 3 else cut(images, patch, self.tubelet)
        if self.stem == "conv":
            if images.ndim != 4 or self.base is not None or patch[0] != patch[1]:
                raise UserError(
                    "ViT.stem is 'conv', which takes images of one size and square patches, no clips, no cut patches "
                    "and no patch_base; 'linear' takes them."
                )
            return self._convolve(images, patch[0], train)
        if self.base is not None:
            base = pair(self.base)
            return FlexibleProjection(
                self.width, base, patch, self.tubelet, self.bias, self.dtype, name="projection"
            )(pixels)
        scale = pixels.shape[-1] ** -0.5
        axes = (None, "embed")
        return dense(self.width, axes, stddev=scale, name="projection", bias=self.bias, dtype=self.dtype)(
            pixels
        )

    def _convolve(self, images: jax.Array, patch: int, train: bool) -> jax.Array:
        strides = self.strides or (2,) * int(math.log2(patch))
        if math.prod(strides) != patch:
            raise UserError(
                f"ViT.stem_strides is {strides}, whose product must be the patch of {patch} pixels."
            )
        count = len(strides)
        channels = self.channels or tuple(max(self.width // 2 ** (count - step), 8) for step in range(count))
        if len(channels) != count:
            raise UserError(
                f"ViT.stem_channels has {len(channels)} entries, but there are {count} strides: {strides}."
            )
        images = convolve(images, channels, strides, kind=self.stem_norm, dtype=self.dtype, train=train)
        tokens = rearrange(images, "b h w c -> b (h w) c")
        scale = tokens.shape[-1] ** -0.5
        return dense(self.width, (None, "embed"), stddev=scale, name="projection", dtype=self.dtype)(tokens)
