"""Next-token prediction: a decoder learns from text alone, several documents to a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.decoder import blockwise_causal
from vlpjax.models.vocabulary_loss import vocabulary_loss
from vlpjax.objectives.base import BatchCoupled, Context, Loss
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import active_order, lay_out

MEANS = ("tokens", "examples")


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
    is the whole batch's, the loss couples its examples, if weakly; accumulation is exact.  With ``mean="examples"``,
    weights are first divided by their sum over the token's document, so that L is the mean over documents of their own
    means; a document of which nothing is asked for is none.

    The metric ``tokens`` counts those that are asked for; ``filled``, where there are segments, is the share of all
    tokens that is no padding.

    Attributes:
      decoder: name of the tower, a :class:`vlpjax.models.decoder.Decoder`.
      field: of the batch; token ids, int32 [B, T + 1].
      segment_field: of the batch; which document of its row each token is of, int32 [B, T + 1], from 1 on, and 0 for
        padding.  Documents do not see one another, positions count from the start of each.  Empty: every row is one
        text without padding.
      weight_field: of the batch; how much each token counts, float32 [B, T + 1], 0 for what others say.  Empty: all
        count alike.
      prefix_lm: whether tokens that do not count, such as images and questions, see the whole of their run and not only
        what stands before them; tokens that count see what stands before them.
      mean: ``"tokens"``, of the whole batch, or ``"examples"``.
      z_loss: factor of ``log_partition ** 2`` ("PaLM", arXiv 2204.02311, section 5).
      chunk: tokens of each row whose logits exist at once.

    Raises:
      UserError: another ``mean``, or ``prefix_lm`` without a ``weight_field``.

    Source: "Language Models are Unsupervised Multitask Learners" (GPT-2), equation 1; for ``prefix_lm`` and
    ``mean="examples"``, "PaliGemma", arXiv 2407.07726.
    """

    decoder: str = "decoder"
    field: str = "tokens"
    segment_field: str = ""
    weight_field: str = ""
    prefix_lm: bool = False
    mean: str = "tokens"
    z_loss: float = 0.0
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.mean not in MEANS:
            raise UserError(f"NextToken.mean is {self.mean!r}; there are {', '.join(map(repr, MEANS))}.")
        if self.prefix_lm and not self.weight_field:
            raise UserError("NextToken.prefix_lm needs a weight_field, which says what is asked for.")

    def encode(self, context: Context) -> dict[str, jax.Array]:
        ids = context.read(self.field)
        inputs, labels = ids[:, :-1], ids[:, 1:]
        packed: dict[str, Any] = {}
        filled: dict[str, jax.Array] = {}
        weights = jnp.ones(labels.shape, jnp.float32)
        if self.segment_field:
            segments = self._per_token(context, self.segment_field)
            packed["segment_ids"] = segments[:, :-1]
            filled = {"filled": jnp.mean(segments != 0, axis=1, dtype=jnp.float32)}
            weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)).astype(jnp.float32)
        if self.weight_field:
            weights = weights * self._per_token(context, self.weight_field)[:, 1:].astype(jnp.float32)
        weights = weights * self._asked(labels)
        counted = jnp.sum(weights, axis=1)
        if self.mean == "examples":
            weights = weights / _sum_over_documents(weights, packed.get("segment_ids"))
        # Rows may lie over several devices; what is one per token is dealt out now, after labels were shifted.
        order = active_order(labels.shape[1])
        seen = self._seen(context) if self.prefix_lm else {}
        inputs, labels, weights = lay_out(order, inputs, labels, weights)
        packed = {name: lay_out(order, x)[0] for name, x in packed.items()}
        packed |= {name: Interval(*lay_out(order, *interval)) for name, interval in seen.items()}
        given = {**self.given(context, inputs, order), **packed}
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
            "weight": jnp.sum(weights, axis=1),
            "tokens": counted,
            **filled,
        }

    def _seen(self, context: Context) -> dict[str, Interval]:
        """What the decoder's tokens see, where those that do not count see the whole of their run."""
        asked = self._per_token(context, self.weight_field)[:, :-1] > 0
        begins = asked | jnp.pad(asked[:, :-1], [(0, 0), (1, 0)])
        window = context.student[self.decoder].window
        return {"interval": blockwise_causal(begins), "local_interval": blockwise_causal(begins, window)}

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

    def given(self, context: Context, inputs: jax.Array, order: TokenOrder | None) -> dict[str, Any]:
        """What the decoder reads, in training and before it answers: ids, or what they stand for.

        Args:
          inputs: ids [B, T], all of a row's or those of a prompt; padding may stand before or after them.
          order: how they lie over the sequence ranks; None is the row's own order.

        Returns:
          ``"ids"`` or ``"embeddings"``, as :class:`vlpjax.models.decoder.Decoder` takes them.
        """
        del context, order
        return {"ids": inputs}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        del context
        total = jnp.sum(features["weight"])
        total = jnp.where(total == 0, 1.0, total)
        mean = {name: jnp.sum(features[name]) / total for name in ("nats", "squares", "correct")}
        metrics = {
            "nats": mean["nats"],
            "perplexity": jnp.exp(mean["nats"]),
            "accuracy": mean["correct"],
            "tokens": jnp.sum(features["tokens"]),
        }
        if "filled" in features:
            metrics["filled"] = jnp.mean(features["filled"])
        return Loss(mean["nats"] + self.z_loss * mean["squares"], metrics)


def _sum_over_documents(
    weights: Float[Array, "batch tokens"], segments: Int[Array, "batch tokens"] | None
) -> Float[Array, "batch tokens"]:
    """For every token the sum of the weights of its document, or 1 where that is 0."""
    if segments is None:
        sums = jnp.sum(weights, axis=1, keepdims=True)
    else:
        of = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, ids.shape[0] + 1)[ids])
        sums = of(weights, segments)
    return jnp.where(sums == 0, 1.0, sums)
