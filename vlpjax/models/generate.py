"""Texts from a decoder, or from an encoder-decoder: prompts in, new tokens out, compiled as one prefill and one loop.

``generate(model, variables, prompts, max_new_tokens=64, eos=(2,))`` continues each row until it ends; every row gets
what it would get alone, whatever the lengths of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.beam import Beam, beam_search
from vlpjax.models.decoding import Cache, Model, Prompt, align, is_one_of, prefill, processed, step
from vlpjax.models.encoder_decoder import EncoderDecoder
from vlpjax.models.sampling import Greedy, Processor, Sampler, Written

Decode = Callable[[Sequence[int]], str]


class Generation(NamedTuple):
    """New tokens.

    Attributes:
      tokens: what follows the prompts, an end of text included; filled up with the padding id.
      lengths: tokens of each row that count.
      scores: of beam search, each row's log-probability over its length to the power of the penalty; otherwise None.
      texts: decoded, without ends of text and up to the first stop string; None without a ``decode``.
    """

    tokens: Int[np.ndarray, "batch new"]
    lengths: Int[np.ndarray, " batch"]
    scores: Float[np.ndarray, " batch"] | None = None
    texts: list[str] | None = None


class State(NamedTuple):
    """Where a generation stands.

    Attributes:
      ids: prompts and new tokens, [B, S].  The last token is not in the cache yet.
      end: slots that hold tokens, the same for all rows.
      lengths: new tokens of each row that count.
      done: rows that have ended.
      rng: key of the next draw.
      cache: keys and values of all tokens but the last.
    """

    ids: Int[Array, "batch slots"]
    end: Int[Array, ""]
    lengths: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    rng: Any
    cache: Cache


@dataclass(frozen=True)
class Choice:
    """What does not change from step to step: how a token is chosen, and what ends a row."""

    sampler: Sampler
    processors: tuple[Processor, ...]
    eos: tuple[int, ...]
    pad: int

    def append(self, state: State, prompt: Prompt, logits: Float[Array, "batch vocabulary"]) -> State:
        """The state with one more token per row."""
        written = Written(state.ids, prompt.known, prompt.ids.shape[1], state.end)
        rng, key = jax.random.split(state.rng)
        tokens = self.sampler(processed(logits, self.processors, written), key)
        tokens = jnp.where(state.done, self.pad, tokens)
        return state._replace(
            ids=jax.lax.dynamic_update_slice_in_dim(state.ids, tokens[:, None], state.end, axis=1),
            end=state.end + 1,
            lengths=state.lengths + ~state.done,
            done=state.done | is_one_of(tokens, self.eos),
            rng=rng,
        )


def begin(
    model: Model,
    variables: Any,
    prompt: Prompt,
    rng: Any,
    *,
    choice: Choice,
    max_new_tokens: int,
    prefix_lm: bool | Bool[Array, ""],
) -> State:
    """Reads the prompts and chooses the first new token of each row."""
    batch, count = prompt.ids.shape
    slots = count + max_new_tokens
    logits, cache = prefill(model, variables, prompt, slots, prefix_lm)
    ids = jnp.full((batch, slots), choice.pad, jnp.int32).at[:, :count].set(prompt.ids)
    nothing, running = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    state = State(ids, jnp.asarray(count, jnp.int32), nothing, running, rng, cache)
    return choice.append(state, prompt, logits)


def advance(
    model: Model, variables: Any, prompt: Prompt, state: State, until: Int[Array, ""], *, choice: Choice
) -> State:
    """Goes on until ``until`` slots hold tokens, or all rows are done."""

    def one(state: State) -> State:
        last = jax.lax.dynamic_index_in_dim(state.ids, state.end - 1, axis=1, keepdims=False)
        logits, cache = step(model, variables, prompt, last, state.end - 1, state.cache)
        return choice.append(state._replace(cache=cache), prompt, logits)

    return jax.lax.while_loop(lambda state: (state.end < until) & ~jnp.all(state.done), one, state)


_begin = jax.jit(begin, static_argnames=("model", "choice", "max_new_tokens"))
_advance = jax.jit(advance, static_argnames=("model", "choice"), donate_argnames=("state",))
_beam_search = jax.jit(
    beam_search, static_argnames=("model", "beam", "processors", "eos", "pad", "max_new_tokens")
)


def generate(
    model: Model,
    variables: Any,
    prompts: Int[Array, "batch prompt"] | None = None,
    *,
    max_new_tokens: int,
    lengths: Sequence[int] | Int[Array, " batch"] | None = None,
    padding: str = "right",
    embeddings: Float[Array, "batch prompt width"] | None = None,
    positions: Int[Array, "*three batch prompt"] | None = None,
    memory: Float[Array, "batch memory width"] | None = None,
    memory_lengths: Int[Array, " batch"] | None = None,
    prefix_lm: bool = False,
    sampler: Sampler | Beam | None = None,
    processors: Sequence[Processor] = (),
    eos: Sequence[int] = (),
    pad: int = 0,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
    check_every: int = 16,
    rng: Any = None,
) -> Generation:
    """Continues prompts.

    Args:
      model, variables: the decoder; of a larger model, the decoder's part of the variables, as ``{"params": ...}``.
      prompts: token ids; None if there are ``embeddings`` only.  An encoder-decoder's are what its decoder has said
        so far; None is its ``start_id``.
      max_new_tokens: per row.
      lengths: tokens of each row's prompt, and on which side (``padding``) rows are filled up; None: all of them.
      embeddings: rows to read instead of the ids' (images between words), of :meth:`Decoder.embed`'s scale.  The ids
        are then only read by processors.
      positions: of the prompt's tokens, [B, P], or [3, B, P] for rotary positions with sections; new tokens follow
        the largest.
      memory, memory_lengths: for an encoder-decoder, what it encoded ([B, M, D], ``"tokens"`` of its ``encode``) and
        how much of each row is no padding; None: all of it.
      prefix_lm: whether all tokens of a prompt see one another (PaliGemma, arXiv 2407.07726).
      sampler: :class:`~vlpjax.models.sampling.Greedy` (None), :class:`~vlpjax.models.sampling.Sample`,
        :class:`~vlpjax.models.beam.Beam`, or one of your own.
      processors: change the logits before the sampler, in this order.
      eos: ids that end a row.
      pad: the id that fills rows up after their end.
      stop: texts that end a row where they first occur; needs ``decode``, ids to text.  They are looked for every
        ``check_every`` tokens, wherever they lie in tokens; the result is cut exactly before them: ``texts`` to the
        character, ``tokens`` to the last token that lies before them as a whole.
      rng: a key, for samplers that draw.

    Raises:
      UserError: settings that cannot be, or more tokens than the decoder's ``length``.
    """
    sampler = Greedy() if sampler is None else sampler
    if max_new_tokens < 1 or check_every < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} and check_every={check_every} must be at least 1.")
    if stop and (decode is None or isinstance(sampler, Beam) or "" in stop):
        raise UserError("Stop strings are not empty, need decode= and cannot end the beams of a beam search.")
    if rng is None and not isinstance(sampler, (Greedy, Beam)):
        raise UserError(f"{sampler} draws at random; give rng, a key of jax.random.")
    if isinstance(model, EncoderDecoder) != (memory is not None):
        wanted = "needs" if isinstance(model, EncoderDecoder) else "takes no"
        raise UserError(f"A {type(model).__name__} {wanted} memory= to generate from.")
    if isinstance(model, EncoderDecoder):
        if embeddings is not None or positions is not None:
            raise UserError(
                "An EncoderDecoder generates from ids; it takes no embeddings= and no positions=."
            )
        assert memory is not None
        prompts = jnp.full((len(memory), 1), model.start_id) if prompts is None else prompts
    prompt = align(prompts, lengths, padding, embeddings, positions)
    prompt = prompt._replace(memory=memory, memory_lengths=memory_lengths)
    eos = tuple(int(token) for token in eos)
    if isinstance(sampler, Beam):
        found, scores = _beam_search(
            model, variables, prompt, sampler, tuple(processors), eos, pad, max_new_tokens, prefix_lm
        )
        ends = np.isin(np.asarray(found), eos)
        first = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, max_new_tokens)
        return _result(np.asarray(found), first, pad, eos, decode, np.asarray(scores))

    choice = Choice(sampler, tuple(processors), eos, pad)
    rng = jax.random.key(0) if rng is None else rng  # of what does not draw, it is never used
    state = _begin(
        model, variables, prompt, rng, choice=choice, max_new_tokens=max_new_tokens, prefix_lm=prefix_lm
    )
    prompt = prompt.read()
    count = prompt.ids.shape[1]
    last = count + max_new_tokens
    stopped: dict[int, int] = {}  # row -> where its text is cut
    while True:
        if stop:
            assert decode is not None
            written, sizes = np.asarray(state.ids)[:, count:], np.asarray(state.lengths)
            for row in range(len(written)):
                text = decode(_visible(written[row], int(sizes[row]), eos))
                places = [at for at in (text.find(end) for end in stop) if at >= 0]
                if places and row not in stopped:
                    stopped[row] = min(places)
            ended = np.isin(np.arange(len(written)), [*stopped])
            state = state._replace(done=jnp.asarray(np.asarray(state.done) | ended))
        if int(state.end) >= last or np.asarray(state.done).all():
            break
        until = min(int(state.end) + check_every, last) if stop else last
        state = _advance(model, variables, prompt, state, jnp.asarray(until), choice=choice)
    return _result(
        np.asarray(state.ids)[:, count:], np.asarray(state.lengths), pad, eos, decode, cuts=stopped
    )


def _visible(tokens: np.ndarray, length: int, eos: Sequence[int]) -> list[int]:
    """A row's tokens without its end of text."""
    shown = tokens[:length].tolist()
    return shown[:-1] if shown and shown[-1] in eos else shown


def _result(
    tokens: np.ndarray,
    lengths: np.ndarray,
    pad: int,
    eos: Sequence[int],
    decode: Decode | None,
    scores: np.ndarray | None = None,
    cuts: dict[int, int] | None = None,
) -> Generation:
    """The tokens with everything after their end filled up, and the texts."""
    lengths = np.array(lengths)
    texts: list[str] | None = None
    if decode is not None:
        texts = []
        for row, length in enumerate(lengths):
            shown = _visible(tokens[row], int(length), eos)
            text = decode(shown)
            if cuts and row in cuts:
                text = text[: cuts[row]]
                while shown and not text.startswith(decode(shown)):
                    shown.pop()
                lengths[row] = len(shown)
            texts.append(text)
    kept = np.arange(tokens.shape[1])[None] < lengths[:, None]
    return Generation(np.where(kept, tokens, pad), lengths, scores, texts)
