"""The mesh: mistakes are told with what would work, and every array of a step lies where the rules say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from tests.tiny import (
    NormTower,
    Trained,
    abstract_of,
    experiment_of,
    layout_of,
    model_config,
    random_batch,
    run_config,
    take_steps,
)
from vlpjax.checkpoint import Checkpoints
from vlpjax.config import Config, spec
from vlpjax.errors import UserError
from vlpjax.mesh import AXES, RULES, Layout, constrain, hardware_name, make_layout, pick_rule
from vlpjax.objectives.moco import MoCoV2
from vlpjax.rules import tree_names
from vlpjax.run import Run, apply_mesh_rules
from vlpjax.state import TrainState, check_replicated, replicated_share
from vlpjax.step import gradients
from vlpjax.teachers import EMA


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"fsdp": 3}, ["fsdp=3", "8 devices"]),
        ({"fsdp": 4}, ["fsdp=4", "multiply to 8"]),
        ({"replica": 3, "fsdp": -1}, ["replica=3", "8"]),
        ({"replica": -1, "fsdp": -1}, ["replica=-1", "fsdp=-1", "only one"]),
        ({"data": 8}, ["'data'", "replica, fsdp"]),
        ({"fsdp": 0}, ["fsdp=0", "8"]),
        ({}, ["all sizes 1", "8"]),
    ],
)
def test_sizes_that_do_not_work_are_told(sizes: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_layout(sizes)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_one_axis_takes_the_rest_and_all_axes_exist() -> None:
    layout = make_layout({"replica": 2, "fsdp": -1})
    assert dict(layout.mesh.shape) == {**dict.fromkeys(AXES, 1), "replica": 2, "fsdp": 4}


@dataclass(frozen=True)
class Chip:
    """What the mesh asks of a device: a chip of a torus in one of several slices."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices: int, *torus: int, platform: str = "tpu") -> list[Chip]:
    places = [(index, place) for index in range(slices) for place in np.ndindex(*torus)]
    return [Chip(number, index, place, platform) for number, (index, place) in enumerate(places)]


def slices_along(layout: Layout, *axes: str) -> np.ndarray:
    """The slices along these axes, of which every other axis sees the same."""
    grid = np.vectorize(lambda chip: chip.slice_index)(layout.mesh.devices)
    others = tuple(index for index, axis in enumerate(AXES) if axis not in axes)
    np.testing.assert_array_equal(grid.min(axis=others), grid.max(axis=others))
    found: np.ndarray = grid.min(axis=others)
    return found


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_slices_are_told_apart_by_the_slowest_axes_that_can(platform: str) -> None:
    layout = make_layout(
        {"replica": 2, "fsdp": -1, "tensor": 4}, devices=chips(2, 2, 2, 4, platform=platform)
    )
    assert layout.slices == {"replica": 2}
    assert dict(layout.mesh.shape) == {**dict.fromkeys(AXES, 1), "replica": 2, "fsdp": 4, "tensor": 4}
    assert slices_along(layout, "replica").tolist() == [0, 1]
    layout = make_layout({"replica": 4, "fsdp": -1}, devices=chips(2, 2, 2, 4, platform=platform))
    assert slices_along(layout, "replica").tolist() == [0, 0, 1, 1]  # two replicas in each
    layout = make_layout({"fsdp": -1}, devices=chips(2, 2, 2, 4, platform=platform))
    assert slices_along(layout, "fsdp").tolist() == [0] * 16 + [1] * 16
    layout = make_layout(
        {"replica": 2, "ring": -1, "ulysses": 4}, devices=chips(4, 2, 2, 4, platform=platform)
    )
    assert layout.slices == {"replica": 2, "ring": 2}
    assert slices_along(layout, "replica", "ring").tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]


