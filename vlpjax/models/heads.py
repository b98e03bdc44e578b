"""Small modules that objectives add to the towers: temperatures and projections."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.models.layers import dense, named


class Scalar(nn.Module):
    """One learned number, such as the logarithm of a temperature.  Always float32.

    Attributes:
      initial: its value before training.
    """

    initial: float

    @nn.compact
    def __call__(self) -> Float[Array, ""]:
        return self.param("value", named(nn.initializers.constant(self.initial)), ())


class Projection(nn.Module):
    """A linear map into a space that towers share, as a rule without bias; initial deviation width^-0.5."""

    features: int
    dtype: Any = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... features"]:
        axes = ("embed", "joint")
        project = dense(
            self.features, axes, stddev=x.shape[-1] ** -0.5, name="kernel", bias=self.bias, dtype=self.dtype
        )
        out: jax.Array = project(x)
        return out
