"""Model FLOPs: every product once, and once more for each operand that a gradient flows to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vlpjax.planning.flops import Flops, count

X = jnp.ones((8, 4))
W = jnp.ones((4, 4))
ONE = 2 * 8 * 4 * 4  # a product of the two


def of(function: Any, *learns: bool) -> Flops:
    return count(lambda *arguments: jnp.sum(function(*arguments)), (X, W, W)[: len(learns)], learns)


def test_a_layer_counts_three_times_and_the_first_one_twice() -> None:
    assert of(lambda x, w: x @ w, False, True) == Flops(products=2 * ONE, forward=ONE)
    assert of(lambda x, v, w: x @ v @ w, False, True, True) == Flops(products=5 * ONE, forward=2 * ONE)


def test_frozen_layers_count_as_far_as_gradients_pass_through_them() -> None:
    assert of(lambda x, v, w: x @ v @ w, False, True, False).products == (2 + 2) * ONE
    assert of(lambda x, v, w: x @ v @ w, False, False, True).products == (1 + 2) * ONE
    assert of(lambda x, w: x @ w, False, False).products == ONE


def test_what_stands_before_a_stopped_gradient_counts_once() -> None:
    assert of(lambda x, w: jax.lax.stop_gradient(x @ w), False, True).products == ONE
    assert of(lambda x, v, w: jax.lax.stop_gradient(x @ v) @ w, False, True, True).products == (1 + 2) * ONE
    assert of(lambda x, w: jnp.argmax(x @ w, axis=1), False, True).products == ONE  # whole numbers carry none


@pytest.mark.parametrize("remat", [False, True])
def test_scans_multiply_and_what_is_computed_again_does_not_count(remat: bool) -> None:
    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(body, x, jnp.stack([w] * 5))[0]

    # Five layers, all counted alike: the carry of the first is data, that of the others is not.
    assert of(scanned, False, True) == Flops(products=3 * 5 * ONE, forward=5 * ONE)


def test_what_every_device_does_with_its_part_counts_for_all() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    parts = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert of(parts, False, True) == Flops(products=2 * ONE, forward=ONE)


def test_the_rule_agrees_with_what_autodiff_computes() -> None:
    def loss(x: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.relu(x @ v) @ w)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(1, 2))).lower(X, W, W).as_text()
    assert gradient.count("dot_general") * ONE == count(loss, (X, W, W), (False, True, True)).products


def test_attention_is_told_by_its_batch_of_heads_and_masks_leave_a_share_of_it() -> None:
    def attend(q: jax.Array, w: jax.Array) -> jax.Array:
        heads = (q @ w).reshape(1, 2, 4, 4)
        return jnp.einsum(
            "bhqk,bhkd->bhqd", jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", heads, heads)), heads
        )

    found = of(attend, False, True)
    pairs = 2 * 2 * 4 * 4 * 4
    assert found == Flops(products=2 * ONE, attention=3 * 2 * pairs, forward=ONE + 2 * pairs)
    assert found.total(0.5) == 2 * ONE + 3 * pairs


def test_convolutions_count_their_windows() -> None:
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 16))

    def patches(image: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(
            jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=numbers)
        )

    assert count(patches, (image, kernel), (False, True)).products == 2 * 2 * (2 * 2 * 2 * 16) * (4 * 4 * 3)


def test_loops_of_unknown_length_are_told() -> None:
    def search(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ w, x)

    assert of(search, False, False) == Flops(products=ONE, forward=ONE, endless=1)
