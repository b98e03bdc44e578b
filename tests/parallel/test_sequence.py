"""Attention over sequence ranks equals the dense form on one device: value and gradients, for every scheme."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import assert_trees_close, layout_of
from vlpjax.errors import UserError
from vlpjax.mesh import Layout, make_layout
from vlpjax.parallel.attention import Interval, attend
from vlpjax.parallel.order import TokenOrder, fitting_order
from vlpjax.parallel.sequence import SCHEMES, checked_heads, sequence_attention, sequence_ranks
from vlpjax.parallel.sharded_cache import decode_attention, write_prompt, write_token

B, S, H, D = 2, 64, 8, 4

# (scheme, mesh, kind of order, heads of keys and values)
CASES = [
    ("gather", {"ring": 4, "ulysses": 2}, "block_striped", 2),
    ("gather", {"fsdp": 2, "ring": 4}, "zigzag", 8),
    ("ring", {"ring": 8}, "zigzag", 2),
    ("ring", {"ring": 2, "ulysses": 2, "tensor": 2}, "block_striped", 4),
    ("ring", {"replica": 2, "ring": 4}, "contiguous", 1),
    ("ulysses", {"ulysses": 8}, "block_striped", 2),  # each head of keys goes to four ranks
    ("ulysses", {"ulysses": 4, "tensor": 2}, "zigzag", 8),
    ("ulysses", {"ring": 2, "ulysses": 4}, "contiguous", 8),
    ("ulysses_gather", {"ring": 2, "ulysses": 4}, "zigzag", 2),
    ("ulysses_ring", {"ring": 2, "ulysses": 2, "fsdp": 2}, "block_striped", 1),
    ("ulysses_ring", {"ring": 4, "ulysses": 2}, "zigzag", 4),
]
MASKS = ("causal", "prefix", "blocks", "window", "packed")


def arrays(heads: int = H, kv_heads: int = 2, length: int = S, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys, values, and a gradient of the mixed values."""
    rng = np.random.default_rng(seed)
    counts = (heads, kv_heads, kv_heads, heads)
    return [rng.normal(size=(B, length, count, D)).astype(np.float32) for count in counts]


def intervals(kind: str, length: int = S) -> tuple[np.ndarray, np.ndarray]:
    """What queries see: causally, with a prefix, in pictures of seven tokens, the last ten tokens, in packed texts."""
    index = np.arange(length)
    start, end = np.zeros((B, length), np.int32), np.tile(index + 1, (B, 1)).astype(np.int32)
    if kind == "prefix":
        end = np.maximum(end, [[9], [23]])
    elif kind == "blocks":
        end = np.where(index % 20 < 7, index - index % 20 + 7, index + 1) + np.zeros((B, 1), np.int32)
    elif kind == "window":
        start = np.maximum(end - 10, 0)
    elif kind == "packed":
        bounds = np.array([[0, 5, 6, 30, length - 9], [0, 17, 40, 41, length - 3]])
        for row, edges in enumerate(bounds):
            for first, last in zip(edges, [*edges[1:], length], strict=True):
                start[row, first:last] = first
            start[row, edges[-1] :] = end[row, edges[-1] :] = 0  # padding
    return start, np.minimum(end, length).astype(np.int32)


@functools.partial(jax.jit, static_argnames="soft_cap")
def dense(
    start: jax.Array, end: jax.Array, *given: jax.Array, soft_cap: float | None = None
) -> tuple[jax.Array, ...]:
    """Value and gradients on one device, tokens in the row's order."""
    *qkv, gradient = given
    mixed, pull = jax.vjp(lambda *qkv: attend(*qkv, Interval(start, end), soft_cap=soft_cap).mixed, *qkv)
    return mixed, *pull(gradient)


