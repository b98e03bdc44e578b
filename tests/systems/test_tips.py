"""TIPS: two captions with a class token each, one large crop, masked patches, and a teacher that gets no gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.objectives.rig import Patches, compared, experiment_of, head_variables, views
from tests.systems.test_dino import FEATURES, logits_of, softmax
from tests.tiny import ROOT, assert_trees_equal
from vlpjax.config import load, spec
from vlpjax.models.text import TextTransformer
from vlpjax.objectives.crops import crop_pairs
from vlpjax.objectives.dino import DINO
from vlpjax.step import gradients, initial_state

B = 16


def config() -> Any:
    """The experiment's objectives and teacher, on small towers."""
    config = load(f"{ROOT}/experiments/contrastive/tips.py")
    text = spec(
        TextTransformer, vocabulary=20, length=6, width=16, depth=1, heads=2, causal=False, pool="mean"
    )
    config.towers = dict(image=spec(Patches), text=text)
    config.objectives.patches.loss.update(prototypes=8, patch_prototypes=8, hidden=(8,), bottleneck=8)
    for name in ("web", "synthetic"):
        config.objectives[name].loss.same = None  # random batches have no labels
    return config


def batch(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    texts = {name: rng.integers(1, 20, (B, 6)).astype(np.int32) for name in ("text", "synthetic")}
    return {**views(seed, image=16, local1=8, local2=8), **texts}


def test_each_caption_reaches_its_own_class_token_and_all_three_losses_add_up() -> None:
    experiment, data = experiment_of(config()), batch()
    state = jax.jit(lambda data: initial_state(experiment, data))(data)

    def run(data: Any) -> Any:
        losses, _, grads = gradients(experiment, state, data)
        return {name: loss.value for name, loss in losses.items()}, grads

    run = jax.jit(run)
    losses, grads = run(data)
    assert float(losses["patches"]) > 0
    assert np.any(grads["image"]["mask_token"])
    assert set(state.teachers["ema"]) == {"image", "patches_head", "patches_patch_head"}
    other = {**data, "synthetic": batch(1)["synthetic"]}
    changed, _ = run(other)
    np.testing.assert_array_equal(changed["web"], losses["web"])  # the other caption is none of its business
    assert abs(float(changed["synthetic"] - losses["synthetic"])) > 1e-5
    swapped, _ = run({**data, "text": data["synthetic"], "synthetic": data["text"]})
    before, after = (0.5 * float(x["web"]) + 0.5 * float(x["synthetic"]) for x in (losses, swapped))
    assert abs(before - after) > 1e-5
    same, _ = run({**data, "synthetic": data["text"]})
    equal = state.params["image"]["prefix"]
    twins = {name: np.concatenate([x[..., :16], x[..., :16]], axis=-1) for name, x in equal.items()}
    state = state.replace(params={**state.params, "image": {**state.params["image"], "prefix": twins}})
    alike = jax.jit(lambda data: gradients(experiment, state, data)[0])({**data, "synthetic": data["text"]})
    np.testing.assert_allclose(alike["web"].value, alike["synthetic"].value, rtol=1e-6)
    np.testing.assert_allclose(same["web"], alike["web"].value, rtol=1e-6)  # then the sum is one InfoNCE


def test_one_large_crop_is_predicted_from_the_small_ones_only() -> None:
    np.testing.assert_array_equal(crop_pairs(1, 4), np.array([[0, 1, 1, 1]], np.float32) / 3)


def test_a_student_that_is_its_teacher_has_the_cross_entropy_of_sharpened_and_plain() -> None:
    objective = DINO(
        global_views=("image",), local_views=("local1",), prototypes=9, hidden=(8,), bottleneck=5,
        teacher_temperature=(0.07, 0.07),
    )  # fmt: skip
    seen = FEATURES["teacher"][:, :1]
    features = {"student": np.concatenate([seen, seen], axis=1), "teacher": seen}
    heads = head_variables(objective, features)
    ours = compared(objective, features, heads)
    logits = logits_of(heads, seen[:, 0])
    expected = -np.mean(np.sum(softmax(logits / 0.07) * np.log(softmax(logits / 0.1)), axis=-1))
    np.testing.assert_allclose(ours.loss.value, expected, rtol=1e-4)
    assert_trees_equal(ours.teacher, jax.tree.map(np.zeros_like, ours.teacher))
    assert jnp.any(ours.features["student"][:, 1])
    np.testing.assert_array_equal(
        ours.features["student"][:, 0], 0.0
    )  # the large crop has no pair with itself
