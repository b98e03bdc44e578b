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
import numpy as np
import optax
from jaxtyping import Array, Float

from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.optim.layers import LayerDecay
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
      layer_decay: learning rates that fall from layer to layer towards the input, on top of ``rate_rules``.
      final_weight_decay: what ``weight_decay`` rises or falls to over the run, along half a cosine ("Emerging
        Properties in Self-Supervised Vision Transformers", arXiv 2104.14294, appendix C); None keeps it.
    """

    direction: Any
    learning_rate: float
    schedule: Schedule
    weight_decay: float = 0.0
    clip_norm: float | None = None
    decay_rules: tuple[tuple[str, float], ...] = ((r".*/(kernel|embedding)", 1.0), (r".*", 0.0))
    rate_rules: tuple[tuple[str, float | None], ...] = ((r".*", 1.0),)
    layer_decay: LayerDecay | None = None
    final_weight_decay: float | None = None

    def factors(self, params: Any) -> dict[str, tuple[float | None, float]]:
        """Per parameter name its (learning-rate factor or None, weight-decay factor)."""
        names = tree_names(params)
        rates = match_rules(self.rate_rules, names, "optimizer.rate_rules")
        decays = match_rules(self.decay_rules, names, "optimizer.decay_rules")
        return {name: (rates[name], decays[name]) for name in names}

    def layer_factors(self, params: Any) -> dict[str, np.ndarray]:
        """Per parameter name the factor of its layer, of a shape that multiplies the parameter."""
        if self.layer_decay is None:
            return dict.fromkeys(tree_names(params), np.ones((), np.float32))
        return self.layer_decay.factors(params)

    def make(self, params: Any, durations: Durations) -> optax.GradientTransformation:
        """The gradient transformation for parameters with these names (shapes are enough)."""
        factors, layers = self.factors(params), self.layer_factors(params)
        rate = self.schedule.make(durations)

        def scale(updates: Any, params: Any) -> Any:
            return map_with_names(lambda name, update: layers[name] * factors[name][0] * update, updates)

        parts = [
            self.direction,
            self._decay(factors, durations),
            optax.stateless(scale),
            optax.scale_by_schedule(lambda step: -self.learning_rate * rate(step)),
        ]
        if self.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
        trained = optax.chain(*parts)
        if all(factor is not None for factor, _ in factors.values()):
            return trained
        labels = map_with_names(lambda name, _: "frozen" if factors[name][0] is None else "trained", params)
        return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)

    def _decay(
        self, factors: dict[str, tuple[float | None, float]], durations: Durations
    ) -> optax.GradientTransformation:
        """Adds weight decay to the direction; it counts steps only if it changes with them."""

        def add(updates: Any, params: Any, amount: Any) -> Any:
            return map_with_names(
                lambda name, update, param: update + amount * factors[name][1] * param, updates, params
            )

        start, end, total = self.weight_decay, self.final_weight_decay, durations.total_steps
        if end is None:
            return optax.stateless(lambda updates, params: add(updates, params, start))
        assert total is not None, "a schedule is made when the run's length is known"

        def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> tuple[Any, Any]:
            done = jnp.minimum(state.count / total, 1.0)
            amount = end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * done))
            counted = optax.ScaleByScheduleState(optax.safe_increment(state.count))
            return add(updates, params, amount), counted

        return optax.GradientTransformation(
            lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
        )
