"""Momentum contrast: queries of the student against keys of a slowly following teacher (MoCo v2 and v3)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.mesh import constrain
from vlpjax.models.heads import MLPHead
from vlpjax.objectives.base import Context, Loss, normalize, pick
from vlpjax.objectives.contrastive import local_rows
from vlpjax.objectives.queue import enqueue
from vlpjax.objectives.two_views import TwoViews, per_view


@dataclass(frozen=True)
class MomentumContrast(TwoViews):
    """What both versions share: a teacher that makes the keys, its name in ``config.teachers``, and a temperature.

    Attributes:
      teacher: an EMA of the tower and of this objective's projector.
      temperature: divides the cosines.
    """

    teacher: str = "ema"
    temperature: float = 0.2


@dataclass(frozen=True)
class MoCoV2(MomentumContrast):
    """One view asks, the other answers; the negatives are the keys of earlier batches, in a queue.

    logits = [q . k, q . queue^T] / T with the answer in front.  The keys join the queue after the loss, in place of
    the oldest.  BatchNorm takes the statistics of the global batch, so that there is nothing to shuffle: no device
    can recognise its own keys by them.

    Attributes:
      queue: number of keys that are remembered, at least a batch.
      projector: widths of the projector's layers, without norms.

    Source: "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297; "Momentum Contrast for
    Unsupervised Visual Representation Learning", arXiv 1911.05722, algorithm 1.
    """

    queue: int = 65536
    projector: tuple[int, ...] = (2048, 128)

    def heads(self) -> dict[str, nn.Module]:
        return {"projector": MLPHead(self.projector, norm=None)}

    def initial_state(self, key: jax.Array) -> dict[str, jax.Array]:
        noise = jax.random.normal(key, (self.queue, self.projector[-1]))
        return {"queue": normalize(noise), "oldest": jnp.zeros((), jnp.int32)}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        first, second = self.views
        return {
            "student": pick(context.encode(self.tower, first), self.output),  # [B, D]
            "teacher": pick(context.encode(self.tower, second, teacher=self.teacher), self.output),  # [B, D]
        }

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        queries = normalize(context.head("projector", features["student"]))  # [B, E]
        keys = normalize(context.head("projector", features["teacher"], teacher=self.teacher))  # [B, E]
        queue = context.state["queue"]
        right = jnp.sum(queries * keys, axis=-1, keepdims=True)
        wrong = constrain(queries, "frames", None) @ queue.T  # [B / devices, queue]
        logits = jnp.concatenate([right, wrong], axis=1) / self.temperature
        losses = jax.nn.logsumexp(logits, axis=1) - logits[:, 0]
        accuracy = jnp.mean(right[:, 0] >= jnp.max(wrong, axis=1))
        return Loss(jnp.mean(losses), {"accuracy": accuracy}, enqueue(context.state, "MoCoV2", queue=keys))


@dataclass(frozen=True)
class MoCoV3(MomentumContrast):
    """Each view asks for the other among the batch's; the student has a predictor, the negatives are the batch's keys.

    L = ctr(q1, k2) + ctr(q2, k1) with ctr(q, k) = 2 T CE(q k^T / T).  Keys carry no gradient.

    For Vision Transformers the patch projection stays as it was initialised, which ``rate_rules`` of the optimizer
    say: ``(r"image/patches/.*", None)`` (section 4.3 of the paper).

    Attributes:
      projector, predictor: widths of their layers; BatchNorm after each, one view at a time.
      last_norm: after the last layer of both: ``"plain"`` has no scale and bias.  The paper's ResNet has none on the
        predictor, which ``predictor_last_norm`` says.

    Source: "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057, algorithm 1.
    """

    projector: tuple[int, ...] = (4096, 4096, 256)
    predictor: tuple[int, ...] = (4096, 256)
    last_norm: str | None = "plain"
    predictor_last_norm: str | None = "plain"

    def heads(self) -> dict[str, nn.Module]:
        return {
            "projector": MLPHead(self.projector, last_norm=self.last_norm, bias=False),
            "predictor": MLPHead(self.predictor, last_norm=self.predictor_last_norm, bias=False),
        }

    def encode(self, context: Context) -> dict[str, jax.Array]:
        return {**super().encode(context), "teacher": self.features(context, self.teacher)}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        projected = per_view(context, "projector", features["student"])
        queries = normalize(per_view(context, "predictor", projected))  # [B, 2, E]
        keys = normalize(per_view(context, "projector", features["teacher"], self.teacher))  # [B, 2, E]
        forward, right = momentum_contrast(queries[:, 0], keys[:, 1], self.temperature)
        backward, right_back = momentum_contrast(queries[:, 1], keys[:, 0], self.temperature)
        return Loss(forward + backward, {"accuracy": (right + right_back) / 2})


def momentum_contrast(
    queries: Float[Array, "batch features"], keys: Float[Array, "batch features"], temperature: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """ctr(q, k) = 2 T CE(q k^T / T) over the global batch, and the share of queries that find their key.

    Queries and keys have length one; keys are gathered.

    Source: "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057, algorithm 1.
    """
    logits = local_rows(queries, keys, 1 / temperature)  # [B / devices, B]
    labels = jnp.arange(queries.shape[0])
    right = jnp.sum(queries * keys, axis=-1) / temperature
    losses = jax.nn.logsumexp(logits, axis=1) - right
    accuracy = jnp.mean(jnp.argmax(logits, axis=1) == constrain(labels, "frames"))
    return 2 * temperature * jnp.mean(losses), accuracy
