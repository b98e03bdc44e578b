"""Attention whose tokens lie over several devices: five schemes behind one function, and decoding on a sharded cache.

Queries, keys and values come in a :class:`vlpjax.parallel.order.TokenOrder` over the mesh axes ``ring`` and
``ulysses``.  A scheme says which of the two axes trade tokens for heads first (all-to-all: afterwards a rank has more
tokens and fewer heads), and how keys and values get around the remaining ranks: all gathered at once, or passed around
in a ring while queries stay.

=================  =======================  =========================
scheme             tokens against heads     keys and values
=================  =======================  =========================
``gather``         on no axis               gathered over both axes
``ring``           on no axis               passed around both axes
``ulysses``        on both axes             all there
``ulysses_gather`` on ``ulysses``           gathered over ``ring``
``ulysses_ring``   on ``ulysses``           passed around ``ring``
=================  =======================  =========================

Each call is one ``shard_map`` that trades, one forward and one backward, with their collectives written out.  The
backward pass needs the queries, keys and values that were traded: it trades again, unless they are saved by the name
``"exchanged"`` (:mod:`vlpjax.models.stack`).  Keys that are gathered or pass by are not kept.

Sources: "Ring Attention", arXiv 2310.01889; "DeepSpeed Ulysses", arXiv 2309.14509; "USP", arXiv 2405.07719; "LongVILA",
arXiv 2408.10188.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.mesh import Layout, active_layout, constrain, devices_along, used_axes
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.backends import on_device
from vlpjax.parallel.flash import NAMES, Flash
from vlpjax.parallel.order import TokenOrder, fitting_order
from vlpjax.parallel.passing import Ring

SCHEMES = ("gather", "ring", "ulysses", "ulysses_gather", "ulysses_ring")


def sequence_ranks(layout: Layout | None) -> int:
    """Over how many devices the tokens of a row lie."""
    return 1 if layout is None else devices_along(layout, "sequence")


def active_order(length: int) -> TokenOrder | None:
    """The order for rows of this length on the active layout; None if its sequence axes have one device.

    Raises:
      UserError: a length that the sequence ranks do not divide.
    """
    ranks = sequence_ranks(active_layout())
    return None if ranks == 1 else fitting_order(length, ranks)


def lay_out(order: TokenOrder | None, *arrays: Int[Array, "batch tokens"]) -> tuple[jax.Array, ...]:
    """Rows of ids, labels, positions, weights or intervals in an order, each token's on its rank.

    Labels are shifted before; what is embedded afterwards is where attention wants it, and no embedding is moved.
    """
    if order is None:
        return arrays
    return tuple(constrain(order.permute(x, 1), "batch", "sequence") for x in arrays)


def sequence_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens kv_heads head_dim"],
    value: Float[Array, "batch tokens kv_heads head_dim"],
    interval: Interval,
    order: TokenOrder,
    *,
    scheme: str = "gather",
    scale: float | None = None,
    soft_cap: float | None = None,
    form: Flash | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Self-attention of tokens that lie over the sequence ranks of the active layout.

    Args:
      query, key, value: unscaled, in ``order``.
      interval: what each query (in ``order``) sees, in indices of the row's own order.
      order: how the tokens lie.
      scheme: one of :data:`SCHEMES`.
      scale: of the logits; ``head_dim ** -0.5`` by default.
      soft_cap: of the logits, or None.
      form: attention on one device; the one that fits it by default (:func:`vlpjax.parallel.backends.on_device`).

    Returns:
      the mixed values in ``order``; ``"attention_out"`` and ``"attention_lse"`` name what is kept for the backward
      pass (:func:`jax.ad_checkpoint.checkpoint_name`).

    Raises:
      UserError: no layout with sequence ranks, another number of ranks in ``order``, an unknown scheme, or a batch, a
        length or heads that the mesh does not divide.
    """
    interval = Interval(*jnp.broadcast_arrays(*(x.astype(jnp.int32) for x in interval)))
    layout = layout_for(order)
    plan = _Plan.of(layout, query, key, order, scheme)
    part = plan.length // plan.size(plan.outer)
    sizes = dict(queries=part, keys=part if plan.rotate else plan.length)
    plan = plan._replace(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        soft_cap=soft_cap,
        form=form or on_device(query, key, **sizes, rows=rows_on_device(interval, layout)),
    )
    mixed: jax.Array = _attend(plan, query, key, value, interval)
    return mixed


