"""Small trainings for tests of learning effects: a whole run on generated data is one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlpjax.config import Config, spec
from vlpjax.durations import Durations
from vlpjax.experiment import Experiment, base_config
from vlpjax.models.towers import Towers
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.state import TrainState
from vlpjax.step import initial_state, train_step


@dataclass
class Trained:
    """The run's end, and its metrics, [steps] each."""

    experiment: Experiment
    state: TrainState
    metrics: dict[str, np.ndarray]

    def last(self, name: str) -> float:
        """The mean of a metric over the last 20 steps."""
        return float(self.metrics[name][-20:].mean())

    def read(self, function: Callable[[Towers], Any]) -> Any:
        """What a function finds in the trained towers."""
        variables = {"params": self.state.params, "batch_stats": self.state.statistics}
        return jax.device_get(
            jax.jit(lambda variables: self.experiment.towers.apply(variables, method=function))(variables)
        )


def train(
    towers: Mapping[str, Config],
    objectives: Mapping[str, Config],
    draw: Callable[[jax.Array], Mapping[str, jax.Array]],
    steps: int,
    learning_rate: float = 3e-3,
    *,
    weights: Mapping[str, float] | None = None,
    teachers: Mapping[str, Config] | None = None,
    rate_rules: tuple[tuple[str, float | None], ...] = ((r".*", 1.0),),
) -> Trained:
    """Trains with Adam on the sum of the objectives.

    Args:
      draw: the batch of a step, by its number.
      weights: of objectives, where they are not 1.
      rate_rules: of the optimizer, which say what is frozen.
    """
    config = base_config()
    config.towers = dict(towers)
    config.objectives = {
        name: dict(weight=(weights or {}).get(name, 1.0), loss=loss) for name, loss in objectives.items()
    }
    config.teachers = dict(teachers or {})
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.scale_by_adam),
        learning_rate=learning_rate,
        schedule=spec(Schedule, warmup="5%", final=0.1),
        rate_rules=rate_rules,
    )
    size = jax.tree.leaves(jax.eval_shape(draw, jnp.int32(0)))[0].shape[0]
    experiment = Experiment.from_config(config, Durations(size, 10 * size, steps))

    def step(state: TrainState, number: jax.Array) -> tuple[TrainState, Any]:
        return train_step(experiment, state, draw(number))

    def run() -> tuple[TrainState, Any]:
        return jax.lax.scan(step, initial_state(experiment, draw(jnp.int32(0))), jnp.arange(steps))

    state, metrics = jax.device_get(jax.jit(run)())
    return Trained(experiment, state, metrics)


def unit_rows(outputs: Mapping[str, jax.Array], name: str = "embedding") -> jax.Array:
    """An output of a tower, rows of length one."""
    return outputs[name] / jnp.linalg.norm(outputs[name], axis=-1, keepdims=True)
