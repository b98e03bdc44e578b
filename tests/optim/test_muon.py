"""Muon: matrices move along orthogonal directions, whatever their shape; everything else moves as Adam would."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlpjax.errors import UserError
from vlpjax.optim.muon import muon

RNG = np.random.default_rng(0)
SHAPES = {
    "image": {
        "block_0": {
            "attention": {"query": {"kernel": (16, 4, 8), "bias": (4, 8)}, "out": {"kernel": (4, 8, 16)}},
            "mlp": {"up": {"kernel": (16, 64)}},
        },
        "position_embedding": (9, 16),
    }
}
PARAMS = jax.tree.map(lambda shape: jnp.zeros(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
GRADS = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), PARAMS)


def update(**settings: float) -> dict:
    direction = muon(**settings)
    updates, _ = direction.update(GRADS, direction.init(PARAMS), PARAMS)
    return updates["image"]


@pytest.mark.parametrize(("path", "rows", "columns"), [("query", 16, 32), ("out", 32, 16), ("up", 16, 64)])
def test_matrices_move_equally_far_in_all_directions(path: str, rows: int, columns: int) -> None:
    block = update(rate=10.0)["block_0"]
    kernel = (block["mlp"] if path == "up" else block["attention"])[path]["kernel"]
    lengths = np.linalg.svd(np.asarray(kernel).reshape(rows, columns), compute_uv=False)
    expected = 10.0 * math.sqrt(max(1.0, columns / rows))
    # Five Newton-Schulz steps with Muon's coefficients leave singular values between about 0.7 and 1.2.
    assert 0.6 * expected < lengths.min()
    assert lengths.max() < 1.3 * expected


def test_scanned_layers_move_as_unrolled_ones() -> None:
    kernels = jnp.asarray(RNG.normal(size=(3, 16, 4, 8)), jnp.float32)
    direction = muon()
    scanned = {"image": {"blocks": {"query": {"kernel": kernels}}}}
    unrolled = {"image": {f"block_{i}": {"query": {"kernel": kernel}} for i, kernel in enumerate(kernels)}}
    (one, _), (each, _) = (direction.update(tree, direction.init(tree), tree) for tree in (scanned, unrolled))
    stacked = jnp.stack([each["image"][f"block_{i}"]["query"]["kernel"] for i in range(3)])
    np.testing.assert_allclose(one["image"]["blocks"]["query"]["kernel"], stacked, rtol=1e-4, atol=1e-4)


def test_convolutions_and_projections_are_matrices_too_but_not_the_first_convolution() -> None:
    shapes = {"convolution_0": (3, 3, 3, 8), "convolution_1": (3, 3, 8, 16)}
    grads = {
        name: {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32)} for name, shape in shapes.items()
    }
    tree = {"image": grads}
    updates, _ = muon(rate=10.0).update(tree, muon().init(tree), tree)
    first, second = (updates["image"][name]["kernel"] for name in shapes)
    np.testing.assert_allclose(np.abs(first), 1.0, rtol=1e-4)  # Adam's first step: the sign
    lengths = np.linalg.svd(np.asarray(second).reshape(72, 16), compute_uv=False)
    assert 6 < lengths.min() < lengths.max() < 13


def test_everything_else_moves_as_with_adam() -> None:
    adam = optax.scale_by_adam(0.9, 0.98, 1e-8)
    expected, _ = adam.update(GRADS, adam.init(PARAMS))
    for leaf in (
        lambda tree: tree["position_embedding"],
        lambda tree: tree["block_0"]["attention"]["query"]["bias"],
    ):
        np.testing.assert_allclose(leaf(update()), leaf(expected["image"]), rtol=1e-6)


def test_momentum_has_the_shape_of_its_parameter() -> None:
    """So that it is sharded like it."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(muon().init(PARAMS))}
    assert {leaf.shape for leaf in jax.tree.leaves(PARAMS)} <= shapes


def test_a_kernel_that_is_no_matrix_is_told() -> None:
    direction = muon(matrices=((r".*/bias", 2), (r".*", 0)))
    with pytest.raises(UserError, match=r"query/bias .* 2 input dimensions"):
        direction.init(PARAMS)
