"""Projectors of self-supervision: where norms stand, what they see of a batch, and what they remember of it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import layout_of
from vlpjax.errors import UserError
from vlpjax.models.heads import MLPHead

X = np.random.default_rng(0).normal(1.0, 2.0, (16, 5)).astype(np.float32)


def variables_of(head: MLPHead, x: Any = X) -> Any:
    """Variables with norms that do something."""
    drawn = nn.meta.unbox(jax.jit(lambda x: head.init(jax.random.key(0), x, train=True))(x))
    random = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.Array) -> Any:
        kind = path[-1].key
        spread = 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
        return leaf if kind == "kernel" else 1 + np.abs(spread) if kind in ("scale", "var") else spread

    return jax.tree_util.tree_map_with_path(draw, drawn)


def shapes(head: MLPHead) -> dict[str, tuple[int, ...]]:
    """Of all parameters, by path."""
    tree = jax.eval_shape(lambda: head.init(jax.random.key(0), X))
    flat = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(tree)["params"])[0]
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


def test_norms_stand_between_layers_and_layers_before_them_have_no_bias() -> None:
    assert shapes(MLPHead((8, 6, 4))) == {
        "layer_0/kernel": (5, 8), "norm_0/scale": (8,), "norm_0/bias": (8,),
        "layer_1/kernel": (8, 6), "norm_1/scale": (6,), "norm_1/bias": (6,),
        "layer_2/kernel": (6, 4), "layer_2/bias": (4,),
    }  # fmt: skip
    last = {name for name in shapes(MLPHead((8, 4), last_norm="affine")) if "1/" in name}
    assert last == {"layer_1/kernel", "norm_1/scale", "norm_1/bias"}
    assert set(shapes(MLPHead((8, 4), norm="layer", bias=False, activation="gelu"))) == {
        "layer_0/kernel", "norm_0/scale", "norm_0/bias", "layer_1/kernel",
    }  # fmt: skip
    plain = {"layer_0/kernel", "layer_0/bias", "layer_1/kernel"}
    assert set(shapes(MLPHead((8, 4), norm=None, last_norm="plain"))) == plain
    assert set(shapes(MLPHead((4,)))) == {"layer_0/kernel", "layer_0/bias"}


def normed(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    return (x - mean) / np.sqrt(var + 1e-5)


def reference(variables: Any, x: np.ndarray, train: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """Two layers with BatchNorms, the last without scale and bias, and the running statistics afterwards."""
    params, running = (jax.tree.map(np.float64, variables[kind]) for kind in ("params", "batch_stats"))
    after: dict[str, Any] = {}
    for index in (0, 1):
        x = x @ params[f"layer_{index}"]["kernel"]
        axes, own = tuple(range(x.ndim - 1)), running[f"norm_{index}"]
        found = {"mean": x.mean(axes), "var": x.var(axes)} if train else own
        after[f"norm_{index}"] = {key: 0.9 * own[key] + 0.1 * found[key] for key in own} if train else own
        x = normed(x, **found)
        if index == 0:
            x = np.maximum(x * params["norm_0"]["scale"] + params["norm_0"]["bias"], 0)
    return x, after


HEAD = MLPHead((8, 4), last_norm="plain")


@jax.jit
def run(variables: Any, x: Any) -> Any:
    return HEAD.apply(variables, x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("shape", [(16, 5), (8, 2, 5)])
def test_training_takes_the_statistics_of_all_examples_and_remembers_a_tenth(shape: tuple[int, ...]) -> None:
    variables = variables_of(HEAD)
    out, updated = run(variables, X.reshape(shape))
    expected, statistics = reference(variables, X.reshape(shape), train=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6),
        dict(updated["batch_stats"]),
        statistics,
    )
    np.testing.assert_allclose(out.reshape(16, 4).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(out.reshape(16, 4).std(axis=0), 1, atol=1e-3)


def test_outside_training_running_statistics_are_used_and_kept() -> None:
    variables = variables_of(HEAD)
    out, updated = HEAD.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(out, reference(variables, X, train=False)[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, dict(updated["batch_stats"]), variables["batch_stats"])


def test_statistics_are_those_of_the_global_batch_on_eight_devices() -> None:
    variables, layout = variables_of(HEAD), layout_of(8)

    def loss(params: Any, x: Any) -> Any:
        out, updated = HEAD.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return (out**3).mean(), (out, updated["batch_stats"])

    whole = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = whole(variables["params"], X)
    with layout.activate():
        placed = jax.device_put(X, layout.sharding("batch"))
        found = whole(jax.device_put(variables["params"], layout.replicated), placed)
    assert len(placed.sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_a_layer_norm_needs_no_batch() -> None:
    head = MLPHead((8, 4), norm="layer", last_norm="affine", activation="gelu")
    variables = variables_of(head)
    assert set(variables) == {"params"}
    whole = head.apply(variables, X, train=True)
    np.testing.assert_allclose(whole[:1], head.apply(variables, X[:1]), rtol=1e-5, atol=1e-6)


def test_every_layer_but_the_last_is_split_along_both_axes_of_the_mesh() -> None:
    boxed = jax.eval_shape(lambda: MLPHead((8, 16, 24, 32)).init(jax.random.key(0), np.zeros((2, 8))))[
        "params"
    ]
    shardings = layout_of(8, fsdp=4, tensor=2).shard_parameters(boxed)
    split = [tuple(shardings[f"layer_{index}"]["kernel"].spec) for index in range(4)]
    assert split == [("fsdp", "tensor"), ("tensor", "fsdp"), ("fsdp", "tensor"), ("fsdp", None)]


def test_kernels_start_with_the_spread_that_they_are_told() -> None:
    wide = np.zeros((2, 200), np.float32)

    def spreads(head: MLPHead) -> list[float]:
        params = nn.meta.unbox(head.init(jax.random.key(0), wide))["params"]
        return [float(np.std(params[f"layer_{index}"]["kernel"])) for index in (0, 1)]

    assert spreads(MLPHead((300, 100))) == pytest.approx([(2 / 200) ** 0.5, (2 / 300) ** 0.5], rel=0.03)
    assert spreads(MLPHead((300, 100), stddev=0.02)) == pytest.approx([0.02, 0.02], rel=0.03)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            MLPHead((4,), last_norm="batch"),
            "MLPHead.last_norm is 'batch'; there are 'affine', 'plain' and None",
        ),
        (MLPHead((4, 4), norm="layer", last_norm="plain"), "a BatchNorm's, but norm is 'layer'"),
        (MLPHead((4, 4), norm="group"), "'group'"),
        (MLPHead((4, 4), activation="tanh"), "activation is 'tanh'"),
    ],
)
def test_mistakes_are_told(head: MLPHead, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: head.init(jax.random.key(0), X))
