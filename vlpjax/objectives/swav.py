"""SwAV: predict the balanced cluster code of one crop of an image from its other crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.heads import MLPHead
from vlpjax.models.prototypes import Prototypes, unit_prototypes
from vlpjax.objectives.assignment import sinkhorn
from vlpjax.objectives.base import Context, Loss, normalize
from vlpjax.objectives.crops import MultiCrop, crop_pairs, cross_entropies, entropies
from vlpjax.objectives.queue import enqueue


@dataclass(frozen=True)
class SwAV(MultiCrop):
    """Swapped prediction between crops: the code of each large crop is the target of all other crops.

    The codes are balanced over the global batch, each large crop by itself, and over a queue of earlier features,
    whose scores are taken anew with the present prototypes.

    Attributes:
      projector: widths of its layers, BatchNorm after all but the last, over all crops together.
      prototypes: their number.  They have length one after every update.
      temperature: of the predictions.
      epsilon, rounds: of the codes, see :func:`vlpjax.objectives.assignment.sinkhorn`; 0 rounds do not balance, which
        collapses.
      queue: earlier images per large crop that codes are balanced with, for batches much smaller than the number of
        prototypes; 0 is none.
      queue_start: duration after which the queue is used, once it is full.
      freeze_prototypes: duration in which prototypes get no gradient.

    Source: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882,
    equations 2 to 5, and appendix A.
    """

    projector: tuple[int, ...] = (2048, 128)
    prototypes: int = 3000
    temperature: float = 0.1
    epsilon: float = 0.05
    rounds: int = 3
    queue: int = 0
    queue_start: str = ""
    freeze_prototypes: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue_start and not self.queue:
            raise UserError(f"SwAV.queue_start is {self.queue_start!r}, but queue=0 is no queue.")

    def heads(self) -> dict[str, nn.Module]:
        return {
            "projector": MLPHead(self.projector),
            "prototypes": Prototypes(self.prototypes, normalized=False),
        }

    def constraints(self) -> dict[str, Any]:
        return {"prototypes": unit_prototypes}

    def initial_state(self, key: jax.Array) -> Any:
        if not self.queue:
            return ()
        features = jnp.zeros((self.queue, len(self.global_views), self.projector[-1]))
        return {"queue": features, "oldest": jnp.zeros((), jnp.int32), "seen": jnp.zeros((), jnp.int32)}

    def encode(self, context: Context) -> Float[Array, "batch views width"]:
        return self.crops(context)[1]

    def compare(self, features: Any, context: Context) -> Loss:
        projected = normalize(context.head("projector", features))  # [B, V, E]
        frozen = self._frozen(context)
        scores = context.head("prototypes", projected, frozen)  # [B, V, K]
        large = len(self.global_views)
        codes = jnp.stack([self._codes(projected, scores, view, context) for view in range(large)], axis=1)
        losses = cross_entropies(codes, scores / self.temperature)  # [B, G, V]
        value = jnp.sum(jnp.mean(losses, axis=0) * crop_pairs(large, scores.shape[1]))
        return Loss(value, entropies(codes), self._enqueue(projected[:, :large], context))

    def _codes(
        self, projected: jax.Array, scores: jax.Array, view: int, context: Context
    ) -> Float[Array, "batch prototypes"]:
        """The balanced codes of one large crop."""
        scores = scores[:, view]
        if not self.queue:
            return sinkhorn(scores, self.epsilon, self.rounds)
        earlier = context.head("prototypes", context.state["queue"][:, view], True)  # [Q, K]
        full = context.state["seen"] >= self.queue
        started = context.step >= (context.steps(self.queue_start, "queue_start") if self.queue_start else 0)
        batch = scores.shape[0]
        counted = (jnp.arange(batch + self.queue) < batch) | (full & started)
        return sinkhorn(jnp.concatenate([scores, earlier]), self.epsilon, self.rounds, counted)[:batch]

    def _enqueue(self, projected: Float[Array, "batch large features"], context: Context) -> Any:
        """The batch's features in place of the oldest."""
        if not self.queue:
            return ()
        seen = jnp.minimum(context.state["seen"] + projected.shape[0], self.queue)
        return {**enqueue(context.state, "SwAV", queue=projected), "seen": seen}

    def _frozen(self, context: Context) -> Any:
        if not self.freeze_prototypes:
            return False
        return context.step < context.steps(self.freeze_prototypes, "freeze_prototypes")
