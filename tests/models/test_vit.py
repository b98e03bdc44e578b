"""The image tower: pooling, dropped patches, stems, and settings that do not work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.vit import ViT

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TINY = dict(image_size=16, patch=4, width=16, depth=2, heads=2)


def make(**fields: Any) -> tuple[ViT, Any]:
    tower = ViT(**{**TINY, **fields})
    return tower, jax.jit(tower.init)(jax.random.key(0), IMAGES)


def run(tower: ViT, variables: Any, images: Any = IMAGES, **options: Any) -> dict[str, Any]:
    """All outputs, compiled at once."""
    return jax.jit(lambda variables, images: tower.apply(variables, images, **options))(variables, images)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_outputs_by_name(pool: str) -> None:
    tower, variables = make(pool=pool, embedding=8)
    outputs = run(tower, variables)
    prefix = {"prefix": (2, 1, 16)} if pool == "cls" else {}
    assert {name: x.shape for name, x in outputs.items()} == {
        "tokens": (2, 16, 16),
        "pooled": (2, 16),
        "embedding": (2, 8),
        **prefix,
    }
    assert ("class_token" in variables["params"]) == (pool == "cls")
    assert ("pool_head" in variables["params"]) == (pool == "map")
    np.testing.assert_allclose(
        outputs["embedding"],
        outputs["pooled"] @ variables["params"]["projection"]["kernel"]["kernel"].unbox(),
        rtol=1e-4,
        atol=1e-6,
    )
    if pool == "mean":
        np.testing.assert_allclose(outputs["pooled"], outputs["tokens"].mean(axis=1), rtol=1e-4, atol=1e-6)


def test_without_a_projection_the_embedding_is_what_was_pooled() -> None:
    tower, variables = make()
    outputs = run(tower, variables)
    np.testing.assert_array_equal(outputs["embedding"], outputs["pooled"])


def test_patches_are_read_in_reading_order() -> None:
    """Only the token of the patch that changed differs before attention mixes them."""
    tower, variables = make(pool="mean", depth=0, pre_norm=False)
    changed = IMAGES.copy()
    changed[:, 4:8, 8:12] += 1.0  # second row of patches, third column
    before, after = (run(tower, variables, images)["tokens"] for images in (IMAGES, changed))
    assert np.flatnonzero(np.any(np.asarray(before != after), axis=(0, 2))).tolist() == [6]


def test_patches_are_dropped_in_training_only() -> None:
    tower, variables = make(patch_dropout=0.3)
    whole, again = (run(tower, variables)["tokens"] for _ in range(2))
    np.testing.assert_array_equal(whole, again)
    assert whole.shape[1] == 16
    rngs = {"dropout": jax.random.key(1)}
    kept = run(tower, variables, train=True, rngs=rngs)["tokens"]
    assert kept.shape[1] == int(16 * 0.7)


def test_the_patches_that_stay_keep_their_positions_and_order() -> None:
    tower, variables = make(pool="mean", depth=0, pre_norm=False, patch_dropout=0.5)
    whole = np.asarray(run(tower, variables)["tokens"])
    kept = np.asarray(run(tower, variables, train=True, rngs={"dropout": jax.random.key(1)})["tokens"])
    chosen = []
    for row in range(2):
        places = [int(np.flatnonzero((whole[row] == token).all(axis=1))[0]) for token in kept[row]]
        assert places == sorted(set(places))
        chosen.append(places)
    assert chosen[0] != chosen[1]


def test_a_convolutional_stem_has_the_same_grid() -> None:
    tower, variables = make(stem="conv")
    outputs = run(tower, variables)
    assert outputs["tokens"].shape == (2, 16, 16)
    assert variables["params"]["position_embedding"].unbox().shape == (1, 17, 16)


def test_examples_do_not_see_each_other() -> None:
    for stem in ("linear", "conv"):
        tower, variables = make(stem=stem, pool="map")
        both, one = (run(tower, variables, images)["pooled"] for images in (IMAGES, IMAGES[:1]))
        np.testing.assert_allclose(both[0], one[0], rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters() -> None:
    tower, variables = make(dtype="bfloat16", embedding=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert run(tower, variables)["tokens"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(image_size=32), ["32", "16"]),
        (dict(pool="max"), ["'max'", "'cls'", "'mean'", "'map'", "'none'"]),
        (dict(pool="cls", class_tokens=0), ["'cls'", "class_tokens is 0"]),
        (dict(pool="none", embedding=8), ["'none'", "embedding"]),
        (dict(positions="absolute"), ["'absolute'", "'learned'", "'rotary'"]),
        (dict(positions="sincos", frames=4, tubelet=2), ["'sincos'", "time"]),
        (dict(frames=3, tubelet=2), ["frames is 3", "tubelet=2"]),
        (dict(frames=4), ["[batch, 4,", "(2, 16, 16, 3)"]),
        (dict(channels=4), ["4 channels", "3"]),
        (dict(remat="some"), ["'some'", "'full'"]),
        (dict(heads=3), ["width 16", "heads=3"]),
        (dict(patch=5), ["16x16", "5"]),
        (dict(stem="convolution"), ["'convolution'", "'linear'", "'conv'"]),
        (dict(activation="swish"), ["'swish'", "gelu"]),
        (dict(stem="conv", image_size=12, patch=6), ["(2, 2)", "6"]),
        (dict(stem="conv", stem_channels=(8,)), ["1 entries", "(2, 2)"]),
    ],
)
def test_what_does_not_work_is_told(fields: dict[str, Any], parts: list[str]) -> None:
    tower = ViT(**{**TINY, **fields})
    images = IMAGES[:, :12, :12] if fields.get("image_size") == 12 else IMAGES
    with pytest.raises(UserError) as caught:
        jax.eval_shape(tower.init, jax.random.key(0), images)
    assert all(part in str(caught.value) for part in parts), caught.value
