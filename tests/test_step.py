"""The step computes the same on every mesh, accumulates gradients exactly, and changes only what it should."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import (
    BATCH,
    STEPS,
    Agreement,
    Noisy,
    NormTower,
    Trained,
    abstract_of,
    assert_trees_close,
    assert_trees_equal,
    experiment_of,
    layout_of,
    model_config,
    on_host,
    random_batch,
    take_steps,
)
from vlpjax.config import Config, spec
from vlpjax.objectives.base import BatchCoupled, Context, Loss, fold_name
from vlpjax.rules import map_with_names, tree_names
from vlpjax.state import TrainState
from vlpjax.step import gradients, initial_state, make_train_step, train_step
from vlpjax.teachers import EMA, Teacher

SPLITS = [(devices, replica) for devices in (2, 4, 8) for replica in (1, 2, 4, 8) if replica <= devices]


@pytest.fixture(scope="module")
def one_device() -> Trained:
    """Five steps on a single device, with dropout."""
    return take_steps(model_config(dropout=0.1), layout_of(1), steps=5)


@pytest.fixture(scope="module")
def start(one_device: Trained) -> TrainState:
    """The state before the first step, for all tests that need no other parameters."""
    return one_device.history[0]


def grads_of(config: Config, state: TrainState, batch: Any) -> tuple[Any, Any]:
    """Losses and gradients of one batch on one device."""
    experiment = experiment_of(config)
    losses, _, grads = jax.jit(lambda state, batch: gradients(experiment, state, batch))(state, batch)
    return losses, grads


def first_moments(trained: Trained) -> dict[str, Any]:
    """What Adam has after one step is the clipped gradient itself, times 0.1."""
    state = trained.history[1].optimizer
    pairs = zip(tree_names(state), jax.tree.leaves(state), strict=True)
    moments = {name: leaf for name, leaf in pairs if "/mu/" in name}
    assert len(moments) == len(jax.tree.leaves(trained.state.params))
    return moments


@pytest.mark.parametrize(("devices", "replica"), SPLITS)
def test_five_steps_are_the_same_on_every_mesh(one_device: Trained, devices: int, replica: int) -> None:
    layout = layout_of(devices, replica=replica, fsdp=devices // replica)
    ours = take_steps(model_config(dropout=0.1), layout, steps=5, start=one_device.history[0])
    np.testing.assert_allclose(ours.losses, one_device.losses, rtol=1e-5)
    assert_trees_close(first_moments(ours), first_moments(one_device), rtol=1e-4, atol=1e-7)


def test_the_memory_of_the_old_state_is_used_for_the_new_one(one_device: Trained) -> None:
    config, layout, batch = model_config(dropout=0.1), layout_of(1), random_batch()
    experiment = experiment_of(config)
    _, shardings = abstract_of(experiment, batch, layout)
    step = make_train_step(experiment, layout, shardings, layout.sharding("batch"))
    state = jax.device_put(one_device.history[0], shardings)
    new, _ = step(state, batch)
    kept = [
        name
        for name, leaf in zip(tree_names(state), jax.tree.leaves(state), strict=True)
        if not leaf.is_deleted()
    ]
    assert not kept
    assert int(new.step) == 1


def test_every_gradient_is_pinned_where_its_parameter_lies() -> None:
    """Values do not show it: without the pin a compiler may gather whole gradients on every device."""
    experiment, layout, batch = experiment_of(model_config()), layout_of(8), random_batch()
    abstract, shardings = abstract_of(experiment, batch, layout)
    step = jax.make_jaxpr(lambda state, batch: train_step(experiment, state, batch, shardings.params))
    pins = [
        equation.params["sharding"]
        for equation in step(abstract, batch).eqns
        if equation.primitive.name == "sharding_constraint"
    ]
    assert pins == jax.tree.leaves(shardings.params)


def test_parameters_start_the_same_on_every_mesh(one_device: Trained) -> None:
    eight = take_steps(model_config(dropout=0.1), layout_of(8), steps=0)
    assert_trees_close(eight.history[0].params, one_device.history[0].params, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_without_dropout_has_the_gradient_of_the_whole_batch(
    start: TrainState, accumulate: int
) -> None:
    whole, expected = grads_of(model_config(), start, random_batch())
    parts, grads = grads_of(model_config(accumulate=accumulate), start, random_batch())
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert_trees_close(parts["clip"].value, whole["clip"].value, rtol=1e-6)
    assert_trees_close(dict(parts["clip"].metrics), dict(whole["clip"].metrics), rtol=1e-6)
    assert abs(float(expected["clip_logit_scale"]["value"])) > 1e-4
    np.testing.assert_allclose(
        grads["clip_logit_scale"]["value"], expected["clip_logit_scale"]["value"], rtol=1e-4
    )


def test_accumulation_with_dropout_is_one_comparison_of_features_made_with_the_same_keys(
    start: TrainState,
) -> None:
    config = model_config(dropout=0.5, patch_dropout=0.5, accumulate=4)
    experiment, batch = experiment_of(config), random_batch()
    labels = np.concatenate(
        [np.arange(BATCH)[micro::4] for micro in range(4)]
    )  # rows in the order of encoding

    def reference(params: Any) -> jax.Array:
        step_key = fold_name(jax.random.fold_in(jax.random.key(config.seed), 0), "objectives")
        features: dict[str, list[jax.Array]] = {"image": [], "text": []}
        for micro in range(4):
            key = fold_name(jax.random.fold_in(step_key, micro), "dropout")
            part = {name: batch[name][micro::4] for name in features}

            def encode(towers: Any, part: Any = part) -> Any:
                return {name: towers.call(name, part[name], train=True)["embedding"] for name in part}

            made = experiment.towers.apply({"params": params}, rngs={"dropout": key}, method=encode)
            for name in features:
                features[name].append(made[name] / jnp.linalg.norm(made[name], axis=-1, keepdims=True))
        image, text = (jnp.concatenate(features[name])[np.argsort(labels)] for name in ("image", "text"))
        logits = jnp.exp(params["clip_logit_scale"]["value"]) * image @ text.T
        rows, columns = (-jnp.diag(jax.nn.log_softmax(logits, axis)) for axis in (0, 1))
        return jnp.mean(rows + columns) / 2

    losses, grads = grads_of(config, start, batch)
    value, expected = jax.jit(jax.value_and_grad(reference))(start.params)
    np.testing.assert_allclose(losses["clip"].value, value, rtol=1e-6)
    # The gradient of a frequent token's embedding is a sum of terms a hundred times as large.
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_accumulation_is_not_the_mean_of_small_batches(start: TrainState) -> None:
    batch = random_batch()
    _, exact = grads_of(model_config(accumulate=4), start, batch)
    experiment = experiment_of(model_config())
    one = jax.jit(lambda part: gradients(experiment, start, part)[2])
    small = [one({name: x[micro::4] for name, x in batch.items()}) for micro in range(4)]
    mean = jax.tree.map(lambda *parts: sum(parts) / 4, *small)
    apart = float(optax.global_norm(jax.tree.map(jnp.subtract, mean, exact)) / optax.global_norm(exact))
    assert apart > 0.1


def test_frozen_parameters_keep_every_bit_and_have_no_moments(start: TrainState) -> None:
    config = model_config()
    config.optimizer.rate_rules = (("image/.*", None), ("text/block_.*", None), (".*", 1.0))
    trained = take_steps(config, layout_of(1), steps=2)
    before, after = (trained.history[index].params for index in (0, 2))
    _, grads = grads_of(model_config(), trained.history[0], random_batch())
    free = {**grads, "image": {}, "text": {**grads["text"], "block_0": {}}}
    np.testing.assert_allclose(trained.metrics[0]["grad_norm"], optax.global_norm(free), rtol=1e-5)
    assert optax.global_norm(free) < 0.99 * optax.global_norm(grads)
    assert_trees_equal(after["image"], before["image"])
    assert_trees_equal(after["text"]["block_0"], before["text"]["block_0"])
    changed = [name for name, same in named_equal(after["text"], before["text"]) if not same]
    assert {"token_embedding/embedding", "projection/kernel/kernel"} <= set(changed)
    _, fixed = grads_of(config, trained.history[0], random_batch())
    assert optax.global_norm(fixed) == pytest.approx(
        float(optax.global_norm(free)), rel=1e-5
    )  # 0 where frozen
    moments = [name for name in tree_names(trained.state.optimizer) if "image/" in name or "block_0" in name]
    assert not moments
    assert any("text/final_norm" in name for name in tree_names(trained.state.optimizer))


def named_equal(ours: Any, theirs: Any) -> list[tuple[str, bool]]:
    names = tree_names(ours)
    pairs = zip(names, jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return [(name, bool(np.array_equal(left, right))) for name, left, right in pairs]


def test_weights_decay_by_rate_and_rule_and_nothing_else_does() -> None:
    config = model_config()
    config.optimizer.direction = spec(optax.scale, step_size=0.0)  # nothing but decay is left of the update
    config.optimizer.decay_rules = ((".*kernel", 1.0), ("image/position_embedding", 0.5), (".*", 0.0))
    config.optimizer.rate_rules = (("text/.*", 0.25), (".*", 1.0))
    trained = take_steps(config, layout_of(1))
    # the first of two warm-up steps
    rate, decay = config.optimizer.learning_rate * 0.5, config.optimizer.weight_decay

    def expected(name: str, value: np.ndarray) -> np.ndarray:
        factor = 1.0 if name.endswith("kernel") else 0.5 if name == "image/position_embedding" else 0.0
        return value * (1 - rate * decay * factor * (0.25 if name.startswith("text/") else 1.0))

    before, after = trained.history[0].params, trained.history[1].params
    assert_trees_close(after, map_with_names(expected, before), rtol=3e-7, atol=0)
    moved = {name for name, same in named_equal(after, before) if not same}
    assert moved
    assert all(name.endswith("kernel") or name == "image/position_embedding" for name in moved)


def test_teachers_follow_their_formula_or_stay() -> None:
    config = model_config()
    config.teachers = dict(
        moving=spec(EMA, decay=0.5),
        rising=spec(EMA, towers=("image",), decay=0.5, final_decay=1.0),
        still=spec(Teacher),
    )
    history = take_steps(config, layout_of(2), steps=3).history
    assert_trees_equal(history[0].teachers["moving"], history[0].params)
    for step in (1, 2, 3):
        params, teachers, previous = history[step].params, history[step].teachers, history[step - 1].teachers
        assert_trees_equal(teachers["still"], history[0].params)
        assert_trees_close(
            teachers["moving"],
            jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, previous["moving"], params),
            rtol=1e-5,
        )
        decay = 1.0 - 0.5 * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        follow = jax.tree.map(
            lambda old, new, m=decay: m * old + (1 - m) * new, previous["rising"]["image"], params["image"]
        )
        assert set(teachers["rising"]) == {"image"}
        assert_trees_close(teachers["rising"]["image"], follow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_go_from_step_to_step(accumulate: int) -> None:
    config = model_config(accumulate=accumulate)
    config.towers.image = spec(NormTower)
    history = take_steps(config, layout_of(2), steps=2).history
    mean = np.zeros(16 * 16 * 3)
    for seed in (0, 1):
        images = random_batch(seed)["image"].reshape(BATCH, -1)
        for micro in range(accumulate):
            mean = 0.9 * mean + 0.1 * images[micro::accumulate].mean(axis=0)
    np.testing.assert_allclose(history[2].statistics["image"]["norm"]["mean"], mean, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Agreed:
    """Objectives that draw per row, one of them with BatchNorm heads, and a teacher that is not the student."""

    config: Config
    state: TrainState

    def gradients(self, accumulate: int) -> tuple[Any, Any, Any]:
        """Losses, statistics and gradients of one batch."""
        experiment = replace(experiment_of(self.config), accumulate=accumulate)
        return jax.jit(lambda state, batch: gradients(experiment, state, batch))(self.state, random_batch())

    @functools.cached_property
    def plain(self) -> tuple[Any, Any, Any]:
        return self.gradients(accumulate=1)


@pytest.fixture(scope="module")
def agreed() -> Agreed:
    config = model_config()
    del config.towers.text
    config.objectives = dict(
        agree=dict(weight=1.0, loss=spec(Agreement)), noisy=dict(weight=0.5, loss=spec(Noisy))
    )
    config.teachers = dict(slow=spec(EMA, decay=0.9))
    state = on_host(jax.jit(lambda batch: initial_state(experiment_of(config), batch))(random_batch()))
    random = np.random.default_rng(1)
    other = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape).astype(x.dtype), state.params)
    return Agreed(config, state.replace(teachers={"slow": other}))


def batch_normed(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)


def test_heads_see_the_whole_batch_and_a_teachers_leave_no_statistics(agreed: Agreed) -> None:
    config, state = agreed.config, agreed.state
    images, embed_with = random_batch()["image"], experiment_of(config).towers.makers["image"]()
    losses, statistics, _ = agreed.plain
    key = fold_name(
        fold_name(jax.random.fold_in(jax.random.key(config.seed), 0), "objectives"), "agree/noise"
    )
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, row), (16,)) for row in range(BATCH)])
    embed = jax.jit(lambda params: embed_with.apply({"params": params}, images))

    def projected(params: Any, noise: Any) -> list[np.ndarray]:
        """What enters the norms of the projector, and what leaves it."""
        head, embedded = params["agree_projector"], embed(params["image"])["embedding"]
        first = (np.asarray(embedded) + noise) @ head["layer_0"]["kernel"]
        affine = batch_normed(first) * head["norm_0"]["scale"] + head["norm_0"]["bias"]
        second = np.maximum(affine, 0) @ head["layer_1"]["kernel"]
        return [first, second, batch_normed(second)]

    *entered, ours = projected(state.params, 0.5 * noise)
    *_, theirs = projected(state.teachers["slow"], 0.0)
    np.testing.assert_allclose(losses["agree"].value, np.square(ours - theirs).sum(axis=1).mean(), rtol=1e-4)
    own = statistics["agree_projector"]
    for name, x in zip(("norm_0", "norm_1"), entered, strict=True):
        np.testing.assert_allclose(own[name]["mean"], 0.1 * x.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own[name]["var"], 0.9 + 0.1 * x.var(axis=0), rtol=1e-4)


def test_draws_per_row_and_heads_statistics_do_not_depend_on_accumulation(agreed: Agreed) -> None:
    (losses, statistics, grads), (parts, kept, accumulated) = agreed.plain, agreed.gradients(accumulate=4)
    for name in ("agree", "noisy"):
        np.testing.assert_allclose(parts[name].value, losses[name].value, rtol=1e-5)
        assert abs(float(losses[name].value)) > 1e-3
    np.testing.assert_allclose(parts["agree"].metrics["noise"], losses["agree"].metrics["noise"], rtol=1e-6)
    assert_trees_close(kept, statistics, rtol=1e-5, atol=1e-6)
    assert np.abs(statistics["agree_projector"]["norm_0"]["mean"]).max() > 1e-3
    assert_trees_close(accumulated, grads, rtol=1e-4, atol=1e-6)


def test_heads_statistics_are_those_of_the_batch_on_every_mesh(agreed: Agreed) -> None:
    losses, statistics, _ = agreed.plain
    eight = take_steps(agreed.config, layout_of(8), steps=1, start=agreed.state)
    np.testing.assert_allclose(
        eight.losses[0], losses["agree"].value + 0.5 * losses["noisy"].value, rtol=1e-5
    )
    assert_trees_close(eight.history[1].statistics, statistics, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Centred(BatchCoupled):
    """Pulls embeddings to a centre, which is the objective's state and follows them; features know it already."""

    def initial_state(self, key: jax.Array) -> Any:
        return {"centre": jnp.zeros(16)}

    def encode(self, context: Context) -> jax.Array:
        centred: jax.Array = context.encode("image", "image")["embedding"] - context.state["centre"]
        return centred

    def compare(self, features: jax.Array, context: Context) -> Loss:
        moved = context.state["centre"] + 0.1 * features.mean(axis=0)
        return Loss(jnp.mean(jnp.square(features)), state={"centre": moved})


