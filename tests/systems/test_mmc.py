"""MMC: three losses over one pass, each of which can be switched off, the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, logsumexp

from tests.masked_tiny import PATCH, Bound, start_of, step_config, textures
from tests.tiny import assert_trees_close, experiment_of, layout_of, random_batch, unit
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.objectives.base import Context
from vlpjax.objectives.masked_contrast import MaskedMomentumContrast
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


CENTRE = np.linspace(-0.5, 0.5, HEADS["prototypes"]).astype(np.float32)


@pytest.fixture(scope="module")
def found(mmc: Bound) -> tuple[Any, dict[str, np.ndarray]]:
    """The loss with a centre that is not 0; and per view [V, B, ...] what it is made of, as the towers give it."""

    def run(context: Context) -> Any:
        drawn = [
            PixelGroups()(context.row_keys(f"corruption/{name}", 8), VIEWS[name])
            for name in ("view1", "view2")
        ]
        seen, taught = (
            [context.student.call("image", images) for images in inputs]
            for inputs in ([item.images for item in drawn], list(VIEWS.values()))
        )
        parts = dict(
            mask=[item.mask for item in drawn],
            seen=[outputs["tokens"] for outputs in seen],
            taught=[outputs["tokens"] for outputs in taught],
            queries=[outputs["prefix"][:, 0] for outputs in seen],
            keys=[outputs["prefix"][:, 0] for outputs in taught],
        )
        loss = objective()(context.of("masked", {"centre": CENTRE}))
        return loss, {name: jnp.stack(values) for name, values in parts.items()}

    loss, parts = mmc.evaluate(run, mmc.params, VIEWS)
    return loss, {name: np.asarray(values, np.float64) for name, values in parts.items()}


def head(params: Any, x: np.ndarray) -> np.ndarray:
    """Two layers with GELU between, in NumPy."""
    first, second = params["layer_0"], params["layer_1"]
    x = x @ first["kernel"] + first["bias"]
    x = x * (1 + erf(x / 2**0.5)) / 2
    out: np.ndarray = x @ second["kernel"] + second["bias"]
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    p: np.ndarray = np.exp(x - logsumexp(x, axis=-1, keepdims=True))
    return p


def whole(patches: np.ndarray) -> np.ndarray:
    """[..., N, p p C] -> [..., H, W, C]."""
    lead, side = patches.shape[:-2], round(patches.shape[-2] ** 0.5)
    grid = patches.reshape(*lead, side, side, PATCH, PATCH, 3).swapaxes(-4, -3)
    out: np.ndarray = grid.reshape(*lead, side * PATCH, side * PATCH, 3)
    return out


def test_pixels_cost_their_absolute_error_where_they_are_corrupted(mmc: Bound, found: Any) -> None:
    loss, parts = found
    rebuilt = whole(head(mmc.params["masked_pixels"], parts["seen"]))  # [V, B, H, W, C]
    gap = np.abs(rebuilt - np.stack(list(VIEWS.values())))
    assert 0.3 < parts["mask"].mean() < 0.9
    expected = np.sum(gap.mean(axis=-1) * parts["mask"]) / np.sum(parts["mask"])
    np.testing.assert_allclose(loss.metrics["pixels"], expected, rtol=1e-4)


def test_half_corrupted_patches_are_named_as_the_centred_teacher_does_and_the_centre_follows(
    mmc: Bound, found: Any
) -> None:
    loss, parts = found
    scores, truth = (head(mmc.params["masked_patches"], parts[name]) for name in ("seen", "taught"))
    targets = softmax((truth - CENTRE) / 0.04)
    errors = -np.sum(targets * np.log(softmax(scores / 0.1)), axis=-1)  # [V, B, N]
    side = parts["mask"].shape[-1] // PATCH
    share = parts["mask"].reshape(2, 8, side, PATCH, side, PATCH).mean(axis=(3, 5)).reshape(2, 8, -1)
    assert np.any((share > 0) & (share < 0.5)) and np.any((share >= 0.5) & (share < 1))
    np.testing.assert_allclose(loss.metrics["patches"], np.mean(errors[share >= 0.5]), rtol=1e-3)
    moved = 0.9 * CENTRE + 0.1 * truth.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(loss.state["centre"], moved, rtol=1e-4, atol=1e-5)
    mean = targets.mean(axis=(0, 1, 2))
    entropy = -np.sum(mean * np.log(mean)) / np.log(len(mean))
    np.testing.assert_allclose(loss.metrics["prototype_entropy"], entropy, rtol=1e-3)


def test_images_are_told_apart_one_view_at_a_time_and_the_losses_add_up(mmc: Bound, found: Any) -> None:
    loss, parts = found
    layers = [mmc.params["masked_projector"][name]["kernel"] for name in ("layer_0", "layer_1")]

    def project(x: np.ndarray) -> np.ndarray:
        """Of one view; the norms' first scales are 1, and the last has none."""
        for index, kernel in enumerate(layers):
            x = x @ kernel
            x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
            x = x if index else np.maximum(x, 0)
        return unit(x)

    queries, keys = ([project(view) for view in parts[name]] for name in ("queries", "keys"))
    expected = 0.0
    for view in (0, 1):
        logits = queries[view] @ keys[1 - view].T / 0.2
        expected += 2 * 0.2 * np.mean(logsumexp(logits, axis=1) - np.diag(logits))
    np.testing.assert_allclose(loss.metrics["images"], expected, rtol=1e-3)
    total = sum(float(loss.metrics[name]) for name in ("pixels", "patches", "images"))
    np.testing.assert_allclose(loss.value, total, rtol=1e-5)


def test_every_loss_reaches_its_own_head_only(mmc: Bound) -> None:
    for term, head in zip(TERMS, ("pixels", "patches", "projector"), strict=True):
        alone = objective(**{other: float(other == term) for other in TERMS})
        grads = jax.grad(lambda params, alone=alone: mmc.evaluate(alone, params, VIEWS).value)(mmc.params)
        moved = {name for name in grads if any(np.any(leaf) for leaf in jax.tree.leaves(grads[name]))}
        assert moved == {"image", f"masked_{head}"}, (term, moved)


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