def sharded(layout: Layout, order: TokenOrder, scheme: str, soft_cap: float | None = None) -> Any:
    """The same over sequence ranks; takes and gives arrays in the row's order."""

    @jax.jit
    def run(start: jax.Array, end: jax.Array, *given: jax.Array) -> tuple[jax.Array, ...]:
        start, end, *placed = (order.permute(x, 1) for x in (start, end, *given))
        *qkv, gradient = placed
        with layout.activate():
            mixed, pull = jax.vjp(
                lambda *qkv: sequence_attention(
                    *qkv, Interval(start, end), order, scheme=scheme, soft_cap=soft_cap
                ),
                *qkv,
            )
            return tuple(order.unpermute(x, 1) for x in (mixed, *pull(gradient)))

    return run


@functools.cache
def case(number: int) -> Any:
    scheme, mesh, kind, _ = CASES[number]
    layout = make_layout(mesh)
    ranks = mesh.get("ring", 1) * mesh.get("ulysses", 1)
    return sharded(layout, TokenOrder(kind, ranks, tile=4), scheme, 3.0 if number == 0 else None)


def test_all_schemes_and_orders_are_among_the_cases() -> None:
    assert {case[0] for case in CASES} == set(SCHEMES)
    assert {case[2] for case in CASES} == {"contiguous", "zigzag", "block_striped"}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_value_and_gradients_equal_the_dense_form(number: int, mask: str) -> None:
    given_ = (*intervals(mask), *arrays(kv_heads=CASES[number][3]))
    expected = dense(*given_, soft_cap=3.0 if number == 0 else None)
    assert_trees_close(case(number)(*given_), expected, rtol=1e-5, atol=4e-6)


@given(seed=st.integers(0, 2**32 - 1), texts=st.integers(1, 12), window=st.integers(1, S))
@settings(max_examples=25)
def test_any_packing_equals_the_dense_form(seed: int, texts: int, window: int) -> None:
    rng = np.random.default_rng(seed)
    start, end = np.zeros((2, B, S), np.int32)
    for row in range(B):
        edges = np.sort(rng.choice(S + 1, texts + 1, replace=False))
        for first, last in itertools.pairwise(edges):
            index = np.arange(first, last)
            start[row, first:last] = np.maximum(first, index + 1 - window)
            # Some tokens see the end of their text, as those of a picture do.
            end[row, first:last] = np.where(rng.random(last - first) < 0.2, last, index + 1)
    given_ = (start, end, *arrays(kv_heads=4, seed=seed))
    number = next(n for n, (scheme, *_, heads) in enumerate(CASES) if (scheme, heads) == ("ulysses_ring", 4))
    assert_trees_close(case(number)(*given_), dense(*given_), rtol=1e-5, atol=4e-6)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, dict[str, int], int, int, int]:
    """A scheme, a mesh of four sequence ranks, heads, heads of keys and values, and a length that all fit."""
    scheme = draw(st.sampled_from(SCHEMES))
    ulysses = draw(st.sampled_from((1, 2, 4)))
    kv_heads = draw(st.sampled_from((1, 2, 3, 4)))
    shared = draw(st.integers(1, 3))
    traded = {"ulysses": 4, "gather": 1, "ring": 1}.get(scheme, ulysses)
    heads = int(np.lcm(kv_heads, traded)) * shared
    length = 4 * draw(st.integers(2, 20))
    return scheme, {"ring": 4 // ulysses, "ulysses": ulysses}, heads, kv_heads, length


@given(shapes(), st.sampled_from(MASKS))
@settings(max_examples=4)
def test_any_lengths_and_heads_equal_the_dense_form(
    shape: tuple[str, dict[str, int], int, int, int], mask: str
) -> None:
    scheme, mesh, heads, kv_heads, length = shape
    run = sharded(layout_of(4, **mesh), fitting_order(length, 4, tile=4), scheme)
    start, end = (x[:, :length] for x in intervals(mask, max(length, S)))
    given_ = (start, np.minimum(end, length), *arrays(heads, kv_heads, length))
    assert_trees_close(run(*given_), dense(*given_), rtol=1e-5, atol=4e-6)


def test_one_interval_may_serve_all_rows() -> None:
    start, end = (x[:1] for x in intervals("causal"))
    given_ = arrays()
    assert_trees_close(case(0)(start, end, *given_), dense(start, end, *given_, soft_cap=3.0), atol=4e-6)


def compiled(scheme: str) -> str:
    """The optimised program of forward and backward on a ring of four and an exchange between two."""
    layout = make_layout({"ring": 4, "ulysses": 2})
    order = TokenOrder("block_striped", 8, tile=4)
    rows = jax.ShapeDtypeStruct((B, S), jnp.int32)
    given_ = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(kv_heads=4)]

    def run(start: jax.Array, end: jax.Array, *given: jax.Array) -> tuple[jax.Array, ...]:
        *qkv, gradient = given
        with layout.activate():
            attention = functools.partial(
                sequence_attention, interval=Interval(start, end), order=order, scheme=scheme
            )
            mixed, pull = jax.vjp(attention, *qkv)
            return mixed, *pull(gradient)

    tokens = layout.sharding("batch", "sequence")
    program = jax.jit(run, in_shardings=(tokens,) * 6, out_shardings=(tokens,) * 4)
    return program.lower(rows, rows, *given_).compile().as_text()


