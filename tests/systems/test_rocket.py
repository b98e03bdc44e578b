"""The losses between modalities against formulas, and what CLIP-rocket leaves as it was."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.rig import compared, head_variables, scalars
from tests.systems import toy
from tests.systems.training import train, unit_rows
from tests.tiny import unit
from vlpjax.config import spec
from vlpjax.data.transforms import EasyAugment, RemoveStopWords
from vlpjax.errors import UserError
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.objectives.cross_modal import BarLIP, Rocket, SiamLIP, SwALIP, cross_correlation_loss

B, E = 16, 6
RNG = np.random.default_rng(0)
WEAK = {name: RNG.normal(size=(B, E)).astype(np.float32) for name in ("image", "text")}
VIEWS = {
    f"{side}:{side}{number}": RNG.normal(size=(B, E)).astype(np.float32)
    for side in ("image", "text")
    for number in ("", 1, 2)
}
STRONG = {name: x for name, x in VIEWS.items() if name[-1].isdigit()}


def whitened(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.mean(axis=0)
    left, _, right = np.linalg.svd(x, full_matrices=False)
    return left @ right * np.sqrt(len(x))


def standardized(x: np.ndarray) -> np.ndarray:
    """What BatchNorm does in training."""
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)


def linear(variables: Any, head: str, x: np.ndarray) -> np.ndarray:
    layer = variables["params"][f"loss_{head}"]["layer_0"]
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer.get("bias", 0.0))


# --- BarLIP -----------------------------------------------------------------------------------------------------


def test_whitened_features_that_are_equal_cost_nothing() -> None:
    v = whitened(WEAK["image"]).astype(np.float32)
    np.testing.assert_allclose(cross_correlation_loss(v, v, 0.005), 0.0, atol=1e-8)


def test_an_off_diagonal_correlation_counts_by_its_square() -> None:
    v = whitened(WEAK["image"])

    def part(amount: float) -> float:
        correlation = np.eye(E)
        correlation[0, 1] = amount
        return float(cross_correlation_loss(jnp.asarray(v), jnp.asarray(v @ correlation), 0.005))

    np.testing.assert_allclose(part(0.6), 4 * part(0.3), rtol=1e-4)
    np.testing.assert_allclose(part(0.3), 0.005 * 0.3**2, rtol=1e-4)


def test_barlip_is_its_formula_over_all_pairs() -> None:
    objective = BarLIP(projector=(4,))
    features = {"student": VIEWS}
    variables = head_variables(objective, features)
    loss = compared(objective, features, variables).loss
    v = {
        name: standardized(linear(variables, f"{name.partition(':')[0]}_projector", x))
        for name, x in VIEWS.items()
    }
    found = []
    for image, text in [("image", "text"), *((f"image{a}", f"text{b}") for a in (1, 2) for b in (1, 2))]:
        c = v[f"image:{image}"].T @ v[f"text:{text}"] / B
        on = np.sum((np.diag(c) - 1) ** 2)
        found.append(on + 0.005 * (np.sum(c**2) - np.sum(np.diag(c) ** 2)))
    np.testing.assert_allclose(loss.value, 0.025 * np.mean(found), rtol=1e-4)


# --- SiamLIP, BYOLIP --------------------------------------------------------------------------------------------


def test_siamlip_is_its_formula_and_its_targets_get_no_gradient() -> None:
    objective = SiamLIP(
        image_views=("image",), text_views=("text",), projector=(4,), predictor=(4,), teacher="ema"
    )
    features = {
        name: {"image:image": WEAK["image"], "text:text": WEAK["text"]} for name in ("student", "teacher")
    }
    variables = head_variables(objective, features)
    found = compared(objective, features, variables)
    v = {side: standardized(linear(variables, f"{side}_projector", WEAK[side])) for side in WEAK}
    p = {side: linear(variables, f"{side}_predictor", v[side]) for side in v}
    cosines = [
        np.sum(unit(p[a]) * unit(v[b]), axis=1).mean() for a, b in (("image", "text"), ("text", "image"))
    ]
    np.testing.assert_allclose(found.loss.value, 4 - 2 * sum(cosines), rtol=1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves((found.features["teacher"], found.teacher)))
    # Without a teacher the value is the same, and the gradient reaches features through predictions only.
    own = SiamLIP(image_views=("image",), text_views=("text",), projector=(4,), predictor=(4,))
    alone = compared(own, {"student": features["student"]}, variables)
    np.testing.assert_allclose(alone.loss.value, found.loss.value, rtol=1e-6)
    for name in features["student"]:
        np.testing.assert_allclose(
            alone.features["student"][name], found.features["student"][name], rtol=1e-4, atol=1e-6
        )
    with pytest.raises(UserError, match="so they are equal"):
        SiamLIP(projector=(8,), predictor=(4,)).heads()


# --- SwALIP -----------------------------------------------------------------------------------------------------


def balanced(scores: np.ndarray) -> np.ndarray:
    codes = np.exp(scores / 0.05)
    for _ in range(3):
        codes /= codes.sum(axis=0, keepdims=True)
        codes /= codes.sum(axis=1, keepdims=True)
    return codes


def test_swalip_compares_each_pair_with_the_balanced_other() -> None:
    objective = SwALIP(projector=(4,))
    features = {"student": VIEWS}
    variables = head_variables(objective, features)
    loss = compared(objective, features, variables).loss
    h = {
        name: unit(linear(variables, f"{name.partition(':')[0]}_projector", x)) for name, x in STRONG.items()
    }
    found = []
    for a, b in np.ndindex(2, 2):
        similarity = h[f"image:image{a + 1}"] @ h[f"text:text{b + 1}"].T
        other = h[f"image:image{2 - a}"] @ h[f"text:text{2 - b}"].T
        for scores, target in ((similarity, balanced(other)), (similarity.T, balanced(other.T))):
            logits = scores / 0.1
            log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            found.append(-np.mean(np.sum(target * log_softmax, axis=1)))
    np.testing.assert_allclose(loss.value, np.mean(found), rtol=1e-3)
    with pytest.raises(UserError, match="one weak and two strong views"):
        SwALIP(image_views=("image",))


# --- rocket -----------------------------------------------------------------------------------------------------


def test_without_strong_views_it_is_clip() -> None:
    rocket = Rocket(image_views=("image",), text_views=("text",), label_smoothing=0.3)
    ours = compared(rocket, {"weak": WEAK, "strong": {}})
    features = {side: unit(x).astype(np.float32) for side, x in WEAK.items()}
    clip = compared(InfoNCE(), features, scalars(logit_scale=-np.log(0.07)))
    np.testing.assert_allclose(ours.loss.value, clip.loss.value, rtol=1e-6)
    assert set(rocket.heads()) == {"logit_scale"}


def test_smoothing_and_weights_are_those_of_local_pairs() -> None:
    features = {"weak": WEAK, "strong": STRONG}
    found = {}
    for smoothing in (0.0, 0.3):
        objective = Rocket(projector=(4,), label_smoothing=smoothing)
        variables = head_variables(objective, features)
        found[smoothing] = compared(objective, features, variables).loss
    np.testing.assert_array_equal(found[0.0].metrics["global"], found[0.3].metrics["global"])
    assert abs(found[0.0].metrics["local"] - found[0.3].metrics["local"]) > 1e-3
    h = {
        name: unit(linear(variables, f"{name.partition(':')[0]}_projector", x)) for name, x in STRONG.items()
    }
    total = 0.0
    for a, b in np.ndindex(2, 2):
        logits = 10.0 * h[f"image:image{a + 1}"] @ h[f"text:text{b + 1}"].T
        for side in (logits, logits.T):
            log_softmax = side - np.log(np.exp(side).sum(axis=1, keepdims=True))
            total -= np.mean(0.7 * np.diag(log_softmax) + 0.3 * log_softmax.mean(axis=1)) / 8
    np.testing.assert_allclose(found[0.3].metrics["local"], total, rtol=1e-4)
    value = found[0.3].metrics
    np.testing.assert_allclose(found[0.3].value, (value["global"] + 2 * value["local"]) / 3, rtol=1e-6)


# --- the learning effect ----------------------------------------------------------------------------------------

STORED, BATCH, STEPS = 200, 32, 200
WORDS, SAID = 32, 6


def words(key: jax.Array, label: jax.Array) -> jax.Array:
    """The class's word among words that say nothing; 1 ends the text."""
    noise = jax.random.randint(key, (len(label), SAID - 1), 2, WORDS - toy.CLASSES)
    place = jax.random.randint(jax.random.fold_in(key, 1), (len(label),), 0, SAID - 1)
    said = jnp.where(jnp.arange(SAID - 1) == place[:, None], WORDS - toy.CLASSES + label[:, None], noise)
    return jnp.concatenate([said, jnp.ones_like(label)[:, None]], axis=1)


