"""The parts that transformers are made of: projections with named axes, attention, MLP, pre-norm block.

Every parameter carries the logical names of its axes, which :mod:`vlpjax.mesh` places on a mesh.  Kernels
are initialised as in CLIP (arXiv 2103.00020): normal, with the branches that write into the residual stream
scaled down by the square root of twice the depth.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.mesh import active_layout
from vlpjax.models.positions import Rotation, rotate
from vlpjax.parallel.attention import Attended, Interval
from vlpjax.parallel.backends import attend
from vlpjax.parallel.cost import pick_scheme
from vlpjax.parallel.gathering import gathered
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import sequence_attention
from vlpjax.parallel.sharded_cache import read_tokens


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, taken in float32 ("Gaussian Error Linear Units", arXiv 1606.08415).

    With ``erf`` and not ``erfc``: on CPUs value and gradient take a third of the time.
    """
    exact = x.astype(jnp.float32)
    return (0.5 * exact * (1 + jax.lax.erf(exact * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # the OpenAI weights' GELU, arXiv 2103.00020
    "silu": nn.silu,
    "relu": nn.relu,
    "squared_relu": lambda x: jnp.square(nn.relu(x)),  # "Primer", arXiv 2109.08668
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function of this name; an unknown name is an error that lists the known ones."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation is {name!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class NamedParameter(nn.LogicallyPartitioned):
    """A parameter with the logical names of its axes, and how it was initialised (for tables)."""

    initializer: str = struct.field(default="", pytree_node=False)


def named(initializer: Callable[..., Any], *axes: str | None) -> Callable[..., Any]:
    """An initializer whose parameter carries these logical axis names."""
    label = _label(initializer)

    def make(*args: Any, **kwargs: Any) -> NamedParameter:
        return NamedParameter(initializer(*args, **kwargs), axes, initializer=label)

    return make


def _label(initializer: Callable[..., Any]) -> str:
    """``"normal(stddev=0.02)"``: the factory's name, and the numbers and words that it was given."""
    settings = inspect.getclosurevars(initializer).nonlocals
    shown = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in settings.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and "axis" not in name
    ]
    name = initializer.__qualname__.partition(".")[0]
    return f"{name}({', '.join(shown)})" if shown else name


def dense(
    features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    stddev: float,
    name: str | None,
    inputs: int = 1,
    bias: bool = True,
    dtype: Any = None,
) -> nn.DenseGeneral:
    """A projection of the last ``inputs`` dimensions whose kernel carries ``axes``, and its bias the output's."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.normal(stddev), *axes),
        bias_init=named(nn.initializers.zeros, *axes[inputs:]),
        dot_general=functools.partial(_project, axes=axes),
        name=name,
    )


def _project(
    inputs: jax.Array, kernel: jax.Array, *args: Any, axes: tuple[str | None, ...], **kwargs: Any
) -> jax.Array:
    """The product with a kernel that lies in pieces, cast already."""
    return jax.lax.dot_general(inputs, gathered(kernel, axes), *args, **kwargs)


NORMS = ("layer", "layer_plain", "rms", "rms_offset")


class RMSNorm(nn.Module):
    """Divides by the root mean square of the features; statistics in float32, no mean, no bias.

    Attributes:
      epsilon: under the root.
      offset: what the learned scale is relative to.  With 0 it starts at 1 and multiplies (arXiv 1910.07467;
        Llama); with 1 it starts at 0 and multiplies as ``1 + scale`` (Gemma), so that weight decay pulls towards
        the identity.
      dtype: of the result; None keeps the type of the input.
    """

    epsilon: float = 1e-6
    offset: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        initial = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", named(initial, "activation"), (tokens.shape[-1],))
        x = tokens.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (self.offset + scale)).astype(self.dtype or tokens.dtype)


def norm(name: str, kind: str = "layer", dtype: Any = None, epsilon: float = 1e-6) -> nn.Module:
    """LayerNorm or RMSNorm over features: statistics in float32, replicated parameters.

    Args:
      kind: ``"layer"``; ``"layer_plain"``, which learns nothing; ``"rms"`` ("Root Mean Square Layer Normalization",
        arXiv 1910.07467); or ``"rms_offset"``, which learns the difference of the scale from 1 (Gemma, arXiv
        2403.08295).
    """
    if kind == "layer":
        scale, bias = named(nn.initializers.ones, "activation"), named(nn.initializers.zeros, "activation")
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, scale_init=scale, bias_init=bias, name=name)
    if kind == "layer_plain":
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_scale=False, use_bias=False, name=name)
    if kind in ("rms", "rms_offset"):
        return RMSNorm(epsilon=epsilon, offset=float(kind == "rms_offset"), dtype=dtype, name=name)
    raise UserError(f"norm is {kind!r}; there are {', '.join(map(repr, NORMS))}.")


def batch_norm(
    name: str,
    train: bool,
    *,
    affine: bool = True,
    scale: Callable[..., Any] = nn.initializers.ones,
    dtype: Any = None,
) -> nn.BatchNorm:
    """BatchNorm over all examples of the global batch: statistics in float32, running ones outside training.

    Args:
      affine: whether a scale and a bias are learned.
      scale: the scale's initializer.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=affine,
        use_bias=affine,
        dtype=dtype,
        scale_init=named(scale, "activation"),
        bias_init=named(nn.initializers.zeros, "activation"),
        name=name,
    )


class KeyValues(NamedTuple):
    """Keys and values of the tokens that a decoder has seen, one layer's or (stacked) all layers'."""

    key: Float[Array, "*layers batch slots kv_heads head_dim"]
    value: Float[Array, "*layers batch slots kv_heads head_dim"]

    def write(self, key: jax.Array, value: jax.Array, start: jax.Array) -> KeyValues:
        """Puts new tokens into the slots from ``start`` (a scalar, the same for all rows) on."""
        at = (0, start, 0, 0)
        return KeyValues(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), at),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), at),
        )


