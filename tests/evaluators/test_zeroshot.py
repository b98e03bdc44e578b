"""Zero-shot classification against NumPy, with ensembles of prompts and padded batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import experiment_of, layout_of, model_config, rows_of, unit
from vlpjax.config import spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.transforms import Tokenize
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Result
from vlpjax.evaluators.zeroshot import ZeroShot
from vlpjax.models.heads import Scalar

CLASSES, E = 7, 4
RNG = np.random.default_rng(3)
TABLE = RNG.normal(size=(128, E)).astype(np.float32)  # a feature per character
IMAGES = RNG.normal(size=(19, E)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, 19).tolist()
NAMES = [chr(ord("a") + label) for label in LABELS]
TEMPLATES = ("{}", "x{}", "{}yz")


@dataclass(frozen=True)
class Characters:
    """A tokenizer whose ids are code points."""

    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = 1
    unk_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Seen(nn.Module):
    """Passes its input on."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": x * Scalar(1.0, name="scale")()}


class Letters(nn.Module):
    """The sum of the features of the letters, with a length that depends on them."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
        words = jnp.asarray(TABLE)[ids] * (ids > 1)[..., None]
        return {"embedding": words.sum(axis=1) * Scalar(1.0, name="scale")()}


def evaluate(devices: int, names: list[str] = NAMES, labels: list[int] = LABELS, **fields: Any) -> Result:
    data = Pipeline(
        rows_of(image=list(IMAGES), label=labels, name=names), {}, batch_size=8, shuffle=False, repeat=False
    )
    config = model_config()
    config.towers = dict(image=spec(Seen), text=spec(Letters))
    layout = layout_of(devices)
    tokenize = Tokenize(Characters(), length=6)
    evaluator = ZeroShot(
        **{**dict(data=data, tokenize=tokenize, templates=TEMPLATES, ks=(1, 3, 50)), **fields}
    )
    params = {name: {"scale": {"value": np.float32(2.0)}} for name in ("image", "text")}
    return evaluator.make(experiment_of(config), layout)(
        {"params": jax.device_put(params, layout.replicated)}
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_accuracy_is_that_of_the_mean_of_normalised_prompts(devices: int) -> None:
    classes = sorted(set(NAMES), key=NAMES.index)
    classifier = []
    for name in classes:
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        features = [
            unit(sum(TABLE[ord(letter)].astype(np.float64) for letter in prompt)) for prompt in prompts
        ]
        classifier.append(unit(np.mean(features, axis=0)))
    order = np.argsort(-(unit(IMAGES) @ np.array(classifier).T), axis=1)
    right = order == np.array([classes.index(name) for name in NAMES])[:, None]
    result = evaluate(devices)
    assert result.metrics == {
        "top1": pytest.approx(right[:, :1].any(1).mean()),
        "top3": pytest.approx(right[:, :3].any(1).mean()),
        "mean_per_class_accuracy": pytest.approx(
            np.mean([right[np.array(NAMES) == name, 0].mean() for name in classes])
        ),
    }
    assert result.chance == {
        "top1": pytest.approx(1 / len(classes)),
        "top3": pytest.approx(3 / len(classes)),
        "mean_per_class_accuracy": pytest.approx(1 / len(classes)),
    }


def test_a_template_that_is_there_twice_changes_nothing() -> None:
    assert evaluate(1, templates=("{}", "x{}")) == evaluate(1, templates=("{}", "x{}") * 2)


def test_every_prompt_counts_alike_however_long_its_feature_is() -> None:
    """Three more letters make a longer feature; it must not outvote the other prompt."""
    long = "{}" + "x" * 3
    classes = sorted(set(NAMES), key=NAMES.index)
    letters = [[TABLE[ord(name)], TABLE[ord(name)] + 3 * TABLE[ord("x")]] for name in classes]

    def accuracy(classifier: list[np.ndarray]) -> float:
        best = np.argmax(unit(IMAGES) @ np.array(classifier).T, axis=1)
        return float(np.mean(best == [classes.index(name) for name in NAMES]))

    normalised = accuracy([unit(np.mean([unit(prompt) for prompt in pair], axis=0)) for pair in letters])
    summed = accuracy([unit(np.mean(pair, axis=0)) for pair in letters])
    assert normalised != summed
    assert evaluate(1, templates=("{}", long)).metrics["top1"] == pytest.approx(normalised)


def test_classes_of_one_name_are_one_class() -> None:
    merged = ["a" if name == "b" else name for name in NAMES]
    assert evaluate(1, names=merged).chance["top1"] == pytest.approx(1 / (len(set(NAMES)) - 1))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(data=None), ["'data'", "'tokenize'"]),
        (dict(tokenize=None), ["'data'", "'tokenize'"]),
        (dict(templates=("a photo",)), ["a photo", "'{}'"]),
        (dict(templates=()), ["at least one"]),
        (dict(label="lable"), ["'lable'", "image, label, name"]),
        (dict(image="imag"), ["'imag'", "image, text"]),
        (
            dict(names=["q", *NAMES[1:-1], "r"], labels=[50, *LABELS[1:-1], 50]),
            ["label=50", "'r'", "example 18"],
        ),
    ],
    ids=range(7),
)
def test_what_does_not_work_is_told(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(1, **fields)
    assert all(part in str(caught.value) for part in parts), caught.value
