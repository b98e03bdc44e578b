"""ResNet with bottleneck blocks (arXiv 1512.03385), the tower of the first self-supervised systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.heads import Projection
from vlpjax.models.layers import batch_norm, named

STEMS = ("large", "small")


class ResNet(nn.Module):
    """Images of any size to features, through stages of residual bottleneck blocks.

    The stride of a block is in its 3x3 convolution (as in torchvision; "v1.5").  BatchNorm takes the statistics of
    the global batch in training.

    Attributes:
      depths: blocks per stage; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101.
      width: channels inside the first stage's blocks; each further stage doubles them.
      expansion: of the channels at a block's end.
      stem: ``"large"`` (7x7 with stride 2, then max-pooling) or ``"small"`` (3x3, for images of 32 pixels, as SimCLR
        has it for CIFAR-10, arXiv 2002.05709, appendix B.9).
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      zero_init: the last norm of every block starts at 0, so that blocks start as the identity ("Accurate, Large
        Minibatch SGD", arXiv 1706.02677).
      dtype: compute type; None is float32.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    expansion: int = 4
    stem: str = "large"
    embedding: int | None = None
    zero_init: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> dict[str, Float[Array, ...]]:
        """Encodes a batch of images.

        Returns:
          ``"tokens"`` [B, N, D], one per position of the last grid; ``"pooled"`` [B, D], their mean; ``"embedding"``
          [B, E] (equal to ``"pooled"`` without a projection).

        Raises:
          UserError: an unknown ``stem``.
        """
        if self.stem not in STEMS:
            raise UserError(f"ResNet.stem is {self.stem!r}; there are {', '.join(map(repr, STEMS))}.")
        large = self.stem == "large"
        x = self._convolve("stem", images, self.width, 7 if large else 3, 2 if large else 1, train)
        x = nn.relu(x)
        if large:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                x = self._block(
                    f"block_{sum(self.depths[:stage]) + block}", x, self.width << stage, stride, train
                )
        tokens = rearrange(x, "b h w c -> b (h w) c")
        pooled = jnp.mean(tokens, axis=1, dtype=jnp.float32).astype(tokens.dtype)
        embedding = pooled
        if self.embedding is not None:
            embedding = Projection(self.embedding, self.dtype, name="projection")(pooled)
        return {"tokens": tokens, "pooled": pooled, "embedding": embedding}

    def _block(
        self, name: str, x: Float[Array, "batch rows columns channels"], width: int, stride: int, train: bool
    ) -> Float[Array, "batch rows columns channels"]:
        """1x1, 3x3 and 1x1 convolutions beside a shortcut, which is projected where shapes differ."""
        channels = width * self.expansion
        y = nn.relu(self._convolve(f"{name}_reduce", x, width, 1, 1, train))
        y = nn.relu(self._convolve(f"{name}_mix", y, width, 3, stride, train))
        y = self._convolve(f"{name}_expand", y, channels, 1, 1, train, zero=self.zero_init)
        if x.shape != y.shape:
            x = self._convolve(f"{name}_shortcut", x, channels, 1, stride, train)
        return nn.relu(x + y)

    def _convolve(
        self,
        name: str,
        x: Float[Array, "batch rows columns channels"],
        channels: int,
        size: int,
        stride: int,
        train: bool,
        zero: bool = False,
    ) -> Float[Array, "batch rows columns channels"]:
        """A convolution without bias, and BatchNorm."""
        margin: Sequence[tuple[int, int]] = ((size // 2, size // 2),) * 2
        x = nn.Conv(
            channels,
            (size, size),
            strides=(stride, stride),
            padding=margin,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=named(nn.initializers.he_normal(), None, None, None, "embed"),
            name=f"{name}_convolution",
        )(x)
        initial = nn.initializers.zeros if zero else nn.initializers.ones
        normed: Any = batch_norm(f"{name}_norm", train, scale=initial, dtype=self.dtype)(x)
        return normed
