"""From pixels to tokens: linear patch projection, or a stem of small convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.layers import dense, named, norm


class PatchEmbedding(nn.Module):
    """Cuts images into a grid of patches and makes a token of each.

    Attributes:
      patch: side of a patch in pixels; must divide the image's sides.
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
    """

    patch: int
    width: int
    stem: str = "linear"
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    stem_norm: str = "batch"
    bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[Array, "batch patches width"]:
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UserError(f"Images of {height}x{width} pixels cannot be cut into patches of {self.patch}.")
        if self.stem == "conv":
            return self._convolve(images, train)
        if self.stem != "linear":
            raise UserError(f"ViT.stem is {self.stem!r}; there are 'linear' and 'conv'.")
        pixels = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
        scale = pixels.shape[-1] ** -0.5
        axes = (None, "embed")
        return dense(self.width, axes, stddev=scale, name="projection", bias=self.bias, dtype=self.dtype)(
            pixels
        )

    def _convolve(self, images: jax.Array, train: bool) -> jax.Array:
        strides = self.strides or (2,) * int(math.log2(self.patch))
        if math.prod(strides) != self.patch:
            raise UserError(
                f"ViT.stem_strides is {strides}, whose product must be the patch of {self.patch} pixels."
            )
        count = len(strides)
        channels = self.channels or tuple(max(self.width // 2 ** (count - step), 8) for step in range(count))
        if len(channels) != count:
            raise UserError(
                f"ViT.stem_channels has {len(channels)} entries, but there are {count} strides: {strides}."
            )
        for step, (features, stride) in enumerate(zip(channels, strides, strict=True)):
            images = nn.Conv(
                features,
                kernel_size=(3, 3),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=named(nn.initializers.he_normal(), None, None, None, "embed"),
                name=f"convolution_{step}",
            )(images)
            images = nn.relu(self._normalize(f"norm_{step}", images, train))
        tokens = rearrange(images, "b h w c -> b (h w) c")
        scale = tokens.shape[-1] ** -0.5
        return dense(self.width, (None, "embed"), stddev=scale, name="projection", dtype=self.dtype)(tokens)

    def _normalize(self, name: str, images: jax.Array, train: bool) -> jax.Array:
        if self.stem_norm != "batch":
            return norm(name, self.stem_norm, self.dtype)(images)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            dtype=self.dtype,
            scale_init=named(nn.initializers.ones, "activation"),
            bias_init=named(nn.initializers.zeros, "activation"),
            name=name,
        )(images)
