"""What self-supervision asks of the image tower: patches kept, keys restricted, causality, embeddings by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.masked_tiny import drawn, textures
from vlpjax.errors import UserError
from vlpjax.models.positions_2d import grid_positions, rotation_2d
from vlpjax.models.vit import ViT

IMAGES = textures(jax.random.key(0), 2)
TINY = dict(image_size=16, patch=4, width=16, depth=2, heads=2)
KEEP = jnp.array([[5, 0, 9], [15, 2, 3]])


def make(**fields: Any) -> tuple[ViT, Any]:
    """A tower with class token and register, and its parameters."""
    tower = ViT(**{**TINY, "registers": 1, **fields})
    made = jax.eval_shape(lambda: tower.init(jax.random.key(0), IMAGES))
    return tower, {"params": drawn(nn.meta.unbox(made)["params"])}


def run(tower: ViT, variables: Any, images: Any = IMAGES, **options: Any) -> dict[str, Any]:
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    rest = {name: value for name, value in options.items() if name not in arrays}
    return jax.jit(lambda v, x, a: tower.apply(v, x, **a, **rest))(variables, images, arrays)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rotary"])
def test_keeping_all_patches_in_another_order_reorders_the_tokens(positions: str) -> None:
    tower, variables = make(positions=positions)
    order = jnp.stack([jax.random.permutation(jax.random.key(seed), 16) for seed in (0, 1)])
    plain, kept = run(tower, variables), run(tower, variables, keep=order)
    np.testing.assert_allclose(
        kept["tokens"], jnp.take_along_axis(plain["tokens"], order[..., None], axis=1), atol=1e-5
    )
    np.testing.assert_allclose(kept["pooled"], plain["pooled"], atol=1e-5)


def test_of_patches_that_are_left_out_nothing_is_seen() -> None:
    tower, variables = make(positions="rotary")
    mask = jnp.ones((2, 16), bool).at[jnp.arange(2)[:, None], KEEP].set(False)
    hidden = jnp.repeat(jnp.repeat(mask.reshape(2, 4, 4), 4, axis=1), 4, axis=2)[..., None]
    changed = jnp.where(hidden, 1e3, IMAGES)
    first, second = (run(tower, variables, images, keep=KEEP) for images in (IMAGES, changed))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert first["tokens"].shape == (2, 3, 16) and first["prefix"].shape == (2, 2, 16)


def test_restricted_keys_are_those_of_a_tower_that_keeps_them_only() -> None:
    """With one block, what the context's own tokens see is each other and the prefix."""
    tower, variables = make(depth=1)
    seen = jnp.zeros((2, 16), bool).at[jnp.arange(2)[:, None], KEEP].set(True)
    every, kept = run(tower, variables, keys=seen), run(tower, variables, keep=KEEP)
    np.testing.assert_allclose(
        jnp.take_along_axis(every["tokens"], KEEP[..., None], axis=1), kept["tokens"], atol=1e-5
    )
    np.testing.assert_allclose(every["prefix"], kept["prefix"], atol=1e-5)
    both = run(tower, variables, keys=seen, keep=jnp.stack([jnp.arange(16)] * 2))
    np.testing.assert_allclose(both["tokens"], every["tokens"], atol=1e-5)


def test_a_causal_tower_sees_class_tokens_and_earlier_patches() -> None:
    tower, variables = make(causal=True)
    changed = IMAGES.at[:, 4:8, 8:12].add(1.0)  # patch 6
    before, after = run(tower, variables), run(tower, variables, changed)
    np.testing.assert_array_equal(before["prefix"], after["prefix"])
    differs = np.any(np.asarray(before["tokens"] != after["tokens"]), axis=(0, 2))
    np.testing.assert_array_equal(differs, np.arange(16) >= 6)


def test_patch_embeddings_come_before_masks_and_positions() -> None:
    tower, variables = make(mask_token=True, positions="learned")
    masked = jnp.ones((2, 16), bool)
    outputs = run(tower, variables, masked=masked, embedded=True)
    kernel = variables["params"]["patches"]["projection"]["kernel"]
    patches = np.asarray(IMAGES).reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, -1)
    np.testing.assert_allclose(outputs["patch_embeddings"], patches @ kernel, atol=1e-4)
    assert "patch_embeddings" not in run(tower, variables)


def test_rotary_coordinates_are_rescaled_in_training_only() -> None:
    tower, variables = make(positions="rotary", rotary_form="centred", rotary_base=100.0)
    scaled = tower.clone(rotary_rescale=2.0)
    plain = run(tower, variables)["tokens"]
    np.testing.assert_array_equal(run(scaled, variables)["tokens"], plain)
    tokens = [
        scaled.apply(variables, IMAGES, train=True, rngs={"dropout": jax.random.key(seed)})["tokens"]
        for seed in (0, 1)
    ]
    assert np.any(tokens[0] != tokens[1]) and np.any(tokens[0] != plain)


def test_rescaled_coordinates_turn_by_rescaled_angles() -> None:
    grid, where = jnp.array([[[4, 4]]]), grid_positions(4, 4)[None]
    once, twice = (rotation_2d(where, grid, 8, 100.0, "centred", scale) for scale in (1.0, jnp.float32(2.0)))
    np.testing.assert_allclose(twice.cos, 2 * once.cos**2 - 1, atol=1e-5)


def test_what_does_not_go_together_is_refused() -> None:
    tower, variables = make()
    with pytest.raises(UserError, match="array of shape"):
        tower.apply(variables, IMAGES, keep=jnp.arange(3))
    with pytest.raises(UserError, match=r"rotary_rescale is 2.0 with positions='learned'"):
        ViT(**TINY, rotary_rescale=2.0).init(jax.random.key(0), IMAGES)