def test_within_a_slice_an_axis_is_a_line_of_the_torus() -> None:
    layout = make_layout({"replica": 2, "fsdp": -1, "ulysses": 8}, devices=chips(2, 2, 2, 8))
    for line in layout.mesh.devices.reshape(2 * 4, 8):
        assert len({chip.coords[:2] for chip in line}) == 1
    assert (
        make_layout({"fsdp": 2, "ulysses": 8}, devices=chips(1, 2, 2, 4)).slices == {}
    )  # an axis of four is halved


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"tensor": -1}, ["2 slices of 16", "tensor=32 must lie within a slice", "config.mesh.replica=2"]),
        ({"ulysses": 8, "tensor": 4}, ["ulysses=8 x tensor=4", "replica x fsdp x ring is 1"]),
        ({"expert": -1}, ["expert=32"]),
    ],
)
def test_what_must_lie_within_a_slice_and_does_not_is_told(sizes: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_layout(sizes, devices=chips(2, 2, 2, 4))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_slices_of_different_sizes_are_told() -> None:
    with pytest.raises(UserError, match=r"different sizes \(16 in slice 0, 8 in slice 1\)"):
        make_layout({"fsdp": -1}, devices=chips(2, 2, 2, 4)[:24])


def test_names_become_mesh_axes() -> None:
    layout = make_layout({"replica": 2, "fsdp": 2, "tensor": 2})
    assert layout.spec(("batch", None)) == PartitionSpec(("replica", "fsdp"), None)
    assert layout.spec(("embed", "mlp")) == PartitionSpec(("fsdp",), ("tensor",))
    assert layout.spec(("vocabulary", "head_dim")) == PartitionSpec(("tensor",), None)


def test_what_cannot_be_placed_is_told() -> None:
    layout = make_layout({"fsdp": 4, "tensor": 2})
    with pytest.raises(UserError, match=r"image/kernel names the logical axis 'embd'.*'embed'"):
        layout.spec(("embd",), what="image/kernel")
    with pytest.raises(UserError, match=r"kernel: both 'mlp' and 'heads' lie on the mesh axis 'tensor'"):
        layout.spec(("mlp", "heads"), what="kernel")
    with pytest.raises(
        UserError, match=r"kernel has 10 along 'embed', which fsdp=4 does not divide.* 8 or 12"
    ):
        layout.spec(("embed",), (10,), "kernel")
    with pytest.raises(UserError, match=r"kernel has 3 along 'embed'.* are 4\."):
        layout.spec(("embed",), (3,), "kernel")


def test_rules_can_be_replaced_and_added() -> None:
    layout = make_layout({"fsdp": 4, "tensor": 2}, {"embed": ("tensor",), "mine": ("fsdp",)})
    assert layout.spec(("embed", "mine")) == PartitionSpec(("tensor",), ("fsdp",))
    assert layout.rules["mlp"] == RULES["mlp"]
    assert make_layout({"fsdp": -1}, {"mlp": "fsdp"}).rules["mlp"] == ("fsdp",)
    with pytest.raises(UserError, match=r"rule 'embed' names the mesh axis 'model'"):
        make_layout({"fsdp": -1}, {"embed": ("model",)})


def test_the_first_mesh_rule_that_matches_the_hardware_wins() -> None:
    rules = (("tpu-.*", 1), (r"cpu-.*-8", 2), (".*", 3))
    assert pick_rule(rules, hardware_name()) == 2
    assert pick_rule(rules, "gpu-H100-8") == 3
    assert pick_rule((("tpu", 1),), "tpu-v5e-8") is None


def test_mesh_rules_of_a_config_set_its_leaves() -> None:
    config = Config(
        mesh=dict(replica=1, fsdp=-1),
        part=spec(nn.Dense, features=4),
        mesh_rules=(
            ("gpu-.*", {"mesh.fsdp": 3}),
            ("cpu-.*-8", {"mesh.replica": 2, "part.use_bias": False}),
            (".*", {}),
        ),
    )
    apply_mesh_rules(config)
    assert (config.mesh.replica, config.mesh.fsdp, config.part.use_bias) == (2, -1, False)


def config_with_everything() -> Config:
    """Towers, a teacher, an objective that remembers a queue, and a norm that keeps statistics."""
    config = model_config()
    config.teachers = dict(ema=spec(EMA))
    config.towers.plain = spec(NormTower)
    config.objectives.queue = dict(
        weight=0.1,
        loss=spec(
            MoCoV2, tower="plain", output="embedding", views=("image", "image"), queue=32, projector=(16, 8)
        ),
    )
    return config


@pytest.fixture(scope="module")
def trained() -> Trained:
    """One real step on replica=2, fsdp=2, tensor=2."""
    return take_steps(config_with_everything(), layout_of(8, replica=2, fsdp=2, tensor=2))


PLACES = {
    "image/position_embedding": PartitionSpec(None, None, "fsdp"),
    "image/class_token": PartitionSpec(None, None, "fsdp"),
    "image/patches/projection/kernel": PartitionSpec(None, "fsdp"),
    "image/block_0/attention/query/kernel": PartitionSpec("fsdp", "tensor", None),
    "image/block_0/attention/query/bias": PartitionSpec("tensor", None),
    "image/block_0/attention/out/kernel": PartitionSpec("tensor", None, "fsdp"),
    "image/block_0/attention/out/bias": PartitionSpec("fsdp"),
    "image/block_0/mlp/up/kernel": PartitionSpec("fsdp", "tensor"),
    "image/block_0/mlp/up/bias": PartitionSpec("tensor"),
    "image/block_0/mlp/down/kernel": PartitionSpec("tensor", "fsdp"),
    "image/projection/kernel/kernel": PartitionSpec("fsdp", None),
    "text/token_embedding/embedding": PartitionSpec("tensor", "fsdp"),
    "text/position_embedding": PartitionSpec(None, "fsdp"),
    "text/final_norm/scale": PartitionSpec(None),
    "clip_logit_scale/value": PartitionSpec(),
}


@pytest.mark.parametrize("where", ["params", "optimizer", "teachers"])
def test_every_leaf_of_the_state_lies_where_the_rules_say_after_a_step(trained: Trained, where: str) -> None:
    mesh = layout_of(8, replica=2, fsdp=2, tensor=2).mesh
    tree = getattr(trained.state, where)
    found = dict.fromkeys(PLACES, 0)
    for name, leaf in zip(tree_names(tree), jax.tree.leaves(tree), strict=True):
        for parameter, place in PLACES.items():
            if name.endswith(parameter):
                expected = NamedSharding(mesh, place)
                assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.sharding.spec)
                assert leaf.addressable_shards[0].data.shape == expected.shard_shape(leaf.shape)
                found[parameter] += 1
    assert set(found.values()) == {2 if where == "optimizer" else 1}  # two moments


