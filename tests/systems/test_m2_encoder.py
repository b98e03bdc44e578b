"""M2-Encoder: attention that images and texts share, experts that they do not, groups that accumulation fills."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.systems.training import train, unit_rows
from tests.tiny import LENGTH, SIZE, VOCABULARY, assert_trees_close, experiment_of, model_config, random_batch
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.models.multiway import Multiway
from vlpjax.models.towers import Towers
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.rules import tree_names
from vlpjax.step import gradients as gradients_of
from vlpjax.step import initial_state

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

    for name in ("value", "out"):
        np.testing.assert_allclose(spread(name, 1) / spread(name, 0), 2**-0.5, rtol=0.2)
    np.testing.assert_allclose(spread("query", 1) / spread("query", 0), 1.0, rtol=0.2)
    np.testing.assert_allclose(spread("value", 0) / spread("query", 0), 2**-0.5, rtol=0.2)


def test_micro_batches_fill_groups_with_the_gradient_of_one_batch() -> None:
    """Both heads, compared in four groups: four micro-batches give what the whole batch gives."""
    both = dict(image="encoder", text="encoder", groups=4)
    early = dict(image_output="early_embedding", text_output="early_embedding")
    batch, found, state = random_batch(), {}, None
    for accumulate in (1, 4):
        config = model_config(accumulate=accumulate)
        config.towers = dict(
            encoder=spec(
                Multiway, image_size=SIZE, patch=8, vocabulary=VOCABULARY, length=LENGTH, width=16, depth=1,
                joint_depth=1, heads=2, embedding=8,
            )
        )  # fmt: skip
        config.objectives = {
            name: dict(weight=1.0, loss=spec(InfoNCE, **both, **fields))
            for name, fields in (("late", {}), ("early", early))
        }
        experiment = experiment_of(config)
        if state is None:
            state = jax.jit(lambda batch, e=experiment: initial_state(e, batch))(batch)
        found[accumulate] = jax.jit(lambda s, b, e=experiment: gradients_of(e, s, b)[::2])(state, batch)
    (losses, grads), (accumulated, parts) = found[1], found[4]
    for name in ("late", "early"):
        np.testing.assert_allclose(accumulated[name].value, losses[name].value, rtol=1e-5)
    assert_trees_close(parts, grads, rtol=1e-3, atol=2e-6)


# --- two languages ----------------------------------------------------------------------------------------------

DIGITS, LANGUAGES = 10, 2
LOOK = np.random.default_rng(0).normal(size=(DIGITS, 8, 8, 3)).astype(np.float32)


def named(digit: jax.Array, language: jax.Array) -> jax.Array:
    """Two words of a language, the second of which is the digit's; 1 ends the text and no word is in both."""
    words = 2 + language * (DIGITS + 1)
    return jnp.stack([words + DIGITS, words + digit, jnp.ones_like(digit)], axis=1)


def bilingual(seed: Any, count: int = 64) -> dict[str, jax.Array]:
    """Noisy digits, each with its name in one of the languages."""
    key_digit, key_language, key_noise = jax.random.split(jax.random.key(seed), 3)
    digit = jax.random.randint(key_digit, (count,), 0, DIGITS)
    language = jax.random.randint(key_language, (count,), 0, LANGUAGES)
    image = jnp.asarray(LOOK)[digit] + 0.5 * jax.random.normal(key_noise, (count, 8, 8, 3))
    return {"image": image, "text": named(digit, language), "label": digit}


def test_two_languages_meet_at_the_images_though_no_name_was_ever_translated() -> None:
    tower = spec(
        Multiway, image_size=8, patch=4, vocabulary=2 + LANGUAGES * (DIGITS + 1), length=3, width=32, depth=1,
        joint_depth=1, heads=2, embedding=16,
    )  # fmt: skip
    both = dict(image="encoder", text="encoder", same="label")
    early = dict(image_output="early_embedding", text_output="early_embedding")
    losses = dict(late=spec(InfoNCE, **both), early=spec(InfoNCE, **both, **early))
    test, digits = bilingual(10_000, 256), jnp.arange(DIGITS)

    def read(towers: Towers) -> Any:
        image = unit_rows(towers.call("encoder", test["image"]))
        names = [unit_rows(towers.call("encoder", named(digits, digits * 0 + x))) for x in range(LANGUAGES)]
        right = [jnp.mean(jnp.argmax(image @ name.T, axis=1) == test["label"]) for name in names]
        return right, jnp.mean(jnp.argmax(names[0] @ names[1].T, axis=1) == digits)

    right, translated = train(dict(encoder=tower), losses, bilingual, 200).read(read)
    assert min(right) > 0.9, right
    assert translated > 0.5


def test_inputs_of_other_shapes_are_refused(variables: Any) -> None:
    for inputs, message in (
        (np.zeros((2, 9, 9, 3), np.float32), "takes 8 pixels"),
        (np.zeros((2, 7), np.int32), "takes 6 tokens"),
        (np.zeros((2, 3, 4), np.float32), "images .* or texts"),
    ):
        with pytest.raises(UserError, match=message):
            TOWER.apply(variables, inputs)
