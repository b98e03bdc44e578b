"""ResNet: the published number of parameters, strides, and blocks that start as the identity."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.resnet import ResNet

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def shapes(tower: ResNet, size: int) -> tuple[Any, Any]:
    """Shapes of the variables and of the outputs on images of this size."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), np.float32)
    outputs, variables = jax.eval_shape(tower.init_with_output, jax.random.key(0), images)
    return nn.unbox(variables), jax.tree.map(lambda x: x.shape, outputs)


def test_resnet50_has_the_published_parameters_and_grid() -> None:
    variables, outputs = shapes(ResNet(), 224)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"])) == 23_508_032
    assert outputs == {"tokens": (2, 49, 2048), "pooled": (2, 2048), "embedding": (2, 2048)}
    _, small = shapes(ResNet(depths=(1, 1), width=8, stem="small", embedding=5), 32)
    assert small == {"tokens": (2, 256, 64), "pooled": (2, 64), "embedding": (2, 5)}


def test_blocks_start_as_the_identity() -> None:
    deep = ResNet(depths=(3,), width=4, stem="small")
    variables = jax.jit(deep.init)(jax.random.key(0), IMAGES)
    shallow = ResNet(depths=(1,), width=4, stem="small")
    wanted = {"params", "batch_stats"}
    kept = {
        kind: {
            name: value
            for name, value in variables[kind].items()
            if not name.startswith(("block_1", "block_2"))
        }
        for kind in wanted
    }
    both = [jax.jit(tower.apply)(values, IMAGES) for tower, values in ((deep, variables), (shallow, kept))]
    np.testing.assert_allclose(both[0]["tokens"], both[1]["tokens"], rtol=1e-6)


def test_training_takes_the_statistics_of_the_batch() -> None:
    tower = ResNet(depths=(1,), width=4, stem="small")
    variables = jax.jit(tower.init)(jax.random.key(0), IMAGES)
    run = jax.jit(lambda images: tower.apply(variables, images, train=True, mutable=["batch_stats"]))
    _, updated = run(IMAGES)
    assert np.any(updated["batch_stats"]["stem_norm"]["mean"] != 0)


def test_an_unknown_stem_is_told() -> None:
    with pytest.raises(UserError, match=r"stem is 'tiny'.*'large'"):
        jax.eval_shape(ResNet(stem="tiny").init, jax.random.key(0), IMAGES)
