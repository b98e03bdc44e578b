"""Every direction through the optimizer: from a spec, with a frozen tower, its state sharded, on any mesh the same."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.tiny import assert_trees_close, layout_of
from vlpjax.config import Config, build, spec
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.optim.grouped import grouped
from vlpjax.optim.lars import lamb, lars
from vlpjax.optim.muon import muon
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.optim.sgd_sai import sgd_sai
from vlpjax.rules import tree_names
from vlpjax.state import TrainState, replicated_share, state_shardings

DIRECTIONS = {
    "adam": spec(optax.scale_by_adam),
    "sgd": spec(optax.trace, decay=0.9, nesterov=True),
    "lion": spec(optax.scale_by_lion, b1=0.9, b2=0.99),
    "adafactor": spec(optax.scale_by_factored_rms, min_dim_size_to_factor=8),
    "lars": spec(lars),
    "lamb": spec(lamb),
    "sgd_sai": spec(sgd_sai),
    "muon": spec(muon),
    "grouped": spec(
        grouped,
        directions=dict(matrices=spec(sgd_sai), rest=spec(optax.scale_by_adam)),
        rules=((r".*/kernel", "matrices"), (r".*", "rest")),
    ),
}
SHAPES = {
    "image": {
        "block_0": {"mlp": {"up": {"kernel": (16, 24), "bias": (24,)}}},
        "final_norm": {"scale": (16,)},
    },
    "text": {
        "blocks": {"attention": {"query": {"kernel": (3, 16, 2, 8), "bias": (3, 2, 8)}}},
        "token_embedding": {"embedding": (32, 16)},
        "square": {"kernel": (16, 16)},
    },
    "clip_temperature": {"value": ()},
}
RNG = np.random.default_rng(0)


def draw() -> Any:
    return jax.tree.map(
        lambda shape: np.float32(RNG.normal(size=shape)), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


PARAMS, GRADS = draw(), [draw() for _ in range(3)]


def optimizer_of(direction: Config, frozen: str = "") -> Optimizer:
    rates: Any = ((rf"{frozen}/.*", None), (r".*", 1.0)) if frozen else ((r".*", 1.0),)
    return build(
        spec(
            Optimizer, direction=direction, learning_rate=0.1, schedule=spec(Schedule), weight_decay=0.1,
            clip_norm=1.0, rate_rules=rates,
        )
    )  # fmt: skip


def train(optimizer: Optimizer, devices: int) -> tuple[Any, Any, Any]:
    """The parameters after three steps, and the optimizer's state with its shardings."""
    layout = layout_of(devices)
    made = optimizer.make(PARAMS, Durations(1, 12, 12))
    placed = layout.shard_parameters(PARAMS)
    abstract = jax.eval_shape(lambda params: TrainState(0, params, made.init(params), {}, {}, {}), PARAMS)
    shardings = state_shardings(abstract, placed, layout).optimizer
    params = jax.device_put(PARAMS, placed)
    state = jax.jit(made.init, out_shardings=shardings)(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = made.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=(placed, shardings))
    for grads in GRADS:
        params, state = step(params, state, jax.device_put(grads, placed))
    return jax.device_get(params), state, shardings


@pytest.mark.parametrize("name", DIRECTIONS)
def test_eight_devices_move_as_one_and_a_frozen_tower_stays(name: str) -> None:
    optimizer = optimizer_of(DIRECTIONS[name], frozen="image")
    (one, _, _), (eight, state, shardings) = (train(optimizer, devices) for devices in (1, 8))
    assert_trees_close(eight, one, rtol=2e-5, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(one["image"]), jax.tree.leaves(PARAMS["image"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(jax.tree.leaves(one["text"]), jax.tree.leaves(PARAMS["text"]), strict=True):
        assert np.abs(ours - theirs).max() > 1e-6
    assert not any("image" in leaf for leaf in tree_names(state))  # a frozen tower has no moments
    if (
        name != "adafactor"
    ):  # most of its state are vectors, for which these parameters are too small to be divided
        assert replicated_share(state, shardings) < 0.1


def test_factored_moments_lie_where_the_rows_and_columns_of_their_parameter_lie() -> None:
    whole = layout_of(8).shard_parameters(PARAMS)["text"]["token_embedding"]["embedding"].spec
    assert tuple(whole) == ("fsdp", None)  # [32, 16] is divided by its rows
    _, state, _ = train(optimizer_of(DIRECTIONS["adafactor"]), 8)

    def found(parameter: str) -> dict[str, tuple[int, ...]]:
        """Per factored moment the shape that a device holds; what is not factored has one number."""
        moments = zip(tree_names(state), jax.tree.leaves(state), strict=True)
        return {
            name.split("/")[-4]: leaf.addressable_shards[0].data.shape
            for name, leaf in moments
            if name.endswith(parameter) and leaf.shape != (1,)
        }

    # One of the embedding's has a number per column, of which every device has all, the other one per row.
    assert found("text/token_embedding/embedding") == {"v_row": (16,), "v_col": (4,)}
    # Of a square the lengths do not tell which is which; both are divided.
    assert found("text/square/kernel") == {"v_row": (2,), "v_col": (2,)}


def test_every_group_moves_by_its_own_direction() -> None:
    rules = ((r".*/kernel", "first"), (r".*", "second"))
    mixed = grouped({"first": optax.scale(2.0), "second": optax.scale(3.0)}, rules)
    updates, _ = mixed.update(GRADS[0], mixed.init(PARAMS), PARAMS)
    kernel = ("text", "blocks", "attention", "query", "kernel")
    for path, factor in ((kernel, 2.0), ((*kernel[:-1], "bias"), 3.0), (("clip_temperature", "value"), 3.0)):
        ours, theirs = updates, GRADS[0]
        for key in path:
            ours, theirs = ours[key], theirs[key]
        np.testing.assert_allclose(ours, factor * theirs)


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        (((".*", "thrid"), (".*", "first")), ["'thrid'", "'third'"]),
        (((".*", "first"),), ["'third'", "no rule"]),
        (((".*/kernle", "first"), (".*", "third")), ["'.*/kernle'", "no parameter"]),
        (((".*/kernel", "first"), (".*/bias", "third")), ["no rule matches"]),
    ],
    ids=range(4),
)
def test_what_does_not_work_is_told(rules: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        grouped({"first": optax.identity(), "third": optax.identity()}, rules).init(PARAMS)
    assert all(part in str(caught.value) for part in parts), caught.value