def stored() -> dict[str, jax.Array]:
    """The few pairs that there are to learn from."""
    label = jax.random.randint(jax.random.key(5), (STORED,), 0, toy.CLASSES)
    return {"image": toy.images(jax.random.key(6), label), "text": words(jax.random.key(7), label)}


def weak_and_strong(pairs: Any, seed: Any) -> dict[str, jax.Array]:
    """Some pairs; strong images are shifted, darker or brighter, and noisy, strong texts have lost a word."""
    key = jax.random.key(seed)
    rows = jax.random.randint(key, (BATCH,), 0, STORED)
    batch = {name: x[rows] for name, x in pairs.items()}
    for number in (1, 2):
        own = jax.random.fold_in(key, number)
        shift = jax.random.randint(own, (BATCH, 2), -1, 2)
        light = jax.random.uniform(own, (BATCH, 1, 1, 1), minval=0.6, maxval=1.4)
        moved = light * jax.vmap(lambda x, by: jnp.roll(x, by, axis=(0, 1)))(batch["image"], shift)
        batch[f"image{number}"] = moved + 0.2 * jax.random.normal(own, moved.shape)
        lost = jnp.arange(SAID) == jax.random.randint(own, (BATCH, 1), 0, SAID - 1)
        batch[f"text{number}"] = jnp.where(lost, 2, batch["text"])
    return batch


