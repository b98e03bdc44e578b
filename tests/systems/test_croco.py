"""CroCo: the tower encodes a tenth of one view and all of another, and the decoder looks at both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import GRID, PATCH, Bound, N, outputs_of, textures
from vlpjax.models.mae import MAEDecoder
from vlpjax.objectives.masked_image import CrossViewCompletion
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels

DECODER = dict(patch=PATCH, channels=1, decoder_width=64, decoder_depth=2, decoder_heads=4)
FIELDS = dict(channels=1, width=64, heads=4, depth=1)
MASK = RandomPatches(0.85, "hide")  # 13 of 16


@functools.partial(jax.jit, static_argnums=1)
def shifted(key: jax.Array, count: int = 64) -> dict[str, jax.Array]:
    """White noise, and the same moved to the left by one patch; a quarter of it leaves the second view."""
    wide = jax.random.normal(key, (count, 16, 16 + PATCH, 1))
    return {"view1": wide[:, :, :16], "view2": wide[:, :, PATCH:]}


@pytest.fixture(scope="module")
def croco() -> Bound:
    objective = CrossViewCompletion(MASK, Pixels(), **DECODER)
    return Bound(objective, shifted(jax.random.key(0), 2), **FIELDS)


def test_thirteen_of_sixteen_patches_are_hidden() -> None:
    assert MASK.kept(N) == 3
    assert RandomPatches(0.9, "hide").kept(196) == 20


def test_the_second_view_takes_part_and_teaches_the_tower(croco: Bound) -> None:
    batch = shifted(jax.random.key(9), 4)
    unrelated = {**batch, "view2": jnp.roll(batch["view2"], 1, axis=0)}
    assert croco.loss(croco.params, batch).value != croco.loss(croco.params, unrelated).value
    grads = jax.grad(lambda view: croco.loss(croco.params, {**batch, "view2": view}).value)(batch["view2"])
    assert np.all(np.any(grads != 0, axis=(1, 2, 3)))


def test_the_order_of_the_second_views_tokens_says_nothing(croco: Bound) -> None:
    images = textures(jax.random.key(0), 4)[..., :1]
    decoder = croco.objective.heads()["decoder"]
    assert isinstance(decoder, MAEDecoder)
    split = MASK.split(jax.random.split(jax.random.key(1), 4), N)
    order = jnp.broadcast_to(jax.random.permutation(jax.random.key(2), N), (4, N))
    seen, memory, shuffled = (
        outputs_of(croco.params["image"], images, FIELDS, **options)["tokens"]
        for options in ({"keep": split.keep}, {}, {"keep": order})
    )
    np.testing.assert_allclose(shuffled, jnp.take_along_axis(memory, order[..., None], axis=1), atol=1e-5)
    head = {"params": croco.params["masked_decoder"]}
    places = jnp.broadcast_to(jnp.arange(N), (4, N))
    decode = jax.jit(
        lambda memory, places: decoder.apply(
            head, seen, split.restore, GRID, memory=memory, memory_places=places
        )
    )
    plain, moved, wrong = decode(memory, places), decode(shuffled, order), decode(shuffled, places)
    np.testing.assert_allclose(moved, plain, atol=1e-4)
    assert np.max(np.abs(wrong - plain)) > 1e-2