def assert_lie_at(tree: Any, planned: Any) -> None:
    """Every leaf lies where it was planned, on all eight devices."""
    for name, leaf, sharding in zip(
        tree_names(tree), jax.tree.leaves(tree), jax.tree.leaves(planned), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), name
        assert len(leaf.addressable_shards) == 8, name


def test_every_leaf_of_the_state_lies_where_it_was_planned(trained: Trained) -> None:
    assert_lie_at(trained.state, trained.shardings)
    for name in ("objectives", "statistics"):  # small, and of no parameter's shape
        leaves = jax.tree.leaves(getattr(trained.state, name))
        assert leaves and all(leaf.sharding.is_fully_replicated for leaf in leaves)


def test_and_lies_there_again_when_it_was_restored(trained: Trained, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trained.state, {"data": {}})
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, jax.eval_shape(lambda: trained.state), trained.shardings)
    checkpoints.close()
    assert_lie_at(restored, trained.shardings)


def test_every_leaf_of_the_gradient_lies_where_its_parameter_does(trained: Trained) -> None:
    """Seen inside the step: the compiler is not asked to place what comes out."""
    config, layout = config_with_everything(), layout_of(8, replica=2, fsdp=2, tensor=2)
    experiment, shardings = experiment_of(config), trained.shardings

    def inside(state: TrainState, batch: Any) -> Any:
        with layout.activate():
            return gradients(experiment, state, batch, shardings.params)[2]

    jitted = jax.jit(inside, in_shardings=(shardings, layout.sharding("batch")))
    compiled = jitted.lower(jax.eval_shape(lambda: trained.state), random_batch()).compile()
    for name, leaf, found, planned in zip(
        tree_names(trained.state.params),
        jax.tree.leaves(trained.state.params),
        jax.tree.leaves(compiled.output_shardings),
        jax.tree.leaves(shardings.params),
        strict=True,
    ):
        assert found.is_equivalent_to(planned, leaf.ndim), name


def test_metrics_are_on_every_device(trained: Trained) -> None:
    assert {"loss", "grad_norm", "clip/loss", "queue/accuracy"} <= set(trained.metrics[0])
    assert_lie_at(trained.metrics[0], dict.fromkeys(trained.metrics[0], layout_of(8).replicated))


