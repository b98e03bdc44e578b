"""NT-Xent, the loss of SimCLR: of all views in the global batch, find the other view of the same image."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.mesh import constrain
from vlpjax.models.heads import MLPHead
from vlpjax.objectives.base import Context, Loss, normalize
from vlpjax.objectives.contrastive import local_rows
from vlpjax.objectives.two_views import TwoViews


@dataclass(frozen=True)
class NTXent(TwoViews):
    """Normalised, temperature-scaled cross-entropy: the other view is the positive, all 2 (B - 1) others negatives.

    Of the 2B views each is compared with all but itself.  The loss is the mean over images of the sum of its two
    views' losses, as in the paper's code.  A device holds the rows of its own views against the gathered views of
    all, [B / devices, 2B]; the gather carries gradient.

    Attributes:
      temperature: divides the cosines.
      projector: widths of the projector's layers; the last is the space of the comparison.
        Its hidden layers have BatchNorm over both views together.
      projector_last_norm: after its last layer: ``"affine"``, ``"plain"`` or None.

    Source: "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709, equation 1.
    """

    temperature: float = 0.1
    projector: tuple[int, ...] = (2048, 128)
    projector_last_norm: str | None = None

    def heads(self) -> dict[str, nn.Module]:
        return {"projector": MLPHead(self.projector, last_norm=self.projector_last_norm)}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        views = normalize(context.head("projector", features["student"]))  # [B, 2, E]
        first, second = views[:, 0], views[:, 1]
        (forward, right), (backward, right_back) = self._pick(first, second), self._pick(second, first)
        return Loss(jnp.mean(forward + backward), {"accuracy": (jnp.mean(right) + jnp.mean(right_back)) / 2})

    def _pick(
        self, queries: Float[Array, "batch features"], others: Float[Array, "batch features"]
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        """Per query, the loss of finding its own other view, and whether it is found."""
        rows = jnp.arange(queries.shape[0])
        itself = constrain(rows, "frames")[:, None] == rows[None, :]
        within = jnp.where(itself, -jnp.inf, local_rows(queries, queries, 1 / self.temperature))
        across = local_rows(queries, others, 1 / self.temperature)  # [B / devices, B]
        positive = jnp.sum(queries * others, axis=-1) / self.temperature
        total = jnp.logaddexp(jax.nn.logsumexp(across, axis=1), jax.nn.logsumexp(within, axis=1))
        best = jnp.maximum(jnp.max(jnp.where(itself, -jnp.inf, across), axis=1), jnp.max(within, axis=1))
        return total - positive, positive >= best
