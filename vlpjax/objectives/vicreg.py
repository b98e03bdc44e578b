"""VICReg: embeddings of two views agree, every dimension keeps its variance, and no two dimensions say the same."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.mesh import constrain
from vlpjax.models.heads import MLPHead
from vlpjax.objectives.base import Context, Loss
from vlpjax.objectives.two_views import TwoViews, per_view


@dataclass(frozen=True)
class VICReg(TwoViews):
    """Invariance, variance and covariance of two views' embeddings, which are not normalised.

    L = invariance s(z, z') + variance (v(z) + v(z')) / 2 + covariance (c(z) + c(z')), as in the paper's code, which
    halves the second sum and not the third.

    Attributes:
      projector: widths of its layers, BatchNorm after all but the last, one view at a time.
      invariance, variance, covariance: the weights of the three terms.

    Source: "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", arXiv 2105.04906,
    equations 1 to 6.
    """

    projector: tuple[int, ...] = (8192, 8192, 8192)
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def heads(self) -> dict[str, nn.Module]:
        return {"projector": MLPHead(self.projector)}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        embedded = per_view(context, "projector", features["student"]).astype(jnp.float32)
        first, second = embedded[:, 0], embedded[:, 1]
        apart = jnp.mean(jnp.square(first - second))
        narrow = (variance_hinge(first) + variance_hinge(second)) / 2
        alike = off_diagonal_covariance(first) + off_diagonal_covariance(second)
        value = self.invariance * apart + self.variance * narrow + self.covariance * alike
        deviation = jnp.mean(jnp.std(embedded, axis=0))
        metrics = {"invariance": apart, "variance": narrow, "covariance": alike, "deviation": deviation}
        return Loss(value, metrics)


def variance_hinge(embedded: Float[Array, "batch features"]) -> Float[Array, ""]:
    """The mean over dimensions of max(0, 1 - sqrt(variance + 1e-4)); the variance is unbiased.

    Source: arXiv 2105.04906, equations 1 and 2.
    """
    deviation = jnp.sqrt(jnp.var(embedded, axis=0, ddof=1) + 1e-4)
    return jnp.mean(jax.nn.relu(1 - deviation))


def off_diagonal_covariance(embedded: Float[Array, "batch features"]) -> Float[Array, ""]:
    """The sum of the squared covariances of different dimensions, over the number of dimensions.

    The squares of a covariance matrix and of the Gram matrix of the same rows have one sum, so whichever of the two
    is smaller is made, spread over the devices by its rows (a covariance is first a sum of the devices' own); then the
    squares of the diagonal are taken off.

    Source: arXiv 2105.04906, equation 4.
    """
    batch, width = embedded.shape
    centred = embedded - jnp.mean(embedded, axis=0)
    if batch < width:
        gathered = constrain(centred, None, None)
        squares = jnp.sum(jnp.square(constrain(centred, "frames", None) @ gathered.T))  # [B / devices, B]
    else:
        squares = jnp.sum(jnp.square(constrain(centred.T @ centred, "frames", None)))  # [D / devices, D]
    diagonal = jnp.sum(jnp.square(jnp.sum(jnp.square(centred), axis=0)))
    return (squares - diagonal) / float((batch - 1) ** 2 * width)  # too large a number for an int32
