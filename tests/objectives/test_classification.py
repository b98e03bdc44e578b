"""Supervised classification: the loss against NumPy, and a first gradient that reaches the tower."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import BATCH, experiment_of, model_config, random_batch
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import Context, Loss
from vlpjax.objectives.classification import Classification

CLASSES = BATCH // 2


def made(smoothing: float = 0.0, **fields: Any) -> tuple[Any, Any]:
    """The loss as a function of the parameters, and those; ``fields`` replace some of the batch."""
    config = model_config()
    objective = spec(Classification, classes=CLASSES, smoothing=smoothing)
    config.objectives = dict(classes=dict(weight=1.0, loss=objective))
    experiment, batch = experiment_of(config), {**random_batch(), **fields}
    params = nn.meta.unbox(jax.jit(experiment.initial_variables)(batch))["params"]

    def loss(params: Any) -> Loss:
        def run(towers: Towers) -> Loss:
            context = Context(towers, batch, jax.random.key(0), jnp.int32(0), train=False)
            features = context.encode("image", "image")["pooled"]
            losses = experiment.objectives["classes"][1](context.of("classes"))
            return losses._replace(state=features)

        return experiment.towers.apply({"params": params}, method=run)

    return loss, params


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_and_its_gradient_reaches_the_tower(smoothing: float) -> None:
    loss, params = made(smoothing)
    found = jax.jit(loss)(params)
    head = params["classes_classifier"]["linear"]
    logits = np.asarray(found.state, np.float64) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    labels = random_batch()["label"]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES
    assert float(found.value) == pytest.approx(-np.mean(np.sum(targets * logs, axis=1)), rel=1e-5)
    assert float(found.metrics["accuracy"]) == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    grads = jax.jit(jax.grad(lambda params: loss(params).value))(params)
    p = np.exp(logs) - targets
    np.testing.assert_allclose(grads["classes_classifier"]["linear"]["bias"], p.mean(axis=0), atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["image"]["patches"]))


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_label_that_is_no_class_does_not_pass_in_silence(wrong: int) -> None:
    loss, params = made(label=np.where(np.arange(BATCH) == 3, wrong, 0))
    assert np.isnan(jax.jit(loss)(params).value)


@pytest.mark.parametrize("fields", [dict(classes=1), dict(classes=3, smoothing=1.0)])
def test_what_does_not_work_is_told(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="two classes or more"):
        Classification(**fields)
