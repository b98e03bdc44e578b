"""POA: how often each size is trained, the three branches' loss, and that one program serves all sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.rig import compared, experiment_of, head_variables, new_state, run_config, views
from tests.systems.test_dino import logits_of, softmax
from tests.systems.test_ibot import PATCHES, REAL
from tests.tiny import abstract_of, assert_trees_close, assert_trees_equal, layout_of, on_host
from vlpjax.config import Config, spec
from vlpjax.errors import UserError
from vlpjax.mesh import Layout
from vlpjax.models.elastic import ElasticViT
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.assignment import sinkhorn
from vlpjax.objectives.base import Context
from vlpjax.objectives.koleo import koleo
from vlpjax.objectives.poa import POA, multiplicities, size_list
from vlpjax.state import TrainState
from vlpjax.step import make_train_step
from vlpjax.teachers import EMA

LOCAL = ("local1", "local2")
SMALL: dict[str, Any] = dict(
    local_views=LOCAL, head_prototypes=(9, 5), hidden=(8,), bottleneck=5, widths=(3, 6, 3), depths=(1, 2)
)
RNG = np.random.default_rng(5)


def sizes_of(objective: POA, steps: range, seed: int = 0) -> list[tuple[int, int]]:
    def draw(step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), step)
        context = Context(Towers.of({}), {}, key, step, objective="loss", seed=seed)
        return jnp.stack(objective.size(context))

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(steps.start, steps.stop)))
    return [(int(width), int(depth)) for width, depth in drawn]


def test_a_round_trains_small_networks_most_and_never_the_whole() -> None:
    counts = multiplicities((384, 1024, 64), (12, 24))
    assert len(counts) == 11 * 13 - 1
    assert counts[384, 12] == 9
    assert counts[384, 24] == counts[1024, 12] == 3
    assert counts[960, 24] == counts[1024, 23] == 1
    assert (1024, 24) not in counts
    for width, depth in counts:
        by_width, by_depth = 3 - 2 * (width - 384) / 640, 3 - 2 * (depth - 12) / 12
        assert abs(counts[width, depth] - by_width * by_depth) <= 0.5 + 1e-9


def test_sizes_are_drawn_without_replacement_in_another_order_every_round() -> None:
    objective = POA()
    counts = multiplicities(objective.widths, objective.depths)
    length = len(size_list(objective.widths, objective.depths))
    first, second = (sizes_of(objective, range(start, start + length)) for start in (0, length))
    assert Counter(first) == Counter(second) == counts
    assert first != second
    another = sizes_of(objective, range(length), seed=1)
    assert Counter(another) == counts
    assert another != first


def test_the_loss_has_three_branches_and_is_a_mean_over_heads() -> None:
    objective = POA(**SMALL, patch_teacher_temperature=(0.05, 0.05))
    elastic = {
        "elastic": RNG.normal(size=PATCHES["student"].shape).astype(np.float32),
        "elastic_patches": RNG.normal(size=PATCHES["student_patches"].shape).astype(np.float32),
    }
    features = {**PATCHES, **elastic}
    heads, teacher = head_variables(objective, features), head_variables(objective, features, seed=1)
    ours = compared(objective, features, heads, teacher)
    factor = 6 / float(ours.loss.metrics["width"])
    assert float(ours.loss.metrics["width"]) in (3, 6)

    def cross(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        value: np.ndarray = -np.sum(p * np.log(softmax(q / 0.1)), axis=-1)
        return value

    def pairs(targets: np.ndarray, logits: np.ndarray) -> float:
        return float(
            np.mean(
                [np.mean(cross(targets[:, q], logits[:, v])) for q in range(2) for v in range(4) if q != v]
            )
        )

    def patches(targets: np.ndarray, logits: np.ndarray) -> float:
        losses = np.where(REAL, cross(targets, logits), 0).sum(axis=-1) / np.maximum(REAL.sum(axis=-1), 1)
        return float(np.mean(losses))

    total = 0.0
    for head in ("loss_head_0", "loss_head_1"):
        own, others = ({"params": {"loss_head": side["params"][head]}} for side in (heads, teacher))
        flat = logits_of(others, PATCHES["teacher"])
        targets = np.asarray(sinkhorn(flat.reshape(-1, flat.shape[-1]), 0.04, 3)).reshape(flat.shape)
        hidden = logits_of(others, PATCHES["teacher_patches"])
        rows = hidden.reshape(-1, hidden.shape[-1])
        hidden_targets = np.asarray(sinkhorn(rows, 0.05, 3, REAL.reshape(-1))).reshape(hidden.shape)
        student = logits_of(own, PATCHES["student"])
        small = logits_of(own, elastic["elastic"] * factor)
        small_patches = logits_of(own, elastic["elastic_patches"] * factor)
        whole = pairs(targets, student) + patches(hidden_targets, logits_of(own, PATCHES["student_patches"]))
        part = pairs(targets, small) + patches(hidden_targets, small_patches)
        said = np.mean(cross(softmax(student / 0.1), small))
        total += (0.8 * whole + 0.2 * part + 0.2 * said) / 2
    spread = sum(
        float(koleo(x[:, view])) for x in (PATCHES["student"], elastic["elastic"]) for view in (0, 1)
    )
    np.testing.assert_allclose(ours.loss.value, total + 0.1 * spread / 2, rtol=1e-4)
    only = compared(POA(**SMALL, share=0.0, koleo=0.0), features, heads, teacher)
    np.testing.assert_array_equal(only.features["student"], 0.0)  # it teaches, and does not learn from it
    assert_trees_equal(only.teacher, jax.tree.map(np.zeros_like, only.teacher))


def run(config: Config, layout: Layout, start: TrainState, batch: Any, steps: int) -> tuple[TrainState, Any]:
    """So many steps of one compiled program; the metrics of every step."""
    experiment = experiment_of(config, len(batch["index"]))
    _, shardings = abstract_of(experiment, batch, layout)
    step: Any = make_train_step(experiment, layout, shardings, layout.sharding("batch"))
    state, placed = jax.device_put((start, batch), (shardings, layout.sharding("batch")))
    program, found = step.lower(state, placed).compile(), []
    for _ in range(steps):
        state, metrics = program(state, placed)
        found.append(on_host(metrics))
    return on_host(state), found


def test_steps_of_different_sizes_are_one_program_that_is_the_same_on_every_mesh() -> None:
    tower = spec(ViT, image_size=16, patch=4, width=16, depth=2, heads=2, mlp_ratio=2.0, pre_norm=False,
                 resize_positions=True, mask_token=True, drop_path=0.2)  # fmt: skip
    loss = spec(POA, local_views=LOCAL, head_prototypes=(8, 12), hidden=(8,), bottleneck=8, widths=(8, 16, 8),
                depths=(1, 2))  # fmt: skip
    config = run_config(loss, dict(ema=spec(EMA, decay=0.9)))
    config.towers.image, config.accumulate = spec(ElasticViT, tower=tower), 4
    batch = views(size=32, global1=16, global2=16, local1=8, local2=8)
    state = new_state(config, batch)
    one, metrics = run(config, layout_of(1), state, batch, steps=4)
    sizes = [(int(step["loss/width"]), int(step["loss/depth"])) for step in metrics]
    assert sizes == sizes_of(POA(widths=(8, 16, 8), depths=(1, 2)), range(4))
    assert len(set(sizes)) > 1 and (16, 2) not in sizes
    assert jax.tree.all(jax.tree.map(lambda old, new: bool(np.any(old != new)), state.params, one.params))
    eight, others = run(config, layout_of(8), state, batch, steps=4)
    assert_trees_close(others, metrics, rtol=1e-3, atol=1e-5)
    assert_trees_close(eight.params, one.params, rtol=1e-3, atol=1e-4)


def test_a_tower_of_another_size_is_told() -> None:
    with pytest.raises(UserError, match=r"centring is 'mean'"):
        POA(centring="mean")
    with pytest.raises(UserError, match=r"widths=\(3, 7, 3\)"):
        multiplicities((3, 7, 3), (1, 2))
    config = run_config(spec(POA, **SMALL), dict(ema=spec(EMA)))
    with pytest.raises(UserError, match=r"must be an ElasticViT of width 6 and depth 2"):
        new_state(config, views(global1=8, global2=8, local1=4, local2=4))
