"""Checkpoints of another model, or of none: told before a value of them is used."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from vlpjax.checkpoint import Checkpoints
from vlpjax.errors import UserError

STATE: dict[str, Any] = {
    "params": {"kernel": np.arange(12.0, dtype=np.float32).reshape(3, 4)},
    "step": np.int32(5),
}


def shaped(state: Any) -> tuple[Any, Any]:
    """Shapes of a state, and one device for all of it."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.eval_shape(lambda: state), jax.tree.map(lambda _: device, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    checkpoints.save(5, jax.tree.map(jax.numpy.asarray, STATE), {"data": {"step": 5}})
    checkpoints.wait()
    return checkpoints


def test_a_state_and_its_record_come_back(saved: Checkpoints) -> None:
    found, record = saved.restore(5, *shaped(STATE))
    jax.tree.map(np.testing.assert_array_equal, found, STATE)
    assert record == {"data": {"step": 5}}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"kernel": np.zeros((3, 5))}, r"params/kernel has shape \(3, 4\); the model wants \(3, 5\)"),
        ({"kernel": np.zeros(12)}, r"params/kernel has shape \(3, 4\); the model wants \(12,\)"),
        (
            {**STATE["params"], "bias": np.zeros(4)},
            r"has no params/bias; the model wants one of shape \(4,\)",
        ),
        ({}, r"has params/kernel of shape \(3, 4\), and this model has none"),
    ],
)
def test_another_model_is_told_by_the_first_parameter_that_differs(
    saved: Checkpoints, params: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=f"checkpoints/5.*{told}"):
        saved.restore(5, *shaped({**STATE, "params": params}))