@pytest.mark.parametrize(
    ("scheme", "moved"),
    [
        ("gather", {"all-gather", "reduce-scatter", "collective-permute"}),  # two ranks swap halves
        ("ring", {"collective-permute"}),
        ("ulysses_ring", {"all-to-all", "all-gather", "collective-permute"}),  # intervals are gathered
    ],
)
def test_only_the_schemes_own_collectives_are_in_the_program(scheme: str, moved: set[str]) -> None:
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    assert set(re.findall(rf"= \S.*? ({kinds})(?:-start)?\(", compiled(scheme))) == moved


@pytest.mark.parametrize(("saved", "exchanges"), [((), 3), (("exchanged",), 0)], ids=str)
def test_what_was_exchanged_is_exchanged_again_unless_it_is_saved(
    saved: tuple[str, ...], exchanges: int
) -> None:
    layout = make_layout({"ring": 4, "ulysses": 2})
    order = TokenOrder("block_striped", 8, tile=4)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse", *saved)

    def loss(*qkv: jax.Array) -> jax.Array:
        interval = Interval(*(jnp.asarray(x) for x in intervals("causal")))
        attention = functools.partial(
            sequence_attention, interval=interval, order=order, scheme="ulysses_ring"
        )
        return jnp.sum(jax.checkpoint(attention, policy=policy)(*qkv))

    with layout.activate():
        program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays(kv_heads=4)[:3]))
    # There: queries, keys, values, and mixed values back.  Then mixed values and their gradient, and three gradients.
    assert program.count("all_to_all[") == 4 + 5 + exchanges


def refused(scheme: str = "gather", order: TokenOrder | None = None, **changes: Any) -> str:
    layout = make_layout({"ring": 2, "ulysses": 2, "tensor": 2})
    query, key, value, _ = arrays(**changes)
    interval = Interval(*(jnp.asarray(x) for x in intervals("causal", query.shape[1])))
    with layout.activate(), pytest.raises(UserError) as caught:
        sequence_attention(
            query, key, value, interval, order or TokenOrder("block_striped", 4, 4), scheme=scheme
        )
    return str(caught.value)


def test_what_does_not_fit_is_told_in_one_sentence() -> None:
    assert "100 tokens" in refused(length=100)
    assert "that work are 96 or 112" in refused(length=100)
    assert "6 attention heads cannot be dealt out over tensor=2 x ulysses=4" in refused("ulysses", heads=6)
    assert "numbers of heads that work are 8." in refused("ulysses", heads=6)
    assert "'rings'; there are 'gather'" in refused("rings")
    assert "order is for 8 sequence ranks, but the mesh has ring x ulysses = 4" in refused(
        order=TokenOrder("zigzag", 8)
    )
    query, key, value, _ = arrays()
    with pytest.raises(UserError, match="ring x ulysses = 1"):
        sequence_attention(query, key, value, Interval(*intervals("causal")), TokenOrder("zigzag", 4))


