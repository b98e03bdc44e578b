"""Attention of short sequences for TPUs, in Pallas: all logits of a head at once, which never leave the core.

An image of 256 patches has 256 x 256 logits per head, which the dense form writes to memory and reads again several
times.  Tiles of :mod:`vlpjax.parallel.tpu_flash` are made for long rows; here a grid step holds several heads of an
example, and the backward pass is one kernel of five products that recomputes the weights from the log-sum-exp.

Logits of the backward pass stand transposed, [keys, queries]: numbers per query are rows, and of the five products only
that of the queries' gradient needs a transposed operand.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vlpjax.parallel.attention import Interval
from vlpjax.parallel.tpu_kernels import HIDDEN, LANES, each, product

VMEM = 48 * 2**20  # bytes that a kernel may use; the smallest TPU core (TPU7x) has 64 MB
BLOCKS = 24 * 2**20  # and those of its inputs and outputs, which are fetched while others are worked on


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    interval: Interval,
    *,
    scale: float,
    soft_cap: None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """Attention; arguments and results as of :func:`vlpjax.parallel.tpu_flash.forward`, without a soft cap."""
    del soft_cap  # always None; the entry asks for none
    queries, keys = (_pack(x) for x in (query * scale, key))
    both, whole = _intervals(interval, queries.shape[2], key.shape[1], keys.shape[2])
    inputs = (both, queries, keys, _pack(value))
    together = _heads_together(queries, keys, arrays=4)
    specs = _Specs(both.shape[0] == 1, together, queries.shape, keys.shape)
    mixed, lse = pl.pallas_call(
        _forward,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, query.dtype),
            jax.ShapeDtypeStruct((*queries.shape[:2], 1, queries.shape[2]), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(queries.shape[0], queries.shape[1] // together),
            in_specs=[specs.interval, specs.query, specs.key, specs.key],
            out_specs=[specs.query, specs.row],
        ),
        compiler_params=_PARAMS,
        cost_estimate=_cost(inputs, 2),
        interpret=interpret,
        name="short_attention_forward",
    )(whole, *inputs)
    return _unpack(mixed, query.shape[1]), lse[:, :, 0, : query.shape[1]]


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    interval: Interval,
    mixed: Float[Array, "batch queries heads head_dim"],
    lse: Float[Array, "batch heads queries"],
    gradient: Float[Array, "batch queries heads head_dim"],
    *,
    scale: float,
    soft_cap: None = None,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys heads head_dim"],
    Float[Array, "batch keys heads head_dim"],
]:
    """The gradients of queries, keys and values, each in its own type: no sum goes beyond one grid step."""
    # What the mixed values are needed for elsewhere is a sum over weights that are there anyway.
    del soft_cap, mixed
    queries, keys = (_pack(x) for x in (query * scale, key))
    both, whole = _intervals(interval, queries.shape[2], key.shape[1], keys.shape[2])
    missing = queries.shape[2] - query.shape[1]
    rows = jnp.pad(jnp.where(jnp.isneginf(lse), 0.0, lse), ((0, 0), (0, 0), (0, missing)))[:, :, None]
    inputs = (both, queries, keys, _pack(value), _pack(gradient.astype(query.dtype)), rows)
    together = _heads_together(queries, keys, arrays=7)
    specs = _Specs(both.shape[0] == 1, together, queries.shape, keys.shape)
    d_query, d_key, d_value = pl.pallas_call(
        functools.partial(_backward, scale=scale),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (queries, keys, keys)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(queries.shape[0], queries.shape[1] // together),
            in_specs=[specs.interval, specs.query, specs.key, specs.key, specs.query, specs.row],
            out_specs=[specs.query, specs.key, specs.key],
        ),
        compiler_params=_PARAMS,
        cost_estimate=_cost(inputs, 5),
        interpret=interpret,
        name="short_attention_backward",
    )(whole, *inputs)
    length, width = query.shape[1], key.shape[1]
    return _unpack(d_query, length), _unpack(d_key, width), _unpack(d_value, width)


def _forward(whole: Any, interval: Any, query: Any, key: Any, value: Any, mixed: Any, lse: Any) -> None:
    """A grid step of the forward pass: some heads of one example."""

    def body(masked: bool) -> None:
        def head(index: Any) -> None:
            logits = product(query[index], key[index], (1, 1))  # [queries, keys]
            if masked:
                start, end = (_column(interval[row : row + 1]) for row in (0, 1))
                here = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
                seen = (here >= start[:, :1]) & (here < end[:, :1])
                logits = jnp.where(seen, logits, HIDDEN)
            highest = jnp.max(logits, axis=1, keepdims=True)
            shares = jnp.exp(logits - highest)
            total = jnp.sum(shares, axis=1, keepdims=True)
            sums = product(shares.astype(value.dtype), value[index], (1, 0))
            weight, log = 1 / total, highest + jnp.log(total)
            if masked:  # a query that sees nothing mixes nothing
                some = highest > HIDDEN
                weight, log = jnp.where(some, weight, 0.0), jnp.where(some, log, -jnp.inf)
            mixed[index] = (sums * weight).astype(mixed.dtype)
            lse[index] = jnp.transpose(jnp.broadcast_to(log, (log.shape[0], LANES)))[0:1]

        each(query.shape[0], head)

    _whole_or_masked(whole, body)


def _backward(
    whole: Any, interval: Any, query: Any, key: Any, value: Any, gradient: Any, lse: Any,
    query_out: Any, key_out: Any, value_out: Any, *, scale: float,
) -> None:  # fmt: skip
    """A grid step of the backward pass; logits stand transposed."""

    def body(masked: bool) -> None:
        def head(index: Any) -> None:
            logits = product(key[index], query[index], (1, 1))  # [keys, queries]
            shares = jnp.exp(logits - lse[index])
            if masked:
                here = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                shares = jnp.where((here >= interval[0:1]) & (here < interval[1:2]), shares, 0.0)
            by_share = product(value[index], gradient[index], (1, 1))
            by_share -= jnp.sum(shares * by_share, axis=0, keepdims=True)
            by_logit = (shares * by_share).astype(query.dtype)
            value_out[index] = product(shares.astype(query.dtype), gradient[index], (1, 0)).astype(
                value_out.dtype
            )
            key_out[index] = product(by_logit, query[index], (1, 0)).astype(key_out.dtype)
            query_out[index] = (product(by_logit, key[index], (0, 0)) * scale).astype(query_out.dtype)

        each(query.shape[0], head)

    _whole_or_masked(whole, body)


def _whole_or_masked(whole: Any, body: Any) -> None:
    """Without masks where every query of the example sees every key; they cost the vector unit a third more."""
    row = jnp.minimum(pl.program_id(0), whole.shape[0] - 1)
    pl.when(whole[row] == 1)(lambda: body(False))
    pl.when(whole[row] == 0)(lambda: body(True))


def _column(row: jax.Array) -> jax.Array:
    """[1, N] as [N, 128], every lane the same."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


