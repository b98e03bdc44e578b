"""Gradient descent with momentum and coupled weight decay, as PyTorch has it."""

from __future__ import annotations

import optax


def sgd(
    momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """A direction for :class:`vlpjax.optim.optimizer.Optimizer`, whose own ``weight_decay`` is then 0.

    The decay is part of the gradient before the momentum, so that in the long run it is ``1 / (1 - momentum)`` times
    as strong as a decoupled one of the same number.

    Args:
      momentum: share of the last direction that is kept.
      weight_decay: of all parameters, biases and norms included.
      nesterov: look ahead by one step.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum, nesterov))
