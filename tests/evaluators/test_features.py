"""Features that evaluators share: encoded once per step, data set, tower and parameters, and never kept longer."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import vlpjax.evaluators.base as base
from tests.evaluators.given import Given, dataset, variables
from tests.tiny import experiment_of, layout_of, model_config
from vlpjax.config import spec
from vlpjax.evaluators.base import Encoder, encode_all, shared_features

RNG = np.random.default_rng(0)
FEATURES, OTHERS = (RNG.normal(size=(11, 3)).astype(np.float32) for _ in range(2))
LABELS = np.arange(11)
LAYOUT = layout_of(8)
CONFIG = model_config()
CONFIG.towers = dict(image=spec(Given), text=spec(Given))
EXPERIMENT = experiment_of(CONFIG)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that were read, in order."""
    read = []
    whole = base.finite_batches

    def counted(pipeline: Any, layout: Any) -> Any:
        read.append(pipeline)
        return whole(pipeline, layout)

    monkeypatch.setattr(base, "finite_batches", counted)
    return read


def encode(params: Any, features: np.ndarray = FEATURES, labels: np.ndarray = LABELS, **how: Any) -> Any:
    encoder = Encoder(EXPERIMENT, LAYOUT, "image", "image", **how)
    encoded = encode_all(dataset(image=features, label=labels), {"": encoder}, params, LAYOUT)
    return np.asarray(encoded.features[""])[encoded.columns["valid"]], encoded.columns


def test_the_same_features_of_one_step_are_encoded_once(passes: list[Any]) -> None:
    params = variables(LAYOUT)
    with shared_features():
        first, columns = encode(params)
        again, _ = encode(dict(params))
        scaled, _ = encode(params, normalize=False)
    assert len(passes) == 1
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(scaled, 2 * FEATURES, rtol=1e-6)
    np.testing.assert_allclose(first, FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True), rtol=1e-5)
    assert columns["label"][columns["valid"]].tolist() == LABELS.tolist()


@pytest.mark.parametrize("change", ["data", "output", "parameters"])
def test_what_differs_is_encoded_anew(passes: list[Any], change: str) -> None:
    params = variables(LAYOUT)
    with shared_features():
        encode(params)
        features, _ = encode(
            variables(LAYOUT, 3.0) if change == "parameters" else params,
            OTHERS if change == "data" else FEATURES,
            output="pooled" if change == "output" else "embedding",
            normalize=False,
        )
    assert len(passes) == 2
    expected = {"data": 2 * OTHERS, "output": 2 * FEATURES, "parameters": 3 * FEATURES}[change]
    np.testing.assert_allclose(features, expected, rtol=1e-6)


def test_nothing_is_kept_for_the_next_step(passes: list[Any]) -> None:
    params = variables(LAYOUT)
    for _ in range(2):
        with shared_features():
            encode(params)
    assert len(passes) == 2
    encode(params)  # and without anything open nothing is shared at all
    encode(params)
    assert len(passes) == 4


def test_pipelines_that_keep_other_fields_share_features(passes: list[Any]) -> None:
    data = dataset(image=FEATURES, label=LABELS, extra=LABELS)
    encoder = Encoder(EXPERIMENT, LAYOUT, "image", "image")
    params = variables(LAYOUT)
    encoded = []
    with shared_features():
        for keep in (("image", "label"), ("image", "extra")):
            pipeline = type(data)(data.source, {}, batch_size=8, shuffle=False, repeat=False, keep=keep)
            encoded.append(encode_all(pipeline, {"": encoder}, params, LAYOUT))
    assert [sorted(part.columns) for part in encoded] == [
        ["index", "label", "valid"],
        ["extra", "index", "valid"],
    ]
    assert len(passes) == 2  # the second pass reads the columns; the features are there already
    assert jax.tree.all(jax.tree.map(np.array_equal, encoded[0].features, encoded[1].features))
