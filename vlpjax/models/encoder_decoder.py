"""The encoder-decoder of T5 (arXiv 1910.10683): a text, or any tokens, go in; another text comes out.

Positions are a bias on the attention logits that depends on how far apart two tokens are; all blocks of a stack
share it.  Norms are RMSNorm, projections have no biases and logits of the attention are not scaled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.embedding import Embedding
from vlpjax.models.layers import Block, CrossKeyValues, KeyValues, dense, named, norm
from vlpjax.models.stack import Stack
from vlpjax.parallel.attention import Interval, prefix


def relative_buckets(
    offsets: Int[Array, "queries keys"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "queries keys"]:
    """The bucket of each offset (key position minus query position): exact when near, logarithmic when far.

    Half of the buckets are for exact distances; the other half grow logarithmically up to ``max_distance``, and
    everything beyond shares the last.  If ``bidirectional``, offsets above zero have the second half of all buckets
    to themselves; otherwise they count as distance zero.

    Source: "T5", arXiv 1910.10683, section 2.1.
    """
    after = jnp.zeros_like(offsets)
    if bidirectional:
        buckets //= 2
        after = jnp.where(offsets > 0, buckets, 0)
        distance = jnp.abs(offsets)
    else:
        distance = jnp.maximum(-offsets, 0)
    exact = buckets // 2
    # A table made once in float32: borders such as 16 of 128 lie exactly on a power, and must not fall to one side
    # on one kind of device and to the other on the next.
    far = np.arange(exact, max_distance + 1, dtype=np.float32)
    steps = np.log(far / exact) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    table = np.concatenate([np.arange(exact), np.minimum(exact + steps.astype(np.int32), buckets - 1)])
    return after + jnp.asarray(table, jnp.int32)[jnp.minimum(distance, max_distance)]


class RelativeStack(nn.Module):
    """Blocks that share one table of relative position biases, and a final norm: half of :class:`EncoderDecoder`.

    The attributes are those of :class:`EncoderDecoder`; a ``decoder`` is causal and attends to a memory.
    """

    depth: int
    heads: int
    head_dim: int
    mlp_dim: int
    decoder: bool
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-6
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        interval: Interval,
        *,
        memory: Float[Array, "batch memory width"] | None = None,
        memory_interval: Interval | None = None,
        cache: CrossKeyValues | None = None,
        start: Int[Array, ""] | int = 0,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Runs the blocks; ``start`` is the position of the first token, and its slot if there is a cache."""
        count = tokens.shape[1]
        keys = count if cache is None else cache.own.key.shape[-3]
        table = self.param(
            "relative_bias",
            named(nn.initializers.normal(tokens.shape[-1] ** -0.5), "position", "heads"),
            (self.buckets, self.heads),
        )
        offsets = jnp.arange(keys) - (start + jnp.arange(count)[:, None])  # [L, K]
        places = relative_buckets(offsets, self.buckets, self.max_distance, not self.decoder)
        bias = jnp.transpose(table[places], (2, 0, 1))[None]  # [1, H, L, K]
        block = functools.partial(
            Block,
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            depth=self.depth,
            scale=1.0,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            activation=self.activation,
            gated=self.gated,
            cross=self.decoder,
            dropout=self.dropout,
            norm="rms",
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        context: dict[str, Any] = {"bias": bias}
        if self.decoder:
            context |= {"memory": memory, "memory_interval": memory_interval, "start": start}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        stack = Stack(block, self.depth, self.scan, self.remat, self.drop_path)
        stacked = stack(
            drop(tokens), interval, cache=cache, hidden=hidden, weights=attention, train=train, **context
        )
        tokens = drop(norm("final_norm", "rms", self.dtype, self.epsilon)(stacked.tokens))
        outputs: dict[str, Any] = {"tokens": tokens}
        if hidden:
            outputs["hidden"] = stacked.hidden
        if attention:
            outputs["attention"] = stacked.weights
        if cache is not None:
            outputs["cache"] = stacked.cache
        return outputs


class EncoderDecoder(nn.Module):
    """T5, and by its fields T5 1.1, Flan-T5, mT5 and mT0.

    Attributes:
      vocabulary: number of token ids.
      width: of the tokens; ``heads`` of ``head_dim`` need not add up to it.
      depth, decoder_depth: blocks of the encoder and of the decoder; None is as many.
      mlp_dim, activation, gated: of the MLPs: ``"relu"``, or ``"gelu_tanh"`` and gated in T5 1.1 and after.
      buckets, max_distance: of :func:`relative_buckets`.
      tied: whether logits are made with the token embeddings, after scaling tokens by ``width ** -0.5`` (T5), or by a
        head of its own without scaling (T5 1.1).
      dropout: in training, share of each branch's output, of the embedded and of the final tokens that is zeroed.
      drop_path: stochastic depth of the last block of each stack.
      epsilon: of the norms.
      pad_id: the id that fills texts up, at their end.
      start_id, eos_id: what an output begins and ends with.
      scan, remat: as in :class:`vlpjax.models.stack.Stack`.
      dtype: compute type of everything but the logits, which are float32; None is float32.
    """

    vocabulary: int
    width: int = 512
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    decoder_depth: int | None = None
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    tied: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-6
    pad_id: int = 0
    start_id: int = 0
    eos_id: int = 1
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    def setup(self) -> None:
        self.token_embedding = Embedding(
            self.vocabulary,
            self.width,
            dtype=self.dtype,
            embedding_init=named(nn.initializers.normal(1.0), "vocabulary", "embed"),
        )
        half = functools.partial(
            RelativeStack,
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            gated=self.gated,
            buckets=self.buckets,
            max_distance=self.max_distance,
            dropout=self.dropout,
            drop_path=self.drop_path,
            epsilon=self.epsilon,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.encoder = half(self.depth, decoder=False)
        self.decoder = half(self.layers, decoder=True)
        if not self.tied:
            self.head = dense(
                self.vocabulary, ("embed", "vocabulary"), stddev=self.width**-0.5, name=None, bias=False
            )

    @property
    def layers(self) -> int:
        """Blocks of the decoder."""
        return self.depth if self.decoder_depth is None else self.decoder_depth

    def __call__(
        self,
        ids: Int[Array, "batch length"],
        outputs: Int[Array, "batch output_length"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        hidden: Sequence[int] = (),
        decoder_hidden: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Encodes texts and gives logits of what follows each token of ``outputs``.

        Args:
          outputs: what the decoder has said so far, beginning with ``start_id``: see :func:`shift_right`.
          lengths: of ``ids``, without padding; None counts the ids that are not ``pad_id``.
          hidden, decoder_hidden: layers of encoder and decoder to read tokens out of.

        Returns:
          What :meth:`decode` returns, and under ``"encoder"`` what :meth:`encode` returns.
        """
        if lengths is None:
            lengths = self._lengths(ids)
        encoded = self.encode(ids, lengths=lengths, hidden=hidden, train=train)
        decoded = self.decode(
            outputs, memory=encoded["tokens"], memory_lengths=lengths, hidden=decoder_hidden, train=train
        )
        return {**decoded, "encoder": encoded}

    def embed(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """Token embeddings, to put image tokens in front of before :meth:`encode`."""
        embedded: jax.Array = self.token_embedding(ids)
        return embedded

    def encode(
        self,
        ids: Int[Array, "batch length"] | None = None,
        *,
        tokens: Float[Array, "batch length width"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Encodes token ids, or tokens that are embedded already (with image tokens among them, as in BLIP-2).

        Returns:
          ``"tokens"`` [B, L, D] after the final norm, ``"pooled"`` and ``"embedding"`` [B, D], their mean over what
          is no padding; ``"hidden"`` and ``"attention"`` by layer if asked for.

        Raises:
          UserError: both or neither of ``ids`` and ``tokens``.
        """
        if (ids is None) == (tokens is None):
            given = "neither" if ids is None else "both"
            raise UserError(f"EncoderDecoder.encode takes either ids or tokens, but was given {given}.")
        if ids is not None:
            lengths = self._lengths(ids) if lengths is None else lengths
            tokens = self.embed(ids)
        assert tokens is not None
        batch, count = tokens.shape[:2]
        if lengths is None:
            lengths = jnp.full((batch,), count, jnp.int32)
        out: dict[str, Any] = self.encoder(
            tokens, prefix(lengths, count), hidden=hidden, attention=attention, train=train
        )
        text = jnp.arange(count) < lengths[:, None]  # [B, L]
        total = jnp.sum(jnp.where(text[..., None], out["tokens"], 0), axis=1, dtype=jnp.float32)
        pooled = (total / jnp.maximum(lengths, 1)[:, None]).astype(out["tokens"].dtype)
        return {**out, "pooled": pooled, "embedding": pooled}

    def decode(
        self,
        ids: Int[Array, "batch length"],
        *,
        memory: Float[Array, "batch memory width"] | None = None,
        memory_lengths: Int[Array, " batch"] | None = None,
        interval: Interval | None = None,
        cache: CrossKeyValues | None = None,
        start: Int[Array, ""] | int = 0,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        logits: bool = True,
        train: bool = False,
    ) -> dict[str, Any]:
        """Logits of what follows each of ``ids``.

        Args:
          memory: the encoder's tokens, of which each row's first ``memory_lengths`` are attended to; None takes
            those that were given when the cache was first used.
          interval: which of the output's tokens (with a cache: slots) each sees; None: itself and those before it.
          cache: of :meth:`init_cache`, with the tokens before ``start`` in it.
          start: position of the first of ``ids``.

        Returns:
          ``"logits"`` [B, L, V], float32, unless ``logits=False``; ``"tokens"`` [B, L, D] after the final norm;
          ``"cache"`` if there was one; ``"hidden"`` and ``"attention"`` by layer if asked for.
        """
        count = ids.shape[1]
        if interval is None:
            end = (start + jnp.arange(count) + 1)[None]  # [1, L]
            interval = Interval(jnp.zeros_like(end), end)
        out: dict[str, Any] = self.decoder(
            self.embed(ids),
            interval,
            memory=memory,
            memory_interval=None if memory_lengths is None else prefix(memory_lengths, count),
            cache=cache,
            start=start,
            hidden=hidden,
            attention=attention,
            train=train,
        )
        return {**out, "logits": self.logits(out["tokens"])} if logits else out

    def logits(self, tokens: Float[Array, "... width"]) -> Float[Array, "... vocabulary"]:
        """Logits of the decoder's tokens, in float32."""
        tokens = tokens.astype(jnp.float32)
        if self.tied:
            table = self.token_embedding.embedding.T.astype(jnp.float32)
            return tokens * self.width**-0.5 @ table
        found: jax.Array = self.head(tokens)
        return found

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, memory: int, dtype: Any = None) -> CrossKeyValues:
        """An empty cache of the decoder.

        Args:
          slots: output tokens that it can hold.
          memory: tokens of the encoder that it can hold: as many as :meth:`decode` will be given.
          dtype: of its entries; None is the compute type.
        """

        def empty(count: int) -> KeyValues:
            shape = (self.layers, batch, count, self.heads, self.head_dim)
            return KeyValues(*(jnp.zeros(shape, dtype or self.dtype or jnp.float32) for _ in range(2)))

        return CrossKeyValues(empty(slots), empty(memory))

    def _lengths(self, ids: jax.Array) -> jax.Array:
        return jnp.sum(ids != self.pad_id, axis=-1)


def shift_right(ids: Int[Array, "batch length"], start_id: int = 0) -> Int[Array, "batch length"]:
    """What a decoder reads to predict ``ids``: ``start_id``, then all of them but the last."""
    return jnp.concatenate([jnp.full_like(ids[:, :1], start_id), ids[:, :-1]], axis=1)