def test_a_coupled_objective_encodes_with_its_state_in_every_micro_batch() -> None:
    config = model_config()
    del config.towers.text
    config.objectives = dict(centred=dict(weight=1.0, loss=spec(Centred)))
    state = jax.jit(lambda batch: initial_state(experiment_of(config), batch))(random_batch())
    state = state.replace(objectives={"centred": {"centre": jnp.linspace(-2.0, 2.0, 16)}})
    whole, expected = grads_of(config, state, random_batch())
    config.accumulate = 4
    parts, grads = grads_of(config, state, random_batch())
    np.testing.assert_allclose(parts["centred"].value, whole["centred"].value, rtol=1e-5)
    assert_trees_close(parts["centred"].state, whole["centred"].state, rtol=1e-5)
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_that_is_logged_is_the_schedule() -> None:
    trained = take_steps(model_config(), layout_of(1), steps=5)
    cosine = [0.5 * (1 + np.cos(np.pi * (step - 2) / (STEPS - 2))) for step in (2, 3, 4)]
    np.testing.assert_allclose(
        [float(values["learning_rate"]) for values in trained.metrics],
        [5e-3, 1e-2, *(1e-2 * c for c in cosine)],
        rtol=1e-5,
    )
    assert int(trained.state.step) == 5


def test_a_state_is_made_without_looking_at_the_values_of_the_batch() -> None:
    experiment = experiment_of(model_config())
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in random_batch().items()}
    abstract = jax.eval_shape(lambda batch: initial_state(experiment, batch), shapes)
    assert abstract.params["image"]["class_token"].shape == (1, 1, 16)
