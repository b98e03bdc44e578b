"""The cross-entropy over a vocabulary, chunk by chunk: the logits of all tokens never exist at once.

For a vocabulary of 150,000 and 8 texts of 4,096 tokens the logits alone take 20 GB, and their gradient as much.
Here a chunk of tokens is projected, its losses are taken, and the logits are forgotten; the backward pass makes
them once more, for one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.parallel.copies import Devices


class TokenLosses(NamedTuple):
    """What a language model lost on every token; all [batch, tokens], float32, before weights.

    Attributes:
      nats: cross-entropy, ``log_partition`` less the label's logit.
      log_partition: logarithm of the sum of the exponentiated logits.
      correct: 1 where the label has the largest logit.
    """

    nats: Float[Array, "batch tokens"]
    log_partition: Float[Array, "batch tokens"]
    correct: Float[Array, "batch tokens"]


def vocabulary_loss(
    tokens: Float[Array, "batch tokens width"],
    kernel: Float[Array, "width vocabulary"],
    labels: Int[Array, "batch tokens"],
    weights: Float[Array, "batch tokens"] | None = None,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int = 256,
) -> tuple[Float[Array, ""], TokenLosses]:
    """The weighted mean loss of predicting ``labels`` with the logits ``tokens @ kernel``.

    Args:
      tokens: after the decoder's final norm (its output with ``logits=False``).
      kernel: :meth:`vlpjax.models.decoder.Decoder.output_kernel`, logical axes ``"embed"`` and ``"vocabulary"``; it is
        cast to the type of ``tokens``, products are summed up in float32.
      labels: the token that follows each one.
      weights: of the tokens; 0 leaves one out, whatever its label is.  None is 1 everywhere.
      z_loss: factor of ``log_partition ** 2``, which keeps logits from drifting ("PaLM", arXiv 2204.02311,
        section 5).
      soft_cap: of the logits, the decoder's ``final_soft_cap``.
      chunk: tokens of each row that are projected at once.  The last chunk may be shorter.

    Returns:
      ``sum(weights * (nats + z_loss * log_partition ** 2)) / sum(weights)``, 0 if all weights are 0; and the losses
      of the single tokens.

    Raises:
      UserError: a chunk below 1, or labels of another shape than the tokens.
    """
    batch, count = tokens.shape[:2]
    if chunk < 1:
        raise UserError(f"vocabulary_loss takes chunks of at least 1 token, not {chunk}.")
    if labels.shape != (batch, count) or (weights is not None and weights.shape != (batch, count)):
        wrong = labels.shape if labels.shape != (batch, count) or weights is None else weights.shape
        raise UserError(f"Labels and weights have one entry per token, {(batch, count)}, not {wrong}.")
    # A label that does not count may be any number, also one beyond the vocabulary.
    if weights is not None:
        labels = jnp.where(weights == 0, jnp.clip(labels, 0, kernel.shape[1] - 1), labels)
    devices = Devices.of((batch, count), "batch", "sequence")
    # Float32 for a moment, so that the gradients of all chunks are summed up in float32.
    copies = devices.copies(kernel.astype(tokens.dtype), ("embed", "vocabulary")).astype(jnp.float32)

    @jax.checkpoint
    def losses(part: jax.Array, wanted: jax.Array) -> TokenLosses:
        logits = jnp.einsum(
            "mnbtd,mndv->mnbtv", part, copies.astype(part.dtype), preferred_element_type=jnp.float32
        )
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        # Not looked up: the gradient of that is scattered into another array of the logits' size.
        here = jnp.arange(logits.shape[-1], dtype=jnp.int32) == wanted[..., None]
        label = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
        correct = (jnp.argmax(logits, axis=-1) == wanted).astype(jnp.float32)
        return TokenLosses(log_partition - label, log_partition, correct)

    found = _in_chunks(losses, devices.split(tokens), devices.split(labels), chunk)
    each: TokenLosses = jax.tree.map(devices.join, found)
    weights = jnp.ones((batch, count), jnp.float32) if weights is None else weights.astype(jnp.float32)
    total = jnp.sum(weights * (each.nats + z_loss * jnp.square(each.log_partition)))
    amount = jnp.sum(weights)
    return total / jnp.where(amount == 0, 1.0, amount), each


def _in_chunks(
    losses: Callable[[jax.Array, jax.Array], TokenLosses], tokens: jax.Array, labels: jax.Array, chunk: int
) -> TokenLosses:
    """``losses`` of [M, N, B, T, ...], a chunk of the tokens at a time; all of them, [M, N, B, T]."""
    *outer, count = labels.shape
    whole = count // chunk
    pieces = []
    if whole:

        def split(x: jax.Array) -> jax.Array:
            chunks = x[:, :, :, : whole * chunk].reshape(*outer, whole, chunk, *x.shape[4:])
            return jnp.moveaxis(chunks, 3, 0)  # [chunks, M, N, B, chunk, ...]

        _, found = jax.lax.scan(lambda _, part: (None, losses(*part)), None, (split(tokens), split(labels)))
        pieces.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*outer, whole * chunk), found))
    if count % chunk:
        pieces.append(losses(tokens[:, :, :, whole * chunk :], labels[:, :, :, whole * chunk :]))
    joined: TokenLosses = jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *pieces)
    return joined
