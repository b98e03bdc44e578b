"""A bench for objectives on views: one comparison of given features, and whole updates of tiny runs.

Both work on one device or on a mesh.  Objectives are called ``loss``, teachers ``ema``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tests.tiny import abstract_of, on_host
from vlpjax.config import Config, spec
from vlpjax.durations import Durations
from vlpjax.experiment import Experiment, base_config
from vlpjax.mesh import Layout, make_layout
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import BatchCoupled, Context, Loss, head_name
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.state import TrainState
from vlpjax.step import gradients, initial_state, make_train_step

SIZE, BATCH, STEPS = 8, 16, 100
DURATIONS = Durations(BATCH, 4 * BATCH, STEPS)


@dataclass
class Compared:
    """What a comparison gave."""

    loss: Loss
    features: Any  # gradients by the features
    heads: Any  # gradients by the student's heads
    teacher: Any  # gradients by the teacher's heads

    @property
    def gradients(self) -> tuple[Any, Any]:
        """By the features and by the student's heads."""
        return self.features, self.heads


def scalars(**heads: float) -> Any:
    """Variables of heads that are one number each."""
    return {"params": {head_name("loss", name): {"value": jnp.float32(x)} for name, x in heads.items()}}


def head_variables(objective: BatchCoupled, features: Any, seed: int = 0) -> Any:
    """First parameters and statistics of an objective's heads."""
    towers = Towers.of({head_name("loss", name): head for name, head in objective.heads().items()})

    def run(towers: Towers) -> Loss:
        return objective.compare(features, _context(objective, towers, {"ema": towers}, {}, None, 0))

    variables: Any = nn.unbox(towers.init(jax.random.key(seed), method=run))
    return variables


def compared(
    objective: BatchCoupled,
    features: Any,
    variables: Any = None,
    teacher: Any = None,
    *,
    batch: Mapping[str, Any] | None = None,
    state: Any = None,
    step: int = 0,
    layout: Layout | None = None,
) -> Compared:
    """One comparison and all its gradients; without ``variables`` the heads are new, the teacher's are the same."""
    variables = head_variables(objective, features) if variables is None else variables
    teacher = variables if teacher is None else teacher
    examples = (features, dict(batch or {}))
    if layout is not None:
        examples = jax.device_put(examples, layout.sharding("batch"))
    function = comparison(objective, variables, teacher, state=state, step=step, layout=layout)
    params, teacher_params = ({"params": {}, **each}["params"] for each in (variables, teacher))
    grads, loss = jax.jit(function)(examples[0], params, teacher_params, examples[1])
    return Compared(loss, *grads)


def comparison(
    objective: BatchCoupled,
    variables: Any,
    teacher: Any = None,
    *,
    state: Any = None,
    step: int = 0,
    layout: Layout | None = None,
) -> Callable[..., Any]:
    """The function from features, both heads' parameters and batch to gradients and loss; to be jitted."""
    variables, teacher = {"params": {}, **variables}, {"params": {}, **(teacher or variables)}
    towers = Towers.of({head_name("loss", name): head for name, head in objective.heads().items()})

    def value(features: Any, params: Any, teacher_params: Any, batch: Any) -> tuple[jax.Array, Loss]:
        bound = towers.bind({**teacher, "params": teacher_params}, mutable=["batch_stats"])

        def run(towers: Towers, bound: Towers) -> Loss:
            return objective.compare(
                features, _context(objective, towers, {"ema": bound}, batch, state, step)
            )

        loss, _ = towers.apply({**variables, "params": params}, bound, method=run, mutable=["batch_stats"])
        return loss.value, loss

    def whole(*arguments: Any) -> Any:
        if layout is None:
            return jax.grad(value, argnums=(0, 1, 2), has_aux=True)(*arguments)
        with layout.activate():
            return jax.grad(value, argnums=(0, 1, 2), has_aux=True)(*arguments)

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


