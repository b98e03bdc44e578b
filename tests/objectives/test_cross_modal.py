"""Losses between modalities: who is encoded with dropout, the cheaper form of a correlation, one device and eight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.objectives.rig import compared, head_variables, slope
from tests.tiny import ROOT, assert_trees_close, experiment_of, layout_of
from vlpjax.config import load, spec
from vlpjax.errors import UserError
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.base import BatchCoupled, Context
from vlpjax.objectives.cross_modal import BarLIP, CrossModal, Rocket, SiamLIP, SwALIP, cross_correlation_loss
from vlpjax.step import initial_state, train_step

B, E, WIDE = 16, 6, 24
RNG = np.random.default_rng(0)
IMAGES, TEXTS = ("image", "image1", "image2"), ("text", "text1", "text2")
NAMES = [*(f"image:{view}" for view in IMAGES), *(f"text:{view}" for view in TEXTS)]
VIEWS = {name: RNG.normal(size=(B, E)).astype(np.float32) for name in NAMES}
STRONG = {name: x for name, x in VIEWS.items() if name[-1].isdigit()}
WEAK = {"image": VIEWS["image:image"], "text": VIEWS["text:text"]}
OBJECTIVES: dict[str, tuple[BatchCoupled, Any]] = {
    "rocket": (Rocket(projector=(8, 4)), {"weak": WEAK, "strong": STRONG}),
    "barlip": (BarLIP(projector=(8, 8)), {"student": VIEWS}),
    "wide_barlip": (BarLIP(projector=(8, WIDE)), {"student": VIEWS}),
    "siamlip": (SiamLIP(projector=(8, 4), predictor=(8, 4)), {"student": VIEWS}),
    "byolip": (
        SiamLIP(projector=(8, 4), predictor=(8, 4), teacher="ema"),
        {"student": VIEWS, "teacher": VIEWS},
    ),
    "swalip": (SwALIP(projector=(8, 4)), {"student": STRONG}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_are_the_same_on_eight_devices(name: str) -> None:
    objective, features = OBJECTIVES[name]
    variables = head_variables(objective, features)
    one, eight = (
        compared(objective, features, variables, layout=layout)
        for layout in (None, layout_of(8, replica=2, fsdp=4))
    )
    np.testing.assert_allclose(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.gradients, one.gradients, rtol=1e-3, atol=1e-6)


# --- the correlation of more features than examples -------------------------------------------------------------


def correlation_loss(first: Any, second: Any) -> float:
    """With the matrix written out."""
    matrix = np.asarray(first, np.float64).T @ np.asarray(second, np.float64) / B
    diagonal = np.diag(matrix)
    return float(np.sum((diagonal - 1) ** 2) + 0.3 * (np.sum(matrix**2) - np.sum(diagonal**2)))


@pytest.mark.parametrize("width", [E, B, WIDE])
def test_the_correlation_loss_is_its_formula_whichever_matrix_is_smaller(width: int) -> None:
    features = {name: RNG.normal(size=(B, width)).astype(np.float32) for name in ("first", "second")}

    def loss(features: Any) -> jax.Array:
        return cross_correlation_loss(features["first"], features["second"], 0.3)

    value, grads = jax.jit(jax.value_and_grad(loss))(features)
    np.testing.assert_allclose(value, correlation_loss(**features), rtol=1e-5)
    for name in features:
        direction = RNG.normal(size=(B, width))
        expected = slope(correlation_loss, features, name, direction)
        np.testing.assert_allclose(np.sum(grads[name] * direction), expected, rtol=1e-3)


def test_no_device_holds_the_correlations_of_more_features_than_examples() -> None:
    layout = layout_of(8)

    def loss(x: jax.Array) -> jax.Array:
        with layout.activate():
            return cross_correlation_loss(x, 2 * x, 0.3)

    x = jax.device_put(np.ones((B, WIDE), np.float32), layout.sharding("batch"))
    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert f"f32[{B // 8},{B}]" in text
    assert f"f32[{WIDE},{WIDE}]" not in text and f"f32[{B},{B}]" not in text


# --- encoding ---------------------------------------------------------------------------------------------------


def encoded(objective: CrossModal, seed: int, train: bool = True) -> dict[str, dict[str, np.ndarray]]:
    """The features of an objective whose text tower has dropout, under a seed of it."""
    towers = Towers.of(
        {
            "image": ViT(image_size=8, patch=4, width=8, depth=1, heads=2, embedding=4),
            "text": TextTransformer(20, 5, width=8, depth=1, heads=2, embedding=4, dropout=0.5),
        }
    )
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {name: rng.normal(size=(4, 8, 8, 3)).astype(np.float32) for name in IMAGES}
    batch |= {name: rng.integers(1, 20, (4, 5)).astype(np.int32) for name in TEXTS}

    def run(towers: Towers, train: bool) -> Any:
        context = Context(towers, batch, jax.random.key(0), jnp.int32(0), train=train, objective="loss")
        return objective.encode(context)

    variables = towers.init(jax.random.key(0), False, method=run)
    found: dict[str, dict[str, np.ndarray]] = jax.device_get(
        towers.apply(variables, train, method=run, rngs={"dropout": jax.random.key(seed)})
    )
    return found


def test_dropout_of_the_text_tower_acts_on_strong_texts_only() -> None:
    for objective in (Rocket(), BarLIP()):
        first, second, plain = encoded(objective, 1), encoded(objective, 2), encoded(objective, 1, False)
        for part in first:
            for name, x in first[part].items():
                changed = np.any(x != second[part][name]), np.any(x != plain[part][name])
                assert changed == (name in ("text:text1", "text:text2"),) * 2, name


def test_objectives_encode_what_they_compare() -> None:
    assert set(encoded(SwALIP(), 0)["student"]) == set(STRONG)
    assert set(encoded(BarLIP(), 0)["student"]) == set(VIEWS)
    found = encoded(Rocket(), 0)
    assert set(found["weak"]) == {"image", "text"} and set(found["strong"]) == set(STRONG)
    alone = encoded(Rocket(image_views=("image",), text_views=("text",)), 0)
    assert set(alone["weak"]) == {"image", "text"} and alone["strong"] == {}
    with pytest.raises(UserError, match="needs a weak view"):
        BarLIP(image_views=())


# --- the experiment's variants ----------------------------------------------------------------------------------


class Plain(nn.Module):
    """A tower that compiles in no time: two projections of the numbers as they are."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> dict[str, jax.Array]:
        pooled = nn.Dense(8, name="first")(inputs.reshape(len(inputs), -1).astype(jnp.float32))
        return {"pooled": pooled, "embedding": nn.Dense(4, name="second")(pooled)}


