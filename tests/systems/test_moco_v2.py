"""MoCo v2: the queue is first in, first out; the loss sees it as it was; keys carry no gradient."""

from __future__ import annotations

from collections import deque
from typing import Any

import jax
import numpy as np
import pytest

from tests.objectives.rig import compared, experiment_of, head_variables, new_state, run_config, update, views
from tests.tiny import assert_trees_close, assert_trees_equal, layout_of, unit
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.models.convnet import ConvNet
from vlpjax.objectives.moco import MoCoV2
from vlpjax.teachers import EMA

B, D, QUEUE = 16, 6, 40
RNG = np.random.default_rng(0)
FEATURES = {name: RNG.normal(size=(B, D)).astype(np.float32) for name in ("student", "teacher")}
SMALL = MoCoV2(queue=QUEUE, projector=(5,))


def test_the_positive_stands_before_the_queue() -> None:
    heads, teacher = head_variables(SMALL, FEATURES), head_variables(SMALL, FEATURES, seed=1)
    ours = compared(SMALL, FEATURES, heads, teacher)
    q, k = (
        unit(FEATURES[name].astype(np.float64) @ side["params"]["loss_projector"]["layer_0"]["kernel"])
        for name, side in (("student", heads), ("teacher", teacher))
    )
    queue = np.asarray(SMALL.initial_state(jax.random.key(0))["queue"], np.float64)
    logits = np.concatenate([np.sum(q * k, axis=1, keepdims=True), q @ queue.T], axis=1) / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, 0])
    np.testing.assert_allclose(ours.loss.value, expected, rtol=1e-5)


def test_the_queue_is_that_of_a_deque_of_keys() -> None:
    """Keys are what features are, under an identity projector; 40 places and batches of 16 never fit evenly."""
    heads = head_variables(MoCoV2(queue=QUEUE, projector=(D,)), FEATURES)
    heads["params"]["loss_projector"]["layer_0"]["kernel"] = np.eye(D, dtype=np.float32)
    objective = MoCoV2(queue=QUEUE, projector=(D,))
    state = objective.initial_state(jax.random.key(0))
    ring: deque[np.ndarray] = deque(np.asarray(state["queue"]), maxlen=QUEUE)
    for step in range(6):
        keys = np.random.default_rng(step).normal(size=(B, D)).astype(np.float32)
        state = compared(objective, {**FEATURES, "teacher": keys}, heads, state=state).loss.state
        ring.extend(unit(keys))
        oldest = int(state["oldest"])
        in_order = np.roll(np.asarray(state["queue"]), -oldest, axis=0)
        np.testing.assert_allclose(in_order, np.stack(ring), rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_the_keys() -> None:
    ours = compared(SMALL, FEATURES)
    assert_trees_equal(ours.teacher, jax.tree.map(np.zeros_like, ours.teacher))
    np.testing.assert_array_equal(ours.features["teacher"], 0.0)


def test_eight_devices_and_accumulation_give_the_same_update_and_the_same_queue() -> None:
    config = run_config(spec(MoCoV2, queue=32, projector=(16, 8)), dict(ema=spec(EMA, decay=0.9)))
    batch = views()
    state = new_state(config, batch)
    whole, _ = update(config, state, batch)
    config.accumulate = 2
    spread, _ = update(config, state, batch, layout_of(8))
    assert_trees_close(spread.params, whole.params, rtol=1e-4, atol=1e-6)
    assert_trees_close(spread.objectives, whole.objectives, rtol=1e-4, atol=1e-6)
    assert_trees_close(spread.teachers, whole.teachers, rtol=1e-4, atol=1e-6)


def test_keys_have_the_statistics_of_their_batch_and_only_queries_leave_theirs() -> None:
    config = run_config(spec(MoCoV2, queue=B, projector=(8,)), dict(ema=spec(EMA)))
    fields: dict[str, Any] = dict(image_size=8, channels=(8,), strides=(2,), dropout=0.5)
    config.towers.image = spec(ConvNet, **fields)
    batch, tower = views(), ConvNet(**fields)
    state = new_state(config, batch)
    after, _ = update(config, state, batch)
    variables = {"params": state.params["image"], "batch_stats": state.statistics["image"]}
    drawn = {"dropout": jax.random.key(0)}  # behind what is pooled
    queries, keys = (
        tower.apply(variables, batch[view], train=True, mutable="batch_stats", rngs=drawn)
        for view in ("view1", "view2")
    )
    layer = state.params["loss_projector"]["layer_0"]
    expected = unit(keys[0]["pooled"] @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(after.objectives["loss"]["queue"], expected, rtol=1e-4, atol=1e-5)
    assert_trees_close(after.statistics["image"], queries[1]["batch_stats"], rtol=1e-4, atol=1e-6)


def test_a_seed_draws_the_first_keys() -> None:
    config = run_config(spec(MoCoV2, queue=16, projector=(8,)), dict(ema=spec(EMA)))
    first, again, other = (
        experiment_of(config).initial_states()["loss"]["queue"] for config.seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.all(np.abs(first - other).max(axis=1) > 0.1)


def test_an_output_is_picked_by_name_or_by_its_token() -> None:
    batch = views()

    def key_of(output: str) -> Any:
        config = run_config(spec(MoCoV2, queue=16, projector=(8,), output=output), dict(ema=spec(EMA)))
        return update(config, new_state(config, batch), batch)[0].objectives["loss"]["queue"]

    np.testing.assert_array_equal(key_of("prefix/0"), key_of("pooled"))
    with pytest.raises(UserError, match=r"no output 'poled'.*'pooled'"):
        key_of("poled")


def test_a_queue_shorter_than_a_batch_is_told() -> None:
    with pytest.raises(UserError, match=r"MoCoV2.queue is 8.*batch of 16"):
        compared(MoCoV2(queue=8, projector=(5,)), FEATURES)
