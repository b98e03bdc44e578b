"""CroCo: what is hidden in one view is found in the other, and nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import GRID, PATCH, TOWER, Bound, N, textures
from vlpjax.models.mae import MAEDecoder
from vlpjax.models.vit import ViT
from vlpjax.objectives.masked_image import CrossViewCompletion, MaskedAutoencoding
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels

DECODER = dict(patch=PATCH, channels=1, decoder_width=32, decoder_depth=2, decoder_heads=2)
MASK = RandomPatches(0.85, "hide")  # 13 of 16


def shifted(key: jax.Array, count: int = 64) -> dict[str, jax.Array]:
    """White noise, and the same moved to the left by one patch; a quarter of it leaves the second view."""
    wide = jax.random.normal(key, (count, 16, 16 + PATCH, 1))
    return {"view1": wide[:, :, :16], "view2": wide[:, :, PATCH:]}


@pytest.fixture(scope="module")
def croco() -> Bound:
    """Trained on shifts by one patch."""
    objective = CrossViewCompletion(MASK, Pixels(), **DECODER)
    bound = Bound(objective, shifted(jax.random.key(0), 2), channels=1)
    bound.train(shifted, steps=400, rate=4e-3)
    return bound


def test_thirteen_of_sixteen_patches_are_hidden() -> None:
    assert MASK.kept(N) == 3
    assert RandomPatches(0.9, "hide").kept(196) == 20


def test_the_second_view_completes_the_first(croco: Bound) -> None:
    batch = shifted(jax.random.key(9), 256)
    true = float(croco.loss(croco.params, batch).value)
    unrelated = {**batch, "view2": jnp.roll(batch["view2"], 1, axis=0)}
    assert true < 0.35, true  # a quarter of the patches is in neither view
    assert float(croco.loss(croco.params, unrelated).value) > 1.2


def test_one_view_alone_stays_at_the_mean() -> None:
    single = Bound(
        MaskedAutoencoding(MASK, Pixels(), image="view1", **DECODER),
        shifted(jax.random.key(0), 2),
        channels=1,
    )
    single.train(shifted, steps=100, rate=4e-3)
    assert float(single.loss(single.params, shifted(jax.random.key(9), 256)).value) > 0.9


def test_the_order_of_the_second_views_tokens_says_nothing(croco: Bound) -> None:
    images = textures(jax.random.key(0), 4)[..., :1]
    tower, decoder = ViT(**TOWER, channels=1), croco.objective.heads()["decoder"]
    assert isinstance(decoder, MAEDecoder)
    split = MASK.split(jax.random.split(jax.random.key(1), 4), N)
    order = jnp.broadcast_to(jax.random.permutation(jax.random.key(2), N), (4, N))
    encoder, head = ({"params": croco.params[name]} for name in ("image", "masked_decoder"))
    seen = tower.apply(encoder, images, keep=split.keep)["tokens"]
    memory = tower.apply(encoder, images)["tokens"]
    shuffled = tower.apply(encoder, images, keep=order)["tokens"]
    np.testing.assert_allclose(shuffled, jnp.take_along_axis(memory, order[..., None], axis=1), atol=1e-5)
    plain = decoder.apply(head, seen, split.restore, GRID, memory=memory)
    moved = decoder.apply(head, seen, split.restore, GRID, memory=shuffled, memory_places=order)
    np.testing.assert_allclose(moved, plain, atol=1e-4)
    wrong = decoder.apply(head, seen, split.restore, GRID, memory=shuffled)
    assert np.max(np.abs(wrong - plain)) > 1e-2
