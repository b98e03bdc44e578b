"""SwAV: its loss, its prototypes at length one, its queue, and the collapse that balanced codes prevent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.rig import compared, gradients_of, head_variables, new_state, run_config, update, views
from tests.systems.toy import train
from tests.tiny import assert_trees_close, assert_trees_equal, layout_of, unit
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.objectives.assignment import sinkhorn
from vlpjax.objectives.swav import SwAV

B, D, V = 16, 6, 4
LOCAL = ("local1", "local2")
FEATURES = np.random.default_rng(0).normal(size=(B, V, D)).astype(np.float32)
SMALL: dict[str, Any] = dict(local_views=LOCAL, projector=(5,), prototypes=7)
CROPS = dict(global1=8, global2=8, local1=4, local2=4)


def scores_of(objective: SwAV, heads: Any) -> np.ndarray:
    z = unit(FEATURES.astype(np.float64) @ heads["params"]["loss_projector"]["layer_0"]["kernel"])
    scores: np.ndarray = z @ heads["params"]["loss_prototypes"]["kernel"]
    return scores


def swapped(scores: np.ndarray, codes: list[np.ndarray], temperature: float = 0.1) -> float:
    """Every crop but the provider predicts the provider's code."""
    total = 0.0
    for provider, code in enumerate(codes):
        others = [view for view in range(scores.shape[1]) if view != provider]
        for view in others:
            logits = scores[:, view] / temperature
            logarithms = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            total -= np.mean(np.sum(code * logarithms, axis=1)) / len(others) / len(codes)
    return total


def test_the_loss_is_that_of_swapped_codes() -> None:
    objective = SwAV(**SMALL)
    heads = head_variables(objective, FEATURES)
    scores = scores_of(objective, heads)
    codes = [np.asarray(sinkhorn(scores[:, view].astype(np.float32), 0.05, 3)) for view in range(2)]
    ours = compared(objective, FEATURES, heads)
    np.testing.assert_allclose(ours.loss.value, swapped(scores, codes), rtol=1e-4)


def test_a_full_queue_takes_part_in_the_balance_after_its_start() -> None:
    objective = SwAV(**SMALL, queue=24, queue_start="5 steps")
    heads = head_variables(objective, FEATURES)
    scores = scores_of(objective, heads)
    queue = unit(np.random.default_rng(1).normal(size=(24, 2, 5))).astype(np.float32)
    earlier = queue @ heads["params"]["loss_prototypes"]["kernel"]
    alone = [np.asarray(sinkhorn(scores[:, view].astype(np.float32), 0.05, 3)) for view in range(2)]
    joined = [
        np.asarray(sinkhorn(np.concatenate([scores[:, view], earlier[:, view]]).astype(np.float32), 0.05, 3))[
            :B
        ]
        for view in range(2)
    ]
    for seen, step, codes in ((24, 5, joined), (24, 4, alone), (23, 9, alone)):
        state = {"queue": jnp.asarray(queue), "seen": np.int32(seen), "oldest": np.int32(20)}
        ours = compared(objective, FEATURES, heads, state=state, step=step)
        np.testing.assert_allclose(ours.loss.value, swapped(scores, codes), rtol=1e-4)
    z = unit(FEATURES.astype(np.float64) @ heads["params"]["loss_projector"]["layer_0"]["kernel"])
    places = (20 + np.arange(B)) % 24
    np.testing.assert_allclose(ours.loss.state["queue"][places], z[:, :2], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ours.loss.state["queue"][12:20], queue[12:20])
    assert ours.loss.state["seen"] == 24


def test_prototypes_have_length_one_after_every_update_and_rest_at_the_start() -> None:
    config = run_config(
        spec(SwAV, local_views=LOCAL, projector=(16, 8), prototypes=12, freeze_prototypes="1 step")
    )
    batch = views(**CROPS)
    first = new_state(config, batch)
    second, _ = update(config, first, batch)
    third, _ = update(config, second, batch)
    kernels = [state.params["loss_prototypes"]["kernel"] for state in (first, second, third)]
    for kernel in kernels:
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-6)
    assert np.max(np.abs(kernels[2] - kernels[1])) > 1e-3
    assert np.any(
        second.params["loss_projector"]["layer_0"]["kernel"]
        != first.params["loss_projector"]["layer_0"]["kernel"]
    )


def test_devices_share_one_balance() -> None:
    objective = SwAV(local_views=LOCAL, projector=(8, 5), prototypes=7, queue=16)
    one, eight = compared(objective, FEATURES), compared(objective, FEATURES, layout=layout_of(8))
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.features, one.features, rtol=1e-3, atol=1e-5)
    assert_trees_close(eight.loss.state, one.loss.state, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_gradient_and_the_queue_of_the_whole_batch() -> None:
    config = run_config(spec(SwAV, local_views=LOCAL, projector=(16, 8), prototypes=12, queue=16))
    batch = views(**CROPS)
    state = new_state(config, batch)
    whole, grads = gradients_of(config, state, batch)
    for accumulate in (2, 4, 8):
        config.accumulate = accumulate
        parts, accumulated = gradients_of(config, state, batch)
        np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
        assert_trees_close(accumulated, grads, rtol=1e-3, atol=1e-5)
        assert_trees_close(parts.state, whole.state, rtol=1e-4, atol=1e-6)


def test_balanced_codes_use_all_prototypes_and_unbalanced_ones_are_all_the_same() -> None:
    """Under a projector without BatchNorm, which alone would keep a run without balance from a single point."""
    fields: dict[str, Any] = dict(global_views=("view1", "view2"), projector=(32,), prototypes=32)
    balanced, unbalanced = (
        train(spec(SwAV, **fields, rounds=rounds)).last("loss/mean_entropy") for rounds in (3, 0)
    )
    assert balanced > 0.85
    assert unbalanced < 0.3


def test_a_start_of_no_queue_and_a_queue_that_is_too_short_are_told() -> None:
    with pytest.raises(UserError, match=r"queue_start is '3 steps'"):
        SwAV(queue_start="3 steps")
    with pytest.raises(UserError, match=r"queue is 8.*batch of 16"):
        compared(SwAV(**SMALL, queue=8), FEATURES)
    with pytest.raises(UserError, match=r"large one and another"):
        SwAV(global_views=("global1",))
    assert_trees_equal(SwAV(**SMALL).initial_state(jax.random.key(0)), ())
