"""Small trainings for tests of learning effects: towers, objectives and generated data, in one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vlpjax.models.towers import Towers
from vlpjax.objectives.base import Context, Objective, head_name

Batch = dict[str, jax.Array]


def trained(
    modules: Mapping[str, nn.Module],
    objectives: Mapping[str, Objective],
    draw: Callable[[jax.Array], Batch],
    read: Callable[[Towers], Any],
    steps: int,
    learning_rate: float = 1e-3,
) -> Any:
    """What ``read`` finds in the towers after ``steps`` steps of Adam on the sum of the objectives.

    Args:
      draw: the batch of a random key.
    """
    heads = {
        head_name(name, head): module
        for name, objective in objectives.items()
        for head, module in objective.heads().items()
    }
    towers, optimizer = Towers.of({**modules, **heads}), optax.adam(learning_rate)

    def total(towers: Towers, batch: Batch) -> jax.Array:
        context = Context(towers, batch, jax.random.key(0), jnp.int32(0))
        values = [objective(context.of(name)).value for name, objective in objectives.items()]
        return sum(values, jnp.zeros(()))

    def update(carry: Any, step: jax.Array) -> tuple[Any, None]:
        params, state = carry
        batch = draw(jax.random.fold_in(jax.random.key(1), step))
        grads = jax.grad(lambda params: towers.apply({"params": params}, batch, method=total))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any) -> Any:
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(steps))
        return towers.apply({"params": params}, method=read)

    @jax.jit
    def start() -> Any:
        return nn.unbox(towers.init(jax.random.key(2), draw(jax.random.key(3)), method=total))["params"]

    return jax.device_get(run(start()))


def unit_rows(outputs: Mapping[str, jax.Array]) -> jax.Array:
    """The embedding of a tower's outputs, rows of length one."""
    z = outputs["embedding"]
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)
