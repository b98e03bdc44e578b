"""Driving a decoder by its cache: prompts of different lengths in, one token per row at a time after them.

Prompts are moved to the right, so that all rows go on in the same slot of the cache; what stands before a row's
prompt is hidden from it, and its positions count from its own first token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.encoder_decoder import EncoderDecoder
from vlpjax.models.layers import CrossKeyValues, KeyValues
from vlpjax.models.sampling import Processor, Written
from vlpjax.parallel.attention import Interval

Model = Decoder | EncoderDecoder
Cache = KeyValues | CrossKeyValues


class Prompt(NamedTuple):
    """Prompts that end in the same slot.

    Attributes:
      ids: of the tokens; zeros where only ``embeddings`` were given.
      embeddings: rows that stand for the tokens, or None.
      positions: of the tokens, [B, P] or [3, B, P].
      start: first slot of each row's prompt.
      known: the same for what processors may read; the end of the prompt where there are no ids.
      following: position of each row's first new token.
      memory: for an encoder-decoder, the encoder's tokens; None once the cache holds them.
      memory_lengths: of each row's memory, without padding.
    """

    ids: Int[Array, "batch prompt"]
    embeddings: Float[Array, "batch prompt width"] | None
    positions: Int[Array, "*three batch prompt"]
    start: Int[Array, " batch"]
    known: Int[Array, " batch"]
    following: Int[Array, " batch"]
    memory: Float[Array, "batch memory width"] | None = None
    memory_lengths: Int[Array, " batch"] | None = None

    def read(self) -> Prompt:
        """What is needed of the prompt once the cache holds it: the same program then goes on after all prompts."""
        return self._replace(embeddings=None, positions=self.ids, memory=None)


def align(
    ids: Any, lengths: Any = None, padding: str = "right", embeddings: Any = None, positions: Any = None
) -> Prompt:
    """Prompts moved to the right.

    Args:
      ids: [B, P], or None with ``embeddings``.
      lengths: tokens of each row's prompt; None is P.
      padding: the side on which rows are filled up, ``"right"`` or ``"left"``.
      embeddings: [B, P, D], as :meth:`Decoder.embed` gives them.
      positions: [B, P] or [3, B, P]; by default they count from 0.

    Raises:
      UserError: neither ids nor embeddings, another padding, or lengths that are not between 1 and P.
    """
    if padding not in ("left", "right"):
        raise UserError(f"padding is {padding!r}; there are 'left' and 'right'.")
    if ids is None and embeddings is None:
        raise UserError("Generation needs prompts: token ids, embeddings, or both.")
    # All of this is NumPy: what is done once per prompt is not worth compiling.
    batch, count = (embeddings if ids is None else ids).shape[:2]
    told = np.full(batch, count) if lengths is None else np.asarray(lengths)
    if told.shape != (batch,) or np.any(told < 1) or np.any(told > count):
        raise UserError(f"Lengths of {batch} prompts of up to {count} tokens cannot be {told.tolist()}.")
    start = (count - told).astype(np.int32)  # [B]
    index = np.arange(count, dtype=np.int32)[None]
    counted = np.maximum(index - start[:, None], 0)
    source = counted if padding == "right" else np.broadcast_to(index, (batch, count))

    def moved(x: Any) -> Any:
        return np.take_along_axis(np.asarray(x), source, axis=1).astype(np.int32)

    if positions is None:
        placed = counted
    elif np.ndim(positions) == 2:
        placed = moved(positions)
    else:
        placed = np.stack([moved(axis) for axis in positions])
    largest = np.max(np.where(index >= start[:, None], placed, -1), axis=-1)  # [B] or [3, B]
    tokens: Any = np.zeros((batch, count), np.int32) if ids is None else moved(ids)
    return Prompt(
        tokens,
        None
        if embeddings is None
        else jnp.take_along_axis(jnp.asarray(embeddings), source[..., None], axis=1),
        placed,
        start,
        np.full_like(start, count) if ids is None else start,
        (largest if largest.ndim == 1 else np.max(largest, axis=0)) + 1,
    )


def prefill(
    model: Model, variables: Any, prompt: Prompt, slots: int, prefix_lm: bool | Bool[Array, ""]
) -> tuple[Float[Array, "batch vocabulary"], Cache]:
    """Logits of the first new tokens, and a cache of this many slots with the prompts in it.

    Args:
      prefix_lm: whether all tokens of a prompt see one another; otherwise each sees those before it.
    """
    batch, count = prompt.ids.shape
    index = jnp.arange(count, dtype=jnp.int32)[None]
    start = jnp.broadcast_to(prompt.start[:, None], (batch, count))
    end = jnp.broadcast_to(jnp.where(prefix_lm, count, index + 1), (batch, count))
    # What stands before a prompt sees nothing.
    interval = Interval(start, jnp.where(index < start, start, end))
    given: dict[str, Any]
    given = {"ids": prompt.ids} if prompt.embeddings is None else {"embeddings": prompt.embeddings}
    if isinstance(model, EncoderDecoder):
        assert prompt.memory is not None, "generate asks for it"
        cache: Any = model.init_cache(batch, slots, prompt.memory.shape[1])
    else:
        cache = model.init_cache(batch, slots)
    if isinstance(model, Decoder) and model.window is not None:
        # A prompt that sees all of itself does so in local layers too.
        first = jnp.where(prefix_lm, start, jnp.maximum(start, index + 1 - model.window))
        given["local_interval"] = interval._replace(start=jnp.minimum(first, interval.end))
    return _run(model, variables, prompt, cache, 0, interval, positions=prompt.positions, **given)


def step(
    model: Model,
    variables: Any,
    prompt: Prompt,
    tokens: Int[Array, " batch"],
    slot: Int[Array, ""],
    cache: Cache,
) -> tuple[Float[Array, "batch vocabulary"], Cache]:
    """Logits of the tokens after ``tokens``, which stand in ``slot``."""
    positions = (prompt.following + slot - prompt.ids.shape[1])[:, None]
    start = prompt.start[:, None]
    interval = Interval(start, jnp.broadcast_to(slot + 1, start.shape).astype(jnp.int32))
    return _run(
        model,
        variables,
        prompt._replace(memory=None),
        cache,
        slot,
        interval,
        positions=positions,
        ids=tokens[:, None],
    )


def _run(
    model: Model,
    variables: Any,
    prompt: Prompt,
    cache: Any,
    start: Any,
    interval: Interval,
    *,
    positions: jax.Array,
    **given: Any,
) -> tuple[jax.Array, Any]:
    def last(module: Any) -> tuple[jax.Array, Any]:
        if isinstance(module, EncoderDecoder):  # its positions are distances, which slots give
            read = functools.partial(
                module.decode, memory=prompt.memory, memory_lengths=prompt.memory_lengths, **given
            )
        else:
            read = functools.partial(module, positions=positions, **given)
        outputs = read(interval=interval, cache=cache, start=start, logits=False)
        return module.logits(outputs["tokens"][:, -1]), outputs["cache"]

    found: Any = model.apply(variables, method=last)
    logits, cache = found
    return logits, cache


def processed(logits: jax.Array, processors: Sequence[Processor], written: Written) -> jax.Array:
    """The logits after all processors, in their order."""
    for processor in processors:
        logits = processor(logits, written)
    return logits


def is_one_of(tokens: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Which tokens are among the ids."""
    if not ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.any(tokens[..., None] == jnp.asarray(ids), axis=-1)
