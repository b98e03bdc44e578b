"""Supervised classification: the oldest way to pretrain a tower."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.layers import dense
from vlpjax.objectives.base import Context, Loss, Objective


@dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy of a linear classifier on a tower's features.

    A label that is no number of a class makes the loss NaN, with which a run ends: the compiled step cannot raise.

    Attributes:
      classes: how many there are.
      tower, image: name of the tower, and the field that it reads.
      output: which of the tower's outputs is classified.
      label: field of the batch that holds the class number.
      smoothing: share of the target that is spread evenly over all classes ("Rethinking the Inception Architecture
        for Computer Vision", arXiv 1512.00567, section 7).
    """

    classes: int
    tower: str = "image"
    image: str = "image"
    output: str = "pooled"
    label: str = "label"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 2 or not 0 <= self.smoothing < 1:
            raise UserError(
                f"Classification has classes={self.classes} and smoothing={self.smoothing}; there are two classes or "
                "more, and smoothing is from 0 to below 1."
            )

    def heads(self) -> dict[str, nn.Module]:
        return {"classifier": Classifier(self.classes)}

    def __call__(self, context: Context) -> Loss:
        labels = context.read(self.label)
        features = context.encode(self.tower, self.image)[self.output]
        logits = context.head("classifier", features).astype(jnp.float32)  # [B, classes]
        targets = optax.smooth_labels(nn.one_hot(labels, self.classes), self.smoothing)
        known = (labels >= 0) & (labels < self.classes)
        targets = jnp.where(known[:, None], targets, jnp.nan)
        right = jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
        return Loss(jnp.mean(optax.softmax_cross_entropy(logits, targets)), {"accuracy": right})


class Classifier(nn.Module):
    """A linear layer whose logits start near zero, but not at it: the tower's first gradient must not vanish.

    Attributes:
      classes: how many there are.
    """

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        logits: jax.Array = dense(self.classes, ("embed", None), stddev=0.01, name="linear")(x)
        return logits
