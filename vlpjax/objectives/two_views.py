"""What objectives on two augmented views of an image share: how the views are encoded, and how heads see them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlpjax.objectives.base import BatchCoupled, Context, pick


@dataclass(frozen=True)
class TwoViews(BatchCoupled):
    """Base of the objectives that compare two views of every image.

    Attributes:
      tower: name of the tower that sees the images.
      views: the fields of the batch that hold the two views.
      output: which of the tower's outputs is compared; see :func:`vlpjax.objectives.base.pick`.
    """

    tower: str = "image"
    views: tuple[str, str] = ("view1", "view2")
    output: str = "pooled"

    def encode(self, context: Context) -> dict[str, jax.Array]:
        return {"student": self.features(context)}

    def features(self, context: Context, teacher: str | None = None) -> Float[Array, "batch views width"]:
        """The backbone's features of both views, made in one pass."""
        return pick(context.encode_views(self.tower, self.views, teacher=teacher), self.output)


def per_view(
    context: Context, head: str, features: Float[Array, "batch views width"], teacher: str | None = None
) -> Float[Array, "batch views features"]:
    """A head on each view by itself, so that BatchNorm takes the statistics of one view, over the global batch."""
    views = [context.head(head, features[:, view], teacher=teacher) for view in range(features.shape[1])]
    return jnp.stack(views, axis=1)
