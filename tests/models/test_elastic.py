"""Sub-networks of a ViT: those that are cut out compute what the shared weights did, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.elastic import ElasticViT, Size, extract, kept_blocks
from vlpjax.models.vit import ViT

WHOLE = ViT(
    image_size=16, patch=8, width=32, depth=3, heads=4, mlp_ratio=2.0, pre_norm=False, layer_scale=0.5,
    mask_token=True,
)  # fmt: skip
ELASTIC = ElasticViT(WHOLE)
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
MASKED = np.array([[True, False, False, True], [False] * 4])


@pytest.fixture(scope="module")
def params() -> Any:
    """Parameters of which none is at its first value of 0 or 1."""
    first = nn.unbox(jax.jit(ELASTIC.init)(jax.random.key(0), IMAGES))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), first)


@pytest.fixture(scope="module")
def run() -> Any:
    """The sub-network of a size; one program for all sizes."""
    return jax.jit(
        lambda params, width, depth: ELASTIC.apply(
            {"params": params}, IMAGES, size=Size(width, depth), masked=MASKED
        )
    )


def test_the_names_of_its_parameters_are_those_of_the_vit(params: Any) -> None:
    plain = nn.unbox(jax.eval_shape(WHOLE.init, jax.random.key(0), IMAGES))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain)


@pytest.mark.parametrize(("width", "depth"), [(8, 2), (24, 3), (16, 1)])
def test_what_is_cut_out_is_an_ordinary_vit_that_computes_the_same(
    params: Any, run: Any, width: int, depth: int
) -> None:
    shared = run(params, width, depth)
    small, tower = extract(params, WHOLE, width, depth)
    assert (tower.width, tower.depth, tower.heads) == (width, depth, width // 8)
    alone = jax.jit(lambda params: tower.apply({"params": params}, IMAGES, masked=MASKED))(small)
    for name in ("tokens", "pooled"):
        np.testing.assert_allclose(shared[name][..., :width], alone[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(shared[name][..., width:], 0.0)


def test_at_its_whole_size_it_is_the_vit_bit_by_bit(params: Any) -> None:
    with jax.disable_jit():  # compiled programs may round in other orders
        plain = ELASTIC.apply({"params": params}, IMAGES, masked=MASKED)
        whole = ELASTIC.apply({"params": params}, IMAGES, masked=MASKED, size=Size(32, 3))
    for name in plain:
        np.testing.assert_array_equal(whole[name], plain[name])
    cut, tower = extract(params, WHOLE, 32, 3)
    assert tower == WHOLE
    jax.tree.map(np.testing.assert_array_equal, cut, params)


def test_nothing_outside_the_sub_network_has_a_gradient(params: Any) -> None:
    width, depth = 16, 2

    def value(params: Any) -> jax.Array:
        outputs = ELASTIC.apply({"params": params}, IMAGES, size=Size(width, depth), masked=MASKED)
        return jnp.sum(jnp.sin(outputs["tokens"])) + jnp.sum(jnp.cos(outputs["pooled"]))

    grads = jax.jit(jax.grad(value))(params)
    assert kept_blocks(depth, 3) == (0, 2)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads["block_1"])
    inside, _ = extract(jax.tree.map(lambda x: np.ones_like(x), params), WHOLE, width, depth)
    block = grads["block_2"]
    assert not np.any(block["attention"]["query"]["kernel"][width:])
    assert not np.any(block["attention"]["query"]["kernel"][:, width // 8 :])
    assert not np.any(block["mlp"]["up"]["kernel"][:, 2 * width :])
    assert not np.any(block["attention_norm"]["scale"][width:])
    assert not np.any(grads["patches"]["projection"]["kernel"][..., width:])
    assert not np.any(grads["position_embedding"][..., width:])
    touched = sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(grads))
    assert 0.8 * _size(inside) < touched <= _size(inside)


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def test_blocks_are_spread_evenly_with_the_first_and_the_last() -> None:
    assert kept_blocks(24, 24) == tuple(range(24))
    assert kept_blocks(12, 24) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23)
    assert kept_blocks(1, 3) == (0,)


def test_what_has_no_sub_networks_is_told(params: Any) -> None:
    with pytest.raises(UserError, match=r"width 20.*multiples of 8"):
        extract(params, WHOLE, 20, 2)
    with pytest.raises(UserError, match=r"depth 4.*depth 3"):
        extract(params, WHOLE, 16, 4)
    with pytest.raises(UserError, match="not scanned"):
        jax.eval_shape(ElasticViT(WHOLE.clone(scan=True)).init, jax.random.key(0), IMAGES)
    for fields in (dict(stem="conv"), dict(pooler=True)):
        with pytest.raises(UserError, match="a linear stem and no pooler"):
            jax.eval_shape(ElasticViT(WHOLE.clone(**fields)).init, jax.random.key(0), IMAGES)
    with pytest.raises(UserError, match="no projection"):
        jax.eval_shape(ElasticViT(WHOLE.clone(embedding=4)).init, jax.random.key(0), IMAGES)
