"""The train step: objectives -> loss -> gradients -> update, one pure function.

Gradient accumulation is exact, also for losses that compare the examples of a batch with one another: the
features of all micro-batches are computed and kept, the loss is taken once over the full batch, and its
gradient is pulled back through each micro-batch in turn, with the same random keys in both passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding

from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import BatchCoupled, Context, Loss, fold_name
from vlpjax.rules import map_with_names, tree_names
from vlpjax.state import TrainState, state_shardings

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
BatchShardings = NamedSharding | Mapping[str, NamedSharding]  # of all fields, or per field


def initial_state(experiment: Experiment, batch: Any) -> TrainState:
    """The state before the first step.  Pure; ``batch`` gives shapes only."""
    sample = {name: jnp.zeros((2, *value.shape[1:]), value.dtype) for name, value in batch.items()}
    return _state_with(experiment, experiment.initial_variables(sample))


def _state_with(experiment: Experiment, variables: Any) -> TrainState:
    """The state before the first step, around parameters and statistics as they are initialised."""
    variables = nn.meta.unbox(variables)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=experiment.make_optimizer(params).init(params),
        teachers={name: teacher.initial(params) for name, teacher in experiment.teachers.items()},
        objectives=experiment.initial_states(),
        statistics=variables.get("batch_stats", {}),
    )


def abstract_variables(experiment: Experiment, batch: Any) -> Any:
    """Shapes of parameters and statistics, each parameter in the box that names its axes and its initialiser.

    All objectives are traced for it, which takes seconds for a deep tower: who needs it twice keeps it.
    """
    sample = {name: jax.ShapeDtypeStruct((2, *value.shape[1:]), value.dtype) for name, value in batch.items()}
    return jax.eval_shape(experiment.initial_variables, sample)


def abstract_state(experiment: Experiment, variables: Any, layout: Layout) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state around ``abstract_variables``, without making it."""
    abstract = jax.eval_shape(lambda variables: _state_with(experiment, variables), variables)
    return abstract, state_shardings(abstract, layout.shard_parameters(variables["params"]), layout)


def make_train_step(
    experiment: Experiment, layout: Layout, shardings: TrainState, batch_sharding: BatchShardings
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the old state's memory is reused, and every leaf's sharding is pinned on both sides."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with layout.activate():
            return train_step(experiment, state, batch, shardings.params)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, layout.replicated),
        compiler_options=dict(experiment.compiler_options) or None,
    )


def make_loss_step(
    experiment: Experiment, layout: Layout, shardings: TrainState, batch_sharding: BatchShardings
) -> Callable[[TrainState, Batch], jax.Array]:
    """The jitted forward pass: the weighted loss of a batch, with no gradient and no update."""

    def step(state: TrainState, batch: Batch) -> jax.Array:
        with layout.activate():
            return batch_loss(experiment, state, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding),
        out_shardings=layout.replicated,
        compiler_options=dict(experiment.compiler_options) or None,
    )


