"""LOOK: its loss by direct formula, who is left out, ranking by chunks, and the modes that it keeps within classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.objectives.rig import compared, gradients_of, new_state, run_config, views
from tests.tiny import assert_trees_close, layout_of, unit
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.objectives.look import LOOK, References, neighbour_losses

B, R, E, T = 12, 40, 5, 0.2
RNG = np.random.default_rng(0)
OWN = References(
    unit(RNG.normal(size=(B, E))).astype(np.float32),
    RNG.integers(0, 3, B).astype(np.int32),
    np.arange(B, dtype=np.int32),
)
OTHERS = References(
    unit(RNG.normal(size=(R, E))).astype(np.float32),
    RNG.integers(0, 3, R).astype(np.int32),
    np.arange(100, 100 + R, dtype=np.int32),
)


def direct(own: References, others: References, k: int) -> np.ndarray:
    """Example by example: rank, take k, and the nearest of the same class if none of these is."""
    losses = []
    for z, label, example in zip(*(np.asarray(x) for x in own), strict=True):
        cosines = np.asarray(others.features, np.float64) @ z.astype(np.float64)
        allowed = [j for j in np.argsort(-cosines, kind="stable") if others.examples[j] not in (example, -1)]
        near = allowed[:k]
        same = [j for j in allowed if others.labels[j] == label]
        if not any(others.labels[j] == label for j in near):
            near = [*near, same[0]]
        weights = {j: np.exp(cosines[j] / T) for j in near}
        losses.append(
            -np.log(sum(weights[j] for j in near if others.labels[j] == label) / sum(weights.values()))
        )
    return np.asarray(losses)


@pytest.mark.parametrize("k", [1, 7, R])  # with k of all it is neighbourhood components analysis
@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_ranking_by_chunks_gives_the_direct_formula(k: int, chunk: int) -> None:
    losses, counted, _ = neighbour_losses(OWN, OTHERS, k, T, chunk)
    assert np.all(counted)
    np.testing.assert_allclose(losses, direct(OWN, OTHERS, k), rtol=1e-4, atol=1e-6)


def test_with_all_neighbours_it_is_neighbourhood_components_analysis() -> None:
    logits = OWN.features.astype(np.float64) @ OTHERS.features.T / T
    same = OWN.labels[:, None] == OTHERS.labels
    expected = np.log(np.exp(logits).sum(axis=1)) - np.log((np.exp(logits) * same).sum(axis=1))
    np.testing.assert_allclose(neighbour_losses(OWN, OTHERS, R, T)[0], expected, rtol=1e-4, atol=1e-6)


def test_the_vote_is_the_share_of_classmates_among_the_neighbours_by_weight() -> None:
    cosines = OWN.features.astype(np.float64) @ OTHERS.features.T
    weights, same = np.exp(cosines / T), OWN.labels[:, None] == OTHERS.labels
    shares = np.sum(weights * same, axis=1) / np.sum(weights, axis=1)
    np.testing.assert_allclose(neighbour_losses(OWN, OTHERS, R, T)[2], shares, rtol=1e-4)
    nearest = same[np.arange(B), cosines.argmax(axis=1)]
    assert 0 < nearest.sum() < B
    np.testing.assert_allclose(neighbour_losses(OWN, OTHERS, 1, T)[2], nearest, rtol=1e-6)


def test_the_example_itself_and_empty_places_change_nothing() -> None:
    empty = OTHERS._replace(examples=np.full(R, -1, np.int32))
    joined = References(*(np.concatenate(parts) for parts in zip(OWN, OTHERS, empty, strict=True)))
    alone = References(*(np.concatenate([own[:1], other]) for own, other in zip(OWN, OTHERS, strict=True)))
    only_first = References(*(x[:1] for x in OWN))
    losses = neighbour_losses(only_first, alone, 7, T)[0]
    np.testing.assert_allclose(losses, neighbour_losses(only_first, OTHERS, 7, T)[0], rtol=1e-6)
    np.testing.assert_allclose(
        neighbour_losses(OWN, joined, 7, T, chunk=16)[0], direct(OWN, joined, 7), rtol=1e-4, atol=1e-6
    )


def test_a_class_without_a_neighbour_has_a_gradient_and_one_without_any_member_does_not_count() -> None:
    own = References(OWN.features[:2], np.array([7, 8], np.int32), OWN.examples[:2])
    farthest = int(np.argmin(OTHERS.features @ own.features[0]))
    labels = np.where(np.arange(R) == farthest, 7, 0).astype(np.int32)

    def loss(features: jax.Array) -> tuple[jax.Array, Any]:
        losses, counted, _ = neighbour_losses(
            own._replace(features=features), OTHERS._replace(labels=labels), 3, T
        )
        return jnp.sum(losses), counted

    grad, counted = jax.grad(loss, has_aux=True)(own.features)
    np.testing.assert_array_equal(counted, [True, False])
    assert np.linalg.norm(grad[0]) > 1.0
    np.testing.assert_array_equal(grad[1], 0.0)


def test_the_queue_is_filled_by_the_teacher_and_eight_devices_rank_alike() -> None:
    objective = LOOK(projector=(E,), neighbours=5, queue=32, temperature=T)
    features = {name: RNG.normal(size=(16, 6)).astype(np.float32) for name in ("student", "teacher")}
    batch = {"label": RNG.integers(0, 3, 16).astype(np.int32), "index": np.arange(16, dtype=np.int32)}
    kernel = RNG.normal(size=(6, E)).astype(np.float32)
    heads = {"params": {"loss_projector": {"layer_0": {"kernel": kernel, "bias": np.zeros(E, np.float32)}}}}
    state = objective.initial_state(jax.random.key(0))
    empty = compared(objective, features, heads, state=state, batch=batch)
    first = empty.loss
    assert first.metrics["counted"] == 0.0  # the queue was empty
    np.testing.assert_array_equal(empty.features["student"], 0.0)
    np.testing.assert_array_equal(first.state["examples"], [*range(16), *[-1] * 16])
    keys = unit(features["teacher"] @ kernel)
    np.testing.assert_allclose(first.state["features"][:16], keys, rtol=1e-4, atol=1e-6)
    one = compared(objective, features, heads, state=first.state, batch=batch)
    eight = compared(objective, features, heads, state=first.state, batch=batch, layout=layout_of(8))
    queue = References(first.state["features"], first.state["labels"], first.state["examples"])
    queries = unit(features["student"] @ kernel)
    own = References(queries.astype(np.float32), batch["label"], batch["index"])
    np.testing.assert_allclose(one.loss.value, np.mean(direct(own, queue, 5)), rtol=1e-4)
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.features, one.features, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(one.features["teacher"], 0.0)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    config = run_config(spec(LOOK, image="view1", queue=0, teacher="", projector=(8,), neighbours=5))
    batch = views()
    state = new_state(config, batch)
    whole, grads = gradients_of(config, state, batch)
    config.accumulate = 4
    parts, accumulated = gradients_of(config, state, batch)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
    assert_trees_close(accumulated, grads, rtol=1e-3, atol=1e-6)


# --- what it is for: modes within classes -----------------------------------------------------------------------

CLASSES, MODES, WIDTH, BATCH = 5, 4, 64, 256


def world(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Points about 20 centres; four centres that have nothing else in common make a class."""
    centres = jax.random.normal(jax.random.key(11), (CLASSES * MODES, WIDTH))
    mode_key, noise_key = jax.random.split(key)
    modes = jax.random.randint(mode_key, (count,), 0, CLASSES * MODES)
    return centres[modes] + 1.8 * jax.random.normal(noise_key, (count, WIDTH)), modes % CLASSES, modes


