"""Layer-wise decay of the learning rate: every parameter has one layer, stacked blocks and separate ones alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.tiny import assert_trees_equal, run_config
from vlpjax.config import spec
from vlpjax.describe import parameter_rows
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.models.coca import PooledImage, UnimodalText
from vlpjax.models.convnet import ConvNet
from vlpjax.models.multiway import Multiway
from vlpjax.models.resnet import ResNet
from vlpjax.models.text import TextTransformer
from vlpjax.models.vit import ViT
from vlpjax.optim.layers import LayerDecay
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.rules import tree_names
from vlpjax.run import Run

DEPTH = 3
LENGTH = Durations(batch_size=1, total_steps=12)
IMAGES, IDS = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32)


def vit(**fields: Any) -> Any:
    settings = dict(image_size=16, patch=8, width=8, depth=DEPTH, heads=2, mlp_ratio=2.0, embedding=4)
    return {"image": shapes(ViT(**{**settings, **fields}), IMAGES)}


def shapes(module: Any, *inputs: jax.Array) -> Any:
    """Parameters of a module that is called with each of the inputs, without their values."""

    def call(module: Any, inputs: Any) -> Any:
        return [module(x) for x in inputs]

    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, method=call), inputs)
    return jax.tree.map(lambda x: jnp.zeros(x.shape), nn.meta.unbox(variables["params"]))


def adamw(**fields: Any) -> Optimizer:
    return Optimizer(optax.scale_by_adam(), 1e-2, Schedule(decay="constant"), **fields)


def steps(optimizer: Optimizer, params: Any, count: int, grads: Any) -> Any:
    """The parameters after a few updates with the same gradients."""
    made = optimizer.make(params, LENGTH)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = made.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = made.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params


def noise(params: Any, seed: int) -> Any:
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)


def test_a_factor_of_one_changes_no_bit() -> None:
    params, grads = noise(vit(), 0), noise(vit(), 1)
    plain = steps(adamw(weight_decay=0.1), params, 10, grads)
    assert_trees_equal(steps(adamw(weight_decay=0.1, layer_decay=LayerDecay(1.0)), params, 10, grads), plain)


@pytest.mark.parametrize("scan", [False, True])
def test_the_rate_falls_by_the_factor_from_layer_to_layer(scan: bool) -> None:
    params = vit(scan=scan) | {"clip_temperature": {"value": jnp.zeros(())}}
    ones = jax.tree.map(jnp.ones_like, params)
    moved = steps(adamw(layer_decay=LayerDecay(0.65)), params, 1, ones)
    image = moved["image"]
    blocks = image["blocks"] if scan else [image[f"block_{i}"] for i in range(DEPTH)]
    whole = float(moved["clip_temperature"]["value"])  # a head: no layer of the tower
    assert whole == pytest.approx(-1e-2, rel=1e-5)
    for index in range(DEPTH):
        block = jax.tree.map(lambda x, index=index: x[index], blocks) if scan else blocks[index]
        for leaf in jax.tree.leaves(block):
            np.testing.assert_allclose(leaf, whole * 0.65 ** (DEPTH - index), rtol=1e-6)
    for name in ("patches", "position_embedding"):
        for leaf in jax.tree.leaves(image[name]):
            np.testing.assert_allclose(leaf, whole * 0.65 ** (DEPTH + 1), rtol=1e-6)
    for name in ("final_norm", "projection"):
        for leaf in jax.tree.leaves(image[name]):
            np.testing.assert_allclose(leaf, whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "inputs", "last"),
    [
        (
            ViT(
                image_size=16, patch=8, width=8, depth=2, heads=2, pool="map", class_tokens=1, registers=2,
                mask_token=True, pre_norm=True, pool_norm=True, pooler=True, layer_scale=0.1, stem="conv",
            ),
            (IMAGES,),
            3,
        ),
        (TextTransformer(vocabulary=16, length=8, width=8, depth=2, heads=2, types=2, embedding_norm=True), (IDS,), 3),
        (ConvNet(image_size=16, channels=(4, 4, 4), strides=(1, 2, 2), embedding=4, pool="mean"), (IMAGES,), 4),
        (ResNet(depths=(1, 2), width=4, embedding=4), (IMAGES,), 4),
        (
            Multiway(
                image_size=16, patch=8, vocabulary=16, length=8, width=8, depth=1, joint_depth=1, heads=2, embedding=4
            ),
            (IMAGES, IDS),
            3,
        ),
        (
            PooledImage(
                ViT(image_size=16, patch=8, width=8, depth=2, heads=2, pool="none"),
                queries=2, width=8, heads=2, embedding=4,
            ),
            (IMAGES,),
            3,
        ),
        (UnimodalText(vocabulary=16, length=8, width=8, depth=2, heads=2, embedding=4), (IDS,), 3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_parameter_of_a_tower_has_exactly_one_layer(module: Any, inputs: Any, last: int) -> None:
    params = {"image": shapes(module, *inputs)}
    layers, found = LayerDecay(0.5).layers(params, "image")
    assert sorted(layers) == sorted(tree_names(params))
    assert found == last
    first = int(isinstance(module, ConvNet))  # which has no embeddings before its first convolution
    assert {int(layer) for layer in layers.values()} == set(range(first, last + 1))


def test_a_residual_blocks_convolutions_are_of_its_layer() -> None:
    layers, _ = LayerDecay(0.5).layers({"image": shapes(ResNet(depths=(1, 2), width=4), IMAGES)}, "image")
    assert {name: int(layer) for name, layer in layers.items() if name.endswith("/kernel")} == {
        "image/stem_convolution/kernel": 0,
        **{f"image/block_0_{part}_convolution/kernel": 1 for part in ("reduce", "mix", "expand", "shortcut")},
        **{f"image/block_1_{part}_convolution/kernel": 2 for part in ("reduce", "mix", "expand", "shortcut")},
        **{f"image/block_2_{part}_convolution/kernel": 3 for part in ("reduce", "mix", "expand")},
    }


def test_weight_decay_falls_with_the_rate() -> None:
    params = jax.tree.map(jnp.ones_like, vit())
    still = jax.tree.map(jnp.zeros_like, params)
    moved = steps(adamw(weight_decay=0.5, layer_decay=LayerDecay(0.5)), params, 1, still)["image"]
    kernel = moved["block_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(1 - kernel, 1e-2 * 0.5 * 0.5**DEPTH, rtol=1e-4)
    np.testing.assert_array_equal(moved["block_0"]["mlp"]["up"]["bias"], 1.0)


def test_a_run_shows_the_rates_of_its_layers() -> None:
    """The whole way from an experiment's config to what ``--mode=describe`` prints; one of two towers decays."""
    config = run_config()
    config.optimizer.layer_decay = spec(LayerDecay, factor=0.5)
    rates = {row.name: row.rate for row in parameter_rows(Run.from_config(config))}
    shown = {
        name.partition("/")[2].partition("/")[0]: rate for name, rate in rates.items() if "image/" in name
    }
    assert shown == {
        "patches": 0.25, "position_embedding": 0.25, "class_token": 0.25, "pre_norm": 0.25, "block_0": 0.5,
        "final_norm": 1.0, "projection": 1.0,
    }  # fmt: skip
    assert {rate for name, rate in rates.items() if "image/" not in name} == {1.0}


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: LayerDecay(1.5), ["1.5", "at most 1"]),
        (lambda: LayerDecay(0.5, rules=((".*", "middle"),)), ["'middle'", "first, block, last"]),
        (lambda: LayerDecay(0.5, ("imag",)).factors(vit()), ["'imag'", "'image'"]),
        (lambda: LayerDecay(0.5).factors({"image": {"odd": jnp.zeros(2)}}), ["'odd'", "LayerDecay.rules"]),
        (
            lambda: LayerDecay(0.5, rules=((".*", "block"),)).factors({"image": {"odd": jnp.zeros(2)}}),
            ["image/odd", "no number"],
        ),
    ],
    ids=range(5),
)
def test_what_does_not_work_is_told(make: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value
