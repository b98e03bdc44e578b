"""Next-token prediction with frames between words: against the model that reads both, on one device and eight."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import (
    abstract_of,
    assert_trees_close,
    experiment_of,
    layout_of,
    model_config,
    on_host,
)
from vlpjax.config import Config, build, spec
from vlpjax.errors import UserError
from vlpjax.mesh import Layout
from vlpjax.models.connectors import AdaptiveAveragePool, MlpConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.objectives.visual_next_token import VisualNextToken
from vlpjax.step import gradients, initial_state

ROWS, LENGTH, VOCABULARY, FRAMES, EACH, SIZE = 8, 32, 24, 6, 2, 16
PLACEHOLDER = VOCABULARY  # behind the vocabulary


def rows() -> dict[str, np.ndarray]:
    """Rows of two videos; 0 to 6 frames in all, so that frames fill none, some or all of the room."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH + 1), np.int32)
    for row, shown in enumerate([0, 1, 2, 3, 4, 5, 6, 6]):
        first = shown // 2
        tokens[row, 1 : 1 + first * EACH] = PLACEHOLDER
        tokens[row, 16 : 16 + (shown - first) * EACH] = PLACEHOLDER
        segments[row, 15:], segments[row, 29 + row % 3 :] = 2, 0
    video = rng.integers(0, 256, (ROWS, FRAMES, SIZE, SIZE, 3)).astype(np.uint8)
    return {"tokens": tokens, "segment_ids": segments, "video": video}


BATCH = rows()


def config_of(accumulate: int = 1, **fields: Any) -> Config:
    config = model_config(accumulate=accumulate)
    config.towers = dict(
        image=spec(ViT, image_size=SIZE, patch=4, width=16, depth=1, heads=2, mlp_ratio=2.0, pool="none"),
        connector=spec(
            nn.Sequential, layers=(spec(AdaptiveAveragePool, grid=(1, EACH)), spec(MlpConnector, width=16))
        ),
        decoder=spec(
            Decoder, vocabulary=VOCABULARY, width=16, depth=2, heads=4, kv_heads=2, mlp_dim=24, tied=False, scan=True
        ),
    )  # fmt: skip
    given = dict(segment_field="segment_ids", placeholder=PLACEHOLDER, chunk=8, frames_at_once=2)
    config.objectives = dict(next=dict(weight=1.0, loss=spec(VisualNextToken, **{**given, **fields})))
    return config


@functools.cache
def state() -> Any:
    experiment = experiment_of(config_of(), ROWS)
    return on_host(jax.jit(lambda batch: initial_state(experiment, batch))(BATCH))


def found(config: Config, layout: Layout | None = None) -> Any:
    """The objective's value, and the gradients."""
    experiment = experiment_of(config, ROWS)

    def run(state: Any, batch: Any) -> Any:
        losses, _, grads = gradients(experiment, state, batch)
        return losses["next"], grads

    if layout is None:
        return on_host(jax.jit(run)(state(), BATCH))
    placed = jax.device_put(state(), abstract_of(experiment, BATCH, layout)[1])
    with layout.activate():
        return on_host(jax.jit(run)(placed, jax.device_put(BATCH, layout.sharding("batch"))))


@functools.cache
def on_one_device() -> Any:
    return found(config_of())


def test_the_loss_and_its_gradients_are_those_of_the_words_that_the_whole_model_predicts() -> None:
    towers = build(config_of().towers)
    model = VisionLanguageModel(**towers, image_token=PLACEHOLDER)
    tokens, segments = BATCH["tokens"], BATCH["segment_ids"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = (same & (tokens[:, 1:] != PLACEHOLDER)).astype(np.float32)

    def loss(params: Any) -> jax.Array:
        images = jnp.asarray(BATCH["video"], jnp.float32) / 127.5 - 1
        outputs = model.apply({"params": params}, tokens[:, :-1], images, segment_ids=segments[:, :-1])
        logs = jax.nn.log_softmax(outputs["logits"])
        labels = np.minimum(tokens[:, 1:], VOCABULARY - 1)
        return (
            -jnp.sum(weights * jnp.take_along_axis(logs, labels[..., None], axis=2)[..., 0]) / weights.sum()
        )

    value, grads = jax.jit(jax.value_and_grad(loss))(state().params)
    ours, our_grads = on_one_device()
    np.testing.assert_allclose(ours.value, value, rtol=1e-5)
    assert ours.metrics["tokens"] == weights.sum()
    assert_trees_close(our_grads, grads, rtol=1e-5, atol=1e-6)


def test_accumulation_is_exact() -> None:
    assert_trees_close(found(config_of(accumulate=4)), on_one_device(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "ring": 2, "ulysses": 2}, {"ring": 8}], ids=str)
def test_every_mesh_has_the_same_loss_and_gradients(sizes: dict[str, int]) -> None:
    # Neither four nor eight ranks divide six frames.
    ours = found(config_of(frames_at_once=1), layout_of(8, **sizes))
    assert_trees_close(ours, on_one_device(), rtol=1e-5, atol=1e-6)


def test_frames_of_a_wrong_form_are_refused() -> None:
    experiment = experiment_of(config_of(), ROWS)
    flat = {**BATCH, "video": BATCH["video"][:, 0]}
    with pytest.raises(UserError, match=r"Frames are \[batch, frames, height, width, channels\]"):
        jax.eval_shape(lambda batch: gradients(experiment, state(), batch), flat)