def checked_heads(heads: int, kv_heads: int, tensor: int, ulysses: int) -> tuple[int, int]:
    """How often heads of keys and values are repeated, so that each rank has those that its queries need.

    Returns:
      the repetitions over the tensor ranks, 1 where these divide the heads; and those in the exchange that follows.

    Raises:
      UserError: heads that cannot be dealt out.
    """
    unit = tensor * ulysses
    if heads % unit:
        near = f"{heads // unit * unit} or {-(-heads // unit) * unit}" if heads > unit else f"{unit}"
        raise UserError(
            f"{heads} attention heads cannot be dealt out over tensor={tensor} x ulysses={ulysses}; the nearest "
            f"numbers of heads that work are {near}."
        )
    over = 1 if kv_heads % tensor == 0 else tensor // kv_heads
    local = kv_heads * over // tensor
    again = math.lcm(local, ulysses) // local if local else 0
    if kv_heads * over % tensor or not again or (heads // tensor) % (local * again):
        raise UserError(
            f"{kv_heads} heads of keys and values, for {heads} of queries, cannot be dealt out over tensor={tensor} x "
            f"ulysses={ulysses}; a multiple or a divisor of {unit} works."
        )
    return over, again


class _Plan(NamedTuple):
    """One call: who exchanges what with whom.

    Attributes:
      batch, tensor: mesh axes of examples and of heads.
      inner: mesh axes whose ranks trade tokens for heads.
      outer: mesh axes around which keys and values get.
      rotate: in a ring, or all at once.
      order: how tokens lie over outer and inner ranks together, of rows of ``length``.
      over, again: of :func:`checked_heads`, with ``kv_heads`` of all tensor ranks.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    tensor: tuple[str, ...]
    inner: tuple[str, ...]
    outer: tuple[str, ...]
    rotate: bool
    order: TokenOrder
    length: int
    over: int
    again: int
    kv_heads: int
    scale: float = 1.0
    soft_cap: float | None = None
    form: Flash | None = None

    @classmethod
    def of(cls, layout: Layout, query: jax.Array, key: jax.Array, order: TokenOrder, scheme: str) -> _Plan:
        """The plan for arrays of these shapes, checked."""
        if scheme not in SCHEMES:
            raise UserError(f"The sequence scheme is {scheme!r}; there are {', '.join(map(repr, SCHEMES))}.")
        order.check(query.shape[1])
        layout.spec(("batch", "sequence", None, None), query.shape, "The query of attention")
        batch, tensor, sequence = (used_axes(layout, name) for name in ("batch", "heads", "sequence"))
        inner = sequence if scheme == "ulysses" else ()
        if scheme.startswith("ulysses_"):
            inner = tuple(axis for axis in sequence if axis == "ulysses")
        outer = tuple(axis for axis in sequence if axis not in inner)
        sizes = [math.prod(layout.mesh.shape[axis] for axis in axes) for axes in (tensor, inner)]
        over, again = checked_heads(query.shape[2], key.shape[2], *sizes)
        rotate = scheme.endswith("ring")
        length, kv_heads = query.shape[1], key.shape[2]
        return cls(layout.mesh, batch, tensor, inner, outer, rotate, order, length, over, again, kv_heads)

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def ring(self) -> Ring:
        """The outer ranks."""
        return Ring(self.outer, self.size(self.outer))

    @property
    def outer_order(self) -> TokenOrder:
        """How tokens lie over the outer ranks once the inner ones have traded."""
        return self.order.grouped(self.size(self.inner))

    def run(self, function: Callable[..., Any], given: str, returned: str, *arrays: Any) -> Any:
        """``function`` on every device; ``given`` and ``returned`` say what arrays are, one letter each."""
        alike = "i" in given and arrays[given.index("i")].start.shape[0] == 1  # all rows' intervals
        tokens = (*self.outer, *self.inner)
        specs = {
            "q": PartitionSpec(self.batch, tokens, self.tensor, None),
            "k": PartitionSpec(self.batch, tokens, self.tensor if self.over == 1 else None, None),
            "h": PartitionSpec(self.batch, self.outer, (*self.tensor, *self.inner), None),  # once exchanged
            "i": PartitionSpec(None if alike else self.batch, tokens),  # of both ends
            "l": PartitionSpec(self.batch, (*self.tensor, *self.inner), self.outer),
        }
        # Gradients are written out by hand, and kernels do not say over which axes their results vary.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(specs[letter] for letter in given),
            out_specs=tuple(specs[letter] for letter in returned),
            check_vma=False,
        )(*arrays)


def layout_for(order: TokenOrder) -> Layout:
    """The active layout, whose sequence ranks are those of ``order``."""
    layout = active_layout()
    ranks = sequence_ranks(layout)
    if layout is None or ranks != order.ranks:
        raise UserError(
            f"The tokens' order is for {order.ranks} sequence ranks, but the mesh has ring x ulysses = {ranks}."
        )
    return layout


def rows_on_device(interval: Interval, layout: Layout) -> int:
    """How many different intervals a device has."""
    rows = interval.start.shape[0]
    return rows if rows == 1 else rows // devices_along(layout, "batch")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval) -> jax.Array:
    return _attend_forward(plan, query, key, value, interval)[0]


def _attend_forward(
    plan: _Plan, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval
) -> tuple[jax.Array, tuple[Any, ...]]:
    own = _exchanged(plan, query, key, value)
    mixed, lse = plan.run(functools.partial(_forward, plan), "hhhi", "ql", *own, interval)
    mixed, lse = (checkpoint_name(x, name) for x, name in zip((mixed, lse), NAMES, strict=True))
    return mixed, (*own, interval, mixed, lse)


def _attend_backward(plan: _Plan, kept: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    run = functools.partial(_backward, plan)
    d_query, d_key, d_value = plan.run(run, "hhhiqlq", "qkk", *kept, gradient)
    return d_query, d_key, d_value, None


_attend.defvjp(_attend_forward, _attend_backward)


def _exchanged(
    plan: _Plan, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those heads of all three that each rank attends with, of all inner ranks' tokens."""
    if not plan.inner and plan.over == 1:
        return query, key, value

    def trade(*own: jax.Array) -> tuple[jax.Array, ...]:
        return to_heads(plan, own[0]), _own_heads(plan, own[1]), _own_heads(plan, own[2])

    traded = plan.run(trade, "qkk", "hhh", query, key, value)
    query, key, value = (checkpoint_name(x, "exchanged") for x in traded)
    return query, key, value


def _forward(
    plan: _Plan, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval
) -> tuple[jax.Array, jax.Array]:
    """One device's part of the forward pass, from what was exchanged on."""
    interval = _with_inner_ranks(plan, interval)
    assert plan.form is not None
    forward = functools.partial(plan.form.forward, scale=plan.scale, soft_cap=plan.soft_cap)
    if plan.rotate and plan.outer:
        mixed, lse = _ring_forward(plan, forward, query, key, value, interval)
    else:
        mixed, lse = forward(query, _gathered(plan, key), _gathered(plan, value), interval)
    return to_tokens(plan, mixed), lse


def _backward(
    plan: _Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    interval: Interval,
    mixed: jax.Array,
    lse: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One device's part of the backward pass."""
    mixed, gradient = to_heads(plan, mixed), to_heads(plan, gradient)
    interval = _with_inner_ranks(plan, interval)
    assert plan.form is not None
    run = functools.partial(plan.form.backward, scale=plan.scale, soft_cap=plan.soft_cap)

    def backward(key: jax.Array, value: jax.Array, seen: Interval) -> tuple[jax.Array, jax.Array, jax.Array]:
        return run(query, key, value, seen, mixed, lse, gradient)

    if plan.rotate and plan.outer:
        d_query, d_key, d_value = _ring_backward(plan, backward, query, key, value, interval)
    else:
        d_query, *rest = backward(_gathered(plan, key), _gathered(plan, value), interval)
        d_key, d_value = (_scattered(plan, x.astype(jnp.float32)) for x in rest)
    d_query = to_tokens(plan, d_query.astype(query.dtype))
    # The sums over queries are done; what is exchanged now is rounded, as the results are.
    d_key, d_value = (_back_from_own_heads(plan, x.astype(key.dtype)) for x in (d_key, d_value))
    return d_query, d_key, d_value


# Keys and values around the outer ranks.


def _ring_forward(
    plan: _Plan,
    forward: Callable[..., tuple[jax.Array, jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    interval: Interval,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values pass by; what each part adds is weighted by its share of the softmax's sum."""

    def add(carry: Any, step: jax.Array | int, keys: Any) -> Any:
        (sums, sums_lse), (mixed, lse) = carry, forward(query, *keys, _seen_of(plan, interval, step))
        return merge(sums, sums_lse, mixed.astype(jnp.float32), lse)

    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full(_heads_first(query.shape), -jnp.inf, jnp.float32)
    mixed, lse = plan.ring.meet(add, nothing, (key, value))
    return mixed.astype(query.dtype), lse


def _ring_backward(
    plan: _Plan,
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    interval: Interval,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values pass by once more, and their gradients a step behind them, until they are back at home."""

    def add(d_query: jax.Array, step: jax.Array | int, keys: Any) -> tuple[jax.Array, Any]:
        found, *rest = backward(*keys, _seen_of(plan, interval, step))
        return d_query + found.astype(jnp.float32), tuple(x.astype(jnp.float32) for x in rest)

    d_query, *zeros = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    d_query, (d_key, d_value) = plan.ring.collect(add, d_query, (key, value), tuple(zeros))
    return d_query, d_key, d_value


def _seen_of(plan: _Plan, interval: Interval, step: jax.Array | int) -> Interval:
    """What queries see of the keys that are here at a step of the ring."""
    rank = (jax.lax.axis_index(plan.outer) - step) % plan.ring.size
    return plan.outer_order.local(interval, rank, plan.length)


def merge(
    mixed: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention to two sets of keys from that to each; values float32 [B, Q, H, D], sums [B, H, Q]."""
    total = jnp.logaddexp(lse, more_lse)
    base = jnp.where(jnp.isneginf(total), 0.0, total)
    ours, theirs = (jnp.swapaxes(jnp.exp(x - base), 1, 2)[..., None] for x in (lse, more_lse))
    return mixed * ours + more * theirs, total


def _heads_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[1]


def _gathered(plan: _Plan, x: jax.Array) -> jax.Array:
    """The keys of all outer ranks, ascending."""
    if not plan.outer:
        return x
    tiles = _tiled(x, plan.outer_order, plan.length)[:, :, None]  # [b, n, 1, T, ...]
    # Axis by axis, which moves as much: a TPU's links gather and scatter along two dimensions of a torus, not three.
    for axis in reversed(plan.outer):
        tiles = jax.lax.all_gather(tiles, axis, axis=2, tiled=False)
        tiles = tiles.reshape(*tiles.shape[:2], -1, *tiles.shape[4:])
    return _untiled(plan.order.turned(tiles, 1))


def _scattered(plan: _Plan, x: jax.Array) -> jax.Array:
    """The sum over outer ranks of gradients of all keys, each rank's own: what :func:`_gathered` is pulled back by."""
    if not plan.outer:
        return x
    count, tile = plan.outer_order.tiles(plan.length)
    tiles = plan.order.turned(x.reshape(x.shape[0], count, -1, tile, *x.shape[2:]), 1)
    # Ranks first, and no cast before the sum is there: or the TPU compiler sums up all of it everywhere, and rounded.
    tiles = jnp.moveaxis(tiles, 2, 0)
    for axis in plan.outer:
        tiles = tiles.reshape(plan.mesh.shape[axis], -1, *tiles.shape[1:])
        if plan.mesh.shape[axis] == 2:
            tiles = _sum_of_two(tiles, axis)
        else:
            tiles = jax.lax.psum_scatter(tiles, axis, scatter_dimension=0)
    return jax.lax.optimization_barrier(_untiled(tiles[0][:, :, None]))


def _sum_of_two(halves: jax.Array, axis: str) -> jax.Array:
    """Each of two ranks' half of the sum; the TPU compiler would have both sum up both halves, and rounded."""
    rank = jax.lax.axis_index(axis)
    own, other = (jax.lax.dynamic_index_in_dim(halves, place, keepdims=False) for place in (rank, 1 - rank))
    return own + jax.lax.ppermute(other, axis, [(0, 1), (1, 0)])


# Tokens against heads among the inner ranks.


def to_heads(plan: _Plan, x: jax.Array) -> jax.Array:
    """[b, s, h, d] of own tokens -> [b, inner s, h / inner, d] of all inner ranks' tokens, ascending."""
    if not plan.inner:
        return x
    x = _tiled(x, plan.order, plan.length)  # [b, n, T, h, d]
    x = x.reshape(*x.shape[:3], plan.size(plan.inner), -1, x.shape[-1])
    x = jax.lax.all_to_all(x, plan.inner, split_axis=3, concat_axis=2)  # [b, n, inner, T, h / inner, d]
    return _untiled(plan.order.turned(x, 1))


def to_tokens(plan: _Plan, x: jax.Array) -> jax.Array:
    """Undoes :func:`to_heads`."""
    if not plan.inner:
        return x
    count, tile = plan.order.tiles(plan.length)
    x = plan.order.turned(x.reshape(x.shape[0], count, -1, tile, *x.shape[2:]), 1)
    x = jax.lax.all_to_all(x, plan.inner, split_axis=2, concat_axis=3)  # [b, n, T, inner, h / inner, d]
    return x.reshape(x.shape[0], count * tile, -1, x.shape[-1])


def _with_inner_ranks(plan: _Plan, interval: Interval) -> Interval:
    """The intervals of all inner ranks' queries."""
    if not plan.inner:
        return interval

    def gather(x: jax.Array) -> jax.Array:
        tiles = jax.lax.all_gather(_tiled(x, plan.order, plan.length), plan.inner, axis=2)
        return _untiled(plan.order.turned(tiles, 1))

    return Interval(gather(interval.start), gather(interval.end))


def _own_heads(plan: _Plan, x: jax.Array) -> jax.Array:
    """Those heads of keys or values that this rank's queries need, of all inner ranks' tokens."""
    x = shared_head(x, plan.tensor, plan.over)
    return to_heads(plan, x if plan.again == 1 else jnp.repeat(x, plan.again, axis=2))


def shared_head(x: jax.Array, tensor: tuple[str, ...], over: int) -> jax.Array:
    """Of all heads of keys or values the one that ``over`` tensor ranks share; where each has its own, those."""
    return x if over == 1 else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(tensor) // over, 1, axis=2)


def _back_from_own_heads(plan: _Plan, x: jax.Array) -> jax.Array:
    """What :func:`_own_heads` is pulled back by: gradients of heads that were repeated are summed, in float32."""
    x, dtype = to_tokens(plan, x), x.dtype
    if plan.again > 1:
        x = jnp.sum(x.reshape(*x.shape[:2], -1, plan.again, x.shape[-1]), axis=3, dtype=jnp.float32)
    if plan.over > 1:
        all_heads = jnp.zeros((*x.shape[:2], plan.kv_heads, x.shape[-1]), jnp.float32)
        head, x = jax.lax.axis_index(plan.tensor) // plan.over, x.astype(jnp.float32)
        x = jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(all_heads, x, head, axis=2), plan.tensor)
    return x.astype(dtype)


def _tiled(x: jax.Array, order: TokenOrder, length: int) -> jax.Array:
    """A rank's tokens [b, s, ...] as tiles [b, n, T, ...]."""
    return x.reshape(x.shape[0], *order.tiles(length), *x.shape[2:])


def _untiled(x: jax.Array) -> jax.Array:
    """Tiles of several ranks [b, n, ranks, T, ...] as tokens."""
    return x.reshape(x.shape[0], -1, *x.shape[4:])
