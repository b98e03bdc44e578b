"""BYOL: predict the teacher's projection of the other view; there are no negatives."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.models.heads import MLPHead
from vlpjax.objectives.base import Context, Loss, normalize
from vlpjax.objectives.two_views import TwoViews, per_view


@dataclass(frozen=True)
class BYOL(TwoViews):
    """Twice one minus the cosine between the student's prediction and the teacher's projection, over both orders.

    Attributes:
      teacher: its name in ``config.teachers``, an EMA of the tower and of this objective's projector.  An empty name
        makes the student its own target, without stopping the gradient.
      projector, predictor: widths of their layers, BatchNorm after all but the last.  Without a predictor, ``()``, the
        projection itself is compared.

    Both empty forms collapse to one point (section 5 of the paper): they are there to be compared with.

    Source: "Bootstrap your own latent", arXiv 2006.07733, equation 2 and section 3.
    """

    teacher: str = "ema"
    projector: tuple[int, ...] = (4096, 256)
    predictor: tuple[int, ...] = (4096, 256)

    def heads(self) -> dict[str, nn.Module]:
        heads: dict[str, nn.Module] = {"projector": MLPHead(self.projector)}
        if self.predictor:
            heads["predictor"] = MLPHead(self.predictor)
        return heads

    def encode(self, context: Context) -> dict[str, jax.Array]:
        encoded = super().encode(context)
        return {**encoded, "teacher": self.features(context, self.teacher)} if self.teacher else encoded

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        projected = per_view(context, "projector", features["student"])  # [B, 2, E]
        predicted = per_view(context, "predictor", projected) if self.predictor else projected
        targets = projected
        if self.teacher:
            targets = per_view(context, "projector", features["teacher"], self.teacher)
        cosines = jnp.sum(normalize(predicted) * normalize(targets[:, ::-1]), axis=-1)  # [B, 2]
        return Loss(jnp.mean(jnp.sum(2 - 2 * cosines, axis=1)), {"spread": spread(projected)})


def spread(projected: Float[Array, "*leading features"]) -> Float[Array, ""]:
    """How far normalised embeddings are spread: 1 is evenly over the sphere, 0 is one point.

    The mean over dimensions of the standard deviation, times the root of their number.
    """
    unit = normalize(projected).reshape(-1, projected.shape[-1])
    return jnp.mean(jnp.std(unit, axis=0)) * projected.shape[-1] ** 0.5