def net(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["first"])
    x = x @ params["second"]
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def look_loss(k: int) -> Callable[..., jax.Array]:
    def loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        own = References(net(params, x), labels, jnp.arange(len(x)))
        return jnp.mean(neighbour_losses(own, own, k, 0.1)[0])

    return loss


def cross_entropy(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = net(params, x) @ params["classes"] / 0.1
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def supervised_contrast(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all positives of -log softmax (SupCon, arXiv 2004.11362)."""
    z = net(params, x)
    itself = jnp.eye(len(x), dtype=bool)
    logits = jnp.where(itself, -1e9, z @ z.T / 0.1)
    positive = (labels[:, None] == labels[None]) & ~itself
    picked = jnp.where(positive, jax.nn.log_softmax(logits, axis=1), 0.0)
    return -jnp.mean(picked.sum(axis=1) / positive.sum(axis=1))


def mode_accuracy(loss: Callable[..., jax.Array]) -> tuple[float, float]:
    """k-NN accuracy on new points after training: of hidden modes, and of classes."""
    keys = jax.random.split(jax.random.key(2), 3)
    params = {
        "first": jax.random.normal(keys[0], (WIDTH, 64)) * (2 / WIDTH) ** 0.5,
        "second": jax.random.normal(keys[1], (64, 16)) / 8,
        "classes": jax.random.normal(keys[2], (16, CLASSES)) / 4,
    }
    adam = optax.adam(3e-3)

    def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = carry
        x, labels, _ = world(jax.random.fold_in(jax.random.key(3), number), BATCH)
        value, grads = jax.value_and_grad(loss)(params, x, labels)
        updates, moments = adam.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), value

    def run() -> Any:
        (trained, _), _ = jax.lax.scan(step, (params, adam.init(params)), jnp.arange(600))
        memory, queries = (world(jax.random.key(seed), count) for seed, count in ((90, 1000), (91, 500)))
        near = jax.lax.top_k(net(trained, queries[0]) @ net(trained, memory[0]).T, 5)[1]

        def vote(kind: int, kinds: int) -> jax.Array:
            counts = jax.nn.one_hot(memory[kind][near], kinds).sum(axis=1)
            return jnp.mean(jnp.argmax(counts, axis=1) == queries[kind])

        return vote(2, CLASSES * MODES), vote(1, CLASSES)

    modes, classes = jax.jit(run)()
    return float(modes), float(classes)


def test_hidden_modes_survive_best_under_look_then_cross_entropy_then_supcon() -> None:
    scores = {
        name: mode_accuracy(loss)
        for name, loss in (("look", look_loss(20)), ("ce", cross_entropy), ("supcon", supervised_contrast))
    }
    modes = {name: score[0] for name, score in scores.items()}
    assert modes["look"] > modes["ce"] + 0.05
    assert modes["ce"] > modes["supcon"]
    assert min(score[1] for score in scores.values()) > 0.8, scores


def test_odd_settings_are_told() -> None:
    with pytest.raises(UserError, match=r"neighbours is 0"):
        LOOK(neighbours=0)
    with pytest.raises(UserError, match=r"queue is 65536.*teacher"):
        LOOK(teacher="")
