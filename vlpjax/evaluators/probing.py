"""Linear classifiers of frozen features: a convex problem solved to its optimum, or a short training by SGD.

Features stay sharded by rows, classifiers are whole on every device; the sums over examples cross the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vlpjax.optim.lars import lars
from vlpjax.optim.sgd import sgd


class Classifier(NamedTuple):
    """Logits are ``features @ kernel + bias``."""

    kernel: Float[Array, "features classes"]
    bias: Float[Array, classes]

    def __call__(self, features: Float[Array, "examples features"]) -> Float[Array, "examples classes"]:
        return jnp.matmul(features, self.kernel, precision="highest") + self.bias


def fit_logistic(
    features: Float[Array, "examples features"],
    labels: Int[Array, examples],
    weights: Float[Array, examples],
    regularization: Float[Array, ""],
    *,
    classes: int,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Classifier:
    """Multinomial logistic regression: the minimum of sum_i w_i CE_i + regularization / 2 |kernel|^2, by L-BFGS.

    Args:
      weights: of the examples; 0 leaves one out.
      iterations: at most so many.
      tolerance: the norm of the gradient of the mean loss at which it is done.
    """
    total = jnp.sum(weights)

    def loss(model: Classifier) -> Float[Array, ""]:
        errors = optax.softmax_cross_entropy_with_integer_labels(model(features), labels)
        penalty = 0.5 * regularization * jnp.sum(jnp.square(model.kernel))
        return (jnp.sum(weights * errors) + penalty) / total

    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: tuple[Classifier, Any]) -> jax.Array:
        state = carry[1]
        count, norm = optax.tree.get(state, "count"), optax.tree.norm(optax.tree.get(state, "grad"))
        return (count == 0) | ((count < iterations) & (norm > tolerance))

    def step(carry: tuple[Classifier, Any]) -> tuple[Classifier, Any]:
        model, state = carry
        value, grad = value_and_grad(model, state=state)
        updates, state = solver.update(grad, state, model, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(model, updates), state

    start = Classifier(jnp.zeros((features.shape[1], classes)), jnp.zeros((classes,)))
    return jax.lax.while_loop(unfinished, step, (start, solver.init(start)))[0]


def search(
    score: Callable[[float], float], values: np.ndarray, steps: tuple[int, ...] = (16, 8, 4, 2, 1)
) -> float:
    """The value of the best score on a grid, from coarse to fine around the best so far.

    Every ``steps[0]``-th value is tried first, then the two that stand the next step away from the best.  Of equal
    scores the greatest value wins, which of regularisations is the simplest model.

    Args:
      score: is called once per value that is tried.
      values: rising.

    Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, appendix A.3.
    """
    tried = {place: score(float(values[place])) for place in range(0, len(values), steps[0])}
    for step in steps[1:]:
        best = _best(tried)
        for place in (best - step, best + step):
            if 0 <= place < len(values) and place not in tried:
                tried[place] = score(float(values[place]))
    return float(values[_best(tried)])


def _best(tried: dict[int, float]) -> int:
    return max(tried, key=lambda place: (tried[place], place))


def held_out(labels: np.ndarray, real: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """bool [N]: about this share of every class's real examples, at least one where a class has two or more."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels[real]):
        rows = rng.permutation(np.flatnonzero(real & (labels == label)))
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        chosen[rows[:count]] = True
    return chosen


class Standard(NamedTuple):
    """Mean and deviation per feature, which BatchNorm without scale and bias takes away."""

    mean: Float[Array, features]
    deviation: Float[Array, features]

    @classmethod
    def of(cls, features: jax.Array, weights: jax.Array, epsilon: float = 1e-6) -> Standard:
        """Those of the examples, each of which counts by its weight."""
        shares = (weights / jnp.sum(weights))[:, None]
        mean = jnp.sum(shares * features, axis=0)
        variance = jnp.sum(shares * jnp.square(features - mean), axis=0)
        return cls(mean, jnp.sqrt(variance + epsilon))

    def __call__(self, features: jax.Array) -> jax.Array:
        return (features - self.mean) / self.deviation


def train_classifier(
    features: Float[Array, "examples features"],
    labels: Int[Array, examples],
    rows: Int[Array, chosen],
    rates: Float[Array, "epochs steps"],
    *,
    batch_size: int,
    classes: int,
    direction: optax.GradientTransformation,
    batch_norm: bool,
    seed: int,
) -> Classifier:
    """A linear classifier, trained on batches of features that BatchNorm (without scale and bias) standardises.

    Args:
      rows: of the examples that are trained on.
      rates: the learning rate of every step.
      batch_size: examples of a step.
      direction: an optax direction.
      batch_norm: whether features are standardised, by the statistics of their batch.
      seed: of the order of every epoch, and of the initial kernel, from a truncated normal distribution with a
        deviation of 0.01.

    Returns:
      the classifier of standardised features (see :class:`Standard`).
    """
    start, orders = jax.random.split(jax.random.key(seed))
    initial = 0.01 * jax.random.truncated_normal(start, -2.0, 2.0, (features.shape[1], classes))
    model = Classifier(initial, jnp.zeros((classes,)))

    def loss(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
        if batch_norm:
            x = Standard.of(x, jnp.ones(len(x)))(x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(x), y))

    def step(carry: tuple[Classifier, Any], item: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        model, state = carry
        chosen, rate = item
        grads = jax.grad(loss)(model, features[chosen], labels[chosen])
        updates, state = direction.update(grads, state, model)
        return (jax.tree.map(lambda p, u: p - rate * u, model, updates), state), None

    def epoch(carry: tuple[Classifier, Any], item: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        key, rates = item
        return jax.lax.scan(step, carry, (shuffled_batches(key, rows, batch_size), rates))

    # Only one epoch's order stands on a device at a time; that of a whole training would be hundreds of megabytes.
    keys = jax.random.split(orders, len(rates))
    return jax.lax.scan(epoch, (model, direction.init(model)), (keys, rates))[0][0]


def shuffled_batches(key: jax.Array, rows: Int[Array, rows], batch_size: int) -> Int[Array, "steps batch"]:
    """All rows in random order, without those of the last, smaller batch."""
    steps = len(rows) // batch_size
    return jax.random.permutation(key, rows)[: steps * batch_size].reshape(steps, batch_size)


DIRECTIONS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    "lars": lambda momentum, decay: lars(decay, 1e-3, momentum, (("kernel", True), ("bias", False))),
    "sgd": sgd,
}
