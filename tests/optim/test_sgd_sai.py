"""SGD-SaI against a loop in NumPy; its ratios are measured once, and make plain momentum train a transformer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.tiny import assert_trees_equal
from vlpjax.durations import Durations
from vlpjax.models.text import TextTransformer
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.optim.sgd_sai import sgd_sai, signal_to_noise

RNG = np.random.default_rng(0)
SHAPES = {"a": {"kernel": (5, 7), "bias": (3,)}}
RATE, DECAY = 1e-2, 0.1


def draw() -> Any:
    return jax.tree.map(
        lambda shape: (RNG.normal(size=shape) + 0.3).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, GRADS = draw(), [draw() for _ in range(6)]


def optimizer() -> optax.GradientTransformation:
    made = Optimizer(sgd_sai(), RATE, Schedule(decay="constant"), DECAY, decay_rules=((".*", 1.0),))
    return made.make(PARAMS, Durations(1, 100, 100))


def advance(params: Any, state: Any, grads: list[Any]) -> tuple[Any, Any]:
    for grad in grads:
        updates, state = optimizer().update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_steps_are_those_of_the_paper() -> None:
    found, _ = advance(PARAMS, optimizer().init(PARAMS), GRADS[:5])
    for name in ("kernel", "bias"):
        p = PARAMS["a"][name].astype(np.float64)
        grads = [grad["a"][name].astype(np.float64) for grad in GRADS[:5]]
        ratio = np.linalg.norm(grads[0]) / (np.std(grads[0], ddof=1) + 1e-8)
        for step, g in enumerate(grads):
            m = g if step == 0 else 0.9 * m + 0.1 * g
            p = (1 - RATE * DECAY) * p - RATE * ratio * m
        np.testing.assert_allclose(found["a"][name], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [64, 4096, 65536])
def test_the_ratio_of_noise_is_the_root_of_its_size_at_any_scale(count: int) -> None:
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=(count,)), jnp.float32)
    ratio = float(signal_to_noise("kernel", gradient))
    assert ratio == pytest.approx(count**0.5, rel=0.02)
    assert float(signal_to_noise("kernel", 1000 * gradient)) == pytest.approx(ratio, rel=1e-5)


def test_a_common_mean_raises_the_ratio() -> None:
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=(4096,)), jnp.float32)
    assert float(signal_to_noise("kernel", gradient + 1)) == pytest.approx(2**0.5 * 64, rel=0.05)


def test_one_number_is_not_thrown_away_by_its_own_step() -> None:
    assert float(signal_to_noise("value", jnp.float32(3.0))) == 1.0


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped() -> None:
    """The ratios are part of the state; a state that comes back from a checkpoint is not measured anew."""
    whole, _ = advance(PARAMS, optimizer().init(PARAMS), GRADS)
    params, state = advance(PARAMS, optimizer().init(PARAMS), GRADS[:3])
    restored = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)
    again, after = advance(params, restored, GRADS[3:])
    assert_trees_equal(again, whole)
    assert_trees_equal(after[0].ratio, state[0].ratio)


def test_stacked_layers_have_ratios_of_their_own() -> None:
    kernels = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32) + jnp.arange(3.0)[:, None, None]
    together = signal_to_noise("image/blocks/mlp/kernel", kernels)
    alone = [
        float(signal_to_noise(f"image/block_{i}/mlp/kernel", kernel)) for i, kernel in enumerate(kernels)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    direction = sgd_sai()
    tree = {"image": {"blocks": {"kernel": kernels}}}
    updates, _ = direction.update(tree, direction.init(tree))
    expected = np.asarray(alone)[:, None, None] * kernels
    np.testing.assert_allclose(updates["image"]["blocks"]["kernel"], expected, rtol=1e-5)


# --- the effect: a copy task --------------------------------------------------------------------------------------

SYMBOLS, HALF, WIDTH = 16, 4, 32


class Copier(nn.Module):
    """Two causal blocks that predict the next symbol; symbol 0 is the tower's padding and does not occur."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        tower = TextTransformer(SYMBOLS + 1, 2 * HALF - 1, width=WIDTH, depth=2, heads=4, name="text")
        return nn.Dense(SYMBOLS + 1, name="logits")(tower(ids)["tokens"])


def copy_loss(params: Any, ids: jax.Array) -> jax.Array:
    """How badly the second half, which repeats the first, is predicted."""
    logits = Copier().apply({"params": params}, ids[:, :-1])[:, HALF - 1 :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, HALF:]).mean()


def final_losses(direction: optax.GradientTransformation, rates: list[float], count: int = 150) -> np.ndarray:
    """Per learning rate, the mean loss over the last ten of ``count`` steps."""

    def sequences(key: jax.Array) -> jax.Array:
        half = jax.random.randint(key, (32, HALF), 1, SYMBOLS + 1)
        return jnp.concatenate([half, half], axis=1)

    def train(rate: jax.Array) -> jax.Array:
        params = nn.meta.unbox(
            Copier().init(jax.random.key(0), sequences(jax.random.key(1))[:, :-1])["params"]
        )

        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            ids = sequences(jax.random.fold_in(jax.random.key(2), index))
            loss, grads = jax.value_and_grad(copy_loss)(params, ids)
            updates, state = direction.update(grads, state, params)
            warm = jnp.minimum(1.0, (index + 1) / 20)
            return (jax.tree.map(lambda p, u: p - rate * warm * u, params, updates), state), loss

        _, losses = jax.lax.scan(step, (params, direction.init(params)), jnp.arange(count))
        return losses[-10:].mean()

    return np.asarray(jax.jit(jax.vmap(train))(jnp.asarray(rates)))


RATES = [3e-4, 1e-3]  # which Adam would take; plain momentum needs rates a hundred times as large


def test_it_learns_to_copy_at_rates_at_which_plain_momentum_is_far_behind() -> None:
    """The ratios move the rate that fits, no more: plain momentum does as well at rates of its own, such as 0.1."""
    ours, plain = (final_losses(direction, RATES).min() for direction in (sgd_sai(), optax.trace(0.9)))
    assert ours < 0.15
    assert ours < 0.6 * plain
