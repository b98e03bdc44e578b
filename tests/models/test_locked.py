"""A locked tower keeps its statistics, gives no gradient, and costs no backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import NormTower
from vlpjax.errors import UserError
from vlpjax.models.convnet import ConvNet
from vlpjax.models.locked import Locked
from vlpjax.models.towers import Towers

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), jnp.float32)
TOWER = ConvNet(image_size=8, channels=(4, 8), strides=(2, 2))


def made(**fields):
    model = Locked(TOWER, **fields)
    return model, model.init(jax.random.key(0), IMAGES)


def test_the_tower_is_in_evaluation_mode_and_what_stands_on_it_trains():
    model, variables = made(embedding=5)
    outputs, moved = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    own = {name: tree["tower"] for name, tree in variables.items()}
    alone = TOWER.apply(own, IMAGES)
    np.testing.assert_array_equal(outputs["pooled"], alone["pooled"])
    np.testing.assert_array_equal(outputs["tokens"], alone["tokens"])
    assert outputs["embedding"].shape == (6, 5)
    statistics = moved["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, statistics["tower"], variables["batch_stats"]["tower"])
    mean = np.mean(alone["pooled"], axis=0)
    np.testing.assert_allclose(statistics["standard"]["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_only_what_stands_on_the_tower_has_a_gradient():
    model, variables = made(embedding=5)

    def loss(params):
        outputs, _ = model.apply({**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(outputs["embedding"] ** 2) + jnp.sum(outputs["tokens"] ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["tower"]))
    assert np.all(grads["projection"]["kernel"]["kernel"])


def test_the_backward_pass_of_the_tower_is_not_computed():
    def convolutions(model):
        def loss(params, statistics):
            variables = {"params": params, "batch_stats": statistics}
            outputs, _ = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
            return jnp.sum(outputs["embedding"] ** 2)

        variables = model.init(jax.random.key(0), IMAGES)
        lowered = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"])
        return lowered.as_text().count("stablehlo.convolution")

    assert convolutions(Locked(TOWER, embedding=5)) == 2
    assert convolutions(TOWER.clone(embedding=5)) > 2


@pytest.mark.parametrize("kind", ["batch", "layer", None])
def test_kinds_of_standardizing(kind):
    model, variables = made(standardize=kind)
    outputs, _ = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    features, embedding = outputs["pooled"], outputs["embedding"]
    if kind is None:
        np.testing.assert_array_equal(embedding, features)
    else:
        axis = 0 if kind == "batch" else 1
        expected = (features - features.mean(axis, keepdims=True)) / features.std(axis, keepdims=True)
        np.testing.assert_allclose(embedding, expected, rtol=2e-2, atol=2e-2)
    assert ("standard" in variables["params"]) == (kind == "layer")


def test_an_unknown_kind_is_told():
    with pytest.raises(UserError, match="Locked.standardize is 'group'"):
        made(standardize="group")


def test_among_towers_it_is_called_like_any_other():
    class Plain(NormTower):
        def __call__(self, images):
            return {"pooled": images.reshape(len(images), -1)}

    towers = Towers.of({"image": Locked(TOWER, embedding=5), "text": Locked(Plain(), embedding=5)})

    def call(towers):
        return {name: towers.call(name, IMAGES, train=True)["embedding"] for name in towers}

    outputs, variables = towers.init_with_output(jax.random.key(0), method=call)
    assert {name: leaf.shape for name, leaf in outputs.items()} == {"image": (6, 5), "text": (6, 5)}
    assert set(variables["params"]["image"]) == {"tower", "projection"}
