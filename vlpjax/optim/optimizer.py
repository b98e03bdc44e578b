"""The optimizer: any optax direction, with a schedule, weight decay and learning rates by parameter name.

The order is fixed, and is that of AdamW as PyTorch and big_vision have it: clip the gradients, turn them into
a direction, add decoupled weight decay, scale by the parameter's factor and by the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.rules import map_with_names, match_rules, tree_names


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate over the run: a linear warm-up from 0 to 1, then a decay.

    Attributes:
      warmup: a duration.
      decay: ``"cosine"``, ``"linear"`` or ``"constant"``.
      final: the factor that the decay reaches at the end of the run.
    """

    warmup: str = "0 steps"
    decay: str = "cosine"
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear", "constant"):
            raise UserError(f"Schedule.decay is {self.decay!r}; there are 'cosine', 'linear' and 'constant'.")

    def make(self, durations: Durations) -> Callable[[jax.Array], jax.Array]:
        """The factor as a function of the step, counted from 0; the first step is not at factor 0."""
        warmup = durations.steps(self.warmup, "optimizer.schedule.warmup")
        total = durations.total_steps
        assert total is not None, "a schedule is made when the run's length is known"

        def factor(step: Float[Array, ""]) -> Float[Array, ""]:
            rising = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
            done = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
            shape = {
                "cosine": 0.5 * (1 + jnp.cos(math.pi * done)),
                "linear": 1 - done,
                "constant": jnp.ones_like(done),
            }[self.decay]
            return rising * (self.final + (1 - self.final) * shape)

        return factor


@dataclass(frozen=True)
class Optimizer:
    """An optax optimizer, put together from its parts.

    Attributes:
      direction: what turns gradients into a direction of descent, such as ``spec(optax.scale_by_adam)``.
      learning_rate: the peak; what the schedule's factor 1 means.
      schedule: of the learning rate.
      weight_decay: decoupled, multiplied by the learning rate, as in AdamW ("Decoupled Weight Decay
        Regularization", arXiv 1711.05101).
      clip_norm: the largest global norm of the gradients; None does not clip.
      decay_rules: (expression, factor of ``weight_decay``) per parameter name.  By default matrices decay,
        and scales, biases, positions, class tokens and temperatures do not.
      rate_rules: (expression, factor of ``learning_rate``); None freezes: no update, no moments, no decay.
    """

    direction: Any
    learning_rate: float
    schedule: Schedule
    weight_decay: float = 0.0
    clip_norm: float | None = None
    decay_rules: tuple[tuple[str, float], ...] = ((r".*/(kernel|embedding)", 1.0), (r".*", 0.0))
    rate_rules: tuple[tuple[str, float | None], ...] = ((r".*", 1.0),)

    def factors(self, params: Any) -> dict[str, tuple[float | None, float]]:
        """Per parameter name its (learning-rate factor or None, weight-decay factor)."""
        names = tree_names(params)
        rates = match_rules(self.rate_rules, names, "optimizer.rate_rules")
        decays = match_rules(self.decay_rules, names, "optimizer.decay_rules")
        return {name: (rates[name], decays[name]) for name in names}

    def make(self, params: Any, durations: Durations) -> optax.GradientTransformation:
        """The gradient transformation for parameters with these names (shapes are enough)."""
        factors = self.factors(params)
        rate = self.schedule.make(durations)

        def decay(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
            def add(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
                return update + self.weight_decay * factors[name][1] * param

            return map_with_names(add, updates, params), state

        def scale(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
            return map_with_names(lambda name, update: factors[name][0] * update, updates), state

        parts = [
            self.direction,
            optax.GradientTransformation(lambda params: optax.EmptyState(), decay),
            optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
            optax.scale_by_schedule(lambda step: -self.learning_rate * rate(step)),
        ]
        if self.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
        trained = optax.chain(*parts)
        if all(factor is not None for factor, _ in factors.values()):
            return trained
        labels = map_with_names(lambda name, _: "frozen" if factors[name][0] is None else "trained", params)
        return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)
