"""Copies of kernels and tables on every device: values, gradients, and what is summed where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import layout_of
from vlpjax.mesh import constrain, make_layout
from vlpjax.parallel.copies import Devices, look_up
from vlpjax.parallel.gathering import rings, stages

V, D, B, T = 16, 8, 8, 8
OVER = ("batch", "sequence")
MESHES: list[dict[str, int]] = [
    {"fsdp": 8},
    {"fsdp": 2, "ring": 4},
    {"replica": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "ring": 2, "ulysses": 2},
    {"replica": 8},
]
RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(D, V)).astype(np.float32)
TOKENS = RANDOM.normal(size=(B, T, D)).astype(np.float32)
IDS = RANDOM.integers(0, V, (B, T)).astype(np.int32)


@pytest.fixture(params=[False, True], ids=["in one stage", "in two stages"])
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Has lines of eight devices be a torus of three dimensions, which sums in two stages."""
    if request.param:
        monkeypatch.setattr("vlpjax.parallel.gathering._ring", lambda line: 2 if len(line) == 8 else None)
    rings.cache_clear()
    yield request.param
    rings.cache_clear()


def loss_of_kernel(kernel: jax.Array, tokens: jax.Array) -> jax.Array:
    """Two products with one kernel, as two chunks of tokens have."""
    devices = Devices.of(tokens.shape, *OVER)
    copies = devices.copies(kernel, ("embed", "vocabulary"))
    own = devices.split(tokens)
    first, second = (jnp.einsum("mnbtd,mndv->mnbtv", x, copies) for x in (own, own / 2))
    return jnp.sum(jnp.square(devices.join(first))) + jnp.sum(jnp.square(second))


def loss_of_table(kernel: jax.Array, ids: jax.Array) -> jax.Array:
    rows = constrain(look_up(kernel.T, ids, *OVER), *OVER, None)
    return jnp.sum(jnp.sin(rows) * (1 + jnp.arange(T)[:, None]))


def plain_loss_of_table(kernel: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(kernel.T[ids]) * (1 + jnp.arange(T)[:, None]))


def plain_loss_of_kernel(kernel: jax.Array, tokens: jax.Array) -> jax.Array:
    return sum(jnp.sum(jnp.square(x @ kernel)) for x in (tokens, tokens / 2))


@pytest.mark.parametrize("use", ["kernel", "table"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.usefixtures("compiled_anew")
def test_gradients_of_copies_are_summed_up_into_pieces_and_nowhere_whole(
    sizes: dict[str, int], staged: bool, use: str, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = layout_of(8, **sizes)
    ours, theirs, x = {
        "kernel": (loss_of_kernel, plain_loss_of_kernel, TOKENS),
        "table": (loss_of_table, plain_loss_of_table, IDS),
    }[use]
    expected = jax.value_and_grad(theirs)(KERNEL, x)
    lies = layout.sharding("embed", "vocabulary")
    capfd.readouterr()
    with layout.activate():
        step: Any = jax.jit(
            jax.value_and_grad(ours),
            in_shardings=(lies, layout.sharding("batch")),
            out_shardings=(layout.replicated, lies),
        ).lower(KERNEL, x)
        step = step.compile()
    assert "full rematerialization" not in capfd.readouterr().err
    found = step(*jax.device_put((KERNEL, x), (lies, layout.sharding("batch"))))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
    text = step.as_text()
    scattered = [place.spec for place in stages(layout, ("embed", "vocabulary"))]
    assert len(re.findall(r" reduce-scatter(?:-start)?\(", text)) == len(set(scattered)) - 1
    if "fsdp" in sizes:
        whole = rf"= f32\[{D},\d+\]\S* all-reduce"
        assert not re.search(whole, text)


@pytest.mark.parametrize(
    ("sizes", "count", "exchanged"),
    [
        ({"fsdp": 8}, 8, True),
        ({"fsdp": 4, "expert": 2}, 8, True),
        ({"fsdp": 8}, 264, False),  # more rows per device than the table has
        ({"fsdp": 4, "ring": 2}, 8, False),  # the compiler finds no exchange
        ({"replica": 2, "fsdp": 4}, 8, False),
    ],
    ids=str,
)
def test_rows_are_exchanged_where_that_is_less_than_the_table(
    sizes: dict[str, int], count: int, exchanged: bool
) -> None:
    layout = make_layout(sizes)
    table = RANDOM.normal(size=(256, 256)).astype(np.float32)
    ids = RANDOM.integers(0, 256, (8, count)).astype(np.int32)

    def total(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(constrain(look_up(table, ids, *OVER), *OVER, None)))

    expected = jax.value_and_grad(lambda table: jnp.sum(jnp.sin(table[ids])))(table)
    places = (layout.sharding("vocabulary", "embed"), layout.sharding("batch"))
    with layout.activate():
        step = jax.jit(
            jax.value_and_grad(total), in_shardings=places, out_shardings=(layout.replicated, places[0])
        ).lower(table, ids)
        run = step.compile()
    found = run(*jax.device_put((table, ids), places))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-4)
    text = run.as_text()
    assert ("all-to-all" in text) == exchanged
    assert bool(re.search(r"= f32\[256,256\]\S* all-gather", text)) != exchanged


def test_what_devices_do_not_divide_is_not_dealt_out() -> None:
    expected = KERNEL.T[IDS[:, :7]]
    with make_layout({"fsdp": 2, "ring": 4}).activate():
        devices = Devices.of((B, 7), *OVER)
        assert devices == Devices(OVER, (1, 1))
        np.testing.assert_array_equal(
            jax.jit(look_up, static_argnums=(2, 3))(KERNEL.T, IDS[:, :7], *OVER), expected
        )
    np.testing.assert_array_equal(look_up(KERNEL.T, IDS[:, :7], *OVER), expected)


def test_rules_that_shard_parameters_elsewhere_than_tokens_are_followed() -> None:
    layout = make_layout({"fsdp": 4, "tensor": 2}, {"embed": ("tensor",), "vocabulary": ()})
    expected = jax.value_and_grad(plain_loss_of_kernel)(KERNEL, TOKENS)
    with layout.activate():
        found = jax.jit(jax.value_and_grad(loss_of_kernel))(KERNEL, TOKENS)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)


def test_splitting_and_joining_are_inverse() -> None:
    with make_layout({"fsdp": 2, "ring": 2, "ulysses": 2}).activate():
        devices = Devices.of(TOKENS.shape, *OVER)
        split = devices.split(jnp.asarray(TOKENS))
        assert split.shape == (2, 4, B // 2, T // 4, D)
        np.testing.assert_array_equal(split[1, 2], TOKENS[4:, 4:6])
        np.testing.assert_array_equal(devices.join(split), TOKENS)
