"""The optimizer's parts, on a few numbers that can be followed by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlpjax.durations import Durations
from vlpjax.optim.optimizer import Optimizer, Schedule

LENGTH = Durations(batch_size=1, total_steps=12)
STILL = Schedule(decay="constant")
PARAMS: Any = {"dense": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([4.0])}}
GRADS: Any = {"dense": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}}  # of norm 5


def update(optimizer: Optimizer) -> dict[str, list[float]]:
    """The first update of the parameters above."""
    made = optimizer.make(PARAMS, LENGTH)
    updates: Any = made.update(GRADS, made.init(PARAMS), PARAMS)[0]["dense"]
    return {name: np.asarray(updates[name]).tolist() for name in updates}


@pytest.mark.parametrize(
    ("decay", "last"), [("cosine", 0.5 * (1 + np.cos(0.9 * np.pi))), ("linear", 0.1), ("constant", 1.0)]
)
def test_the_rate_rises_from_the_first_step_and_falls_over_the_rest(decay: str, last: float) -> None:
    factor = Schedule(warmup="2 steps", decay=decay, final=0.2).make(LENGTH)
    values = [float(factor(jnp.float32(step))) for step in (0, 1, 2, 11, 12)]
    end = 0.2 if decay != "constant" else 1.0
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.2 + 0.8 * last, end], rel=1e-6)


def test_without_a_warm_up_the_first_step_is_a_whole_one() -> None:
    assert float(Schedule().make(LENGTH)(jnp.float32(0))) == 1.0


@pytest.mark.parametrize(("clip", "factor"), [(None, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_gradients_are_clipped_by_their_norm_and_decay_is_not(clip: float | None, factor: float) -> None:
    found = update(Optimizer(optax.identity(), 0.5, STILL, weight_decay=0.1, clip_norm=clip))
    assert found["kernel"] == pytest.approx([-0.5 * (3 * factor + 0.2), 0.05], rel=1e-6)
    assert found["bias"] == pytest.approx([-0.5 * 4 * factor], rel=1e-6)


def test_clipping_comes_before_the_direction() -> None:
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    assert update(Optimizer(sign, 0.5, STILL, clip_norm=0.1)) == {"kernel": [-0.5, 0.0], "bias": [-0.5]}


def test_factors_are_those_of_the_rules() -> None:
    rules: Any = dict(
        decay_rules=((".*/bias", 2.0), (".*", 0.0)), rate_rules=((".*/bias", 3.0), (".*", None))
    )
    found = update(Optimizer(optax.identity(), 0.5, STILL, weight_decay=0.1, **rules))
    assert found["kernel"] == [0.0, 0.0]
    assert found["bias"] == pytest.approx([-0.5 * 3 * (4 + 0.1 * 2 * 4)], rel=1e-6)


@pytest.mark.parametrize(("final", "expected"), [(None, [0.04] * 3), (0.4, [0.04, 0.22, 0.4])])
def test_weight_decay_moves_along_half_a_cosine(final: float | None, expected: list[float]) -> None:
    """At the first step, in the middle and at the end of the run."""
    made = Optimizer(optax.identity(), 1.0, STILL, weight_decay=0.04, final_weight_decay=final).make(
        PARAMS, LENGTH
    )
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    state, found = made.init(PARAMS), []
    for _ in range(13):
        updates, state = made.update(still, state, PARAMS)
        found.append(float(updates["dense"]["kernel"][0]) / -2.0)
        assert float(updates["dense"]["bias"][0]) == 0.0
    assert [found[0], found[6], found[12]] == pytest.approx(expected)
