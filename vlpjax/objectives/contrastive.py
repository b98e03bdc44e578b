"""Image-text contrastive losses: the softmax form of CLIP and the sigmoid form of SigLIP.

Both compare every image of the global batch with every text.  Each device holds the rows of its own
examples against the gathered features of all: logits of [B / devices, B], never [B, B].  The gather carries
gradient, so that value and gradient are those of one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.mesh import constrain
from vlpjax.models.heads import Scalar
from vlpjax.objectives.base import BatchCoupled, Context, Loss, normalize


@dataclass(frozen=True)
class Contrastive(BatchCoupled):
    """What both losses share: two towers, a learned scale, and who counts as a positive.

    Attributes:
      image, text: names of the towers.
      image_field, text_field: the fields of the batch that they read.
      same: a field of integers; examples with equal values are positives of one another (two drawings of
        one concept in a batch are no negatives).  None makes the pairs of the batch the only positives.
      temperature: initial value; the learned parameter is the logarithm of its inverse.
      max_scale: the scale is clipped to [1, max_scale] after every update (CLIP clips to 100).
    """

    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    text_field: str = "text"
    same: str | None = None
    temperature: float = 0.07
    max_scale: float = 100.0

    def heads(self) -> dict[str, nn.Module]:
        return {"logit_scale": Scalar(-math.log(self.temperature))}

    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"logit_scale": (0.0, math.log(self.max_scale))}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        return {
            "image": normalize(context.encode(self.image, self.image_field)["embedding"]),  # [B, E]
            "text": normalize(context.encode(self.text, self.text_field)["embedding"]),  # [B, E]
        }

    def positives(self, context: Context, batch: int) -> Bool[Array, "batch batch"]:
        """Which text (column) is right for which image (row); symmetric, with a true diagonal."""
        labels = jnp.arange(batch) if self.same is None else context.read(self.same)
        return constrain(labels, "frames")[:, None] == constrain(labels, None)[None, :]


def local_rows(
    queries: Float[Array, "batch features"],
    keys: Float[Array, "batch features"],
    scale: Float[Array, ""] | float,
) -> Float[Array, "batch batch"]:
    """scale * queries @ keys^T, rows on the devices of their queries, keys gathered."""
    queries = constrain(queries, "frames", None) * scale
    return constrain(queries @ constrain(keys, None, None).T, "frames", None)  # [B / devices, B]


@dataclass(frozen=True)
class InfoNCE(Contrastive):
    """Softmax contrastive loss: each image picks its text among the batch's, each text its image.

    L = (CE(S u v^T, P) + CE(S v u^T, P)) / 2, with P uniform over a row's positives.

    Attributes:
      label_smoothing: share of the target that is spread evenly over all columns.

    Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020,
    figure 3; several positives as in "Unified Contrastive Learning", arXiv 2204.03610.
    """

    label_smoothing: float = 0.0

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        image, text = features["image"], features["text"]
        scale = jnp.exp(context.head("logit_scale"))
        positive = self.positives(context, image.shape[0])
        target = positive / jnp.sum(positive, axis=1, keepdims=True)
        target = (1 - self.label_smoothing) * target + self.label_smoothing / image.shape[0]
        logits = local_rows(image, text, scale)
        image_to_text = -jnp.sum(target * jax.nn.log_softmax(logits, axis=1), axis=1)  # [B]
        text_to_image = -jnp.sum(target * jax.nn.log_softmax(local_rows(text, image, scale), axis=1), axis=1)
        best = jnp.take_along_axis(positive, jnp.argmax(logits, axis=1)[:, None], axis=1)
        metrics = {"accuracy": jnp.mean(best), "scale": scale}
        return Loss(jnp.mean(image_to_text + text_to_image) / 2, metrics)


@dataclass(frozen=True)
class Sigmoid(Contrastive):
    """Pairwise sigmoid loss: every image-text pair of the batch is a binary question of its own.

    L = -1/B sum_ij log sigmoid(y_ij (S u_i . v_j + b)), y = +1 for positives and -1 otherwise.  The sum is
    divided by the batch size, not by the number of pairs.

    Attributes:
      bias: initial value of the learned bias.

    Source: "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, equation 1; initial
    temperature 0.1 and bias -10.
    """

    temperature: float = 0.1
    bias: float = -10.0

    def heads(self) -> dict[str, nn.Module]:
        return {**super().heads(), "logit_bias": Scalar(self.bias)}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        image, text = features["image"], features["text"]
        scale, bias = jnp.exp(context.head("logit_scale")), context.head("logit_bias")
        positive = self.positives(context, image.shape[0])
        logits = local_rows(image, text, scale) + bias
        losses = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
        best = jnp.take_along_axis(positive, jnp.argmax(logits, axis=1)[:, None], axis=1)
        metrics = {"accuracy": jnp.mean(best), "scale": scale, "bias": bias}
        return Loss(jnp.sum(losses) / image.shape[0], metrics)
