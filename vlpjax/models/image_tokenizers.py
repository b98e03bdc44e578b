"""Frozen tokenizers: a grid of ids per image, which masked prediction takes as its targets.

Both are towers whose outputs have ``"ids"`` [B, N], one per patch in reading order.  As a teacher they are never
trained.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.layers import dense, named
from vlpjax.models.patches import cut


class RandomProjectionTokenizer(nn.Module):
    """The nearest of random codes to a random projection of the patch: a tokenizer that needs no training.

    Patches are standardised per image, so that the codes see differences between patches and not the brightness of
    the whole; a projected patch and the codes have length one.

    Attributes:
      patch: side in pixels.
      vocabulary: number of codes.
      width: of the space in which patches and codes are compared.

    Parameters: ``projection/kernel`` and ``codes`` [vocabulary, width]; both stay at their initial values.

    Source: "Self-Supervised Learning with Random-Projection Quantizer for Speech Recognition", arXiv 2202.01855,
    section 3.1, there for frames of speech.
    """

    patch: int
    vocabulary: int = 512
    width: int = 16

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"]) -> dict[str, jax.Array]:
        pixels = cut(images.astype(jnp.float32), (self.patch, self.patch))  # [B, N, P]
        pixels = jax.nn.standardize(pixels, axis=(1, 2), epsilon=1e-6)
        stddev = pixels.shape[-1] ** -0.5
        project = dense(self.width, (None, "embed"), stddev=stddev, name="projection", bias=False)
        initial = named(nn.initializers.normal(1.0), "vocabulary", "embed")
        codes = self.param("codes", initial, (self.vocabulary, self.width))
        codes = codes / jnp.linalg.norm(codes, axis=-1, keepdims=True)
        # The longest dot product with codes of length one is the nearest code, whatever the patch's own length.
        return {"ids": jnp.argmax(project(pixels) @ codes.T, axis=-1)}


class DiscreteVAEEncoder(nn.Module):
    """The encoder of DALL-E's discrete VAE, whose 8192 codes are BEiT's targets.

    Eight pixels are one id: images of 112 pixels give the 14x14 ids of a ViT/16 at 224.  Pixels are in [0, 1], squeezed
    to [0.1, 0.9].

    Attributes:
      vocabulary: number of codes.
      width: channels of the first group; they double at every halving of the grid.
      blocks: residual blocks per group.
      dtype: compute type.

    Parameters: ``input``, ``group_{g}_block_{b}_{skip, conv_1, ..., conv_4}``, ``output``.

    Source: "Zero-Shot Text-to-Image Generation", arXiv 2102.12092, appendix A.2, in the form of the released weights.
    """

    vocabulary: int = 8192
    width: int = 256
    blocks: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"]) -> dict[str, jax.Array]:
        groups = 4
        if images.shape[1] % 8 or images.shape[2] % 8:
            raise UserError(
                f"DiscreteVAEEncoder takes sides that 8 divides; the images have {images.shape[1:3]}."
            )
        gain = 1 / (groups * self.blocks) ** 2  # keeps the sum of all branches small
        x = self._conv("input", 0.1 + 0.8 * images, self.width, 7)
        for group in range(groups):
            for block in range(self.blocks):
                x = self._block(f"group_{group}_block_{block}", x, self.width * 2**group, gain)
            if group < groups - 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        logits = self._conv("output", nn.relu(x), self.vocabulary, 1)  # [B, H / 8, W / 8, vocabulary]
        return {"ids": jnp.argmax(logits, axis=-1).reshape(len(images), -1)}

    def _block(self, name: str, x: jax.Array, width: int, gain: float) -> jax.Array:
        skip = x if x.shape[-1] == width else self._conv(f"{name}_skip", x, width, 1)
        for index, size in enumerate((3, 3, 3, 1), start=1):
            hidden = width if index == 4 else width // 4
            x = self._conv(f"{name}_conv_{index}", nn.relu(x), hidden, size)
        return skip + gain * x

    def _conv(self, name: str, x: jax.Array, width: int, size: int) -> jax.Array:
        stddev = 1 / math.sqrt(x.shape[-1] * size**2)
        convolved: jax.Array = nn.Conv(
            width,
            (size, size),
            dtype=self.dtype,
            # Without names of axes, the largest dimension that can be divided is: sizes differ from layer to layer.
            kernel_init=nn.initializers.normal(stddev),
            name=name,
        )(x)
        return convolved
