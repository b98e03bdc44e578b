"""Objectives on given features, in place of towers: the loss, and its gradients by features and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.mesh import Layout
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import BatchCoupled, Context, Loss, head_name

Function = Callable[[Any, Any, Any], tuple[Any, Loss]]


def compared(
    objective: BatchCoupled,
    features: Any,
    batch: Mapping[str, Any] | None = None,
    heads: Mapping[str, float] | None = None,
    layout: Layout | None = None,
) -> tuple[Loss, Any, Any]:
    """The loss of features, and its gradients by the features and by the scalars ``heads``."""
    function = gradient_of(objective, layout)
    features, batch = jax.tree.map(jnp.asarray, (features, dict(batch or {})))
    if layout is not None:
        features, batch = jax.device_put((features, batch), layout.sharding("batch"))
    params = {head_name("loss", name): {"value": jnp.float32(value)} for name, value in (heads or {}).items()}
    (by_features, by_heads), loss = jax.jit(function)(features, params, batch)
    return loss, by_features, {name: by_heads[head_name("loss", name)]["value"] for name in heads or {}}


def gradient_of(objective: BatchCoupled, layout: Layout | None = None) -> Function:
    """The function from features, heads' parameters and batch to gradients and loss; to be jitted."""
    towers = Towers.of({head_name("loss", name): head for name, head in objective.heads().items()})

    def compare(features: Any, params: Any, batch: Any) -> tuple[jax.Array, Loss]:
        def run(towers: Towers) -> Loss:
            context = Context(towers, batch, jax.random.key(0), jnp.int32(0), objective="loss")
            return objective.compare(features, context)

        loss = towers.apply({"params": params}, method=run)
        return loss.value, loss

    def whole(features: Any, params: Any, batch: Any) -> Any:
        if layout is None:
            return jax.grad(compare, argnums=(0, 1), has_aux=True)(features, params, batch)
        with layout.activate():
            return jax.grad(compare, argnums=(0, 1), has_aux=True)(features, params, batch)

    return whole


def slope(formula: Callable[..., float], features: Mapping[str, Any], name: str, direction: Any) -> float:
    """The derivative of a formula of float64 features along a direction of one of them."""
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = {key: np.asarray(value, np.float64) for key, value in features.items()}
        moved[name] = moved[name] + sign * step * direction
        ends.append(formula(**moved))
    return (ends[0] - ends[1]) / (2 * step)
