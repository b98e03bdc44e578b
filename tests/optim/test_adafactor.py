"""Adafactor against its formulas: rows and columns for matrices, a capped decay, a first moment in half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.optim.adafactor import adafactor

RNG = np.random.default_rng(0)
PARAMS = {"kernel": np.zeros((8, 6), np.float32), "bias": np.zeros(6, np.float32)}
GRADS = [{name: RNG.normal(size=x.shape).astype(np.float32) for name, x in PARAMS.items()} for _ in range(4)]


def test_directions_are_the_formulas_and_the_decay_stops_rising() -> None:
    ours = adafactor(b1=0.9, b2=0.5, factor_from=4)
    state = ours.init(PARAMS)
    rows, columns, squares = np.zeros(8), np.zeros(6), np.zeros(6)
    momentum = {name: np.zeros(x.shape) for name, x in PARAMS.items()}
    for step, grads in enumerate(GRADS):
        found, state = ours.update(grads, state, PARAMS)
        decay = min(0.5, 1 - (step + 1) ** -0.8)
        square = grads["kernel"].astype(np.float64) ** 2
        rows = decay * rows + (1 - decay) * square.mean(axis=1)
        columns = decay * columns + (1 - decay) * square.mean(axis=0)
        squares = decay * squares + (1 - decay) * grads["bias"].astype(np.float64) ** 2
        scaled = {
            "kernel": grads["kernel"] / np.sqrt(np.outer(rows, columns) / rows.mean()),
            "bias": grads["bias"] / np.sqrt(squares),
        }
        for name, direction in scaled.items():
            momentum[name] = 0.9 * momentum[name] + 0.1 * direction
            np.testing.assert_allclose(found[name], momentum[name], rtol=0.03, atol=0.01)  # of bfloat16


def test_a_matrix_costs_half_a_number_per_parameter() -> None:
    params = {"kernel": jnp.zeros((256, 256))}
    state = jax.eval_shape(adafactor().init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert 2 * 256**2 < size < 2.1 * 256**2  # bytes, where Adam takes 8
