"""Next-token prediction: against a loop in NumPy, on one device and eight, accumulated or not, packed or not."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import abstract_of, assert_trees_close, experiment_of, layout_of, model_config, on_host
from vlpjax.config import Config, spec
from vlpjax.errors import UserError
from vlpjax.mesh import Layout
from vlpjax.models.decoder import Decoder
from vlpjax.objectives.next_token import NextToken
from vlpjax.step import gradients, initial_state

ROWS, LENGTH, VOCABULARY, Z_LOSS = 16, 8, 24, 0.1
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
# Documents of several lengths, and padding at the end of some rows.
SEGMENTS = np.sort(RANDOM.integers(1, 4, (ROWS, LENGTH + 1)), axis=1).astype(np.int32)
SEGMENTS[3:7, 6:] = 0
BATCH = {"tokens": IDS, "segment_ids": SEGMENTS}


def config_of(accumulate: int = 1, **fields: Any) -> Config:
    config = model_config(accumulate=accumulate)
    decoder = spec(
        Decoder, vocabulary=VOCABULARY, width=16, depth=2, heads=2, mlp_dim=24, tied=False, scan=True
    )
    config.towers = dict(decoder=decoder)
    loss = spec(NextToken, **{**dict(segment_field="segment_ids", z_loss=Z_LOSS, chunk=3), **fields})
    config.objectives = dict(next=dict(weight=1.0, loss=loss))
    return config


@pytest.fixture(scope="module")
def state() -> Any:
    experiment = experiment_of(config_of())
    return on_host(jax.jit(lambda batch: initial_state(experiment, batch))(BATCH))


def grads_of(config: Config, state: Any, layout: Layout | None = None) -> Any:
    """The objective's loss, and the gradients."""
    experiment, batch = experiment_of(config), BATCH

    def run(state: Any, batch: Any) -> Any:
        losses, _, grads = gradients(experiment, state, batch)
        return losses["next"], grads

    if layout is None:
        return on_host(jax.jit(run)(state, batch))
    state = jax.device_put(state, abstract_of(experiment, batch, layout)[1])
    with layout.activate():
        return on_host(jax.jit(run)(state, jax.device_put(batch, layout.sharding("batch"))))


@pytest.fixture(scope="module")
def found(state: Any) -> Any:
    return grads_of(config_of(), state)


def test_the_loss_is_the_mean_over_all_tokens_that_follow_one_of_their_document(
    state: Any, found: Any
) -> None:
    decoder = Decoder(VOCABULARY, width=16, depth=2, heads=2, mlp_dim=24, tied=False, scan=True)
    variables = {"params": state.params["decoder"]}
    apply = jax.jit(lambda ids: decoder.apply(variables, ids)["logits"])
    nats, squares, right, count = 0.0, 0.0, 0, 0
    for ids, segments in zip(IDS, SEGMENTS, strict=True):
        for number in set(segments.tolist()) - {0}:
            document = ids[segments == number]
            # Alone, and filled up with what no earlier token sees.
            logits = np.asarray(apply(np.resize(document, (1, LENGTH + 1)))[0], np.float64)
            for place, label in enumerate(document[1:]):
                partition = np.log(np.sum(np.exp(logits[place])))
                nats += partition - logits[place, label]
                squares += partition**2
                right += int(np.argmax(logits[place]) == label)
                count += 1
    loss, _ = found
    np.testing.assert_allclose(loss.value, (nats + Z_LOSS * squares) / count, rtol=1e-5)
    expected = {
        "nats": nats / count,
        "perplexity": np.exp(nats / count),
        "accuracy": right / count,
        "tokens": count,
        "filled": np.mean(SEGMENTS > 0),
    }
    assert set(loss.metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(loss.metrics[name], value, rtol=1e-5)


def test_accumulation_is_exact(state: Any, found: Any) -> None:
    accumulated = grads_of(config_of(accumulate=4), state)
    assert_trees_close(accumulated, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "ring": 2, "ulysses": 2}, {"ring": 8}],
    ids=str,
)
def test_every_mesh_has_the_same_loss_and_gradients(state: Any, found: Any, sizes: dict[str, int]) -> None:
    assert_trees_close(grads_of(config_of(), state, layout_of(8, **sizes)), found, rtol=1e-4, atol=1e-6)


def test_without_segments_every_token_but_the_first_counts(state: Any) -> None:
    loss, _ = grads_of(config_of(segment_field=""), state)
    assert loss.metrics["tokens"] == ROWS * LENGTH and "filled" not in loss.metrics


def test_a_token_counts_as_much_as_its_weight_says(state: Any, found: Any) -> None:
    """The loss is the mean of those of any two parts of the tokens, by their weights."""
    weights = np.where(IDS % 3 == 0, 0.0, np.where(SEGMENTS == 2, 2.0, 1.0)).astype(np.float32)

    experiment = experiment_of(config_of(weight_field="weights"))
    run = jax.jit(lambda state, batch: gradients(experiment, state, batch)[0]["next"])

    def loss(weights: np.ndarray) -> Any:
        return on_host(run(state, {**BATCH, "weights": weights}))

    whole, parts = (
        loss(weights),
        [loss(np.where(SEGMENTS == 2, weights, 0)), loss(np.where(SEGMENTS != 2, weights, 0))],
    )
    counts = [part.metrics["tokens"] for part in parts]
    assert counts[0] == 2 * np.sum((SEGMENTS[:, 1:] == 2) & (SEGMENTS[:, :-1] == 2) & (IDS[:, 1:] % 3 != 0))
    np.testing.assert_allclose(whole.metrics["tokens"], sum(counts))
    mean = sum(count * part.value for count, part in zip(counts, parts, strict=True)) / sum(counts)
    np.testing.assert_allclose(whole.value, mean, rtol=1e-5)
    assert_trees_close(loss(np.ones(IDS.shape, np.float32)), found[0], rtol=1e-6)


def test_segments_are_one_per_token(state: Any) -> None:
    experiment = experiment_of(config_of())
    short = {**BATCH, "segment_ids": SEGMENTS[:, :-1]}
    with pytest.raises(UserError, match=r"'segment_ids' has the shape \(16, 8\), but 'tokens' has \(16, 9\)"):
        jax.eval_shape(lambda batch: gradients(experiment, state, batch), short)


def test_the_first_token_of_a_row_is_not_predicted() -> None:
    assert NextToken().tokens(BATCH) == LENGTH
