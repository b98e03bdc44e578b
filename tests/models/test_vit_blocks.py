"""The blocks of the image tower: read-outs, scanning, rematerialisation, precision and stochastic depth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.vit import ViT

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TINY: dict[str, Any] = dict(image_size=16, patch=4, width=16, depth=2, heads=2)


def make(**fields: Any) -> tuple[ViT, Any]:
    """A tower and its first variables."""
    tower = ViT(**{**TINY, **fields})
    return tower, jax.jit(tower.init)(jax.random.key(0), IMAGES)


def run(tower: ViT, variables: Any, images: Any = IMAGES, **options: Any) -> dict[str, Any]:
    """All outputs, compiled at once."""
    return jax.jit(lambda variables, images: tower.apply(variables, images, **options))(variables, images)


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal up to rounding."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def test_tokens_and_attention_of_chosen_blocks() -> None:
    tower, variables = make(registers=1, depth=3)
    outputs = run(tower, variables, hidden=(0, -1), attention=(1,))
    assert {layer: x.shape for layer, x in outputs["hidden"].items()} == {0: (2, 18, 16), -1: (2, 18, 16)}
    assert outputs["attention"][1].shape == (2, 2, 18, 18)
    close(outputs["attention"][1].sum(axis=-1), 1.0)
    shallow = ViT(**{**TINY, "depth": 1}, registers=1, final_norm=False)
    first = run(shallow, variables)
    close(outputs["hidden"][0], jnp.concatenate([first["prefix"], first["tokens"]], axis=1))
    with pytest.raises(UserError, match="Layer 3.*0 to 2"):
        run(tower, variables, hidden=(3,))


def stack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """Parameters of unrolled blocks as those of scanned ones."""
    blocks = [params[f"block_{index}"] for index in range(depth)]
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


FULL: dict[str, Any] = dict(
    qk_norm="rms", layer_scale=0.5, activation="silu", gated=True, mlp_dim=24, registers=1, positions="rotary",
    qkv_bias=False, out_bias=False, mlp_bias=False, norm="rms",
)  # fmt: skip


@pytest.mark.parametrize("remat", ["none", "full", "dots", "projections"])
def test_scanned_and_rematerialised_blocks_give_the_same_values_and_gradients(remat: str) -> None:
    tower, variables = make(**FULL)
    params = nn.unbox(variables["params"])

    def value(tower: ViT) -> Any:
        def loss(params: Any) -> jax.Array:
            outputs = tower.apply({"params": params}, IMAGES, hidden=(0, 1), attention=(1,))
            read = [*outputs["hidden"].values(), *outputs["attention"].values()]
            return jnp.sum(outputs["pooled"] ** 2) + sum(jnp.sum(jnp.sin(x)) for x in read)

        return jax.jit(jax.value_and_grad(loss))

    wanted, gradient = value(tower)(params)
    scanned = ViT(**TINY, **FULL, scan=True, remat=remat)
    found, found_gradient = value(scanned)(stack_blocks(params, 2))
    close(found, wanted)
    jax.tree.map(close, found_gradient, stack_blocks(gradient, 2))
    if remat == "dots":
        found, found_gradient = value(ViT(**TINY, **FULL, remat=remat))(params)
        close(found, wanted)
        jax.tree.map(close, found_gradient, gradient)


def test_every_option_of_a_block_reaches_it() -> None:
    _, variables = make(**FULL)
    block = nn.unbox(variables["params"]["block_0"])
    assert set(block["attention"]) == {"query", "key", "value", "out", "query_norm", "key_norm"}
    assert {name for part in block.values() for name in _leaf_names(part)} == {"kernel", "scale", ""}
    assert block["mlp"]["gate"]["kernel"].shape == (16, 24)
    assert block["attention_scale"].tolist() == [0.5] * 16


def _leaf_names(part: Any) -> set[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(part)]
    return {str(path[-1].key) if path else "" for path in paths}


def test_scanned_blocks_in_bfloat16_keep_float32_parameters() -> None:
    tower, variables = make(**FULL, scan=True, remat="dots", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = run(tower, variables, hidden=(0,))
    assert {outputs["tokens"].dtype, outputs["hidden"][0].dtype} == {jnp.dtype("bfloat16")}
    exact = run(ViT(**TINY, **FULL, scan=True), variables)["pooled"]
    close(outputs["pooled"].astype(jnp.float32), exact, 0.1)


@pytest.mark.parametrize("scan", [False, True])
def test_stochastic_depth_skips_the_last_block_at_its_rate_and_the_first_never(scan: bool) -> None:
    """A block whose branches add nothing but a constant shows, per example, how many of them were kept."""
    rate, examples = 0.25, 2000
    tower = ViT(image_size=4, patch=4, width=8, depth=2, heads=1, pool="mean", drop_path=rate, scan=scan,
                pre_norm=False, final_norm=False, mlp_dim=8)  # fmt: skip
    images = np.zeros((examples, 4, 4, 3), np.float32)
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape),
        nn.unbox(jax.eval_shape(tower.init, jax.random.key(0), images[:1])["params"]),
    )
    for index in range(2):  # the MLP of block 0 adds 1 to feature 0, that of block 1 adds 1 to feature 1
        bias = jax.nn.one_hot(index, 8)
        if scan:
            params["blocks"]["mlp"]["down"]["bias"] = jnp.eye(2, 8)
        else:
            params[f"block_{index}"]["mlp"]["down"]["bias"] = bias
    rngs = {"dropout": jax.random.key(5)}
    pooled = np.asarray(run(tower, {"params": params}, images, train=True, rngs=rngs)["pooled"])
    assert set(pooled[:, 0].tolist()) == {1.0}
    assert {round(x, 4) for x in pooled[:, 1].tolist()} == {0.0, round(1 / (1 - rate), 4)}
    spread = (rate * (1 - rate) / examples) ** 0.5
    assert np.mean(pooled[:, 1] == 0) == pytest.approx(rate, abs=4 * spread)
    close(run(tower, {"params": params}, images)["pooled"][0, :2], [1.0, 1.0])
