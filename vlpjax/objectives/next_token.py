"""Next-token prediction: a decoder learns from text alone, several documents to a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vlpjax.errors import UserError
from vlpjax.models.vocabulary_loss import vocabulary_loss
from vlpjax.objectives.base import BatchCoupled, Context, Loss
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import active_order, lay_out


@dataclass(frozen=True)
class NextToken(BatchCoupled):
    """Cross-entropy of every token given those before it in its document.

    A row is one token longer than what the decoder sees of it, because its first token is never asked for and nothing
    follows its last:

        row       a b c . d e      segment_ids  1 1 1 1 2 2
        inputs    a b c . d                     1 1 1 1 2
        labels    b c . d e                     1 1 1 2 2
        weights   1 1 1 0 1

    L = sum over tokens of weight * (-log p(label) + z_loss * log_partition ** 2), over the sum of the weights.  As that
    is the whole batch's, the loss couples its examples, if weakly; accumulation is exact.

    Attributes:
      decoder: name of the tower, a :class:`vlpjax.models.decoder.Decoder`.
      field: of the batch; token ids, int32 [B, T + 1].
      segment_field: of the batch; which document of its row each token is of, int32 [B, T + 1], from 1 on, and 0 for
        padding.  Documents do not see one another, positions count from the start of each.  Empty: every row is one
        text without padding.
      weight_field: of the batch; how much each token counts, float32 [B, T + 1], 0 for what others say.  Empty: all
        count alike.
      z_loss: factor of ``log_partition ** 2`` ("PaLM", arXiv 2204.02311, section 5).
      chunk: tokens of each row whose logits exist at once.

    Source: "Language Models are Unsupervised Multitask Learners" (GPT-2), equation 1.
    """

    decoder: str = "decoder"
    field: str = "tokens"
    segment_field: str = ""
    weight_field: str = ""
    z_loss: float = 0.0
    chunk: int = 256

    def encode(self, context: Context) -> dict[str, jax.Array]:
        ids = context.read(self.field)
        inputs, labels = ids[:, :-1], ids[:, 1:]
        packed: dict[str, Any] = {}
        weights = jnp.ones(labels.shape, jnp.float32)
        if self.segment_field:
            segments = self._per_token(context, self.segment_field)
            packed["segment_ids"] = segments[:, :-1]
            weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)).astype(jnp.float32)
        if self.weight_field:
            weights = weights * self._per_token(context, self.weight_field)[:, 1:].astype(jnp.float32)
        weights = weights * self._asked(labels)
        # Rows may lie over several devices; what is one per token is dealt out now, after labels were shifted.
        order = active_order(labels.shape[1])
        inputs, labels, weights = lay_out(order, inputs, labels, weights)
        packed = {name: lay_out(order, x)[0] for name, x in packed.items()}
        given = {**self._given(context, inputs, order), **packed}
        found = context.student.call(self.decoder, **given, order=order, logits=False, train=context.train)
        tower = context.student[self.decoder]
        _, each = vocabulary_loss(
            found["tokens"],
            tower.output_kernel(),
            labels,
            weights,
            soft_cap=tower.final_soft_cap,
            chunk=self.chunk,
        )
        return {
            "nats": jnp.sum(weights * each.nats, axis=1),  # [B]
            "squares": jnp.sum(weights * jnp.square(each.log_partition), axis=1),
            "correct": jnp.sum(weights * each.correct, axis=1),
            "tokens": jnp.sum(weights, axis=1),
        }

    def _per_token(self, context: Context, name: str) -> jax.Array:
        """A field of the batch that has one entry per token."""
        entries, ids = context.read(name), context.read(self.field)
        if entries.shape != ids.shape:
            raise UserError(
                f"objectives.{context.objective}: {name!r} has the shape {entries.shape}, but {self.field!r} has "
                f"{ids.shape}; there is one entry per token."
            )
        return entries

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """All but the first of a row, which nothing predicts."""
        return int(batch[self.field].shape[1]) - 1

    def _asked(self, labels: jax.Array) -> jax.Array | float:
        """Factor of the weights of these labels."""
        del labels
        return 1.0

    def _given(self, context: Context, inputs: jax.Array, order: TokenOrder | None) -> dict[str, Any]:
        """What the decoder reads: ids, which lie in ``order``, or what they stand for."""
        del context, order
        return {"ids": inputs}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        del context
        total = jnp.maximum(jnp.sum(features["tokens"]), 1.0)
        mean = {name: jnp.sum(features[name]) / total for name in ("nats", "squares", "correct")}
        metrics = {
            "nats": mean["nats"],
            "perplexity": jnp.exp(mean["nats"]),
            "accuracy": mean["correct"],
            "tokens": jnp.sum(features["tokens"]),
        }
        return Loss(mean["nats"] + self.z_loss * mean["squares"], metrics)
