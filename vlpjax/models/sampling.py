"""How the next token is chosen: processors that change its logits, and samplers that draw from them.

All are frozen dataclasses, so that a compiled generation can be kept per choice; a processor of one's own is any
hashable object with the call of :class:`Processor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError

NEVER = float(np.finfo(np.float32).min)  # a logit that no softmax gives a share


class Written(NamedTuple):
    """What stands there when a token is to be chosen.

    Attributes:
      ids: prompt and continuation, [rows, slots]; slots outside of ``[start, end)`` hold nothing.
      start: first slot of each row's prompt.
      prompt_end, end: slots after the prompts and after the last token, the same for all rows.
    """

    ids: Int[Array, "rows slots"]
    start: Int[Array, " rows"]
    prompt_end: int
    end: Int[Array, ""]

    def filled(self) -> Bool[Array, "rows slots"]:
        """Which slots hold a token."""
        index = jnp.arange(self.ids.shape[1])[None]
        return (index >= self.start[:, None]) & (index < self.end)


class Processor(Protocol):
    """Changes the logits of the next token; in beam search these are log-probabilities."""

    def __call__(
        self, logits: Float[Array, "rows vocabulary"], written: Written
    ) -> Float[Array, "rows vocabulary"]:
        """The changed logits."""


def _seen(ids: jax.Array, counted: jax.Array, vocabulary: int) -> jax.Array:
    """Which ids [rows, vocabulary] occur among the slots that are counted."""
    rows = jnp.arange(ids.shape[0])[:, None]
    safe = jnp.where(counted, ids, vocabulary)  # out of range: dropped
    return jnp.zeros((ids.shape[0], vocabulary), bool).at[rows, safe].set(True, mode="drop")


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits of ids that occurred by ``penalty`` and multiplies negative ones: "CTRL", arXiv
    1909.05858, in the form that works for both signs."""

    penalty: float

    def __call__(self, logits: jax.Array, written: Written) -> jax.Array:
        """The changed logits."""
        seen = _seen(written.ids, written.filled(), logits.shape[-1])
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@dataclass(frozen=True)
class NoRepeat:
    """No sequence of ``size`` tokens occurs twice in a row ("A Deep Reinforced Model for Abstractive Summarization",
    arXiv 1705.04304, section 2.5), the prompt included."""

    size: int

    def __call__(self, logits: jax.Array, written: Written) -> jax.Array:
        """The changed logits."""
        ids, slots = written.ids, written.ids.shape[1]
        before = self.size - 1
        # The last tokens, which the candidate would complete to a sequence that is forbidden if it is there already.
        at = jnp.clip(written.end - before + jnp.arange(before), 0, slots - 1)
        last = jnp.take(ids, at, axis=1)  # [R, size - 1]
        matches = jnp.ones(ids.shape, bool)
        for offset in range(before):
            matches &= jnp.roll(ids, before - offset, axis=1) == last[:, offset : offset + 1]
        index = jnp.arange(slots)[None]
        whole = (index - before >= written.start[:, None]) & (index < written.end)
        enough = written.end - written.start >= before
        banned = _seen(ids, matches & whole & enough[:, None], logits.shape[-1])
        return jnp.where(banned, NEVER, logits)


@dataclass(frozen=True)
class MinNewTokens:
    """No end of text among the first ``count`` new tokens."""

    count: int
    eos: tuple[int, ...]

    def __call__(self, logits: jax.Array, written: Written) -> jax.Array:
        """The changed logits."""
        early = written.end - written.prompt_end < self.count
        return jnp.where(early, logits.at[:, jnp.asarray(self.eos)].set(NEVER), logits)


@dataclass(frozen=True)
class AllowedTokens:
    """Only these ids: a choice among labels, digits, the answers of a list."""

    ids: tuple[int, ...]

    def __call__(self, logits: jax.Array, written: Written) -> jax.Array:
        """The changed logits."""
        allowed = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(self.ids)].set(True)
        return jnp.where(allowed, logits, NEVER)


class Sampler(Protocol):
    """Chooses the next token."""

    def __call__(self, logits: Float[Array, "rows vocabulary"], rng: Any) -> Int[Array, " rows"]:
        """One id per row."""


@dataclass(frozen=True)
class Greedy:
    """The likeliest token; of equal ones the first."""

    def __call__(self, logits: jax.Array, rng: Any) -> jax.Array:
        """One id per row."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Sample:
    """A random token.

    Attributes:
      temperature: divides the logits; small is nearly greedy.
      top_k: only the likeliest so many are drawn from; None is all.
      top_p: of these, only the smallest set of likeliest tokens whose probabilities sum up to it ("The Curious Case
        of Neural Text Degeneration", arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise UserError(
                f"{self} cannot be sampled from; temperature is above 0, top_k at least 1, top_p in (0, 1]."
            )

    def __call__(self, logits: jax.Array, rng: Any) -> jax.Array:
        """One id per row."""
        return jax.random.categorical(rng, self.restricted(logits)).astype(jnp.int32)

    def restricted(self, logits: jax.Array) -> jax.Array:
        """The logits of what is drawn from; all else is :data:`NEVER`."""
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, NEVER, logits)
        if self.top_p < 1:
            order = jnp.argsort(logits, axis=-1, descending=True)
            shares = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
            # A token stays if those before it do not sum up to top_p yet: the first always does.
            kept = jnp.cumsum(shares, axis=-1) - shares < self.top_p
            place = jnp.argsort(order, axis=-1)
            logits = jnp.where(jnp.take_along_axis(kept, place, axis=-1), logits, NEVER)
        return logits
