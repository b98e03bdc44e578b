"""Differentiable attention from a forward and a backward pass that meet in the log-sum-exp, on one device or a mesh.

What the backward pass needs of the forward pass, the mixed values and the log-sum-exp, is named: a rematerialisation
policy that saves these names never runs attention twice (``attention_out``, ``attention_lse``; the log-sum-exp is a
number per query and head, the mixed values are as large as the queries).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vlpjax.mesh import Layout, active_layout, devices_along, used_axes
from vlpjax.parallel.attention import Interval

NAMES = ("attention_out", "attention_lse")


class Flash(NamedTuple):
    """A form of attention.

    Attributes:
      forward: ``forward(query, key, value, interval, *, scale, soft_cap) -> (mixed, lse)``.
      backward: ``backward(query, key, value, interval, mixed, lse, gradient, *, scale, soft_cap)`` gives the gradients
        of the first three, in float32 where they are parts of a sum.
      by_device: the compiler cannot divide it; on a mesh each device is given its own examples and heads.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    by_device: bool = False


class _Settings(NamedTuple):
    """What is known when a program is traced.

    Attributes:
      layout: that each device's part is cut from; the backward pass may be traced outside of it.
    """

    form: Flash
    scale: float
    soft_cap: float | None
    layout: Layout | None


def flash(
    form: Flash,
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention by a form, with its own backward pass; arguments as of :func:`vlpjax.parallel.attention.attend`."""
    layout = active_layout() if form.by_device else None
    if layout is not None:
        key, value = (repeat_heads(layout, x, query.shape[2]) for x in (key, value))
    return _flash(_Settings(form, scale, soft_cap, layout), query, key, value, interval)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    settings: _Settings, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval
) -> jax.Array:
    return _forward(settings, query, key, value, interval)[0]


def _forward(
    settings: _Settings, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval
) -> tuple[jax.Array, tuple[Any, ...]]:
    form, scale, soft_cap, layout = settings
    run: Callable[..., Any] = functools.partial(form.forward, scale=scale, soft_cap=soft_cap)
    if layout is not None:
        at = Places.of(layout, query, key, interval)
        run = at.map(run, (at.tokens, at.tokens, at.tokens, at.interval), (at.tokens, at.rows))
    mixed, lse = run(query, key, value, interval)
    mixed, lse = (checkpoint_name(x, name) for x, name in zip((mixed, lse), NAMES, strict=True))
    return mixed, (query, key, value, interval, mixed, lse)


def _backward(
    settings: _Settings, kept: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    form, scale, soft_cap, layout = settings
    run: Callable[..., Any] = functools.partial(form.backward, scale=scale, soft_cap=soft_cap)
    query, key, value, interval, _, _ = kept
    if layout is not None:
        at = Places.of(layout, query, key, interval)
        inputs = (at.tokens, at.tokens, at.tokens, at.interval, at.tokens, at.rows, at.tokens)
        run = at.map(run, inputs, (at.tokens,) * 3)
    gradients = run(*kept, gradient)
    cast = (x.astype(like.dtype) for x, like in zip(gradients, (query, key, value), strict=True))
    return (*cast, None)


_flash.defvjp(_forward, _backward)


class Places(NamedTuple):
    """Where arrays lie on a mesh while each device attends to its own examples and heads.

    Attributes:
      layout: the mesh.
      tokens: of [batch, tokens, heads, head_dim].
      rows: of [batch, heads, queries].
      interval: of both of an interval's arrays.
    """

    layout: Layout
    tokens: PartitionSpec
    rows: PartitionSpec
    interval: PartitionSpec

    @classmethod
    def of(cls, layout: Layout, query: jax.Array, key: jax.Array, interval: Interval) -> Places:
        """Examples over as much of the mesh as they can be dealt to; heads where their projections lie."""
        examples = batch_axes(layout, query.shape[0])
        parts = devices_along(layout, "heads")
        heads = used_axes(layout, "heads") if query.shape[2] % parts == key.shape[2] % parts == 0 else ()
        own = max(x.shape[0] for x in interval) > 1
        return cls(
            layout,
            PartitionSpec(examples or None, None, heads or None),
            PartitionSpec(examples or None, heads or None),
            PartitionSpec(examples or None) if own else PartitionSpec(),
        )

    def map(
        self, run: Callable[..., Any], inputs: tuple[PartitionSpec, ...], outputs: Any
    ) -> Callable[..., Any]:
        """``run`` on each device's part."""
        mapped: Callable[..., Any] = jax.shard_map(
            run, mesh=self.layout.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
        return mapped


def batch_axes(layout: Layout, batch: int) -> tuple[str, ...]:
    """The mesh axes that examples are dealt over: all of those of frames, or those of a decoder's rows, or none."""
    for name in ("frames", "batch"):
        if batch % devices_along(layout, name) == 0:
            return used_axes(layout, name)
    return ()


def repeat_heads(
    layout: Layout, keys: Float[Array, "batch keys kv_heads head_dim"], heads: int
) -> Float[Array, "batch keys copies head_dim"]:
    """Keys or values, repeated until their heads can be dealt over the devices that hold the queries' heads."""
    parts = devices_along(layout, "heads")
    groups = keys.shape[2]
    if heads % parts or groups % parts == 0:
        return keys
    copies = next(n for n in range(1, heads // groups + 1) if groups * n % parts == 0 == heads % (groups * n))
    return jnp.repeat(keys, copies, axis=2)