@pytest.mark.parametrize("heads", [(8, 3, 1, 4), (8, 3, 4, 1), (12, 8, 1, 3)])
def test_heads_of_keys_that_cannot_be_dealt_out_are_refused(heads: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match=f"{heads[1]} heads of keys and values, for {heads[0]} of queries"):
        checked_heads(*heads)


def test_more_tensor_ranks_than_heads_of_keys_share_them() -> None:
    layout = make_layout({"tensor": 4, "ring": 2}, rules={"kv_heads": ()})
    given_ = (*intervals("packed"), *arrays(kv_heads=2))
    run = sharded(layout, TokenOrder("block_striped", 2, 4), "ring")
    assert_trees_close(run(*given_), dense(*given_), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [({"fsdp": 2, "ring": 2, "ulysses": 2}, {}), ({"tensor": 4, "ring": 2}, {"kv_heads": ()})],
    ids=["each rank has all heads", "two tensor ranks share a head of keys"],
)
def test_a_sharded_cache_decodes_as_a_whole_one(sizes: dict[str, int], rules: Any) -> None:
    layout = make_layout(sizes, rules)
    order = TokenOrder("block_striped", sequence_ranks(layout), 4)
    rng = np.random.default_rng(3)
    prompt, token = (rng.normal(size=(B, n, 2, D)).astype(np.float32) for n in (32, 1))
    query = rng.normal(size=(B, 1, H, D)).astype(np.float32)
    slots = 48

    @jax.jit
    def decode(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        with layout.activate():
            cache = write_prompt(jnp.zeros((B, slots, 2, D)), order.permute(prompt, 1), order)
            cache = write_token(cache, token, slot, order)
            seen = Interval(jnp.full((1, 1), 3), jnp.full((1, 1), slot + 1))
            return cache, decode_attention(query, cache, 2 * cache, seen, order)

    for slot in (32, 35, 45):
        cache, mixed = decode(jnp.int32(slot))
        whole = np.zeros((B, slots, 2, D), np.float32)
        whole[:, :32], whole[:, slot : slot + 1] = prompt, token
        np.testing.assert_array_equal(order.unpermute(cache, 1), whole)
        seen = Interval(jnp.full((1, 1), 3), jnp.full((1, 1), slot + 1))
        expected = attend(query, whole, 2 * whole, seen).mixed
        np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def test_a_sharded_cache_refuses_heads_that_cannot_be_dealt_out() -> None:
    query, cache = jnp.zeros((B, 1, 6, D)), jnp.zeros((B, 32, 2, D))
    with (
        make_layout({"tensor": 4, "ring": 2}).activate(),
        pytest.raises(UserError, match="6 attention heads cannot be dealt out over tensor=4"),
    ):
        seen = Interval(*intervals("causal", 1))
        decode_attention(query, cache, cache, seen, TokenOrder("block_striped", 2, 4))


def test_a_sharded_cache_takes_prompts_that_fit() -> None:
    layout = make_layout({"ring": 4, "fsdp": 2})
    cache = jnp.zeros((B, 32, 2, D))
    with layout.activate():
        with pytest.raises(UserError, match="'block_striped', not 'zigzag'"):
            write_prompt(cache, cache, TokenOrder("zigzag", 4))
        with pytest.raises(UserError, match="32 slots, but the prompt 48 tokens"):
            write_prompt(cache, jnp.zeros((B, 48, 2, D)), TokenOrder("block_striped", 4, 4))
        with pytest.raises(UserError, match="order is for 2"):
            write_token(cache, cache[:, :1], jnp.int32(0), TokenOrder("block_striped", 2, 4))
