"""CroCo: what is hidden in one view is found in the other, and nowhere else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import GRID, PATCH, Bound, N, outputs_of, textures
from vlpjax.models.mae import MAEDecoder
from vlpjax.objectives.masked_image import CrossViewCompletion, MaskedAutoencoding
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels

DECODER = dict(patch=PATCH, channels=1, decoder_width=64, decoder_depth=2, decoder_heads=4)
FIELDS = dict(channels=1, width=64, heads=4, depth=1)
MASK = RandomPatches(0.85, "hide")  # 13 of 16


@functools.partial(jax.jit, static_argnums=1)
def shifted(key: jax.Array, count: int = 32) -> dict[str, jax.Array]:
    """White noise, and the same moved to the left by one patch; a quarter of it leaves the second view."""
    wide = jax.random.normal(key, (count, 16, 16 + PATCH, 1))
    return {"view1": wide[:, :, :16], "view2": wide[:, :, PATCH:]}


@pytest.fixture(scope="module")
def croco() -> Bound:
    """Trained on shifts by one patch.  For the first 250 steps or so attention has not found the place to look at."""
    objective = CrossViewCompletion(MASK, Pixels(), **DECODER)
    bound = Bound(objective, shifted(jax.random.key(0), 2), **FIELDS)
    bound.train(shifted, steps=600, rate=3e-3)
    return bound


def test_thirteen_of_sixteen_patches_are_hidden() -> None:
    assert MASK.kept(N) == 3
    assert RandomPatches(0.9, "hide").kept(196) == 20


def test_the_second_view_completes_the_first(croco: Bound) -> None:
    batch = shifted(jax.random.key(9), 256)
    unrelated = {**batch, "view2": jnp.roll(batch["view2"], 1, axis=0)}
    true, wrong = (float(croco.loss(croco.params, views).value) for views in (batch, unrelated))
    # A quarter of the patches is in neither view, and costs what their mean does: 15 / 16.
    assert 0.2 < true < 0.35 and wrong > 1.2, (true, wrong)


def test_one_view_alone_stays_at_the_mean() -> None:
    objective = MaskedAutoencoding(MASK, Pixels(), image="view1", **DECODER)
    single = Bound(objective, shifted(jax.random.key(0), 2), **FIELDS)
    single.train(shifted, steps=200, rate=3e-3)
    loss = float(single.loss(single.params, shifted(jax.random.key(9), 256)).value)
    assert 0.9 < loss < 0.97, loss


def test_the_second_view_teaches_the_tower(croco: Bound) -> None:
    batch = shifted(jax.random.key(9), 4)
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