class CrossKeyValues(NamedTuple):
    """The cache of a decoder with cross-attention: of its own tokens, and of the memory, which is projected once."""

    own: KeyValues
    memory: KeyValues


class Mixed(NamedTuple):
    """What attention and blocks return: new tokens, and what was asked for beside them."""

    tokens: Float[Array, "batch tokens width"]
    weights: Float[Array, "batch heads tokens keys"] | None = None
    cache: KeyValues | CrossKeyValues | None = None


class Attention(nn.Module):
    """Multi-head attention of ``tokens`` to themselves, or to ``memory``.

    Attributes:
      heads: of the queries.
      kv_heads: of keys and values, a divisor of ``heads``; None is as many ("GQA", arXiv 2305.13245).
      head_dim: width of a head; None is ``width / heads``.
      bias: of the query, key and value projections; ``out_bias`` of the output's.
      qk_norm: kind of norm on each head's queries and keys ("Scaling Vision Transformers to 22 Billion
        Parameters", arXiv 2302.05442), or None.
      scale: of the logits; None is ``head_dim ** -0.5``.
      soft_cap: of the logits ("Gemma 2", arXiv 2408.00118), or None.
      depth: blocks in the tower, for the scale of the output projection's initial values.
      value_gain: factor of the value projection's initial values.
      epsilon: of ``qk_norm``.
      scheme: of attention over sequence ranks (:data:`vlpjax.parallel.sequence.SCHEMES`), or ``"auto"``: the one that
        :func:`vlpjax.parallel.cost.pick_scheme` picks.
      dtype: compute type; parameters are float32.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = True
    out_bias: bool = True
    qk_norm: str | None = None
    scale: float | None = None
    soft_cap: float | None = None
    depth: int = 1
    value_gain: float = 1.0
    epsilon: float = 1e-6
    scheme: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        interval: Interval | None = None,
        memory: Float[Array, "batch memory memory_width"] | KeyValues | None = None,
        *,
        mask: Bool[Array, "#batch tokens keys"] | None = None,
        bias: Float[Array, "#batch heads tokens keys"] | None = None,
        rotation: Rotation | None = None,
        cache: KeyValues | None = None,
        start: Int[Array, ""] | int = 0,
        order: TokenOrder | None = None,
        weights: bool = False,
    ) -> Mixed:
        """Attends.

        Args:
          interval, mask, bias: as in :func:`vlpjax.parallel.attention.attend`.  With a cache, key indices are
            the cache's slots.
          memory: what keys and values are made of; None is ``tokens``.  Or keys and values made before.
          rotation: rotary positions of the tokens; queries and keys turn.
          cache: slots that the new keys and values are written into, from ``start`` on; all slots are attended
            to as far as the masks let them.
          order: how the tokens of a row, and a cache's slots, lie over the sequence ranks; for attention to themselves.
            Intervals, masks and biases name keys by their index in the row's own order.  With a cache, tokens are a
            prompt from slot 0 on, or one token (:mod:`vlpjax.parallel.sharded_cache`).
          weights: also return the softmax.

        Raises:
          UserError: heads that do not divide.
        """
        width = tokens.shape[-1]
        kv_heads = self.kv_heads or self.heads
        if self.head_dim is None and width % self.heads:
            raise UserError(f"width {width} is not a multiple of heads={self.heads}.")
        if self.heads % kv_heads:
            raise UserError(f"heads={self.heads} is not a multiple of kv_heads={kv_heads}.")
        head_dim = self.head_dim or width // self.heads
        memory = tokens if memory is None else memory

        def project(name: str, x: jax.Array, heads: int) -> jax.Array:
            axes = ("embed", "heads" if heads == self.heads else "kv_heads", "head_dim")
            stddev = x.shape[-1] ** -0.5
            if name == "value":
                stddev *= self.value_gain
            if name == "query" and self.scale is not None:
                stddev *= (
                    head_dim**-0.5 / self.scale
                )  # logits start with the same spread whatever their scale
            return dense((heads, head_dim), axes, stddev=stddev, name=name, bias=self.bias, dtype=self.dtype)(
                x
            )

        query = project("query", tokens, self.heads)  # [B, N, H, D]
        if self.qk_norm is not None:
            query = norm("query_norm", self.qk_norm, self.dtype, self.epsilon)(query)
        if isinstance(memory, KeyValues):
            key, value = memory.key.astype(query.dtype), memory.value.astype(query.dtype)
        else:
            key, value = project("key", memory, kv_heads), project("value", memory, kv_heads)  # [B, M, G, D]
            if self.qk_norm is not None:
                key = norm("key_norm", self.qk_norm, self.dtype, self.epsilon)(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = (
            checkpoint_name(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
        )
        options: dict[str, Any] = dict(mask=mask, bias=bias, weights=weights)
        if cache is not None and order is not None:
            mixed, cache = self._read(query, key, value, interval, order, options, cache, start)
        else:
            if cache is not None:
                cache = cache.write(key, value, jnp.asarray(start))
                key, value = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
            mixed = self._mix(query, key, value, interval, order, options)
        out = dense(
            width,
            ("heads", "head_dim", "embed"),
            stddev=(2 * self.heads * head_dim * self.depth) ** -0.5,
            name="out",
            inputs=2,
            bias=self.out_bias,
            dtype=self.dtype,
        )(mixed.mixed)
        return Mixed(out, mixed.weights, cache)

    @nn.nowrap
    def _mix(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        interval: Interval | None,
        order: TokenOrder | None,
        options: dict[str, Any],
    ) -> Attended:
        """Attention over sequence ranks where tokens lie over them and one interval says what a token sees."""
        logits = self._logits_options()
        if order is None:
            return attend(query, key, value, interval, **logits, **options)
        if interval is None or _written_out(options) or active_layout() is None:
            # Queries may stand in any order, keys may not.
            key, value = order.unpermute(key, 1), order.unpermute(value, 1)
            return attend(query, key, value, interval, **logits, **options)
        scheme = self._scheme(query, key)
        return Attended(sequence_attention(query, key, value, interval, order, scheme=scheme, **logits), None)

    @nn.nowrap
    def _read(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        interval: Interval | None,
        order: TokenOrder,
        options: dict[str, Any],
        cache: KeyValues,
        start: jax.Array | int,
    ) -> tuple[Attended, KeyValues]:
        """Attention to a cache whose slots lie over sequence ranks."""
        if interval is None or _written_out(options):
            raise UserError(
                "A cache that lies over sequence ranks takes an interval, no mask, bias or weights."
            )
        scheme = self._scheme(query, key)
        mixed, *written = read_tokens(
            query, key, value, cache, interval, start, order, scheme=scheme, **self._logits_options()
        )
        return Attended(mixed, None), KeyValues(*written)

    @nn.nowrap
    def _logits_options(self) -> dict[str, Any]:
        return {"scale": self.scale, "soft_cap": self.soft_cap}

    @nn.nowrap
    def _scheme(self, query: jax.Array, key: jax.Array) -> str:
        return pick_scheme(query, key) if self.scheme == "auto" else self.scheme


def _written_out(options: dict[str, Any]) -> bool:
    """Whether attention was asked for what only its dense form has."""
    return options["mask"] is not None or options["bias"] is not None or options["weights"]


class Mlp(nn.Module):
    """Two projections with an activation between, applied per token.

    Attributes:
      hidden: width between the projections.
      depth: blocks in the tower, for initial values.
      activation: a key of :data:`ACTIVATIONS`.
      gated: a third projection multiplies the activated one: SwiGLU with ``"silu"``, GeGLU with ``"gelu"`` ("GLU
        Variants Improve Transformer", arXiv 2002.05202).
      bias: of all projections.
      dtype: compute type.
    """

    hidden: int
    depth: int = 1
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        width = tokens.shape[-1]

        def enter(name: str) -> jax.Array:
            axes, stddev = ("embed", "mlp"), (2 * width) ** -0.5
            entered = dense(self.hidden, axes, stddev=stddev, name=name, bias=self.bias, dtype=self.dtype)(
                tokens
            )
            return checkpoint_name(entered, f"mlp_{name}")

        hidden = activation(self.activation)(enter("gate" if self.gated else "up"))
        if self.gated:
            hidden = hidden * enter("up")
        scale = (2 * width * self.depth) ** -0.5
        down = dense(width, ("mlp", "embed"), stddev=scale, name="down", bias=self.bias, dtype=self.dtype)
        return down(hidden)


class Block(nn.Module):
    """A transformer block: attention, attention to a memory if there is one, MLP; each adds to its input.

    Attributes:
      heads, kv_heads, head_dim, qk_norm, scale, soft_cap: of :class:`Attention`.
      qkv_bias, out_bias, mlp_bias: whether projections have biases.
      mlp_dim, activation, gated: of :class:`Mlp`.
      depth: blocks in the tower, for initial values.
      order: where norms stand: ``"pre"`` (at the start of each branch), ``"post"`` (after each sum, as in BERT,
        arXiv 1810.04805), ``"both"`` (at the start and at the end of each branch, as in Gemma 2, arXiv 2408.00118).
      cross: whether the block also attends to a ``memory`` between attention and MLP.
      memory_norm: whether each block norms the memory for itself ("CroCo", arXiv 2210.10716).
      layer_scale: initial value of a learned factor per feature at each branch's end ("Going deeper with Image
        Transformers", arXiv 2103.17239), or None.
      dropout: share of each branch's output that is zeroed in training.
      norm: a kind of :func:`norm`, and its ``epsilon``.
      scheme: of :class:`Attention`.
      dtype: compute type.
    """

    heads: int
    mlp_dim: int
    depth: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: str | None = None
    scale: float | None = None
    soft_cap: float | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    activation: str = "gelu"
    gated: bool = False
    order: str = "pre"
    cross: bool = False
    memory_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    norm: str = "layer"
    epsilon: float = 1e-6
    scheme: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        interval: Interval | None = None,
        *,
        mask: Bool[Array, "#batch tokens keys"] | None = None,
        bias: Float[Array, "#batch heads tokens keys"] | None = None,
        rotation: Rotation | None = None,
        memory: Float[Array, "batch memory memory_width"] | None = None,
        memory_interval: Interval | None = None,
        cache: KeyValues | CrossKeyValues | None = None,
        start: Int[Array, ""] | int = 0,
        drop_path: Float[Array, ""] | float = 0.0,
        order: TokenOrder | None = None,
        weights: bool = False,
        train: bool = False,
    ) -> Mixed:
        """One block; the arguments are those of :class:`Attention`.

        Args:
          cache: of a block with ``cross``, :class:`CrossKeyValues`: a memory that is given is projected into it, and
            read from it where none is given.
          drop_path: in training, the probability that an example skips a branch ("Deep Networks with Stochastic
            Depth", arXiv 1603.09382); 0 (the number) draws nothing.

        Raises:
          UserError: an unknown ``order``, or a memory that is missing or not expected.
        """
        if self.order not in ("pre", "post", "both"):
            raise UserError(f"order is {self.order!r}; there are 'pre', 'post' and 'both'.")
        kept = cache.memory if isinstance(cache, CrossKeyValues) else None
        if self.cross != (memory is not None or kept is not None):
            raise UserError(
                f"A block with cross={self.cross} was called {'with' if memory is not None else 'without'} a memory."
            )
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def enter(name: str) -> jax.Array:
            return (
                tokens
                if self.order == "post"
                else norm(f"{name}_norm", self.norm, self.dtype, self.epsilon)(tokens)
            )

        def leave(name: str, branch: jax.Array) -> jax.Array:
            if self.order == "both":
                branch = norm(f"{name}_out_norm", self.norm, self.dtype, self.epsilon)(branch)
            if self.layer_scale is not None:
                initial = named(nn.initializers.constant(self.layer_scale), "activation")
                branch = branch * self.param(f"{name}_scale", initial, branch.shape[-1:]).astype(branch.dtype)
            branch = drop(branch)
            if train and not (isinstance(drop_path, float) and drop_path == 0.0):
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (len(branch), 1, 1))
                branch = jnp.where(kept, branch / (1 - drop_path), 0.0).astype(branch.dtype)
            total = tokens + branch
            return (
                norm(f"{name}_norm", self.norm, self.dtype, self.epsilon)(total)
                if self.order == "post"
                else total
            )

        fields: dict[str, Any] = dict(
            bias=self.qkv_bias, out_bias=self.out_bias, qk_norm=self.qk_norm, scale=self.scale, soft_cap=self.soft_cap,
            depth=self.depth, epsilon=self.epsilon, scheme=self.scheme, dtype=self.dtype,
        )  # fmt: skip
        attention = Attention(self.heads, self.kv_heads, self.head_dim, **fields, name="attention")
        options: dict[str, Any] = dict(
            mask=mask, bias=bias, rotation=rotation, start=start, weights=weights,
            cache=cache.own if isinstance(cache, CrossKeyValues) else cache,
        )  # fmt: skip
        mixed = attention(enter("attention"), interval, order=order, **options)
        tokens = checkpoint_name(leave("attention", mixed.tokens), "residual")
        if self.cross:
            attention = Attention(self.heads, self.kv_heads, self.head_dim, **fields, name="cross_attention")
            if self.memory_norm and memory is not None:
                memory = norm("memory_norm", self.norm, self.dtype, self.epsilon)(memory)
            if memory is None:
                crossed = attention(enter("cross"), memory_interval, kept)
            else:
                crossed = attention(enter("cross"), memory_interval, memory, cache=kept)
            tokens = leave("cross", crossed.tokens)
            if kept is not None:
                memory_cache = kept if memory is None else crossed.cache
                assert isinstance(mixed.cache, KeyValues) and isinstance(memory_cache, KeyValues)
                mixed = mixed._replace(cache=CrossKeyValues(mixed.cache, memory_cache))
        mlp = Mlp(
            self.mlp_dim, self.depth, self.activation, self.gated, self.mlp_bias, self.dtype, name="mlp"
        )
        tokens = leave("mlp", mlp(enter("mlp")))
        return Mixed(tokens, mixed.weights, mixed.cache)
