"""Masked language modelling: hide tokens of a text, and predict them from the others (and from an image)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from vlpjax.errors import UserError
from vlpjax.models.text import MaskedLanguageHead
from vlpjax.objectives.base import BatchCoupled, Context, Loss
from vlpjax.objectives.masking import lowest, members, spans
from vlpjax.objectives.targets import loss_of_sums, sums_per_example


def hide_tokens(
    key: jax.Array,
    ids: Int[Array, " length"],
    hideable: Bool[Array, " length"],
    ratio: float,
    mask_id: int,
    vocabulary: int,
    shares: tuple[float, float] = (0.8, 0.1),
    in_spans: bool = False,
) -> tuple[Int[Array, " length"], Bool[Array, " length"]]:
    """The ids that are read, and which tokens are to be predicted.

    Of the tokens that may be hidden, round(ratio * count), at least one, are to be predicted.  Of these, a first share
    reads as the mask token, a second as a random id, the rest as itself.

    Args:
      hideable: tokens that may be hidden: neither padding nor special.
      vocabulary: random ids are below it.
      shares: of the mask token and of random ids.
      in_spans: hide runs of tokens; a run goes on behind tokens that may not be hidden.

    Source: "BERT", arXiv 1810.04805, section 3.1; spans as in "SpanBERT", arXiv 1907.10529.
    """
    choice_key, kind_key, id_key = jax.random.split(key, 3)
    total = jnp.sum(hideable)
    count = jnp.minimum(jnp.maximum(jnp.round(ratio * total).astype(jnp.int32), 1), total)
    if in_spans:
        rank = jnp.cumsum(hideable) - 1  # among the tokens that may be hidden
        chosen = spans(choice_key, len(ids), count, total)[rank] & hideable
    else:
        chosen = lowest(jax.random.uniform(choice_key, ids.shape) + jnp.where(hideable, 0.0, 2.0), count)
    kind = jax.random.uniform(kind_key, ids.shape)
    random = jax.random.randint(id_key, ids.shape, 0, vocabulary)
    read = jnp.where(kind < shares[0], mask_id, jnp.where(kind < sum(shares), random, ids))
    return jnp.where(chosen, read, ids), chosen


@dataclass(frozen=True)
class MaskedLanguage(BatchCoupled):
    """Cross-entropy of the hidden tokens, over all of them in the batch.

    With a teacher the target is softened: (1 - soft) of the token itself and ``soft`` of the teacher's distribution,
    which reads the same text ("ALBEF", arXiv 2107.07651, equation 7).

    Attributes:
      vocabulary: number of token ids, the mask token among them.
      mask_id: id of the mask token.
      tower, text: name of the tower, a TextTransformer without causality, and the field that it reads.
      image, image_field: name of the tower whose tokens the text attends to, and the field that it reads; empty for
        text alone.
      ratio: share of the tokens that is hidden.
      shares: of the hidden ones that read as the mask token, and as a random id.
      in_spans: hide runs of tokens.
      special: ids that are never hidden; padding never is.
      tied: whether the head's decoder is the tower's table of token embeddings.
      teacher, soft: a teacher with the towers and this objective's head, and its weight.

    Source: "BERT", arXiv 1810.04805, section 3.1.
    """

    vocabulary: int
    mask_id: int
    tower: str = "text"
    text: str = "text"
    image: str = ""
    image_field: str = "image"
    ratio: float = 0.15
    shares: tuple[float, float] = (0.8, 0.1)
    in_spans: bool = False
    special: tuple[int, ...] = ()
    tied: bool = True
    teacher: str = ""
    soft: float = 0.4

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise UserError(
                f"MaskedLanguage.ratio is {self.ratio}; it is a share of the tokens above 0, up to 1."
            )
        if min(self.shares) < 0 or sum(self.shares) > 1:
            raise UserError(
                f"MaskedLanguage.shares are {self.shares}; they are shares that add up to 1 at most."
            )
        if not 0 <= self.mask_id < self.vocabulary:
            raise UserError(
                f"MaskedLanguage.mask_id is {self.mask_id}, which is no id below vocabulary={self.vocabulary}."
            )

    def heads(self) -> dict[str, nn.Module]:
        return {"head": MaskedLanguageHead(self.vocabulary, self.tied)}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        ids = context.read(self.text)
        tower = context.student[self.tower]
        if tower.causal:
            raise UserError(
                f"MaskedLanguage needs a tower that sees both sides, but {self.tower!r} has causal=True."
            )
        hideable = ids != tower.pad_id
        for special in self.special:
            hideable = hideable & (ids != special)

        def hide(key: jax.Array, ids: jax.Array, hideable: jax.Array) -> tuple[jax.Array, jax.Array]:
            shares = (self.shares[0], self.shares[1])
            return hide_tokens(
                key, ids, hideable, self.ratio, self.mask_id, self.vocabulary, shares, self.in_spans
            )

        read, chosen = jax.vmap(hide)(context.row_keys("tokens", len(ids)), ids, hideable)  # [B, L]
        most = max(1, math.ceil(self.ratio * ids.shape[1]))
        places, counted = jax.vmap(lambda mask: members(mask, most))(chosen)  # [B, M]
        labels = jnp.take_along_axis(ids, places, axis=1)
        logits = self._logits(context, read, places, None)  # [B, M, V]
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.teacher:
            target = jax.nn.softmax(self._logits(context, read, places, self.teacher))
            errors = (1 - self.soft) * errors + self.soft * optax.softmax_cross_entropy(logits, target)
        hits = jnp.argmax(logits, axis=-1) == labels
        return sums_per_example(counted, error=errors, accuracy=hits.astype(jnp.float32))

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        return loss_of_sums(features)

    def _logits(self, context: Context, ids: jax.Array, places: jax.Array, teacher: str | None) -> jax.Array:
        """What the student or a teacher predicts at these places of these ids; a teacher's carry no gradient."""
        towers = context.student if teacher is None else context.teacher(teacher)
        options: dict[str, Any] = {"train": context.train and teacher is None}
        if self.image:
            options["memory"] = context.encode(self.image, self.image_field, teacher=teacher)["tokens"]
        tokens = towers.call(self.tower, ids, **options)["tokens"]
        hidden = jnp.take_along_axis(tokens, places[..., None], axis=1)  # [B, M, D]
        table = None
        if self.tied:
            table = nn.meta.unbox(towers[self.tower].variables["params"]["token_embedding"]["embedding"])
        logits: jax.Array = context.head("head", hidden, table, teacher=teacher)
        return logits