def train_step(
    experiment: Experiment, state: TrainState, batch: Batch, param_shardings: Any = None
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      experiment: what to compute.
      state: before the step.
      batch: per field, an array with the examples on the first dimension.
      param_shardings: where gradients are pinned, which is where the parameters lie.

    Returns:
      the state after the step, and metrics: ``loss``, each objective's, gradient and update norms, the
      learning rate.
    """
    losses, statistics, grads = gradients(experiment, state, batch, param_shardings)
    updates, optimizer = experiment.make_optimizer(state.params).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    for name, constraint in experiment.constraints().items():
        params = {**params, name: constraint(params[name])}
    progress = (state.step + 1) / (experiment.durations.total_steps or 1)
    teachers = {
        name: teacher.update(state.teachers[name], params, progress, experiment.durations)
        for name, teacher in experiment.teachers.items()
    }
    schedule = experiment.optimizer.schedule.make(experiment.durations)
    metrics = {
        "loss": _weighted(experiment, losses),
        "grad_norm": optax.global_norm(_trained(experiment, grads)),
        "update_norm": optax.global_norm(updates),
        "learning_rate": experiment.optimizer.learning_rate * schedule(state.step.astype(jnp.float32)),
    }
    for name, loss in losses.items():
        metrics |= {f"{name}/loss": loss.value} | {
            f"{name}/{key}": value for key, value in loss.metrics.items()
        }
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        teachers=teachers,
        objectives={name: loss.state for name, loss in losses.items()},
        statistics=statistics,
    )
    return new_state, metrics


def batch_loss(experiment: Experiment, state: TrainState, batch: Batch) -> jax.Array:
    """The weighted sum of all objectives on a whole batch at once."""
    losses, _ = _losses(experiment, state, state.params, batch)
    return _weighted(experiment, losses)


def gradients(
    experiment: Experiment, state: TrainState, batch: Batch, param_shardings: Any = None
) -> tuple[dict[str, Loss], Any, Any]:
    """Losses, new normalisation statistics, and the gradient of the weighted sum of the losses.

    Nothing is differentiated by parameters that the optimizer freezes; their gradient is 0.

    Args:
      param_shardings: where gradients are pinned; left to XLA, they lose the parameters' sharding.
    """
    differentiate = _plain_gradients if experiment.accumulate == 1 else _accumulated_gradients
    losses, statistics, grads = differentiate(experiment, state, batch)
    if param_shardings is not None:
        grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, param_shardings)
    return losses, statistics, grads


def _plain_gradients(
    experiment: Experiment, state: TrainState, batch: Batch
) -> tuple[dict[str, Loss], Any, Any]:
    def loss(params: Any) -> tuple[jax.Array, Any]:
        losses, statistics = _losses(experiment, state, _fixed(experiment, params), batch)
        return _weighted(experiment, losses), (losses, statistics)

    grads, (losses, statistics) = jax.grad(loss, has_aux=True)(state.params)
    return losses, statistics, grads


def _losses(
    experiment: Experiment, state: TrainState, params: Any, batch: Batch
) -> tuple[dict[str, Loss], Any]:
    """All losses of a batch, and the new normalisation statistics."""

    def function(towers: Towers, rng: jax.Array, teachers: Any) -> dict[str, Loss]:
        return experiment.run_objectives(
            towers, batch, rng, teachers, state.objectives, state.step, _step_key(experiment, state)
        )

    return _apply(experiment, state, params, state.statistics, 0, function)


def _accumulated_gradients(
    experiment: Experiment, state: TrainState, batch: Batch
) -> tuple[dict[str, Loss], Any, Any]:
    """Exact gradients over micro-batches, in three passes.

    1. Encode every micro-batch without gradient and keep its features.
    2. Compare the full batch's features: the loss, its gradient by the features, and by the heads.
    3. Encode every micro-batch again, with the same random keys, and pull its features' gradients back;
       objectives that are means over examples are evaluated and differentiated here.

    Normalisation layers that use batch statistics see micro-batches inside ``encode`` (backbones), and the full batch
    inside ``compare`` (the heads of objectives that compare), as without accumulation.
    """
    parts = experiment.accumulate
    coupled = {
        name: (weight, objective)
        for name, (weight, objective) in experiment.objectives.items()
        if isinstance(objective, BatchCoupled)
    }
    single = {name: item for name, item in experiment.objectives.items() if name not in coupled}
    batches = jax.tree.map(lambda x: _split(x, parts), dict(batch))  # [k, B/k, ...]
    indices = jnp.arange(parts)
    rows = _split(jnp.arange(len(jax.tree.leaves(dict(batch))[0])), parts)  # [k, B/k]
    step_key = _step_key(experiment, state)

    def run(params: Any, statistics: Any, states: Any, micro: jax.Array, micro_batch: Batch) -> Any:
        def function(towers: Towers, rng: jax.Array, teachers: Any) -> Any:
            context = Context(
                towers, micro_batch, rng, state.step, teachers=teachers, durations=experiment.durations,
                rows=rows[micro], row_rng=step_key, seed=experiment.seed,
            )  # fmt: skip
            features = {
                name: objective.encode(context.of(name, states[name]))
                for name, (_, objective) in coupled.items()
            }
            losses = {
                name: objective(context.of(name, states[name])) for name, (_, objective) in single.items()
            }
            return features, losses

        return _apply(experiment, state, params, statistics, micro, function)

    def encode(_: None, item: Any) -> tuple[None, Any]:
        return None, run(state.params, state.statistics, state.objectives, *item)[0][0]

    def compare(params: Any, features: Any) -> tuple[jax.Array, tuple[dict[str, Loss], Any]]:
        def function(towers: Towers, rng: jax.Array, teachers: Any) -> dict[str, Loss]:
            context = Context(
                towers,
                batch,
                rng,
                state.step,
                teachers=teachers,
                durations=experiment.durations,
                row_rng=step_key,
                seed=experiment.seed,
            )
            return {
                name: objective.compare(features[name], context.of(name, state.objectives[name]))
                for name, (_, objective) in coupled.items()
            }

        params = _fixed(experiment, params)
        losses, statistics = _apply(experiment, state, params, state.statistics, 0, function)
        return _weighted(experiment, losses), (losses, statistics)

    features = jax.tree.map(_join, jax.lax.scan(encode, None, (indices, batches))[1])  # [B, ...]
    (grads, feature_grads), (coupled_losses, statistics) = jax.grad(compare, argnums=(0, 1), has_aux=True)(
        state.params, features
    )
    feature_grads = jax.tree.map(lambda x: _split(x, parts), feature_grads)

    def pull_back(carry: Any, item: Any) -> tuple[Any, dict[str, Loss]]:
        total, statistics, states = carry
        micro, micro_batch, cotangents = item

        def partial_loss(params: Any) -> tuple[jax.Array, Any]:
            params = _fixed(experiment, params)
            (features, losses), new_statistics = run(params, statistics, states, micro, micro_batch)
            # <features, dL/dfeatures> has the same gradient as the full batch's loss through these features.
            products = jax.tree.map(lambda f, g: jnp.vdot(f, g), features, cotangents)
            value = sum(jax.tree.leaves(products), jnp.zeros(())) + _weighted(experiment, losses) / parts
            return value, (losses, new_statistics)

        grads, (losses, statistics) = jax.grad(partial_loss, has_aux=True)(state.params)
        states = states | {name: loss.state for name, loss in losses.items()}
        return (jax.tree.map(jnp.add, total, grads), statistics, states), losses

    carry = (grads, statistics, dict(state.objectives))
    (grads, statistics, states), stacked = jax.lax.scan(pull_back, carry, (indices, batches, feature_grads))
    mean = {
        name: Loss(jnp.mean(loss.value), jax.tree.map(jnp.mean, dict(loss.metrics)), states[name])
        for name, loss in stacked.items()
    }
    return {name: (coupled_losses | mean)[name] for name in experiment.objectives}, statistics, grads


def _apply(
    experiment: Experiment,
    state: TrainState,
    params: Any,
    statistics: Any,
    micro: Any,
    function: Callable[[Towers, jax.Array, Any], Any],
) -> tuple[Any, Any]:
    """``function`` on bound towers and teachers; returns its result and the new statistics."""
    rng = jax.random.fold_in(_step_key(experiment, state), micro)
    teachers = {
        # Mutable, so that BatchNorm may take the statistics of the batch; what it would remember is dropped.
        name: experiment.towers.bind(
            {"params": params, "batch_stats": statistics},
            rngs={"dropout": fold_name(rng, "teachers")},
            mutable=["batch_stats"],
        )
        for name, params in state.teachers.items()
    }
    variables = {"params": params, "batch_stats": statistics}
    result, updated = experiment.towers.apply(
        variables,
        rng,
        teachers,
        rngs={"dropout": fold_name(rng, "dropout")},
        mutable=["batch_stats"],
        method=lambda towers, rng, teachers: function(towers, rng, teachers),
    )
    return result, {**statistics, **updated.get("batch_stats", {})}


def _step_key(experiment: Experiment, state: TrainState) -> jax.Array:
    return fold_name(jax.random.fold_in(jax.random.key(experiment.seed), state.step), "objectives")


def _weighted(experiment: Experiment, losses: Mapping[str, Loss]) -> jax.Array:
    return sum((experiment.objectives[name][0] * loss.value for name, loss in losses.items()), jnp.zeros(()))


def _fixed(experiment: Experiment, params: Any) -> Any:
    """The parameters, frozen ones without gradient: the compiler need not find out that nobody asks for it."""
    factors = experiment.optimizer.factors(params)
    return map_with_names(
        lambda name, leaf: jax.lax.stop_gradient(leaf) if factors[name][0] is None else leaf, params
    )


def _trained(experiment: Experiment, grads: Any) -> list[jax.Array]:
    """The gradients of the parameters that are not frozen, which are what the optimizer clips."""
    factors = experiment.optimizer.factors(grads)
    named = zip(tree_names(grads), jax.tree.leaves(grads), strict=True)
    return [grad for name, grad in named if factors[name][0] is not None]


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [k, B/k, ...]: every k-th example, so that each device's rows stay where they are."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of :func:`_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
