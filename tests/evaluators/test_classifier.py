"""The classifier that was trained with a tower, judged on features that are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluators.given import Given, dataset
from tests.tiny import experiment_of, layout_of, model_config
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Result
from vlpjax.evaluators.classifier import TrainedClassifier
from vlpjax.objectives.classification import Classification

RNG = np.random.default_rng(0)
CLASSES = 7
X, KERNEL, BIAS = (RNG.normal(size=shape).astype(np.float32) for shape in ((21, 4), (4, CLASSES), (CLASSES,)))
LABELS = RNG.integers(0, CLASSES - 1, 21).astype(np.int32)  # the last class does not occur, and can be chosen


def evaluate(devices: int = 1, **fields: Any) -> Result:
    config = model_config()
    config.towers.image = spec(Given)
    config.objectives = dict(classes=dict(weight=1.0, loss=spec(Classification, classes=CLASSES)))
    layout = layout_of(devices)
    evaluator = TrainedClassifier(**{"data": dataset(image=X, label=LABELS), **fields})
    params = {
        "image": {"scale": {"value": np.float32(1.0)}},
        "classes_classifier": {"linear": {"kernel": KERNEL, "bias": BIAS}},
    }
    return evaluator.make(experiment_of(config), layout)({"params": params})


@pytest.mark.parametrize("devices", [1, 8])
def test_the_scores_are_those_of_its_logits_by_the_labels_as_they_are(devices: int) -> None:
    order = np.argsort(-(X @ KERNEL + BIAS), axis=1)
    hit = order == LABELS[:, None]
    result = evaluate(devices)
    per_class = [hit[label == LABELS, 0].mean() for label in np.unique(LABELS)]
    assert result.metrics == {
        "top1": pytest.approx(hit[:, 0].mean()),
        "top5": pytest.approx(hit[:, :5].any(axis=1).mean()),
        "mean_per_class_accuracy": pytest.approx(np.mean(per_class)),
    }
    assert result.chance["top1"] == pytest.approx(1 / CLASSES)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(data=None), ["TrainedClassifier.data is not set"]),
        (dict(objective="clases"), ["'clases'", "no Classification", "'classes'"]),
        (dict(data=dataset(image=X)), ["'label'", "from the batch"]),
    ],
    ids=range(3),
)
def test_what_does_not_work_is_told(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(**fields)
    assert all(part in str(caught.value) for part in parts), caught.value
