"""The mesh: mistakes are told with what would work, and every array of a step lies where the rules say."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from tests.tiny import Trained, experiment_of, layout_of, model_config, random_batch, take_steps
from vlpjax.config import Config, spec
from vlpjax.errors import UserError
from vlpjax.mesh import AXES, RULES, constrain, hardware_name, make_layout, pick_rule
from vlpjax.rules import tree_names
from vlpjax.run import apply_mesh_rules
from vlpjax.state import replicated_share
from vlpjax.step import abstract_state
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
    config = model_config()
    config.teachers = dict(ema=spec(EMA))
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


def test_every_leaf_of_the_state_lies_where_it_was_planned(trained: Trained) -> None:
    planned, real = jax.tree.leaves(trained.shardings), jax.tree.leaves(trained.state)
    for name, sharding, leaf in zip(tree_names(trained.state), planned, real, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), name
        assert len(leaf.addressable_shards) == 8, name


def test_metrics_are_on_every_device(trained: Trained) -> None:
    for name, value in trained.metrics[0].items():
        assert value.sharding.is_fully_replicated, name
        assert len(value.addressable_shards) == 8, name


def test_no_matrix_is_silently_replicated() -> None:
    layout = layout_of(8)
    abstract, shardings = abstract_state(experiment_of(config_with_everything()), random_batch(), layout)
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
    _, shardings = abstract_state(experiment_of(config), random_batch(), layout_of(8))
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
