"""CLIP, SigLIP and SLIP: accumulated gradients are the big batch's; a classifier can be written in words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems import toy
from tests.systems.training import train, unit_rows
from tests.tiny import BATCH, assert_trees_close, experiment_of, model_config, random_batch
from vlpjax.config import Config, spec
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.contrastive import InfoNCE, Sigmoid
from vlpjax.objectives.ntxent import NTXent
from vlpjax.step import gradients, initial_state

RNG = np.random.default_rng(0)


def batch_of(rows: Any = slice(None)) -> dict[str, np.ndarray]:
    """A random batch with two more views."""
    batch = random_batch()
    more = {name: batch["image"] + np.float32(0.3) * RNG_NOISE[name] for name in RNG_NOISE}
    return {name: value[rows] for name, value in (batch | more).items()}


RNG_NOISE = {name: RNG.normal(size=(BATCH, 16, 16, 3)).astype(np.float32) for name in ("view1", "view2")}


def config_of(accumulate: int = 1, weights: tuple[float, ...] = (1.0, 1.0, 0.5)) -> Config:
    """CLIP, SigLIP and the image-only half of SLIP, over the same towers."""
    config = model_config(accumulate=accumulate)
    losses = dict(
        clip=spec(InfoNCE),
        siglip=spec(Sigmoid, same="label", chunks=2),
        simclr=spec(NTXent, projector=(12, 8)),
    )
    config.objectives = {
        name: dict(weight=weight, loss=loss)
        for (name, loss), weight in zip(losses.items(), weights, strict=True)
    }
    return config


@pytest.fixture(scope="module")
def state() -> Any:
    experiment = experiment_of(config_of())
    return jax.jit(lambda batch: initial_state(experiment, batch))(batch_of())


def grads_of(config: Config, state: Any, batch: Any = None) -> tuple[Any, Any]:
    batch = batch_of() if batch is None else batch
    experiment = experiment_of(config, len(batch["text"]))
    losses, _, grads = jax.jit(lambda state, batch: gradients(experiment, state, batch))(state, batch)
    return losses, grads


@pytest.fixture(scope="module")
def whole(state: Any) -> tuple[Any, Any]:
    return grads_of(config_of(), state)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_big_batch(state: Any, whole: Any, accumulate: int) -> None:
    losses, grads = grads_of(config_of(accumulate), state)
    assert_trees_close(grads, whole[1], rtol=2e-4, atol=2e-6)
    for name in losses:
        np.testing.assert_allclose(losses[name].value, whole[0][name].value, rtol=1e-5)


def test_the_mean_of_small_batches_is_another_loss(state: Any, whole: Any) -> None:
    parts = [grads_of(config_of(), state, batch_of(slice(half, half + 8)))[0] for half in (0, 8)]
    for name in ("clip", "siglip"):
        assert abs(float(np.mean([part[name].value for part in parts]) - whole[0][name].value)) > 0.05


def test_slips_second_task_trains_the_image_backbone_only(state: Any) -> None:
    _, grads = grads_of(config_of(weights=(0.0, 0.0, 1.0)), state)
    for name in ("text", "clip_logit_scale", "siglip_logit_scale", "siglip_logit_bias"):
        assert not any(np.any(x) for x in jax.tree.leaves(grads[name])), name
    assert not np.any(grads["image"]["projection"]["kernel"]["kernel"])
    assert np.any(grads["image"]["block_0"]["mlp"]["up"]["kernel"]) and np.any(
        grads["simclr_projector"]["layer_0"]["kernel"]
    )


# --- zero-shot --------------------------------------------------------------------------------------------------

DIGITS, STEPS, PAIRS, WORDS = 10, 150, 32, 16
SHAPES = np.stack([np.random.default_rng(digit).normal(size=(8, 8, 1)) for digit in range(DIGITS)]).astype(
    np.float32
)


def captions(digit: jax.Array) -> jax.Array:
    """ "a photo of the digit seven", a word each; 1 ends the text."""
    words = [jnp.full_like(digit, word) for word in (2, 3, 4)]
    return jnp.stack([*words, digit + 5, jnp.ones_like(digit)], axis=1)


def digits(seed: Any, count: int = PAIRS, shuffled: bool = False) -> dict[str, jax.Array]:
    """Noisy pictures and their captions, or those of others."""
    key_digit, key_noise, key_other = jax.random.split(jax.random.key(seed), 3)
    digit = jax.random.randint(key_digit, (count,), 0, DIGITS)
    image = jnp.asarray(SHAPES)[digit] + 0.5 * jax.random.normal(key_noise, (count, 8, 8, 1))
    said = jax.random.permutation(key_other, digit) if shuffled else digit
    return {"image": image, "text": captions(said), "label": said, "digit": digit}


def zero_shot(shuffled: bool) -> tuple[float, float]:
    """How often the classifier is right, and the mean probability that it gives to the right word."""
    test = digits(10_000, 400)
    towers = {
        "image": spec(ViT, image_size=8, patch=4, channels=1, width=32, depth=1, heads=2, embedding=16),
        "text": spec(TextTransformer, vocabulary=WORDS, length=5, width=32, depth=1, heads=2, embedding=16),
    }

    def read(towers: Towers) -> Any:
        image = unit_rows(towers.call("image", test["image"]))
        classifier = unit_rows(towers.call("text", captions(jnp.arange(DIGITS))))
        logits = jnp.exp(towers.call("clip_logit_scale")) * image @ classifier.T
        right = jnp.take_along_axis(jax.nn.softmax(logits), test["digit"][:, None], axis=1)
        return jnp.mean(jnp.argmax(logits, axis=1) == test["digit"]), jnp.mean(right)

    losses = {"clip": spec(InfoNCE, same="label")}
    accuracy, probability = train(towers, losses, lambda seed: digits(seed, shuffled=shuffled), STEPS).read(
        read
    )
    return float(accuracy), float(probability)


def test_a_classifier_written_in_words_works_if_captions_belong_to_their_images() -> None:
    assert zero_shot(shuffled=False)[0] > 0.9


def test_captions_of_other_images_teach_nothing() -> None:
    """Accuracy is that of ten guesses, one per digit; what tells chance from knowledge is the probability."""
    _, probability = zero_shot(shuffled=True)
    assert abs(probability - 1 / DIGITS) < 0.02


# --- SLIP -------------------------------------------------------------------------------------------------------


def probed(features: np.ndarray, labels: np.ndarray, test: np.ndarray, right: np.ndarray) -> float:
    """The accuracy of ridge regression onto classes."""
    center, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, y = ((z - center) / spread for z in (features, test))
    targets = np.eye(toy.CLASSES)[labels] - 1 / toy.CLASSES
    weights = np.linalg.solve(x.T @ x + len(x) * 0.01 * np.eye(x.shape[1]), x.T @ targets)
    return float(np.mean(np.argmax(y @ weights, axis=1) == right))


def pictures_of_few_words(seed: Any, count: int = 64) -> dict[str, jax.Array]:
    """Three views of each picture; captions tell two halves of the ten classes apart and no more."""
    batch = toy.views(seed, ("image", "view1", "view2"), count)
    half = batch["label"] % 2
    return {**batch, "text": jnp.stack([2 + half, jnp.ones_like(half)], axis=1), "half": half}


def test_where_captions_say_little_slips_image_tower_knows_more_than_clips() -> None:
    towers = {
        "image": spec(ViT, image_size=toy.SIZE, patch=4, width=32, depth=1, heads=2, embedding=16),
        "text": spec(TextTransformer, vocabulary=4, length=2, width=32, depth=1, heads=2, embedding=16),
    }
    seen, unseen = pictures_of_few_words(10_000, 400), pictures_of_few_words(10_001, 400)
    clip = {"clip": spec(InfoNCE, same="half")}
    slip = clip | {"simclr": spec(NTXent, projector=(32, 16))}
    accuracy = {}
    for name, losses in (("clip", clip), ("slip", slip)):
        run = train(towers, losses, pictures_of_few_words, 150, weights={"simclr": 0.5})
        features = [
            run.read(lambda towers, x=x: towers.call("image", x["image"])["pooled"]) for x in (seen, unseen)
        ]
        accuracy[name] = probed(
            features[0], np.asarray(seen["label"]), features[1], np.asarray(unseen["label"])
        )
    assert accuracy["slip"] > accuracy["clip"] + 0.05, accuracy