def test_no_matrix_is_silently_replicated() -> None:
    layout = layout_of(8)
    abstract, shardings = abstract_of(experiment_of(config_with_everything()), random_batch(), layout)
    for tree, places in ((abstract.params, shardings.params), (abstract.optimizer, shardings.optimizer)):
        for name, leaf, place in zip(
            tree_names(tree), jax.tree.leaves(tree), jax.tree.leaves(places), strict=True
        ):
            if (
                len(leaf.shape) > 1
                and "query/bias" not in name
                and "key/bias" not in name
                and "value/bias" not in name
            ):
                assert place.shard_shape(leaf.shape) != leaf.shape, name
    config = model_config(teachers=dict(ema=spec(EMA)))
    abstract, shardings = abstract_of(experiment_of(config), random_batch(), layout)
    assert 0 < replicated_share(abstract, shardings) < 0.05
    everywhere = jax.tree.map(lambda _: layout.replicated, shardings)
    assert replicated_share(abstract, everywhere) == 1.0


class Plain(nn.Module):
    """A tower whose author has never heard of logical axes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": nn.Dense(16)(nn.Dense(24)(x.reshape(x.shape[0], -1)))}


def test_parameters_without_axis_names_are_sharded_along_their_largest_dimension() -> None:
    config = model_config()
    config.towers.image = spec(Plain)
    _, shardings = abstract_of(experiment_of(config), random_batch(), layout_of(8))
    assert shardings.params["image"]["Dense_0"]["kernel"].spec == PartitionSpec(("fsdp",), None)  # [768, 24]
    assert shardings.params["image"]["Dense_1"]["kernel"].spec == PartitionSpec(("fsdp",), None)  # [24, 16]
    assert shardings.params["image"]["Dense_0"]["bias"].is_fully_replicated


def test_constrain_places_inside_a_layout_and_does_nothing_outside() -> None:
    layout = layout_of(8)
    x = np.ones((16, 4), np.float32)

    def inside(x: jax.Array) -> jax.Array:
        with layout.activate():
            return constrain(x, "batch", None) * 2

    assert jax.jit(inside)(x).sharding.is_equivalent_to(layout.sharding("batch", None), 2)
    np.testing.assert_array_equal(constrain(x, "no such axis", None), x)  # type: ignore[arg-type]


def test_an_activation_that_cannot_be_divided_is_told() -> None:
    layout = layout_of(8)
    with (
        layout.activate(),
        pytest.raises(UserError, match=r"shape 12x4 has 12 along 'batch'.* are 8 or 16\."),
    ):
        jax.eval_shape(lambda x: constrain(x, "batch", None), np.ones((12, 4), np.float32))


class Uneven(nn.Module):
    """A tower with one matrix that eight devices cannot share."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": nn.Dense(16)(nn.Dense(4201)(nn.Dense(4099)(x.reshape(x.shape[0], -1))))}


def test_a_large_parameter_that_every_device_would_copy_is_told() -> None:
    config = model_config()
    config.towers.image = spec(Uneven)
    layout = layout_of(8)
    abstract, shardings = abstract_of(experiment_of(config), random_batch(), layout)
    with pytest.raises(
        UserError, match=r"image/Dense_1/kernel of shape 4099x4201 \(69 MB\).* fsdp=8 divides"
    ):
        check_replicated(abstract.params, shardings.params, layout)
    alone = layout_of(8, replica=8)  # where every device is meant to hold everything
    check_replicated(abstract.params, jax.tree.map(lambda _: alone.replicated, shardings.params), alone)
    config.towers.image = spec(Plain)  # small enough not to matter
    abstract, shardings = abstract_of(experiment_of(config), random_batch(), layout)
    check_replicated(abstract.params, jax.tree.map(lambda _: layout.replicated, shardings.params), layout)


def test_a_batch_that_the_mesh_cannot_divide_is_told_before_anything_is_compiled() -> None:
    config = run_config()
    config.data.train.batch_size = 12
    with pytest.raises(
        UserError, match=r"batch_size has 12 along 'batch', which fsdp=8 does not divide.* 8 or 16"
    ):
        Run.from_config(config)


def test_experts_lie_on_the_expert_axis_and_everything_else_is_shared_over_it() -> None:
    layout = layout_of(8, fsdp=2, tensor=2, expert=2)
    assert layout.spec(("experts", "expert_embed", "mlp")) == PartitionSpec(
        ("expert",), ("fsdp",), ("tensor",)
    )
    assert layout.spec(("embed", "mlp")) == PartitionSpec(("fsdp", "expert"), ("tensor",))
    assert layout.spec(("batch", None)) == PartitionSpec(("fsdp", "expert"), None)
    with pytest.raises(UserError, match="both 'experts' and 'embed' lie on the mesh axis 'expert'"):
        layout.spec(("experts", "embed"), what="kernel")
