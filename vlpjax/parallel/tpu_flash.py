"""Flash attention under interval masks for TPUs, in Pallas: forward and backward, up to millions of tokens.

Tiles of logits that no query sees are neither computed nor fetched, and the grid is only as long as the longest range
of tiles that one goes with: packed documents of 8,000 tokens in a row of two million cost what they cost apart.

With the log-sum-exp of all keys given, the backward pass over a part of the keys gives that part's share of the
gradients, which is what ring attention sums.

Sources: "FlashAttention-2", arXiv 2307.08691; grouped heads: "GQA", arXiv 2305.13245.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float

from vlpjax.parallel import tpu_kernels as kernels
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.tpu_tiles import Tables, Tiles, Work

VMEM = 48 * 2**20  # bytes that a kernel may use; the smallest TPU core (TPU7x) has 64 MB
TILES = Tiles()


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval,
    *,
    scale: float,
    soft_cap: float | None = None,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """Attention to these keys.

    Args:
      query, key, value: unscaled, bfloat16 or float32; the softmax is taken in float32.
      interval: what each query sees, in indices of these keys.
      scale, soft_cap: of the logits, as in :func:`vlpjax.parallel.attention.attend`.
      tiles: sizes of the tiles.
      interpret: run the kernel's body as plain JAX, on any platform.

    Returns:
      the mixed values, in the query's type, zeros where a query sees no key; and the logarithm of the sum of the
      exponentiated logits, float32, ``-inf`` there.
    """
    work = Work.of(query, key, interval, tiles)
    packed = work.pack_interval(interval)
    tables = Tables.of(packed, work.keys, work.tiles)
    inputs = (packed, work.pack_queries(query * scale), work.pack_keys(key), work.pack_keys(value))
    specs, shape = work.specs(work.by_query), work.query_shape
    column = (work.tiles.query, kernels.LANES)
    mixed, lse = pl.pallas_call(
        functools.partial(kernels.forward, rows=work.row, soft_cap=soft_cap),
        out_shape=[_like(shape, query.dtype, inputs), _like((*shape[:3], 1, shape[3]), jnp.float32, inputs)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*shape[:2], work.query_tiles, tables.key_steps),
            in_specs=[specs.interval, specs.query, specs.key, specs.key],
            out_specs=[specs.query, specs.row],
            scratch_shapes=[
                *[pltpu.VMEM(column, jnp.int32)] * 2,
                *[pltpu.VMEM((work.heads, *column), jnp.float32)] * 2,
                pltpu.VMEM((work.heads, work.tiles.query, work.head_dim), jnp.float32),
            ],
        ),
        compiler_params=_compiler_params("arbitrary"),
        cost_estimate=_cost(work, 2, inputs),
        interpret=interpret,
        name="interval_flash_forward",
    )(tables.queries, *inputs)
    return work.unpack_queries(mixed), work.unpack_rows(lse)


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval,
    mixed: Float[Array, "batch queries heads head_dim"],
    lse: Float[Array, "batch heads queries"],
    gradient: Float[Array, "batch queries heads head_dim"],
    *,
    scale: float,
    soft_cap: float | None = None,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """What these keys contribute to the gradients of queries, keys and values, all three in float32.

    Args:
      query, key, value, interval, scale, soft_cap, tiles, interpret: as in :func:`forward`.
      mixed, lse: of :func:`forward` over all keys, of which ``key`` and ``value`` may be a part.
      gradient: of ``mixed``.
    """
    work = Work.of(query, key, interval, tiles)
    packed = work.pack_interval(interval)
    tables = Tables.of(packed, work.keys, work.tiles)
    inner = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    inputs = (
        packed,
        work.pack_queries(query * scale),
        work.pack_keys(key),
        work.pack_keys(value),
        work.pack_queries(gradient.astype(query.dtype)),
        work.pack_rows(jnp.where(jnp.isneginf(lse), 0.0, lse)),  # queries that see nothing are masked anyway
        work.pack_rows(jnp.swapaxes(inner, 1, 2)),
    )
    d_query = _query_gradient(work, tables, inputs, scale, soft_cap, interpret)
    d_key, d_value = _key_value_gradient(work, tables, inputs, soft_cap, interpret)
    return work.unpack_queries(d_query), work.unpack_keys(d_key), work.unpack_keys(d_value)


def _query_gradient(
    work: Work,
    tables: Tables,
    inputs: Sequence[jax.Array],
    scale: float,
    soft_cap: float | None,
    interpret: bool,
) -> Float[Array, "batch parts heads rows head_dim"]:
    specs, column = work.specs(work.by_query), (work.tiles.query, kernels.LANES)
    out: jax.Array = pl.pallas_call(
        functools.partial(kernels.query_gradient, rows=work.row, soft_cap=soft_cap, scale=scale),
        out_shape=_like(work.query_shape, jnp.float32, inputs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*work.query_shape[:2], work.query_tiles, tables.key_steps),
            in_specs=[specs.interval, specs.query, specs.key, specs.key, specs.query, specs.row, specs.row],
            out_specs=specs.query,
            scratch_shapes=[
                *[pltpu.VMEM(column, jnp.int32)] * 2,
                *[pltpu.VMEM((work.heads, *column), jnp.float32)] * 2,
            ],
        ),
        compiler_params=_compiler_params("arbitrary"),
        cost_estimate=_cost(work, 3, inputs),
        interpret=interpret,
        name="interval_flash_query_gradient",
    )(tables.queries, *inputs)
    return out


def _key_value_gradient(
    work: Work, tables: Tables, inputs: Sequence[jax.Array], soft_cap: float | None, interpret: bool
) -> tuple[Float[Array, "batch groups rows head_dim"], Float[Array, "batch groups rows head_dim"]]:
    specs = work.specs(work.by_key)
    kernel = functools.partial(
        kernels.key_value_gradient, rows=work.row, key_rows=work.key_row, soft_cap=soft_cap
    )
    d_key, d_value = pl.pallas_call(
        kernel,
        out_shape=[_like(work.key_shape, jnp.float32, inputs)] * 2,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(work.batch, work.groups, work.key_tiles, work.parts, tables.query_steps),
            in_specs=[specs.interval, specs.query, specs.key, specs.key, specs.query, specs.row, specs.row],
            out_specs=[specs.key] * 2,
        ),
        compiler_params=_compiler_params("arbitrary", "arbitrary"),
        cost_estimate=_cost(work, 4, inputs),
        interpret=interpret,
        name="interval_flash_key_value_gradient",
    )(tables.queries, tables.keys, *inputs)
    return d_key, d_value


def _like(shape: tuple[int, ...], dtype: Any, inputs: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that the inputs vary over, inside ``jax.shard_map``."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=varying))


def _compiler_params(*sums: Any) -> pltpu.CompilerParams:
    """The last grid dimensions sum up; the three before them may run in any order, on either core of a chip."""
    return pltpu.CompilerParams(dimension_semantics=(*["parallel"] * 3, *sums), vmem_limit_bytes=VMEM)


def _cost(work: Work, products: int, inputs: Sequence[jax.Array]) -> pl.CostEstimate:
    """For the scheduler of the program around the kernel: half of the pairs, as under a causal mask."""
    pairs = work.batch * work.groups * work.parts * work.heads * work.queries * work.keys // 2
    return pl.CostEstimate(
        flops=2 * products * pairs * work.head_dim,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs) * 2,
    )
