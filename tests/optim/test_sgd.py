"""Gradient descent with momentum against its formula as PyTorch documents it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from vlpjax.optim.sgd import sgd

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_steps_are_those_of_the_formula(momentum: float, weight_decay: float, nesterov: bool) -> None:
    direction = sgd(momentum, weight_decay, nesterov)
    params = {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)}
    state, expected, buffer = direction.init(params), dict(params), dict.fromkeys(params, 0.0)
    for _ in range(4):
        grads = {name: RNG.normal(size=p.shape) for name, p in params.items()}
        updates, state = direction.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        for name, p in expected.items():
            g = grads[name] + weight_decay * p  # the decay is part of the gradient
            buffer[name] = momentum * buffer[name] + g
            expected[name] = p - 0.1 * (g + momentum * buffer[name] if nesterov else buffer[name])
        for name, p in expected.items():
            np.testing.assert_allclose(params[name], p, rtol=1e-5)
