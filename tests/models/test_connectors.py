"""Connectors against their formulas, PyTorch and the models that they come from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax.core import meta

from vlpjax.errors import UserError
from vlpjax.models.connectors import (
    AdaptiveAveragePool,
    LinearConnector,
    MlpConnector,
    PerceiverResampler,
    PixelShuffle,
)

TOKENS = np.random.default_rng(0).standard_normal((2, 12, 6)).astype(np.float32)


def applied(module: nn.Module, *args: Any) -> tuple[Any, Any]:
    """Its output, and its parameters."""
    outputs, variables = jax.jit(lambda *args: module.init_with_output(jax.random.key(0), *args))(*args)
    return outputs, meta.unbox(variables).get("params", {})


def test_linear() -> None:
    found, params = applied(LinearConnector(5), TOKENS)
    kernel, bias = params["projection"]["kernel"], params["projection"]["bias"]
    np.testing.assert_allclose(found, TOKENS @ kernel + bias, atol=1e-5)
    assert "bias" not in applied(LinearConnector(5, bias=False), TOKENS)[1]["projection"]


def test_mlp() -> None:
    found, params = applied(MlpConnector(5, hidden=7), TOKENS)
    inner = torch.nn.functional.gelu(torch.tensor(np.asarray(TOKENS @ params["up"]["kernel"])))
    np.testing.assert_allclose(found, inner.numpy() @ params["down"]["kernel"], atol=1e-5)
    assert params["down"]["kernel"].shape == (7, 5)
    assert applied(MlpConnector(5), TOKENS)[1]["down"]["kernel"].shape == (5, 5)  # LLaVA's


def test_the_norm_of_the_mlp_makes_it_blind_to_scale() -> None:
    module = MlpConnector(5, input_norm=True, epsilon=1e-12)
    np.testing.assert_allclose(applied(module, 3 * TOKENS + 1)[0], applied(module, TOKENS)[0], atol=1e-5)


def test_pixel_shuffle_is_that_of_internvl() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    tokens = np.random.default_rng(0).standard_normal((2, 64, 5)).astype(np.float32)
    image = torch.tensor(tokens).view(2, 8, 8, 5)
    for factor in (2, 4):
        theirs = InternVLModel.pixel_shuffle(None, image, scale_factor=1 / factor)
        found = PixelShuffle(factor).apply({}, tokens)
        np.testing.assert_array_equal(found, theirs.reshape(2, -1, 5 * factor**2))


def test_pixel_shuffle_of_a_grid_that_is_no_square() -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(1, 24, 1)  # 4 rows of 6
    found = PixelShuffle(2).apply({}, numbers, (4, 6))
    np.testing.assert_array_equal(found[0, 0], [0, 1, 6, 7])  # rows outermost
    np.testing.assert_array_equal(found[0, 5], [16, 17, 22, 23])


@pytest.mark.parametrize(
    ("grid", "cells"), [((6, 4), (3, 2)), ((6, 7), (4, 3)), ((3, 5), (3, 5)), ((2, 3), (5, 4))]
)
def test_adaptive_pooling_is_that_of_pytorch(grid: tuple[int, int], cells: tuple[int, int]) -> None:
    tokens = np.random.default_rng(0).standard_normal((2, grid[0] * grid[1], 3)).astype(np.float32)
    image = torch.tensor(tokens).view(2, *grid, 3).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.adaptive_avg_pool2d(image, cells).permute(0, 2, 3, 1)
    found = AdaptiveAveragePool(cells).apply({}, tokens, grid)
    np.testing.assert_allclose(found, theirs.reshape(2, -1, 3), atol=2e-6)


RESAMPLER = PerceiverResampler(latents=3, depth=2, heads=2, head_dim=4, times=4)
VIDEO = np.random.default_rng(1).standard_normal((2, 3, 5, 6)).astype(np.float32)  # 3 frames of 5 tokens


def layer_norm(x: np.ndarray, of: Any) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * of["scale"] + of["bias"]


def test_the_resampler_is_the_formula_of_flamingo() -> None:
    found, params = applied(RESAMPLER, VIDEO)
    params = jax.tree.map(np.asarray, params)
    media = (VIDEO + params["time_embedding"][:3, None]).reshape(2, 15, 6)
    latents = np.broadcast_to(params["latents"], (2, 3, 6))
    for name in ("block_0", "block_1"):
        of = params[name]
        queries = layer_norm(latents, of["attention_norm"])
        both = np.concatenate([layer_norm(media, of["media_norm"]), queries], axis=1)  # media first, as there
        query, key, value = (
            np.einsum("bnd,dhe->bnhe", x, of["attention"][part]["kernel"])
            for part, x in (("query", queries), ("key", both), ("value", both))
        )
        shares = np.asarray(jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", query, key) / 2, axis=-1))
        mixed = np.einsum("bhqk,bkhe->bqhe", shares, value)
        latents = latents + np.einsum("bqhe,hed->bqd", mixed, of["attention"]["out"]["kernel"])
        inner = layer_norm(latents, of["mlp_norm"]) @ of["mlp"]["up"]["kernel"]
        latents = latents + np.maximum(inner, 0) ** 2 @ of["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(found, layer_norm(latents, params["final_norm"]), atol=1e-5)


def test_the_resampler_sees_no_padding_and_takes_single_images() -> None:
    resampler = RESAMPLER.clone(times=None, depth=1)
    tokens = VIDEO.reshape(2, 15, 6)
    lengths = np.array([15, 9])
    changed = tokens.copy()
    changed[1, 9:] = 50
    found, other = (applied(resampler, x, lengths)[0] for x in (tokens, changed))
    np.testing.assert_array_equal(found, other)
    np.testing.assert_allclose(found[1], applied(resampler, tokens[1:, :9])[0][0], atol=2e-6)


def test_connectors_follow_one_another() -> None:
    both = nn.Sequential([PixelShuffle(2), MlpConnector(5, input_norm=True)])
    found = jax.eval_shape(lambda x: both.init_with_output(jax.random.key(0), x, (2, 6))[0], TOKENS)
    assert found.shape == (2, 3, 5)


def test_bad_grids_are_told() -> None:
    with pytest.raises(UserError, match="12 tokens are no square"):
        PixelShuffle(2).apply({}, TOKENS)
    with pytest.raises(UserError, match="grid of 3 x 3 was given for 12 tokens"):
        AdaptiveAveragePool((2, 2)).apply({}, TOKENS, (3, 3))
    with pytest.raises(UserError, match="4 x 3 does not divide into squares of factor=2"):
        PixelShuffle(2).apply({}, TOKENS, (4, 3))
    with pytest.raises(UserError, match="takes 4 frames, but was given 5"):
        jax.eval_shape(lambda: RESAMPLER.init(jax.random.key(0), np.zeros((1, 5, 2, 6), np.float32)))
