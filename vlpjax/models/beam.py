"""Beam search: the continuations that are likeliest as a whole, several kept at a time.

Its rules (which candidates are kept, when a row is finished, how lengths count) are those of `transformers`, so
that the same weights give the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.decoding import Cache, Model, Prompt, is_one_of, prefill, processed, step
from vlpjax.models.sampling import Processor, Written

WORST = -1e9  # a score that every real one exceeds


@dataclass(frozen=True)
class Beam:
    """How beams are kept.

    Attributes:
      size: beams per row.
      length_penalty: a finished text's score is its log-probability over its length to this power; 0 favours short
        texts, 1 is the mean per token.
      early_stopping: True ends a row when ``size`` texts are finished; False when no running beam, at its present
        length, beats the worst of them; ``"never"`` when none can at any length.
    """

    size: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.early_stopping not in (True, False, "never"):
            raise UserError(f"{self} cannot be; size is at least 1, early_stopping True, False or 'never'.")


class _State(NamedTuple):
    ids: Int[Array, "batch beams slots"]
    scores: Float[Array, "batch beams"]  # log-probabilities of the running beams
    finished_ids: Int[Array, "batch beams slots"]
    finished_scores: Float[Array, "batch beams"]
    finished: Bool[Array, "batch beams"]
    hopeful: Bool[Array, "batch 1"]  # whether a running beam may still become one of the best
    exhausted: Bool[Array, ""]  # whether every candidate has ended
    end: Int[Array, ""]
    cache: Cache


def beam_search(
    model: Model,
    variables: Any,
    prompt: Prompt,
    beam: Beam,
    processors: Sequence[Processor],
    eos: Sequence[int],
    pad: int,
    max_new_tokens: int,
    prefix_lm: bool | Bool[Array, ""],
) -> tuple[Int[Array, "batch new"], Float[Array, " batch"]]:
    """The best text of each row, filled up with ``pad`` after its end, and its score.

    Source of the method: "Google's Neural Machine Translation System", arXiv 1609.08144, section 7 (without its
    coverage term).
    """
    batch, count = prompt.ids.shape
    slots, size = count + max_new_tokens, beam.size

    def spread(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.repeat(x, size, axis=axis)

    logits, cache = prefill(model, variables, prompt, slots, prefix_lm)
    cache = jax.tree.map(lambda leaf: spread(leaf, 1), cache)
    rows = Prompt(
        spread(prompt.ids),
        None,
        prompt.positions,
        spread(prompt.start),
        spread(prompt.known),
        spread(prompt.following),
        memory_lengths=None if prompt.memory_lengths is None else spread(prompt.memory_lengths),
    )
    ids = jnp.full((batch, size, slots), pad, jnp.int32).at[:, :, :count].set(prompt.ids[:, None])
    state = _State(
        ids=ids,
        scores=jnp.full((batch, size), WORST).at[:, 0].set(0.0),  # at first all beams are the same
        finished_ids=ids,
        finished_scores=jnp.full((batch, size), WORST),
        finished=jnp.zeros((batch, size), bool),
        hopeful=jnp.ones((batch, 1), bool),
        exhausted=jnp.zeros((), bool),
        end=jnp.asarray(count, jnp.int32),
        cache=cache,
    )

    def extend(state: _State, logits: jax.Array) -> _State:
        """One more token for every beam; ``logits`` [B * K, V]."""
        likely = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        written = Written(state.ids.reshape(batch * size, slots), rows.known, count, state.end)
        likely = processed(likely, processors, written)
        vocabulary = likely.shape[-1]
        total = (likely.reshape(batch, size, vocabulary) + state.scores[..., None]).reshape(batch, -1)
        # So many that enough are left when the likeliest all end here.
        kept = min(max(2, 1 + len(eos)) * size, total.shape[1])
        scores, index = jax.lax.top_k(total, kept)  # [B, kept]
        parents, tokens = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        ids = jnp.take_along_axis(state.ids, parents[..., None], axis=1)
        ids = jnp.where(jnp.arange(slots) == state.end, tokens[..., None], ids)
        ended = is_one_of(tokens, eos) | (state.end + 1 >= slots)

        running, chosen = jax.lax.top_k(scores + ended * WORST, size)
        length = (state.end + 1 - count).astype(jnp.float32)
        ends_well = ended & (jnp.arange(kept) < size)
        full = jnp.all(state.finished, axis=-1, keepdims=True) & (beam.early_stopping is True)
        worth = scores / length**beam.length_penalty + (full * 1.0 + ~state.hopeful + ~ends_well) * WORST
        merged = jnp.concatenate([state.finished_scores, worth], axis=1)
        finished_scores, best = jax.lax.top_k(merged, size)
        parents = jnp.take_along_axis(parents, chosen, axis=1)
        source = (parents + size * jnp.arange(batch)[:, None]).reshape(-1)

        limit = beam.early_stopping == "never" and beam.length_penalty > 0
        possible = running[:, :1] / (max_new_tokens if limit else length) ** beam.length_penalty
        finished = jnp.take_along_axis(jnp.concatenate([state.finished, ends_well], axis=1), best, axis=1)
        worst = jnp.where(finished, jnp.min(finished_scores, axis=1, keepdims=True), WORST)
        return _State(
            ids=jnp.take_along_axis(ids, chosen[..., None], axis=1),
            scores=running,
            finished_ids=jnp.take_along_axis(
                jnp.concatenate([state.finished_ids, ids], axis=1), best[..., None], axis=1
            ),
            finished_scores=finished_scores,
            finished=finished,
            hopeful=state.hopeful & jnp.any(possible > worst, axis=-1, keepdims=True),
            exhausted=jnp.all(ended),
            end=state.end + 1,
            cache=jax.tree.map(lambda leaf: jnp.take(leaf, source, axis=1), state.cache),
        )

    def goes_on(state: _State) -> jax.Array:
        full = jnp.all(state.finished) & (beam.early_stopping is True)
        return jnp.any(state.hopeful) & ~full & ~state.exhausted & (state.end < slots)

    def advance(state: _State) -> _State:
        last = jax.lax.dynamic_index_in_dim(state.ids, state.end - 1, axis=2, keepdims=False)
        logits, cache = step(model, variables, rows, last.reshape(-1), state.end - 1, state.cache)
        return extend(state._replace(cache=cache), logits)

    state = jax.lax.while_loop(goes_on, advance, extend(state, spread(logits)))
    return state.finished_ids[:, 0, count:], state.finished_scores[:, 0]
