"""Packed images: an image gives what it gives alone, whatever else its row holds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.data.packing import pack
from vlpjax.errors import UserError
from vlpjax.models.vit import ViT

RANDOM = np.random.default_rng(0)
TINY: dict[str, Any] = dict(
    image_size=16, patch=4, width=16, depth=2, heads=2, pool="map", embedding=8, resize_positions=True
)
SIZES = [(8, 12), (16, 16), (8, 12)]  # 6, 16 and 6 patches
IMAGES = [RANDOM.normal(size=(*size, 3)).astype(np.float32) for size in SIZES]
PACKED = {name: x for name, x in pack(IMAGES, 4, 30, 4).items() if name != "places"}
NAFLEX = dict(position_method="bilinear", position_antialias=True, position_grid=(3, 3))


def make(**fields: Any) -> tuple[ViT, Any]:
    tower = ViT(**{**TINY, **fields})
    return tower, nn.unbox(jax.jit(tower.init)(jax.random.key(0), IMAGES[1][None]))


@functools.cache
def program(tower: ViT, hidden: tuple[int, ...]) -> Any:
    return jax.jit(lambda variables, images: tower.apply(variables, images, hidden=hidden))


def run(tower: ViT, variables: Any, images: Any, hidden: tuple[int, ...] = ()) -> dict[str, Any]:
    return program(tower, hidden)(variables, images)


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(pool="mean", **NAFLEX),
        dict(positions="rotary", rotary_form="centred", pre_norm=False, patch_bias=True),
        dict(positions="sincos", pool="mean", pool_norm=True, final_norm=False, patch_base=2),
    ],
)
def test_an_image_among_others_gives_what_it_gives_alone(fields: dict[str, Any]) -> None:
    tower, variables = make(**fields)
    packed = run(tower, variables, PACKED, hidden=(0,))
    assert packed["tokens"].shape == (1, 30, 16) and packed["pooled"].shape == (1, 4, 16)
    start = 0
    for index, image in enumerate(IMAGES):
        alone = run(tower, variables, image[None], hidden=(0,))
        close(packed["pooled"][0, index], alone["pooled"][0])
        close(packed["embedding"][0, index], alone["embedding"][0])
        where = slice(start, start := start + alone["tokens"].shape[1])
        close(packed["tokens"][0, where], alone["tokens"][0])
        close(packed["hidden"][0][0, where], alone["hidden"][0][0])
    np.testing.assert_array_equal(packed["pooled"][0, 3], 0)  # there is no fourth image


def test_no_gradient_leaks_to_other_images_or_to_padding() -> None:
    tower, variables = make()

    def loss(patches: jax.Array) -> jax.Array:
        return jnp.sum(tower.apply(variables, {**PACKED, "patches": patches})["pooled"][0, 1] ** 2)

    gradient = np.abs(jax.jit(jax.grad(loss))(PACKED["patches"])).sum(axis=-1)[0]
    mine = PACKED["segment_ids"][0] == 2
    assert np.all(gradient[mine] > 0) and np.all(gradient[~mine] == 0)


def test_what_padding_holds_changes_nothing() -> None:
    tower, variables = make(**NAFLEX)
    padding = PACKED["segment_ids"] == 0
    dirty = {**PACKED, "patches": np.where(padding[..., None], 100.0, PACKED["patches"]).astype(np.float32)}
    dirty["positions"] = np.where(padding[..., None], 7, PACKED["positions"])
    before, after = run(tower, variables, PACKED), run(tower, variables, dirty)
    np.testing.assert_array_equal(before["pooled"], after["pooled"])
    np.testing.assert_array_equal(before["tokens"][~padding], after["tokens"][~padding])


def test_order_in_the_row_and_row_length_do_not_matter() -> None:
    tower, variables = make()
    turned = pack(IMAGES[::-1], 4, 23, 3)
    places = turned.pop("places")
    ours, theirs = run(tower, variables, turned)["pooled"], run(tower, variables, PACKED)["pooled"]
    for index, (row, segment) in enumerate(places[::-1]):
        close(ours[row, segment], theirs[0, index])


def test_grids_are_read_off_the_positions_if_they_are_not_given() -> None:
    tower, variables = make(segments=4)
    without = {name: x for name, x in PACKED.items() if name != "grids"}
    close(run(tower, variables, without)["pooled"], run(tower, variables, PACKED)["pooled"])


def test_one_image_per_row_may_have_a_class_token_and_registers() -> None:
    tower, variables = make(pool="cls", registers=2)
    rows = pack(IMAGES, 4, 16, 1)
    rows.pop("places")
    pooled = run(tower, variables, rows)["pooled"]
    assert pooled.shape == (3, 1, 16)
    for image, ours in zip(IMAGES, pooled[:, 0], strict=True):
        close(ours, run(tower, variables, image[None])["pooled"][0])


@pytest.mark.parametrize(
    ("fields", "packed", "parts"),
    [
        (dict(pool="cls"), PACKED, ["4 packed images", "no class tokens", "has 1"]),
        ({}, {"patches": PACKED["patches"]}, ["'positions' and 'segment_ids'"]),
        (dict(patch=8), PACKED, ["'patches'", "(1, 30, 48)", "(1, 30, 192)"]),
        ({}, {**PACKED, "positions": PACKED["positions"][..., :1]}, ["'positions'", "(1, 30, 2)"]),
        (dict(stem="conv"), PACKED, ["'conv'", "cut patches"]),
        (dict(patch_dropout=0.5), PACKED, ["patch_dropout"]),
    ],
)
def test_what_does_not_work_is_told(fields: dict[str, Any], packed: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        jax.eval_shape(ViT(**{**TINY, **fields}).init, jax.random.key(0), packed)
    assert all(part in str(caught.value) for part in parts), caught.value