def _context(
    objective: BatchCoupled, towers: Towers, teachers: Any, batch: Any, state: Any, step: int
) -> Context:
    return Context(
        towers,
        batch,
        jax.random.key(0),
        jnp.int32(step),
        teachers=teachers,
        state=objective.initial_state(jax.random.key(0)) if state is None else state,
        objective="loss",
        durations=DURATIONS,
    )


# --- whole updates ----------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """A tower that compiles in no time: patches of four pixels, each projected by itself.

    Attributes:
      width: of all outputs.
    """

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, masked: jax.Array | None = None) -> dict[str, jax.Array]:
        """Tokens, two tokens for the whole image, and the first of these as what was pooled."""
        batch, size = images.shape[:2]
        side = size // 4
        patches = images.reshape(batch, side, 4, side, 4, 3).swapaxes(2, 3).reshape(batch, side * side, 48)
        if masked is not None:
            patches = jnp.where(
                masked[..., None], self.param("mask_token", nn.initializers.ones, (48,)), patches
            )
        tokens = jnp.tanh(nn.Dense(self.width, name="projection")(patches))
        prefix = nn.Dense(2 * self.width, name="prefix")(tokens.mean(axis=1)).reshape(batch, 2, self.width)
        return {"tokens": tokens, "prefix": prefix, "pooled": prefix[:, 0]}


def run_config(loss: Config, teachers: Mapping[str, Config] | None = None) -> Config:
    """A small tower under one objective, with plain gradient descent."""
    config = base_config()
    config.duration = f"{STEPS} steps"
    config.towers = dict(image=spec(Patches))
    config.objectives = dict(loss=dict(weight=1.0, loss=loss))
    config.teachers = dict(teachers or {})
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.identity),
        learning_rate=0.1,
        schedule=spec(Schedule, decay="constant"),
    )
    return config


def experiment_of(config: Config, batch_size: int = BATCH) -> Experiment:
    """The pure parts of a config."""
    return Experiment.from_config(config, Durations(batch_size, 4 * batch_size, STEPS))


def views(seed: int = 0, size: int = BATCH, **sizes: int) -> dict[str, np.ndarray]:
    """Views of noise, by default two; ``sizes`` are pixels per name."""
    rng = np.random.default_rng(seed)
    sizes = sizes or {"view1": SIZE, "view2": SIZE}
    batch: dict[str, np.ndarray] = {
        name: rng.normal(size=(size, pixels, pixels, 3)).astype(np.float32) for name, pixels in sizes.items()
    }
    return {**batch, "label": rng.integers(0, 4, size).astype(np.int32), "index": np.arange(size)}


def new_state(config: Config, batch: Mapping[str, Any]) -> TrainState:
    """The state before the first step, on the host."""
    experiment = experiment_of(config, len(next(iter(batch.values()))))
    state: TrainState = on_host(jax.jit(lambda batch: initial_state(experiment, batch))(dict(batch)))
    return state


def update(
    config: Config, state: TrainState, batch: Mapping[str, Any], layout: Layout | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state after a step on a mesh, and the step's metrics, on the host."""
    experiment = experiment_of(config, len(next(iter(batch.values()))))
    layout = layout or make_layout({}, devices=jax.devices()[:1])
    _, shardings = abstract_of(experiment, batch, layout)
    step = make_train_step(experiment, layout, shardings, layout.sharding("batch"))
    placed = jax.device_put(dict(batch), layout.sharding("batch"))
    new, metrics = step(jax.device_put(state, shardings), placed)
    return on_host(new), on_host(metrics)


def gradients_of(config: Config, state: TrainState, batch: Mapping[str, Any]) -> tuple[Loss, Any]:
    """The loss of the objective, and the gradient by all parameters."""
    experiment = experiment_of(config, len(next(iter(batch.values()))))
    losses, _, grads = jax.jit(lambda state, batch: gradients(experiment, state, batch))(state, dict(batch))
    return losses["loss"], grads
