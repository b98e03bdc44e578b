"""Small modules that objectives add to the towers: temperatures, projections, projectors and predictors."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.layers import activation, batch_norm, dense, named, norm


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


class MLPHead(nn.Module):
    """A projector or predictor of self-supervision: linear layers with norms and activations between them.

    With ``norm="batch"`` the statistics are those of the global batch however it is sharded, so that no device
    can tell its examples from the others' (MoCo v3, arXiv 2104.02057; SimCLR, arXiv 2002.05709).

    Attributes:
      features: width after each layer; the last is the output's.
      norm: after each layer but the last: ``"batch"``, a kind of :func:`vlpjax.models.layers.norm`, or None.
      last_norm: a norm after the last layer: ``"affine"``, ``"plain"`` (without scale and bias) or None.
      activation: between layers: a key of :data:`vlpjax.models.layers.ACTIVATIONS`.
      bias: of the linear layers that no norm follows; the others need none.
      stddev: of the kernels' initial values; None is ``(2 / inputs) ** 0.5`` (arXiv 1502.01852).
      dtype: compute type; None is float32.
    """

    features: tuple[int, ...]
    norm: str | None = "batch"
    last_norm: str | None = None
    activation: str = "relu"
    bias: bool = True
    stddev: float | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "... width"], *, train: bool = False) -> Float[Array, "... features"]:
        """Projects features; all leading dimensions count as examples.

        Raises:
          UserError: a ``last_norm`` that there is not, or that the kind of norm does not have.
        """
        if self.last_norm not in (None, "affine", "plain"):
            raise UserError(f"MLPHead.last_norm is {self.last_norm!r}; there are 'affine', 'plain' and None.")
        if self.last_norm == "plain" and self.norm not in (None, "batch"):
            raise UserError(
                f"MLPHead.last_norm is 'plain', which is a BatchNorm's, but norm is {self.norm!r}."
            )
        last = len(self.features) - 1
        for index, width in enumerate(self.features):
            normed = self.last_norm is not None if index == last else self.norm is not None
            # Kernels alternate, so that each but the last is split along both axes of the mesh; the last, whose width
            # may be anything, is shared among those that hold parameters.
            inner, outer = ("embed", "mlp") if index % 2 == 0 or index == last else ("mlp", "embed")
            axes = (inner, None if index == last else outer)
            x = dense(
                width, axes, stddev=self.stddev or (2 / x.shape[-1]) ** 0.5, name=f"layer_{index}",
                bias=self.bias and not normed, dtype=self.dtype,
            )(x)  # fmt: skip
            if normed:
                affine = index != last or self.last_norm == "affine"
                x = self._norm(f"norm_{index}", x, affine, train)
            if index != last:
                x = activation(self.activation)(x)
        return x

    def _norm(self, name: str, x: jax.Array, affine: bool, train: bool) -> jax.Array:
        if self.norm in (None, "batch"):
            normed: jax.Array = batch_norm(name, train, affine=affine, dtype=self.dtype)(x)
            return normed
        other: jax.Array = norm(name, self.norm, self.dtype)(x)
        return other
