"""The image tower around its blocks: class tokens, registers, positions, pooling, and images of other sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.positions_2d import resize_positions
from vlpjax.models.vit import ViT

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TINY: dict[str, Any] = dict(image_size=16, patch=4, width=16, depth=1, heads=2)


def make(**fields: Any) -> tuple[ViT, Any]:
    """A tower and its first variables."""
    tower = ViT(**{**TINY, **fields})
    return tower, jax.jit(tower.init)(jax.random.key(0), IMAGES)


def run(tower: ViT, variables: Any, images: Any = IMAGES, **options: Any) -> dict[str, Any]:
    """All outputs, compiled at once."""
    return jax.jit(lambda variables, images: tower.apply(variables, images, **options))(variables, images)


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal up to rounding."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def test_class_tokens_registers_and_patches_in_this_order() -> None:
    tower, variables = make(class_tokens=2, registers=3, depth=0, pre_norm=False, final_norm=False)
    params = nn.unbox(variables["params"])
    outputs = run(tower, variables)
    table = params["position_embedding"]
    assert table.shape == (1, 2 + 16, 16), "registers have no positions"
    close(outputs["prefix"][1, :2], (params["class_token"] + table[:, :2])[0])
    close(outputs["prefix"][1, 2:], params["registers"][0])
    close(outputs["pooled"], outputs["prefix"][:, 0])
    assert outputs["tokens"].shape == (2, 16, 16)


def test_class_tokens_without_positions() -> None:
    tower, variables = make(position_prefix=False, depth=0, pre_norm=False, final_norm=False)
    params = nn.unbox(variables["params"])
    assert params["position_embedding"].shape == (1, 16, 16)
    close(run(tower, variables)["pooled"][0], params["class_token"][0, 0])


def test_the_mean_and_attention_are_over_patches_only() -> None:
    for pool in ("mean", "map"):
        tower, variables = make(pool=pool, class_tokens=1, registers=1, depth=0)
        params = nn.unbox(variables["params"])
        changed = {"params": {**params, "class_token": params["class_token"] + 1.0}}
        before, after = run(tower, variables), run(tower, changed)
        assert np.any(before["prefix"] != after["prefix"])
        close(before["pooled"], after["pooled"])


def test_without_pooling_there_are_tokens_only() -> None:
    tower, variables = make(pool="none", class_tokens=1)
    assert set(run(tower, variables)) == {"tokens", "prefix"}


def test_norms_before_and_after_pooling() -> None:
    """As in CLIP, tokens stay as the last block left them and the class token is normed; or all tokens are."""
    clip, variables = make(final_norm=False, pool_norm=True)
    params = nn.unbox(variables["params"])
    params["pool_norm"] = {"scale": jnp.arange(16.0), "bias": jnp.ones(16)}
    last = ViT(**TINY)
    moved = {name: value for name, value in params.items() if name != "pool_norm"}
    every = run(last, {"params": {**moved, "final_norm": params["pool_norm"]}}, hidden=(-1,))
    ours = run(clip, {"params": params})
    close(ours["pooled"], every["pooled"])
    close(jnp.concatenate([ours["prefix"], ours["tokens"]], axis=1), every["hidden"][-1])
    assert np.any(np.abs(ours["tokens"] - every["tokens"]) > 0.1)


def test_a_table_of_another_grid_is_resized() -> None:
    tower, variables = make(position_grid=(6, 3), depth=0, pre_norm=False, final_norm=False)
    params = nn.unbox(variables["params"])
    table = params["position_embedding"]
    assert table.shape == (1, 1 + 18, 16)
    with_zeros = {"params": {**params, "position_embedding": jnp.zeros_like(table)}}
    added = run(tower, variables)["tokens"] - run(tower, with_zeros)["tokens"]
    wanted = resize_positions(table[0, 1:].reshape(6, 3, 16), (4, 4)).reshape(16, 16)
    close(added[1], wanted)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rotary", "none"])
def test_images_of_another_size(positions: str) -> None:
    """The parameters are those of ``image_size``; another size gives another grid, one that is no square too."""
    tower, variables = make(positions=positions, resize_positions=True)
    wide = np.concatenate([IMAGES, IMAGES[:, :, :8]], axis=2)  # 16 x 24 pixels
    assert run(tower, variables, wide)["tokens"].shape == (2, 24, 16)
    strict = ViT(**TINY, positions=positions)
    close(run(tower, variables)["pooled"], run(strict, variables)["pooled"])
    with pytest.raises(UserError, match="16 pixels.*resize_positions"):
        run(strict, variables, wide)


@pytest.mark.parametrize(("positions", "told"), [("none", False), ("rotary", True), ("sincos", True)])
def test_fixed_positions_tell_patches_apart(positions: str, told: bool) -> None:
    """Without positions the tower does not see in which order patches stand."""
    tower, variables = make(positions=positions, pool="mean")
    assert "position_embedding" not in variables["params"]
    mirrored = IMAGES.reshape(2, 4, 4, 4, 4, 3)[:, ::-1].reshape(IMAGES.shape)
    before, after = (run(tower, variables, images)["pooled"] for images in (IMAGES, mirrored))
    assert (np.abs(before - after).max() > 1e-3) == told


def test_patches_keep_their_angles_when_others_are_dropped() -> None:
    """Over equal patches, the class token's attention differs by their angles alone, dropped neighbours or not."""
    tower, variables = make(positions="rotary", pool="cls", patch_dropout=0.5, depth=1)
    rngs = {"dropout": jax.random.key(3)}
    # Attention from the class token to patches of equal content depends on their angles.
    grey = np.ones_like(IMAGES)
    whole = run(tower, variables, grey, attention=(0,))["attention"][0][0]
    some = run(tower, variables, grey, train=True, rngs=rngs, attention=(0,))["attention"][0][0]
    ratio_whole, ratio_some = whole[:, 0, 1:] / whole[:, 0, :1], some[:, 0, 1:] / some[:, 0, :1]
    distance = np.abs(ratio_whole[:, :, None] - ratio_some[:, None, :]).max(axis=0)  # [16, 8]
    assert np.all(distance.min(axis=0) < 1e-5)
    places = distance.argmin(axis=0).tolist()
    assert places == sorted(set(places)) != list(range(8))


def test_clips() -> None:
    clips = np.random.default_rng(1).normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
    tower = ViT(**TINY, frames=4, tubelet=2, pool="mean")
    variables = jax.jit(tower.init)(jax.random.key(0), clips)
    assert variables["params"]["position_embedding"].unbox().shape == (1, 2 * 16, 16)
    assert run(tower, variables, clips)["tokens"].shape == (2, 32, 16)
    large = np.concatenate([clips, clips], axis=3)
    sized = ViT(**TINY, frames=4, tubelet=2, pool="mean", resize_positions=True)
    assert run(sized, variables, large)["tokens"].shape == (2, 64, 16)


def test_pixels_that_fill_no_patch_are_left_out() -> None:
    images = np.pad(IMAGES, ((0, 0), (0, 3), (0, 2), (0, 0)), constant_values=9.0)
    tower, variables = make()
    cropped = ViT(**{**TINY, "image_size": (19, 18)}, patch_crop=True)
    close(run(cropped, variables, images)["pooled"], run(tower, variables)["pooled"])
