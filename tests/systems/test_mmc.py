"""MMC: three losses over one pass, each of which can be switched off, the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.masked_tiny import PATCH, Bound, start_of, step_config, textures
from tests.tiny import assert_trees_close, experiment_of, layout_of, random_batch
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.models.patches import cut
from vlpjax.objectives.masked_contrast import MaskedMomentumContrast, symmetric_contrast
from vlpjax.objectives.masking import PixelGroups
from vlpjax.step import gradients
from vlpjax.teachers import EMA

HEADS: dict[str, Any] = dict(
    patch=PATCH, pixel_hidden=(16,), patch_hidden=(16,), prototypes=12, projector=(16, 8)
)
VIEWS = {"view1": textures(jax.random.key(0), 8), "view2": textures(jax.random.key(1), 8)}
TERMS = ("pixel_weight", "patch_weight", "image_weight")


def objective(**fields: Any) -> MaskedMomentumContrast:
    return MaskedMomentumContrast(PixelGroups(), teacher="ema", **{**HEADS, **fields})


@pytest.fixture(scope="module")
def mmc() -> Bound:
    return Bound(objective(), VIEWS, teacher="ema", class_tokens=1)


def test_only_corrupted_pixels_are_rebuilt(mmc: Bound) -> None:
    features = mmc.evaluate(objective().encode, mmc.params, VIEWS)
    keys = jax.random.split(jax.random.key(5), 8)  # any masks: the shares of patches add up to the pixels
    assert features["corrupted"].shape == (8, 2, 16)
    np.testing.assert_allclose(
        features["pixels"], features["corrupted"].sum(axis=(1, 2)) * PATCH**2, rtol=1e-5
    )
    share = np.asarray(features["pixels"]) / (2 * 16 * 16)
    assert np.all((share > 0.28) & (share < 0.9))
    out, mask = jax.jit(PixelGroups())(keys, VIEWS["view1"])
    changed = cut(jnp.any(out != VIEWS["view1"], axis=-1)[..., None], (PATCH, PATCH))
    assert np.all(changed <= cut(mask[..., None], (PATCH, PATCH)))


def test_every_loss_reaches_its_own_head_only(mmc: Bound) -> None:
    for term, head in zip(TERMS, ("pixels", "patches", "projector"), strict=True):
        alone = objective(**{other: float(other == term) for other in TERMS})
        grads = jax.grad(lambda params, alone=alone: mmc.evaluate(alone, params, VIEWS).value)(mmc.params)
        moved = {name for name in grads if any(np.any(leaf) for leaf in jax.tree.leaves(grads[name]))}
        assert moved == {"image", f"masked_{head}"}, (term, moved)


def test_the_contrast_is_that_of_the_formula() -> None:
    queries, keys = (np.random.default_rng(seed).normal(size=(6, 2, 4)) for seed in (0, 1))
    expected = 0.0
    for view in (0, 1):
        logits = queries[:, view] @ keys[:, 1 - view].T / 0.2
        expected -= np.mean(np.diag(logits) - np.log(np.exp(logits).sum(axis=1)))
    found = symmetric_contrast(jnp.asarray(queries, jnp.float32), jnp.asarray(keys, jnp.float32), 0.2)
    np.testing.assert_allclose(found, 0.4 * expected, rtol=1e-4)


def test_the_centre_follows_the_teachers_mean(mmc: Bound) -> None:
    loss = mmc.loss(mmc.params, VIEWS)
    assert loss.state["centre"].shape == (12,) and np.any(loss.state["centre"] != 0)
    assert 0.0 < loss.metrics["prototype_entropy"] <= 1.0 + 1e-6


def test_a_tower_without_a_class_token_is_refused() -> None:
    with pytest.raises(UserError, match="set class_tokens=1"):
        Bound(objective(), VIEWS, teacher="ema")


def test_one_and_eight_devices_and_micro_batches_agree() -> None:
    loss = spec(
        MaskedMomentumContrast, corruption=spec(PixelGroups, donor_probability=0.0), teacher="ema", **HEADS
    )
    config = step_config(loss, teachers=dict(ema=spec(EMA)))
    config.towers.image.class_tokens = 1
    images = random_batch()["image"]
    batch = {"view1": images, "view2": np.ascontiguousarray(images[:, ::-1])}
    start = start_of(config, batch)

    def grads(accumulate: int, devices: int) -> Any:
        config.accumulate = accumulate
        experiment, layout = experiment_of(config), layout_of(devices)

        def run(state: Any, batch: Any) -> Any:
            with layout.activate():
                return gradients(experiment, state, batch)

        return jax.jit(run)(start, jax.device_put(batch, layout.sharding("batch")))

    whole, _, expected = grads(1, 1)
    for accumulate, devices in ((1, 8), (4, 1)):
        parts, _, found = grads(accumulate, devices)
        np.testing.assert_allclose(parts["masked"].value, whole["masked"].value, rtol=1e-5)
        assert_trees_close(found, expected, rtol=2e-3, atol=1e-5)
