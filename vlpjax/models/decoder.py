"""The decoder: tokens in, the next token's logits out; its fields give GPT-2, Llama, Qwen and Gemma.

It takes ids or rows that are already embedded (images between words), packed texts, prefixes that see all of
themselves, and a key-value cache; :mod:`vlpjax.models.generate` drives it token by token, and
:mod:`vlpjax.models.vocabulary_loss` takes its loss without writing out the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.mesh import active_layout
from vlpjax.models.embedding import Embedding
from vlpjax.models.layers import Block, KeyValues, named, norm
from vlpjax.models.positions import Rotary, Rotation
from vlpjax.models.stack import Stack
from vlpjax.parallel.attention import Interval, intersect, segments
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import sequence_ranks

KINDS = ("global", "local")


def blockwise_causal(begins: Bool[Array, "batch tokens"], window: int | None = None) -> Interval:
    """A row of blocks: tokens of a block see one another and all that stands before it.

    With c, the number of blocks that begin up to a token, a token sees those whose c is not larger.  A block of one
    token is causal; if every token begins one, all are.

    Args:
      begins: whether a block begins with this token; the row's first does in any case.
      window: of what stands before, tokens see the last ``window`` only; their own block they see whole.

    Source: "PaliGemma", arXiv 2407.07726, section 3.2.1, where images and prompts are the first block.
    """
    count = begins.shape[1]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    # Not by ``.at[:, 0].set``: of rows that lie over several devices, the partitioner of jaxlib 0.10 lost flags so.
    first = begins.astype(bool) | (index == 0)
    last = jnp.concatenate([first[:, 1:], jnp.ones_like(first[:, :1])], axis=1)
    end = jax.lax.cummin(jnp.where(last, index + 1, count), axis=1, reverse=True)
    if window is None:
        return Interval(jnp.zeros_like(end), end)
    own = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return Interval(jnp.minimum(own, jnp.maximum(index + 1 - window, 0)), end)


def prefix_causal(lengths: Int[Array, " batch"], tokens: int, window: int | None = None) -> Interval:
    """Prefix-LM: the first ``lengths[b]`` tokens see one another, each later one what stands before it and itself.

    Args:
      window: what stands before is the last ``window`` tokens only; the prefix still sees all of itself.

    Source: "Exploring the Limits of Transfer Learning" (T5), arXiv 1910.10683, section 3.2.1.
    """
    return blockwise_causal(jnp.arange(tokens) >= lengths[:, None], window)


class Head(nn.Module):
    """The map from features to logits of a decoder that does not reuse its token embeddings."""

    vocabulary: int
    width: int

    def setup(self) -> None:
        initial = named(nn.initializers.normal(self.width**-0.5), "embed", "vocabulary")
        self.kernel = self.param("kernel", initial, (self.width, self.vocabulary))


class Decoder(nn.Module):
    """A causal language model.

    The pattern of local and global layers repeats as often as ``depth`` asks for and may stop in its middle.  Layers
    of both kinds have the same parameters and differ in what they see and how they turn, so ``scan`` runs any
    pattern as one stack, with the same results as the unrolled form.

    Attributes:
      vocabulary: number of token ids.
      width, depth, heads, kv_heads, head_dim, mlp_dim: of the blocks; ``mlp_dim`` None is ``4 width``.
      activation, gated: of the MLPs.
      norm: ``"rms"`` (Llama), ``"rms_offset"`` (Gemma) or ``"layer"`` (GPT-2), and its ``epsilon``.
      order: ``"pre"``, or ``"both"`` with a norm at the end of each branch too ("Gemma 2", arXiv 2408.00118).
      qkv_bias, out_bias, mlp_bias: whether projections have biases.
      qk_norm: kind of norm on each head's queries and keys, or None.
      scale: of the attention logits; None is ``head_dim ** -0.5``.
      soft_cap, final_soft_cap: of the attention's logits and of the vocabulary's, or None.
      rotary: the rotary positions, or None.
      local_rotary: the local layers', if they are others ("Gemma 3", arXiv 2503.19786).
      learned_positions: adds a learned table of ``length`` positions (GPT-2).
      length: longest text that the model knows, in tokens; None is any.
      pattern: kinds of layers, repeated: ``"global"`` sees all that its interval lets it see, ``"local"`` of that the
        last ``window`` tokens only.
      window: tokens that a local layer's token sees, itself included.
      embed_scale: factor of the embeddings, cast to their type first; Gemma's is ``sqrt(width)``.
      tied: whether logits are products with the token embeddings; otherwise there is a ``head`` of its own.
      dropout: in training, share of the embedded tokens and of each branch's output that is zeroed.
      sequence_scheme: how attention works where tokens lie over sequence ranks, one of
        :data:`vlpjax.parallel.sequence.SCHEMES`; ``"auto"`` takes the fastest by :mod:`vlpjax.parallel.cost`.
      drop_path, scan, remat: of :class:`vlpjax.models.stack.Stack`.
      dtype: compute type; None is float32.  Parameters and logits are float32.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    epsilon: float = 1e-6
    order: str = "pre"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    scale: float | None = None
    soft_cap: float | None = None
    final_soft_cap: float | None = None
    rotary: Rotary | None = Rotary()
    local_rotary: Rotary | None = None
    learned_positions: bool = False
    length: int | None = None
    pattern: tuple[str, ...] = ("global",)
    window: int | None = None
    embed_scale: float = 1.0
    tied: bool = True
    dropout: float = 0.0
    sequence_scheme: str = "auto"
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    def setup(self) -> None:
        if not self.pattern or any(kind not in KINDS for kind in self.pattern):
            raise UserError(f"Decoder.pattern is {self.pattern}; it takes 'global' and 'local', one or more.")
        if "local" in self.pattern and not self.window:
            raise UserError(
                f"Decoder.pattern {self.pattern} has local layers; give them a window, in tokens."
            )
        if self.order not in ("pre", "both"):
            raise UserError(f"Decoder.order is {self.order!r}; there are 'pre' and 'both'.")
        table = named(nn.initializers.normal(self.width**-0.5), "vocabulary", "embed")
        self.token_embedding = Embedding(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=table, over=("batch", "sequence")
        )
        if not self.tied:
            self.head = Head(self.vocabulary, self.width)
        if self.learned_positions:
            if self.length is None:
                raise UserError("Decoder.learned_positions needs a length, the rows of the table.")
            initial = named(nn.initializers.normal(0.01), "position", "embed")
            self.position_embedding = self.param("position_embedding", initial, (self.length, self.width))

    @nn.nowrap
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.depth))

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, dtype: Any = None) -> KeyValues:
        """An empty cache: keys and values of all layers, [layers, batch, slots, kv_heads, head_dim].

        Args:
          slots: tokens that it can hold.
          dtype: of its entries; None is the compute type.
        """
        heads = self.kv_heads or self.heads
        shape = (self.depth, batch, slots, heads, self.head_dim or self.width // self.heads)
        empty = jnp.zeros(shape, dtype or self.dtype or jnp.float32)
        return KeyValues(empty, empty)

    def embed(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Token embeddings, scaled, without positions: what ``__call__`` takes as ``embeddings``."""
        rows = self.token_embedding(ids)
        return rows * jnp.asarray(self.embed_scale, rows.dtype) if self.embed_scale != 1 else rows

    def logits(self, tokens: Float[Array, "*leading width"]) -> Float[Array, "*leading vocabulary"]:
        """Float32 logits of the next token from the tokens after the final norm."""
        kernel = self.output_kernel().astype(self.dtype or jnp.float32)
        logits = jnp.einsum("...d,dv->...v", tokens, kernel, preferred_element_type=jnp.float32)
        if self.final_soft_cap is not None:
            logits = self.final_soft_cap * jnp.tanh(logits / self.final_soft_cap)
        return logits

    def output_kernel(self) -> Float[Array, "width vocabulary"]:
        """The matrix that makes logits, for losses that take the product piece by piece."""
        kernel: jax.Array = self.token_embedding.embedding.T if self.tied else self.head.kernel
        return kernel

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch tokens"] | None = None,
        *,
        embeddings: Float[Array, "batch tokens width"] | None = None,
        positions: Int[Array, "*three #batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        interval: Interval | None = None,
        local_interval: Interval | None = None,
        mask: Bool[Array, "#batch tokens keys"] | None = None,
        cache: KeyValues | None = None,
        start: Int[Array, ""] | int = 0,
        order: TokenOrder | None = None,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        logits: bool = True,
        train: bool = False,
    ) -> dict[str, Any]:
        """Runs the decoder over tokens, all of them or those that follow a cache.

        Args:
          ids: token ids, or ``embeddings``: rows as :meth:`embed` gives them, some from elsewhere (images).
          positions: of the tokens; by default their index, counted from ``start``, or from the start of each
            segment.  [3, B, T] for a ``rotary`` with sections.
          segment_ids: packed texts; runs of equal numbers see one another only, 0 is padding.
          interval: the keys each token may see, instead of all before it and itself.  Local layers see the last
            ``window`` of them, counted in token order.
          local_interval: what local layers see instead of that; of the shape of ``interval``.
          mask: the same as booleans, for masks that are no interval; without an ``interval`` it alone decides.
          cache: of :meth:`init_cache`; the tokens are written into the slots from ``start`` on, key indices are slots.
          order: how the tokens of a row lie over the sequence ranks of the active layout.  Everything that is one per
            token comes in this order and goes out in it, while intervals name keys by their index in the row; what
            follows from the index (positions, intervals that are not given) is right by itself.  None is the row's
            own order.  With a cache, its slots lie in this order, which is block-striped, and tokens are a prompt from
            slot 0 on, or one token.
          hidden, attention: layers to return the tokens after, and the attention weights of; -1 is the last.
          logits: whether to compute them.
          train: whether dropout is on.

        Returns:
          ``"tokens"`` [B, T, D] after the final norm; ``"logits"`` [B, T, V] float32, or None; ``"hidden"``
          {layer: [B, T, D]}; ``"attention"`` {layer: [B, H, T, K]}; ``"cache"`` with the new tokens, or None.

        Raises:
          UserError: not exactly one of ids and embeddings, more tokens than slots or ``length``, segments with a cache.
        """
        if segment_ids is not None and cache is not None:
            raise UserError("A decoder with a cache takes no segment_ids; generate for one text per row.")
        if ids is not None and embeddings is None:
            tokens = self.embed(ids)
        elif embeddings is not None and ids is None:
            tokens = embeddings.astype(self.dtype or jnp.float32)
        else:
            raise UserError("A decoder takes token ids or embeddings: one of the two.")
        if self.is_initializing():  # all parameters, also those that this call does not need
            self.token_embedding.embedding, self.output_kernel()
        count = tokens.shape[1]
        keys = count if cache is None else cache.key.shape[2]
        if keys < count:
            raise UserError(f"The cache has {keys} slots, but {count} tokens are to be written into it.")
        if self.length is not None and segment_ids is None and keys > self.length:
            raise UserError(f"The decoder takes {self.length} tokens (Decoder.length), but there are {keys}.")

        if order is None and cache is None and (ranks := sequence_ranks(active_layout())) > 1:
            order = TokenOrder("contiguous", ranks)
        index = jnp.asarray(start, jnp.int32) + jnp.arange(count, dtype=jnp.int32)[None]  # [1, T]
        own = None if segment_ids is None else segments(segment_ids)
        spread = cache is None or count > 1  # one token is held by all sequence ranks
        if order is not None and spread:
            index = order.permute(index, 1)
        if order is not None and segment_ids is not None:  # runs are runs in the row's own order
            own = Interval(*(order.permute(x, 1) for x in segments(order.unpermute(segment_ids, 1))))
        if positions is None:
            positions = index if own is None else jnp.maximum(index - own.start, 0)
        if self.learned_positions:
            if positions.ndim != 2:
                raise UserError(
                    f"Learned positions are [batch, tokens]; these have the shape {positions.shape}."
                )
            tokens = tokens + self.position_embedding[positions].astype(tokens.dtype)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)

        seen = interval
        if seen is None:
            end = index + 1 if mask is None else jnp.full_like(index, keys)
            seen = Interval(jnp.zeros_like(end), end)
        if own is not None:
            seen = intersect(seen, own)
            local_interval = None if local_interval is None else intersect(local_interval, own)
        kinds = self.kinds()
        used = [kind for kind in KINDS if kind in kinds]
        varied: dict[str, list[Any]] = {
            "interval": [self._seen(kind, seen, local_interval, index) for kind in used],
            "rotation": self._rotations(used, positions),
        }
        block = functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=self.mlp_dim or 4 * self.width,
            depth=self.depth,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            qk_norm=self.qk_norm,
            scale=self.scale,
            soft_cap=self.soft_cap,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            mlp_bias=self.mlp_bias,
            activation=self.activation,
            gated=self.gated,
            order=self.order,
            dropout=self.dropout,
            norm=self.norm,
            epsilon=self.epsilon,
            scheme=self.sequence_scheme,
            dtype=self.dtype,
        )
        axes = ("batch", "sequence" if spread else None, "activation")
        stack = Stack(block, self.depth, self.scan, self.remat, self.drop_path, axes)
        shared: dict[str, Any] = {"mask": mask, "order": order}
        if cache is not None:
            shared["start"] = start
        if len(used) == 1:  # nothing to choose between
            shared |= {name: values[0] for name, values in varied.items()}
            varied = {}
        stacked = stack(
            tokens,
            cache=cache,
            hidden=hidden,
            weights=attention,
            kinds=[used.index(kind) for kind in kinds],
            varied=varied,
            train=train,
            **shared,
        )
        tokens = norm("final_norm", self.norm, self.dtype, self.epsilon)(stacked.tokens)
        return {
            "tokens": tokens,
            "logits": self.logits(tokens) if logits else None,
            "hidden": stacked.hidden,
            "attention": stacked.weights,
            "cache": stacked.cache,
        }

    def _seen(self, kind: str, seen: Interval, local: Interval | None, index: jax.Array) -> Interval:
        """What layers of this kind see of the interval; the same shapes for all kinds."""
        if kind == "global":
            return seen
        if local is not None:
            return local
        assert self.window is not None
        return Interval(jnp.maximum(seen.start, index + 1 - self.window), seen.end)

    def _rotations(self, used: Sequence[str], positions: jax.Array) -> list[Rotation | None]:
        """The rotation of each kind of layer."""
        head_dim = self.head_dim or self.width // self.heads
        rotary = {"global": self.rotary, "local": self.local_rotary or self.rotary}
        found = [rotary[kind] for kind in used]
        angles = {None if how is None else len(how.frequencies(head_dim)) for how in found}
        if self.scan and len(angles) > 1:
            raise UserError(
                f"Decoder.scan takes local and global layers that turn equally many features, not {found}."
            )
        return [None if how is None else how(positions, head_dim) for how in found]
