"""M2-Encoder: attention that images and texts share, experts that they do not, groups that accumulation fills."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.multiway import Multiway
from vlpjax.rules import tree_names

TOWER = Multiway(
    image_size=8, patch=4, vocabulary=20, length=6, width=16, depth=1, joint_depth=1, heads=2, embedding=8
)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
IDS = np.array([[4, 5, 6, 1, 0, 0], [7, 8, 1, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def variables() -> Any:
    def both(tower: Multiway) -> Any:
        return tower(IMAGES), tower(IDS)

    return nn.unbox(jax.jit(lambda: nn.init(both, TOWER)(jax.random.key(0)))())


@pytest.fixture(scope="module")
def gradients(variables: Any) -> dict[str, dict[str, np.ndarray]]:
    """Of each modality's two embeddings by all parameters, by name."""

    def total(params: Any, inputs: jax.Array) -> jax.Array:
        outputs = TOWER.apply({"params": params}, inputs)
        return jnp.sum(jnp.sin(outputs["embedding"])) + jnp.sum(jnp.sin(outputs["early_embedding"]))

    found = {}
    for name, inputs in (("image", IMAGES), ("text", IDS)):
        grads = jax.device_get(jax.jit(jax.grad(total))(variables["params"], inputs))
        found[name] = dict(zip(tree_names(grads), jax.tree.leaves(grads), strict=True))
    return found


def test_attention_and_joint_layers_are_shared_and_experts_are_not(gradients: Any) -> None:
    for name in gradients["image"]:
        own = {side: np.any(gradients[side][name]) for side in ("image", "text")}
        if name.endswith("key/bias"):  # adds the same to all logits of a query
            continue
        if "image_" in name or name.startswith("patches"):
            assert own == {"image": True, "text": False}, name
        elif "text_" in name or name.startswith("token_embedding"):
            assert own == {"image": False, "text": True}, name
        else:
            assert own == {"image": True, "text": True}, name


def test_padding_is_not_seen(variables: Any) -> None:
    encode = jax.jit(lambda ids: TOWER.apply(variables, ids))
    long, short = encode(IDS), encode(IDS[:, :4])
    for name in ("embedding", "early_embedding"):
        np.testing.assert_allclose(short[name], long[name], rtol=1e-5, atol=1e-6)
    changed = IDS.copy()
    changed[0, 2] = 9
    assert np.max(np.abs(encode(changed)["embedding"][0] - long["embedding"][0])) > 1e-4


def test_later_layers_write_smaller_values(variables: Any) -> None:
    def spread(name: str, index: int) -> float:
        block = variables["params"][f"block_{index}"]
        return float(np.std(block["attention"][name]["kernel"]))

    np.testing.assert_allclose(spread("out", 1) / spread("out", 0), 2**-0.5, rtol=0.2)
    np.testing.assert_allclose(spread("query", 1) / spread("query", 0), 1.0, rtol=0.2)


def test_inputs_of_other_shapes_are_refused(variables: Any) -> None:
    for inputs, message in (
        (np.zeros((2, 9, 9, 3), np.float32), "takes 8 pixels"),
        (np.zeros((2, 7), np.int32), "takes 6 tokens"),
        (np.zeros((2, 3, 4), np.float32), "images .* or texts"),
    ):
        with pytest.raises(UserError, match=message):
            TOWER.apply(variables, inputs)
