"""LARS and LAMB against loops in NumPy, with stacked layers, exclusions, and on several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlpjax.optim.lars import lamb, lars

RNG = np.random.default_rng(0)
SHAPES = {"dense": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}, "token": {"embedding": (5, 2)}}


def draw() -> Any:
    return jax.tree.map(
        lambda shape: RNG.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, GRADS = {"image": draw()}, [{"image": draw()} for _ in range(4)]


def run(direction: optax.GradientTransformation, params: Any, grads: list[Any], rate: float = 0.1) -> Any:
    """The parameters after a step with each of the gradients."""
    state = direction.init(params)
    for grad in grads:
        updates, state = direction.update(grad, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params


def by_hand(param: np.ndarray, grads: list[np.ndarray], adapted: bool, kind: str) -> np.ndarray:
    """The same for one parameter, as the papers write it."""
    decay, trust, momentum = 0.01, 0.02, 0.9
    b1, b2, eps = 0.9, 0.99, 1e-6
    p, sums, m, v = param.astype(np.float64), 0.0, 0.0, 0.0
    for step, g in enumerate(grads, 1):
        if kind == "lars":
            u = g + decay * p if adapted else g
            ratio = trust * np.linalg.norm(p) / np.linalg.norm(u) if adapted else 1.0
            sums = momentum * sums + ratio * u
            p = p - 0.1 * sums
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            u = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps)
            u = u + decay * p if adapted else u
            p = p - 0.1 * (np.linalg.norm(p) / np.linalg.norm(u) if adapted else 1.0) * u
    return p


DIRECTIONS = {
    "lars": lars(weight_decay=0.01, trust=0.02),
    "lamb": lamb(weight_decay=0.01, b2=0.99),
}


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_steps_are_those_of_the_paper(kind: str) -> None:
    found = run(DIRECTIONS[kind], PARAMS, GRADS)["image"]
    for group, name, adapted in (
        ("dense", "kernel", True),
        ("token", "embedding", True),
        ("dense", "bias", False),
        ("norm", "scale", False),
    ):
        grads = [grad["image"][group][name] for grad in GRADS]
        expected = by_hand(PARAMS["image"][group][name], grads, adapted, kind)
        np.testing.assert_allclose(found[group][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_stacked_layers_move_as_separate_ones(kind: str) -> None:
    def stacked(trees: list[Any]) -> Any:
        return {"image": {"blocks": jax.tree.map(lambda *x: np.stack(x), *(tree["image"] for tree in trees))}}

    other = {"image": jax.tree.map(lambda x: 10 * x, draw())}
    together = run(DIRECTIONS[kind], stacked([PARAMS, other]), [stacked([grad, other]) for grad in GRADS])
    for index, (params, grads) in enumerate([(PARAMS, GRADS), (other, [other] * len(GRADS))]):
        alone = run(DIRECTIONS[kind], params, grads)["image"]
        for ours, theirs in zip(
            jax.tree.leaves(together["image"]["blocks"]), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_allclose(ours[index], theirs, rtol=2e-6)


@pytest.mark.parametrize("kind", ["lars", "lamb"])
@pytest.mark.parametrize("zero", ["parameters", "gradients"])
def test_a_norm_of_zero_adapts_nothing(kind: str, zero: str) -> None:
    """Parameters that start at zero must be able to leave it."""
    params, grads = {"a": {"kernel": jnp.ones((2, 2))}}, {"a": {"kernel": jnp.full((2, 2), 0.5)}}
    if zero == "parameters":
        params = jax.tree.map(jnp.zeros_like, params)
    else:
        grads = jax.tree.map(jnp.zeros_like, grads)
    direction = {"lars": lars(weight_decay=0.0), "lamb": lamb(weight_decay=0.0)}[kind]
    updates, _ = direction.update(grads, direction.init(params), params)
    length = {"lars": 0.5, "lamb": 1.0}[kind] if zero == "parameters" else 0.0
    np.testing.assert_allclose(updates["a"]["kernel"], length, rtol=1e-4)


def test_the_step_of_lars_does_not_depend_on_the_size_of_the_gradient() -> None:
    direction = lars(weight_decay=0.0, momentum=0.0)
    large = jax.tree.map(lambda x: 1000 * x, GRADS[0])
    one, other = (direction.update(g, direction.init(PARAMS), PARAMS)[0]["image"] for g in (GRADS[0], large))
    np.testing.assert_allclose(one["dense"]["kernel"], other["dense"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(1000 * one["dense"]["bias"], other["dense"]["bias"], rtol=1e-5)