class _Specs:
    """The blocks of a grid step: one example, and ``together`` of its heads."""

    def __init__(self, shared: bool, together: int, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        def heads(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((None, together, *shape), lambda batch, part, _: (batch, part, 0, 0))

        self.query, self.key = heads(queries[2:]), heads(keys[2:])
        self.row = heads((1, queries[2]))
        self.interval = pl.BlockSpec(
            (None, 2, queries[2]), lambda batch, part, _: (0 if shared else batch, 0, 0)
        )


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM)


def _heads_together(queries: jax.Array, keys: jax.Array, arrays: int) -> int:
    """Heads of a grid step, so that two times its blocks fit."""
    _, heads, length, head_dim = queries.shape
    lanes = -(-head_dim // LANES) * LANES
    most = BLOCKS // (2 * arrays * max(length, keys.shape[2]) * lanes * queries.dtype.itemsize)
    return max(count for count in range(1, heads + 1) if heads % count == 0 and count <= max(most, 1))


def _intervals(interval: Interval, rows: int, keys: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Start and end, [#batch, 2, rows], and per row of them whether no key of the ``width`` is hidden."""
    both = jnp.stack(jnp.broadcast_arrays(interval.start, interval.end), axis=1).astype(jnp.int32)
    both = jnp.clip(both, 0, keys)
    both = jnp.pad(both, ((0, 0), (0, 0), (0, rows - both.shape[2])))  # queries that are padding see nothing
    whole = jnp.all((both[:, 0] == 0) & (both[:, 1] == width), axis=1)
    return both, whole.astype(jnp.int32)


def _pack(x: jax.Array) -> jax.Array:
    """As [batch, heads, rows, head_dim], rows a multiple of 128."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0)))


def _unpack(x: jax.Array, length: int) -> jax.Array:
    return jnp.swapaxes(x[:, :, :length], 1, 2)


def _cost(inputs: Any, products: int) -> pl.CostEstimate:
    """For the scheduler of the program around the kernel."""
    _, query, key, *_ = inputs
    pairs = query.size // query.shape[-1] * key.shape[2]
    return pl.CostEstimate(
        flops=2 * products * pairs * query.shape[-1],
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs) * 2,
    )
