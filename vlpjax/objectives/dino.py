"""DINO: a student predicts its teacher's distribution over prototypes from every other crop of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.models.prototypes import PrototypeHead
from vlpjax.objectives.assignment import sinkhorn
from vlpjax.objectives.base import Context, Loss, pick
from vlpjax.objectives.crops import MultiCrop, crop_pairs, cross_entropies, entropies
from vlpjax.objectives.koleo import koleo

CENTRINGS = ("mean", "sinkhorn", "none")


@dataclass(frozen=True)
class DINO(MultiCrop):
    """Self-distillation of class tokens: cross-entropy of the teacher's sharpened, centred prototypes.

    The mean over all pairs of a large crop, seen by the teacher, and another crop, seen by the student.

    Attributes:
      teacher: its name in ``config.teachers``, an EMA of the tower and of this objective's heads.
      prototypes, hidden, bottleneck: of :class:`vlpjax.models.prototypes.PrototypeHead`.
      student_temperature: of the predictions.
      teacher_temperature: of the targets, at the first step and after ``teacher_warmup``, linear between.
      teacher_warmup: a duration; empty is none.
      centring: what keeps all images from one prototype.  ``"mean"`` takes off the teacher's running mean logits,
        with ``centre_momentum``; ``"sinkhorn"`` balances the targets of the global batch ("DINOv2", arXiv 2304.07193,
        section 4), all large crops together; ``"none"`` collapses.
      freeze_prototypes: duration in which the last layer gets no gradient (the paper's first epoch).
      koleo: weight of :func:`vlpjax.objectives.koleo.koleo` on the student's features of each large crop by itself,
        summed over them, as in DINOv2's code.

    Source: "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294, equations 1 to 4.
    """

    teacher: str = "ema"
    prototypes: int = 65536
    hidden: tuple[int, ...] = (2048, 2048)
    bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04)
    teacher_warmup: str = ""
    centring: str = "mean"
    centre_momentum: float = 0.9
    freeze_prototypes: str = ""
    koleo: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centring not in CENTRINGS:
            raise UserError(
                f"{type(self).__name__}.centring is {self.centring!r}; there are {', '.join(map(repr, CENTRINGS))}."
            )

    def heads(self) -> dict[str, nn.Module]:
        return {"head": self._head(self.prototypes)}

    def initial_state(self, key: jax.Array) -> Any:
        return {"centre": jnp.zeros(self.prototypes)} if self.centring == "mean" else {}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        seen = context.encode_views(self.tower, self.global_views, teacher=self.teacher)
        return {"student": self.crops(context)[1], "teacher": pick(seen, self.output)}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        targets, state = self.class_targets(features["teacher"], context)
        value, metrics = self.class_loss(features["student"], targets, context)
        return Loss(value, {**metrics, **entropies(targets)}, state)

    # --- parts ----------------------------------------------------------------------------------------------

    def class_targets(
        self, features: Float[Array, "batch large width"], context: Context, head: str = "head"
    ) -> tuple[Float[Array, "batch large prototypes"], Any]:
        """The teacher's distributions, which carry no gradient, and the state after this step."""
        logits = context.head(head, features, teacher=self.teacher)  # [B, G, K]
        temperature = self.temperature(self.teacher_temperature, context)
        flat, centre = self.targets(
            logits.reshape(-1, logits.shape[-1]), temperature, context.state.get("centre")
        )
        state = context.state if centre is None else {**context.state, "centre": centre}
        return flat.reshape(logits.shape), state

    def class_loss(
        self,
        features: Float[Array, "batch views width"],
        targets: Float[Array, "batch large prototypes"],
        context: Context,
        head: str = "head",
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """Cross-entropy over all pairs of crops, and KoLeo."""
        logits = context.head(head, features, self.frozen(context)) / self.student_temperature  # [B, V, K]
        distilled = self.pairs_loss(logits, targets)
        if not self.koleo:
            return distilled, {"class": distilled}
        large = range(len(self.global_views))
        spread = sum((koleo(features[:, view]) for view in large), jnp.zeros(()))
        return distilled + self.koleo * spread, {"class": distilled, "koleo": spread / len(large)}

    def pairs_loss(
        self, logits: Float[Array, "batch views prototypes"], targets: Float[Array, "batch large prototypes"]
    ) -> Float[Array, ""]:
        """The mean cross-entropy over all pairs of a target and another crop's logits, over the temperature."""
        pairs = jnp.mean(cross_entropies(targets, logits), axis=0)  # [G, V]
        return jnp.sum(pairs * crop_pairs(*pairs.shape))

    def targets(
        self,
        logits: Float[Array, "rows prototypes"],
        temperature: Float[Array, ""],
        centre: Float[Array, " prototypes"] | None,
        counted: Bool[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "rows prototypes"], Float[Array, " prototypes"] | None]:
        """Distributions from a teacher's logits, and the centre after this batch, which these do not use yet.

        Args:
          counted: rows that have a part in the balance and in the centre; None is all.
        """
        logits = jax.lax.stop_gradient(logits)
        if self.centring == "sinkhorn":
            return sinkhorn(logits, temperature, rounds=3, counted=counted), None
        if centre is None:
            return jax.nn.softmax(logits / temperature, axis=-1), None
        weights = jnp.ones(len(logits)) if counted is None else counted.astype(jnp.float32)
        mean = weights @ logits / jnp.maximum(jnp.sum(weights), 1.0)
        moved = self.centre_momentum * centre + (1 - self.centre_momentum) * mean
        moved = jnp.where(jnp.sum(weights) > 0, moved, centre)
        return jax.nn.softmax((logits - centre) / temperature, axis=-1), moved

    def temperature(self, ends: tuple[float, float], context: Context) -> Float[Array, ""]:
        """A teacher's temperature at this step."""
        return context.ramp(*ends, self.teacher_warmup, "teacher_warmup")

    def frozen(self, context: Context) -> Any:
        """Whether the last layers get no gradient at this step."""
        if not self.freeze_prototypes:
            return False
        return context.step < context.steps(self.freeze_prototypes, "freeze_prototypes")

    def _head(self, prototypes: int) -> nn.Module:
        return PrototypeHead(prototypes, self.hidden, self.bottleneck)
