"""EfficientNet-lite: its sizes, its padding, and its behaviour in training and in evaluation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.models.efficientnet import (
    SIZES,
    TOP,
    EfficientNetLite,
    InvertedResidual,
    depthwise,
    grouped_depthwise,
    scaled_channels,
    scaled_stages,
    shifted_depthwise,
)

RNG = np.random.default_rng(0)


def shapes(model: EfficientNetLite, side: int = 64) -> dict:
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize(("size", "millions"), [(0, 4.7), (1, 5.4), (2, 6.1), (3, 8.2), (4, 13.0)])
def test_parameters_are_as_many_as_published(size, millions):
    width, depth, _ = SIZES[size]
    params = shapes(EfficientNetLite(width, depth, classes=1000))["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 1) == pytest.approx(millions, abs=0.051)


def test_the_first_and_the_last_stage_do_not_become_deeper():
    counts = [stage[0] for stage in scaled_stages(1.0, 1.8)]
    assert counts == [1, 4, 4, 6, 6, 8, 1]
    assert [stage[4] for stage in scaled_stages(1.4, 1.0)] == [24, 32, 56, 112, 160, 272, 448]


def test_rounded_channels_lose_no_more_than_a_tenth():
    for channels in (16, 24, 40, 80):
        for factor in (0.35, 1.1, 1.2, 1.4):
            scaled = scaled_channels(channels, factor)
            assert scaled % 8 == 0 and scaled >= 0.9 * channels * factor


@pytest.mark.parametrize(
    ("side", "stride", "size"), [(3, 1, (6, 5)), (3, 2, (6, 7)), (5, 2, (7, 8)), (5, 1, (2, 3))]
)
def test_both_forms_of_a_depthwise_convolution_are_equal(side, stride, size):
    grid = jnp.asarray(RNG.normal(size=(2, *size, 4)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(side, side, 4)), jnp.float32)

    def both(form):
        out, pull = jax.vjp(lambda g, k: form(g, k, stride), grid, kernel)
        return out, pull(jnp.sin(out))

    found, expected, chosen = jax.jit(
        lambda: tuple(map(both, (shifted_depthwise, grouped_depthwise, depthwise)))
    )()
    assert expected[0].shape == (2, -(-size[0] // stride), -(-size[1] // stride), 4)
    for left, right, third in zip(*map(jax.tree.leaves, (found, expected, chosen)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(third, right, rtol=1e-5, atol=2e-5)


def test_outputs():
    model = EfficientNetLite(embedding=12, classes=7, dropout=0.5)
    images = jax.ShapeDtypeStruct((2, 70, 40, 3), jnp.float32)
    found, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)
    assert found["tokens"].shape == (2, 3 * 2, TOP)  # a 32nd of each side, rounded up
    assert found["pooled"].shape == (2, TOP)
    assert found["embedding"].shape == (2, 12)
    assert found["logits"].shape == (2, 7)
    assert set(variables) == {"params", "batch_stats"}
    plain = jax.eval_shape(lambda x: EfficientNetLite().init_with_output(jax.random.key(0), x)[0], images)
    assert plain["embedding"].shape == (2, TOP) and "logits" not in plain


@pytest.fixture(scope="module")
def residual():
    block = InvertedResidual(features=8, expand=3, side=3, stride=1, drop_path=0.5)
    grid = jnp.asarray(RNG.normal(size=(16, 5, 5, 8)), jnp.float32)
    return block, grid, nn.meta.unbox(block.init(jax.random.key(0), grid))


def test_statistics_move_in_training_only(residual):
    block, grid, variables = residual
    _, still = block.apply(variables, grid, mutable=["batch_stats"])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, still["batch_stats"], variables["batch_stats"]))
    rngs = {"dropout": jax.random.key(1)}
    _, moved = block.apply(variables, grid, train=True, mutable=["batch_stats"], rngs=rngs)
    old, new = (stats["expand"]["norm"]["mean"] for stats in (variables["batch_stats"], moved["batch_stats"]))
    wide = jnp.einsum("bhwi,io->bhwo", grid, variables["params"]["expand"]["kernel"])
    np.testing.assert_allclose(new, 0.99 * old + 0.01 * wide.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_stochastic_depth_drops_the_branch_of_whole_examples(residual):
    block, grid, variables = residual
    rngs = {"dropout": jax.random.key(1)}
    out, _ = block.apply(variables, grid, train=True, mutable=["batch_stats"], rngs=rngs)
    dropped = np.array([bool(jnp.array_equal(a, b)) for a, b in zip(out, grid, strict=True)])
    assert 0 < dropped.sum() < len(dropped)


def test_a_block_that_changes_the_shape_has_no_shortcut():
    grid = jnp.zeros((1, 6, 6, 8))
    for fields in (dict(features=8, stride=2), dict(features=9, stride=1)):
        block = InvertedResidual(expand=1, side=3, **fields)
        variables = jax.eval_shape(block.init, jax.random.key(0), grid)
        assert "expand" not in variables["params"]
    ones = jnp.ones((1, 4, 4, 8))
    block = InvertedResidual(features=9, expand=1, side=3, stride=1)
    variables = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(0), ones))
    np.testing.assert_array_equal(block.apply(variables, ones), 0)
    block = InvertedResidual(features=8, expand=1, side=3, stride=1)
    variables = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(0), ones))
    np.testing.assert_array_equal(block.apply(variables, ones), 1)
