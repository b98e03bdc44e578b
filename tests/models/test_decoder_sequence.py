"""A decoder whose tokens lie over sequence ranks: loss and all gradients are those on one device, on any mesh."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import assert_trees_close
from vlpjax.errors import UserError
from vlpjax.mesh import Layout, make_layout
from vlpjax.models.decoder import Decoder, prefix_causal
from vlpjax.models.vocabulary_loss import vocabulary_loss
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import active_order, lay_out, sequence_ranks

B, T, V = 4, 64, 32
FIELDS: dict[str, Any] = dict(
    vocabulary=V, width=32, depth=2, heads=8, kv_heads=4, mlp_dim=32, pattern=("local", "global"), window=11,
    scan=True,
)  # fmt: skip

# One line per mesh: its sizes, the order of tokens, the scheme, rematerialisation.
MESHES = [
    ({"ring": 8}, "block_striped", "ring", "none"),
    ({"replica": 2, "fsdp": 2, "ulysses": 2}, "zigzag", "ulysses", "none"),
    ({"fsdp": 2, "ring": 2, "ulysses": 2}, "block_striped", "ulysses_ring", "full"),
    ({"ulysses": 4, "tensor": 2}, "block_striped", "auto", "none"),
    ({"replica": 2, "ring": 2, "tensor": 2}, "zigzag", "gather", "none"),
    ({"ring": 2, "ulysses": 2, "tensor": 2}, "contiguous", "ulysses_gather", "none"),
]


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Packed texts; labels and weights as the row's own order gives them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (B, T)).astype(np.int32)
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        edges = np.sort(rng.choice(np.arange(1, T), 4, replace=False))
        segments[row, : edges[-1]] = 1 + np.searchsorted(edges[:-1], np.arange(edges[-1]), side="right")
    labels = np.roll(ids, -1, axis=1)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = np.pad(same, ((0, 0), (0, 1))).astype(np.float32)
    return {"ids": ids, "segment_ids": segments, "labels": labels, "weights": weights}


@functools.cache
def parameters() -> Any:
    """Boxed parameters, made without a mesh."""
    ids = jnp.zeros((B, T), jnp.int32)
    return jax.jit(Decoder(**FIELDS).init)(jax.random.key(0), ids)["params"]


def loss(decoder: Decoder, params: Any, batch: Any, order: TokenOrder | None, **options: Any) -> jax.Array:
    """Next-token loss; integers take their places before they are embedded."""
    if order is not None:
        batch = dict(zip(batch, lay_out(order, *batch.values()), strict=True))
    found = decoder.apply(
        {"params": params},
        batch["ids"],
        segment_ids=batch["segment_ids"],
        order=order,
        logits=False,
        **options,
    )
    kernel = params["token_embedding"]["embedding"].T
    return vocabulary_loss(found["tokens"], kernel, batch["labels"], batch["weights"])[0]


@functools.cache
def on_one_device() -> Any:
    run = jax.jit(jax.value_and_grad(functools.partial(loss, Decoder(**FIELDS)), argnums=0), static_argnums=2)
    return jax.device_get(run(nn.meta.unbox(parameters()), batch(), None))


def on_mesh(layout: Layout, order: TokenOrder, **fields: str) -> Any:
    shardings = layout.shard_parameters(parameters())
    decoder = Decoder(**FIELDS, **fields)

    def run(params: Any, batch: Any) -> Any:
        with layout.activate():
            return jax.value_and_grad(functools.partial(loss, decoder))(params, batch, order)

    tokens = layout.sharding("batch")
    step = jax.jit(run, in_shardings=(shardings, tokens), out_shardings=(layout.replicated, shardings))
    return step(nn.meta.unbox(parameters()), batch())


@pytest.mark.parametrize(
    ("sizes", "kind", "scheme", "remat"), MESHES, ids=["-".join([*sizes, *rest]) for sizes, *rest in MESHES]
)
def test_loss_and_gradients_are_those_on_one_device(
    sizes: dict[str, int], kind: str, scheme: str, remat: str
) -> None:
    layout = make_layout(sizes)
    order = TokenOrder(kind, sequence_ranks(layout), tile=4)
    ours = on_mesh(layout, order, sequence_scheme=scheme, remat=remat)
    assert_trees_close(ours, on_one_device(), rtol=1e-5, atol=2e-7)


@pytest.mark.usefixtures("compiled_anew")
def test_nothing_is_held_whole_that_need_not_be(capfd: pytest.CaptureFixture[str]) -> None:
    """Blocks that are computed again, tokens over three axes: where the compiler was at a loss before."""
    layout = make_layout({"fsdp": 2, "ring": 2, "ulysses": 2})
    capfd.readouterr()
    on_mesh(layout, TokenOrder("block_striped", 4, tile=4), sequence_scheme="ulysses_ring", remat="full")
    assert "full rematerialization" not in capfd.readouterr().err
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] in "01"  # or the compiler would not say so


def test_without_an_order_tokens_lie_in_the_rows_own() -> None:
    # Callers that know nothing of sequence ranks get the same numbers.
    layout = make_layout({"fsdp": 2, "ring": 2, "ulysses": 2})

    def run(params: Any, batch: Any) -> jax.Array:
        with layout.activate():
            return loss(Decoder(**FIELDS), params, batch, None)

    ours = jax.jit(run)(nn.meta.unbox(parameters()), batch())
    np.testing.assert_allclose(ours, on_one_device()[0], rtol=1e-5)


def test_what_is_given_in_an_order_comes_out_in_it_with_or_without_a_mesh() -> None:
    # Masks that are no interval, and attention weights, take the dense form: queries in order, keys in the row's own.
    order = TokenOrder("block_striped", 4, tile=4)
    decoder, params = Decoder(**FIELDS), nn.meta.unbox(parameters())
    ids = jnp.asarray(batch()["ids"])
    interval = prefix_causal(jnp.array([3, 9, 20, 1]), T)

    @jax.jit
    def both() -> tuple[Any, Any]:
        own = decoder.apply({"params": params}, ids, interval=interval, attention=[-1], hidden=[0])
        placed = Interval(*(order.permute(x, 1) for x in interval))
        given = decoder.apply(
            {"params": params},
            order.permute(ids, 1),
            interval=placed,
            order=order,
            attention=[-1],
            hidden=[0],
        )
        return own, given

    own, given = both()
    for name, axis in (("tokens", 1), ("logits", 1), ("hidden", 1), ("attention", 2)):
        place = functools.partial(order.permute, axis=axis)
        assert_trees_close(given[name], jax.tree.map(place, own[name]), rtol=1e-5, atol=1e-6)


def test_the_active_layout_says_which_order_rows_take() -> None:
    assert active_order(T) is None
    with make_layout({"fsdp": 2, "ring": 4}).activate():
        assert active_order(T) == TokenOrder("block_striped", 4, tile=16)
        with pytest.raises(UserError, match="30 tokens cannot be split"):
            active_order(30)
    with make_layout({"fsdp": 8}).activate():
        assert active_order(30) is None


def test_prompts_and_tokens_are_read_into_a_cache_that_lies_over_the_ranks() -> None:
    layout = make_layout({"fsdp": 2, "ring": 2, "ulysses": 2})
    order = TokenOrder("block_striped", 4, tile=4)
    decoder, params = Decoder(**FIELDS, sequence_scheme="ring"), nn.meta.unbox(parameters())
    ids = jnp.asarray(batch()["ids"])

    @jax.jit
    def in_parts() -> list[jax.Array]:
        with layout.activate():
            prompt, cache = order.permute(ids[:, :32], 1), decoder.init_cache(B, 48)
            found = decoder.apply({"params": params}, prompt, cache=cache, order=order)
            parts = [order.unpermute(found["logits"], 1)]
            for slot in (32, 33):
                found = decoder.apply(
                    {"params": params}, ids[:, slot : slot + 1], cache=found["cache"], start=slot, order=order
                )
                parts.append(found["logits"])
            return parts

    whole = jax.jit(decoder.apply)({"params": params}, ids[:, :34])["logits"]
    np.testing.assert_allclose(jnp.concatenate(in_parts(), axis=1), whole, rtol=1e-4, atol=1e-5)


def test_a_cache_over_the_ranks_takes_what_it_can() -> None:
    order, decoder = TokenOrder("block_striped", 4, tile=4), Decoder(**FIELDS)
    variables = {"params": nn.meta.unbox(parameters())}
    ids, cache = jnp.asarray(batch()["ids"])[:, :16], decoder.init_cache(B, 48)
    with make_layout({"fsdp": 2, "ring": 4}).activate():
        with pytest.raises(UserError, match="from slot 0 on"):
            decoder.apply(variables, ids, cache=cache, start=16, order=order)
        with pytest.raises(UserError, match="takes an interval, no mask"):
            mask = jnp.ones((B, 16, 48), bool)
            decoder.apply(variables, ids, cache=cache, mask=mask, order=order)
