"""Similarity-row distillation: a student's similarities over the batch are to look like those of its teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.mesh import constrain
from vlpjax.objectives.base import Context, Loss, normalize, pick
from vlpjax.objectives.contrastive import SIDES, Scaled, cross_entropy, local_rows, only

CROSS = (("image", "text"), ("text", "image"))


@dataclass(frozen=True)
class SimilarityDistillation(Scaled):
    """Cross-entropy, or KL divergence, between softmaxed rows of similarities, averaged over ``pairs``.

    For rows u and columns v, p = mean over teachers of softmax(u_T v_T^T / teacher_temperature), q = softmax(S u v^T),
    and the loss is the mean over rows of -sum p log q, less the entropy of p if ``divergence`` is ``"kl"``.  Only
    relations are compared, so stored teachers may be of other widths, and a rotation of all embeddings changes nothing.

    It stands beside the contrastive objective, whose scale it shares, and the two weights say how much is taught::

        config.teachers.best = spec(Teacher, checkpoint="runs/clip")  # the same towers, with that run's parameters
        config.objectives.distill = dict(
            weight=1.0, loss=spec(SimilarityDistillation, teachers=("best",), scale_of="clip")
        )

    Attributes:
      image, text: names of the student's towers.
      image_field, text_field: the fields of the batch that they read, and the teachers too.
      image_output, text_output: which of a tower's outputs is compared, of the student and of the teachers.
      teachers: names of teachers, which have the student's towers.
      stored: pairs of fields with embeddings [B, D] of images and texts that were computed before, each pair one more
        teacher ("Reinforce Data, Multiply Impact", arXiv 2303.08983).
      pairs: (rows, columns) of each similarity: ``("image", "text")`` or ``("image", "image")``, for example.
      teacher_temperature: of the teachers; the student's is as in :class:`vlpjax.objectives.contrastive.Scaled`.
      own: whether each example's similarity to itself takes part in pairs of one modality.  It is 1 for every model and
        would take most of the probability.
      divergence: ``"ce"`` or ``"kl"``; the gradients are equal.

    Source: "CLIP with Quality Captions", arXiv 2405.08911, and "MobileCLIP", arXiv 2311.17049, section 3.2 (teachers
    averaged after the softmax); "CTP", arXiv 2308.07146, section 3.3 (relations within a modality, without the
    diagonal).
    """

    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    text_field: str = "text"
    image_output: str = "embedding"
    text_output: str = "embedding"
    teachers: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    pairs: tuple[tuple[str, str], ...] = CROSS
    teacher_temperature: float = 0.07
    own: bool = False
    divergence: str = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teachers and not self.stored:
            raise UserError(
                "SimilarityDistillation has nobody to learn from; name 'teachers' or 'stored' fields."
            )
        if not self.pairs or any(side not in SIDES for pair in self.pairs for side in pair):
            raise UserError(
                f"SimilarityDistillation.pairs is {self.pairs}; it takes pairs of 'image' and 'text'."
            )
        if self.divergence not in ("ce", "kl"):
            raise UserError(
                f"SimilarityDistillation.divergence is {self.divergence!r}; there are 'ce' and 'kl'."
            )

    def encode(self, context: Context) -> dict[str, dict[str, jax.Array]]:
        features = {"student": self._features(context)}
        for teacher in self.teachers:
            features[f"teacher_{teacher}"] = self._features(context, teacher)
        for index, fields in enumerate(self.stored):
            features[f"stored_{index}"] = {
                side: normalize(context.read(name)) for side, name in zip(SIDES, fields, strict=True)
            }
        return features

    def compare(self, features: dict[str, dict[str, jax.Array]], context: Context) -> Loss:
        student = features["student"]
        teachers = [
            jax.tree.map(jax.lax.stop_gradient, found)
            for name, found in features.items()
            if name != "student"
        ]
        scale = self.scale(context)
        values, entropies, agreements = [], [], []
        for rows, columns in self.pairs:
            shown = None if self.own or rows != columns else off_diagonal(student[rows].shape[0])
            target = teacher_rows(
                [(each[rows], each[columns]) for each in teachers], self.teacher_temperature, shown
            )
            logits = local_rows(student[rows], student[columns], scale)
            values.append(jnp.mean(cross_entropy(logits, target, shown)))
            entropies.append(jnp.mean(-jnp.sum(jax.scipy.special.xlogy(target, target), axis=1)))
            agreements.append(jnp.mean(jnp.argmax(only(logits, shown), axis=1) == jnp.argmax(target, axis=1)))
        value, entropy, agreement = (
            sum(each, jnp.zeros(())) / len(self.pairs) for each in (values, entropies, agreements)
        )
        metrics = {"kl": value - entropy, "teacher_entropy": entropy, "agreement": agreement}
        return Loss(value - entropy if self.divergence == "kl" else value, metrics)

    def _features(self, context: Context, teacher: str | None = None) -> dict[str, jax.Array]:
        """What ``pairs`` need of the student or of a teacher, rows of length one."""
        towers = {
            "image": (self.image, self.image_field, self.image_output),
            "text": (self.text, self.text_field, self.text_output),
        }
        used = {side for pair in self.pairs for side in pair}
        return {
            side: normalize(pick(context.encode(tower, field, teacher=teacher), output))
            for side, (tower, field, output) in towers.items()
            if side in used
        }


def off_diagonal(size: int) -> Bool[Array, "{size} {size}"]:
    """Where a row does not meet itself, rows on the devices of their examples."""
    rows = jnp.arange(size)
    return constrain(rows, "frames")[:, None] != rows[None, :]


def teacher_rows(
    teachers: Sequence[tuple[Float[Array, "batch _"], Float[Array, "batch _"]]],
    temperature: float,
    shown: Bool[Array, "batch batch"] | None = None,
) -> Float[Array, "batch batch"]:
    """The mean of the teachers' softmaxed similarity rows: averaged after the softmax, not before.

    Args:
      teachers: row and column features of each, of length one.
      shown: entries that have a probability; None is all.
    """
    total: jax.Array | float = 0.0
    for rows, columns in teachers:
        logits = local_rows(rows, columns, 1 / temperature)
        total += jax.nn.softmax(only(logits, shown), axis=1)
    return jnp.asarray(total) / len(teachers)
