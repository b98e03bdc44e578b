"""Heads that compare features with learned prototypes: those of SwAV, and of DINO, iBOT and DINOv2."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.models.heads import MLPHead
from vlpjax.models.layers import named


class Prototypes(nn.Module):
    """Cosines of features of length one with unit-norm prototypes.

    Attributes:
      count: number of prototypes.
      normalized: prototypes are divided by their lengths in every pass, as a weight norm with gain 1 does ("Emerging
        Properties in Self-Supervised Vision Transformers", arXiv 2104.14294, appendix C).  Otherwise they are taken
        as they are, and whoever trains them brings them back to length one after every update
        (:func:`unit_prototypes`), as SwAV does (arXiv 2006.09882, section 3.1).
      dtype: compute type; None is float32.

    Parameters: ``kernel`` [width, count], columns of length one at the start.
    """

    count: int
    normalized: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "... width"], frozen: Bool[Array, ""] | bool = False
    ) -> Float[Array, "... prototypes"]:
        """The logits, in float32.

        Args:
          frozen: the prototypes get no gradient; may be traced.
        """
        shape = (features.shape[-1], self.count)
        kernel = self.param("kernel", named(unit_columns, "embed", "vocabulary"), shape)
        kernel = jnp.where(frozen, jax.lax.stop_gradient(kernel), kernel)
        dtype = self.dtype or jnp.float32
        logits = jnp.matmul(features.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
        if self.normalized:  # after the product, where there is less to divide than in the kernel
            logits = logits * _inverse_lengths(kernel)
        return logits.astype(jnp.float32)


class PrototypeHead(nn.Module):
    """The head of DINO: an MLP into a bottleneck, features to length one, prototypes to length one.

    Attributes:
      prototypes: their number.
      hidden: widths of the MLP's hidden layers.
      bottleneck: width of the space in which features meet prototypes.
      dtype: compute type; None is float32.

    Source: "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294, appendix C.
    """

    prototypes: int = 65536
    hidden: tuple[int, ...] = (2048, 2048)
    bottleneck: int = 256
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "... width"],
        frozen: Bool[Array, ""] | bool = False,
    ) -> Float[Array, "... prototypes"]:
        """Cosines with the prototypes, in float32.

        Args:
          frozen: the prototypes get no gradient; may be traced.
        """
        widths = (*self.hidden, self.bottleneck)
        mlp = MLPHead(widths, norm=None, activation="gelu", stddev=0.02, dtype=self.dtype, name="mlp")
        x = mlp(features).astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
        logits: jax.Array = Prototypes(self.prototypes, dtype=self.dtype, name="prototypes")(x, frozen)
        return logits


def unit_columns(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """An initializer: columns of normal noise, brought to length one."""
    return _columns_to_one(jax.random.normal(key, shape, dtype))


def unit_prototypes(params: Any) -> Any:
    """The parameters of :class:`Prototypes` with every prototype at length one."""
    return {**params, "kernel": _columns_to_one(params["kernel"])}


def _columns_to_one(kernel: Float[Array, "width count"]) -> Float[Array, "width count"]:
    return kernel * _inverse_lengths(kernel)


def _inverse_lengths(kernel: Float[Array, "width count"]) -> Float[Array, " count"]:
    return jax.lax.rsqrt(jnp.sum(jnp.square(kernel), axis=0) + 1e-12)
