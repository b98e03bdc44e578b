"""SGD-SaI: SGD with momentum that trains transformers, because every parameter gets its own rate at the first step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlpjax.optim.layers import layer_axes
from vlpjax.rules import map_with_names


class SGDSaIState(NamedTuple):
    """What is remembered.

    Attributes:
      steps: finished steps, int32; the ratios are measured at the first and at no other.
      ratio: per parameter its signal-to-noise ratio, one number, or one per layer where layers are stacked.
      momentum: in the shape of the parameters: the only such buffer, where Adam has two.
    """

    steps: jax.Array
    ratio: Any
    momentum: Any


def sgd_sai(momentum: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """A direction for :class:`vlpjax.optim.optimizer.Optimizer`, which adds decoupled, unscaled weight decay.

    At the first step every parameter's gradient g of n elements gives a ratio ``|g| / (std(g) + eps)``, with the
    unbiased deviation over its elements.  It does not depend on the gradient's scale, and is about sqrt(n) where the
    mean is small.  The momentum starts as the first gradient and then follows ``momentum * m + (1 - momentum) * g``;
    the step is ``ratio * m``.  The ratio belongs to the state, so that a run that resumes does not measure anew.

    A parameter of one element has no deviation; the published code divides by ``eps`` alone, which moves a learned
    temperature by 10^8 times its gradient.  Here its ratio is 1.  A parameter whose first gradient is 0 throughout
    has the ratio 0 and never moves, as published: start no parameter where its gradient vanishes.

    Args:
      momentum: the share of the old momentum that is kept.
      eps: added to the deviation.

    Source: "No More Adam: Learning Rate Scaling at Initialization is All You Need", arXiv 2412.11768, algorithm 1.
    """

    def init(params: Any) -> SGDSaIState:
        def ones(name: str, param: jax.Array) -> jax.Array:
            return jnp.ones(param.shape[: layer_axes(name)], jnp.float32)

        return SGDSaIState(
            jnp.zeros((), jnp.int32), map_with_names(ones, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(grads: Any, state: SGDSaIState, params: Any = None) -> tuple[Any, SGDSaIState]:
        del params
        first = state.steps == 0
        ratio = jax.lax.cond(
            first,
            lambda: map_with_names(lambda name, g: signal_to_noise(name, g, eps), grads),
            lambda: state.ratio,
        )
        kept = jnp.where(first, 0.0, momentum)  # so that m = g at the first step
        moved = jax.tree.map(lambda m, g: kept * m + (1 - kept) * g, state.momentum, grads)
        updates = jax.tree.map(lambda r, m: r.reshape(r.shape + (1,) * (m.ndim - r.ndim)) * m, ratio, moved)
        return updates, SGDSaIState(optax.safe_increment(state.steps), ratio, moved)

    return optax.GradientTransformation(init, update)


def signal_to_noise(name: str, gradient: jax.Array, eps: float = 1e-8) -> jax.Array:
    """The ratio of a parameter's gradient: a number, or one per layer where layers are stacked."""
    first = layer_axes(name)
    axes = tuple(range(first, gradient.ndim))
    count = math.prod(gradient.shape[first:])
    if count == 1:
        return jnp.ones(gradient.shape[:first], jnp.float32)
    g = gradient.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(g), axis=axes)) / (jnp.std(g, axis=axes, ddof=1) + eps)