@pytest.mark.parametrize("variant", ["barlip", "byolip", "swalip"])
def test_a_variant_adds_its_loss_to_the_recipe_and_takes_a_step(variant: str) -> None:
    config = load(f"{ROOT}/experiments/contrastive/rocket.py:small,variant={variant}")
    config.towers = dict(image=spec(Plain), text=spec(Plain))
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=(B, 12)).astype(np.float32) for name in (*IMAGES, *TEXTS)}
    batch["label"] = np.arange(B, dtype=np.int32)
    experiment = experiment_of(config)

    def step(batch: Any) -> Any:
        state = initial_state(experiment, batch)
        return state, *train_step(experiment, state, batch)

    before, after, metrics = jax.jit(step)(batch)
    assert np.isfinite(metrics["loss"])
    own_heads = set() if variant == "swalip" else {variant}  # that one has the recipe's
    assert {name.partition("_")[0] for name in after.params} == {"image", "text", "rocket"} | own_heads
    weight = 0.2 if variant == "swalip" else 1.0
    total = metrics["rocket/loss"] + weight * metrics[f"{variant}/loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    assert set(after.teachers) == ({"ema"} if variant == "byolip" else set())
    old, new = (state.params["text"]["first"]["kernel"] for state in (before, after))
    assert np.any(old != new)


def test_there_are_no_other_variants() -> None:
    with pytest.raises(UserError, match="no variant 'mocolip'; there are clip, barlip"):
        load(f"{ROOT}/experiments/contrastive/rocket.py:small,variant=mocolip")