def test_of_few_pairs_the_recipe_learns_more_than_clip() -> None:
    towers = {
        "image": spec(ViT, image_size=toy.SIZE, patch=4, width=32, depth=1, heads=2, embedding=16),
        "text": spec(
            TextTransformer, vocabulary=WORDS, length=SAID, width=32, depth=1, heads=2, embedding=16, dropout=0.1
        ),
    }  # fmt: skip
    pairs, label = jax.jit(stored)(), jax.random.randint(jax.random.key(8), (400,), 0, toy.CLASSES)
    image, names = jax.jit(toy.images)(jax.random.key(9), label), jnp.arange(toy.CLASSES)
    prompts = jnp.stack([WORDS - toy.CLASSES + names, jnp.ones_like(names)], axis=1)

    def read(towers: Towers) -> Any:
        classifier = unit_rows(towers.call("text", prompts))
        return jnp.mean(jnp.argmax(unit_rows(towers.call("image", image)) @ classifier.T, axis=1) == label)

    clip, rocket = (
        float(train(towers, {"loss": loss}, functools.partial(weak_and_strong, pairs), STEPS).read(read))
        for loss in (spec(InfoNCE), spec(Rocket, projector=(64, 16)))
    )
    assert rocket > clip + 0.05, (clip, rocket)


# --- texts ------------------------------------------------------------------------------------------------------


def drawn(transform: Any, text: str, seed: int, **more: str) -> list[str]:
    return transform.random_map({"caption": text, **more}, np.random.default_rng(seed))["caption"].split()


def test_stop_words_go() -> None:
    text = "a dog and the cat under it"
    assert drawn(RemoveStopWords(probability=1.0), text, 0) == ["dog", "cat"]
    assert drawn(RemoveStopWords(probability=0.0), text, 0) == text.split()
    assert drawn(RemoveStopWords(probability=1.0), "it is", 0) == ["it", "is"]


def test_easy_augmentation_does_one_operation() -> None:
    text = ["one", "two", "three", "four", "five"]
    for seed in range(8):
        swapped = drawn(EasyAugment(weights=(0, 1, 0)), " ".join(text), seed)
        assert (
            sorted(swapped) == sorted(text) and sum(a != b for a, b in zip(swapped, text, strict=True)) == 2
        )
        left = drawn(EasyAugment(weights=(0, 0, 1)), " ".join(text), seed)
        assert len(left) == 4 and [word for word in text if word in left] == left
        more = drawn(EasyAugment(weights=(1, 0, 0)), " ".join(text), seed, keywords="six|seven")
        assert len(more) == 6 and set(more) - set(text) <= {"six", "seven"}
    assert drawn(EasyAugment(weights=(0, 0, 1)), "alone", 0) == ["alone"]
    with pytest.raises(UserError, match="not all 0"):
        EasyAugment(weights=(0, 0, 0))
