"""Layer-wise adaptive rates: LARS and LAMB, whose steps are proportional to the norm of the parameter they change.

Norms are of whole parameters, wherever their parts lie; of stacked blocks every layer has its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlpjax.optim.layers import layer_axes
from vlpjax.rules import map_with_names, match_rules, tree_names

# What is adapted and decayed; biases, scales of norms, positions, class tokens and temperatures are not.
MATRICES = ((r".*/(kernel|embedding)", True), (r".*", False))
Rules = tuple[tuple[str, bool], ...]


def lars(
    weight_decay: float = 1e-6,
    trust: float = 1e-3,
    momentum: float = 0.9,
    rules: Rules = MATRICES,
) -> optax.GradientTransformation:
    """LARS, a direction for :class:`vlpjax.optim.optimizer.Optimizer`, whose own ``weight_decay`` is then 0.

    With ``u = gradient + weight_decay * parameter`` the step is ``trust * |parameter| / |u| * u`` (``u`` itself where
    either norm is 0), summed by momentum.  The learning rate multiplies the momentum, as PyTorch has it.

    Args:
      weight_decay: coupled: it is part of what is adapted.
      trust: step length as a share of the parameter's, at a learning rate of 1.
      momentum: of the adapted steps.
      rules: (expression, whether to adapt and to decay) per parameter name, first match wins; the others move
        along plain momentum.

    Source: "Large Batch Training of Convolutional Networks", arXiv 1708.03888, algorithm 1; the exclusions are those
    of "Bootstrap your own latent", arXiv 2006.07733, section 3.3.
    """
    adapt = optax.chain(_coupled_decay(weight_decay, rules), _trust_ratio(trust, rules))
    return optax.chain(adapt, optax.trace(momentum))


def lamb(
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    rules: Rules = MATRICES,
) -> optax.GradientTransformation:
    """LAMB, a direction for :class:`vlpjax.optim.optimizer.Optimizer`, whose own ``weight_decay`` is then 0.

    With ``u = adam + weight_decay * parameter`` the step is ``|parameter| / |u| * u``, and ``u`` where either norm
    is 0.

    Args:
      weight_decay: part of what is adapted.
      b1, b2, eps: Adam's.
      rules: as of :func:`lars`; the others move as with Adam.

    Source: "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv 1904.00962, algorithm 2.
    """
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps), _coupled_decay(weight_decay, rules), _trust_ratio(1.0, rules)
    )


def _coupled_decay(weight_decay: float, rules: Rules) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        chosen = _chosen(updates, rules)

        def decayed(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
            return update + weight_decay * param if chosen[name] else update

        return map_with_names(decayed, updates, params)

    return optax.stateless(add)


def _trust_ratio(trust: float, rules: Rules) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        chosen = _chosen(updates, rules)

        def scaled(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
            if not chosen[name]:
                return update
            length, step = _norm(name, param), _norm(name, update)
            ratio = jnp.where((length > 0) & (step > 0), trust * length / jnp.where(step > 0, step, 1.0), 1.0)
            return ratio * update

        return map_with_names(scaled, updates, params)

    return optax.stateless(scale)


def _chosen(tree: Any, rules: Rules) -> dict[str, bool]:
    return match_rules(rules, tree_names(tree), "rules of LARS and LAMB", strict=False)


def _norm(name: str, x: jax.Array) -> jax.Array:
    """The norm of a parameter, of each layer where layers are stacked; broadcasts against it."""
    axes = tuple(range(layer_axes(name), x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
