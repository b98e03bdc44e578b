"""Multi-crop: two or more large crops of an image and any number of small ones, and which are compared with which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.objectives.base import BatchCoupled, Context, pick


@dataclass(frozen=True)
class MultiCrop(BatchCoupled):
    """Base of the objectives on several crops of every image, large ones first in every array.

    Attributes:
      tower: name of the tower that sees the crops; small crops need ``resize_positions=True`` of a ViT.
      global_views: the fields of the batch with the large crops.
      local_views: those with the small crops; empty is none.
      output: which of the tower's outputs is compared; see :func:`vlpjax.objectives.base.pick`.

    Source: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882,
    section 3.2.
    """

    tower: str = "image"
    global_views: tuple[str, ...] = ("global1", "global2")
    local_views: tuple[str, ...] = ()
    output: str = "pooled"

    def __post_init__(self) -> None:
        if len(self.global_views) + len(self.local_views) < 2 or not self.global_views:
            raise UserError(
                f"{type(self).__name__} compares crops: it needs a large one and another, but has "
                f"global_views={self.global_views} and local_views={self.local_views}."
            )

    def crops(
        self, context: Context, variant: str = "", large: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[dict[str, Any], Float[Array, "batch views width"]]:
        """The student's outputs for the large crops, and its features of all crops; one pass per size.

        Args:
          variant: names what the options make different, as in :meth:`Context.encode`.
          large: arguments of the tower for large crops only, such as ``masked=``; ``options`` are those for all.
        """
        outputs = context.encode_views(
            self.tower, self.global_views, variant=variant, **{**options, **(large or {})}
        )
        features = pick(outputs, self.output)
        if self.local_views:
            # Without options of their own, small crops are what any other objective makes of them.
            small = context.encode_views(
                self.tower, self.local_views, variant=variant if options else "", **options
            )
            features = jnp.concatenate([features, pick(small, self.output)], axis=1)
        return outputs, features


def crop_pairs(targets: int, crops: int) -> np.ndarray:
    """Which crop (column) predicts which large crop's target (row): every one but itself.  Sums to 1 over all.

    With G targets there are G crops - G pairs, such as 2 (2 + 8) - 2 = 18.
    """
    pairs = np.ones((targets, crops)) - np.eye(targets, crops)
    return (pairs / pairs.sum()).astype(np.float32)


def cross_entropies(
    targets: Float[Array, "batch targets prototypes"], logits: Float[Array, "batch crops prototypes"]
) -> Float[Array, "batch targets crops"]:
    """-sum_k target_k log softmax(logits)_k of every target with every crop of the same image."""
    # Targets sum to one, so the logarithm of the softmax's denominator need not be spread over prototypes.
    total = jax.nn.logsumexp(logits, axis=-1)[:, None, :]  # [B, 1, V]
    return total - jnp.einsum("btk,bvk->btv", targets, logits)


def entropies(codes: Float[Array, "*leading prototypes"]) -> dict[str, Any]:
    """What tells a collapse: entropies over log K, of single codes and of their mean, both between 0 and 1.

    One prototype for all images is 0 in both; all prototypes for every image is 1 in both.
    """
    flat = codes.reshape(-1, codes.shape[-1])
    scale = 1 / np.log(codes.shape[-1])

    def entropy(p: jax.Array) -> jax.Array:
        return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1) * scale

    return {"entropy": jnp.mean(entropy(flat)), "mean_entropy": entropy(jnp.mean(flat, axis=0))}
