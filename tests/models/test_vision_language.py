"""Images between words: which tokens they become, who sees them, and what is told about prompts that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.data.tiling import NEWLINE, NOTHING, Tiling
from vlpjax.errors import UserError
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.decoder import Decoder, prefix_causal
from vlpjax.models.vision_language import (
    VisionLanguageModel,
    expand_prompts,
    generate_with_images,
    insert_images,
)
from vlpjax.models.vit import ViT

IMAGE, COUNT = 20, 4  # the placeholder, behind the vocabulary, and the tokens of an image
MODEL = VisionLanguageModel(
    ViT(image_size=4, patch=2, width=8, depth=2, heads=2, mlp_dim=8),
    LinearConnector(12),
    Decoder(vocabulary=20, width=12, depth=2, heads=2, mlp_dim=16, pattern=("local", "global"), window=3),
    image_token=IMAGE,
)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((2, 4, 4, 3)).astype(np.float32)
PROMPTS = expand_prompts([[1, IMAGE, 5, 6, 7], [2, 3, IMAGE, 8, 9]], [[COUNT]] * 2, IMAGE)
IDS = np.array(PROMPTS, np.int32)


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(0), IDS, IMAGES)


def run(
    variables: Any, ids: Any = IDS, images: Any = IMAGES, model: Any = MODEL, **options: Any
) -> dict[str, Any]:
    return jax.jit(lambda variables, ids, images: model.apply(variables, ids, images, **options))(
        variables, ids, images
    )


def changed(before: Any, after: Any) -> np.ndarray:
    """[batch, tokens]: where outputs differ."""
    return np.abs(np.asarray(before) - np.asarray(after)).max(axis=-1) > 0


def test_a_decoder_over_the_same_rows_gives_the_same(variables: Any) -> None:
    """Words by their embeddings, and the image's tokens in order in place of placeholders."""
    found = run(variables)
    rows = np.array(MODEL.decoder.apply({"params": variables["params"]["decoder"]}, IDS % 20, method="embed"))
    tower = MODEL.image.apply({"params": variables["params"]["image"]}, IMAGES)["tokens"]
    tokens = MODEL.connector.apply({"params": variables["params"]["connector"]}, tower)
    np.testing.assert_allclose(found["image_tokens"], tokens, atol=1e-6)
    rows[0, 1:5], rows[1, 2:6] = tokens[0], tokens[1]
    alone = MODEL.decoder.apply({"params": variables["params"]["decoder"]}, embeddings=rows)
    np.testing.assert_allclose(found["logits"], alone["logits"], atol=1e-5)


def test_what_stands_before_an_image_does_not_see_it_unless_it_is_a_prefix(variables: Any) -> None:
    images = IMAGES.copy()
    images[1] += 1
    seen = changed(run(variables)["logits"], run(variables, images=images)["logits"])
    assert not seen[0].any() and seen[1].tolist() == [False] * 2 + [True] * 6
    prefix = jnp.array([6, 7])
    seen = changed(
        run(variables, prefix=prefix)["logits"], run(variables, images=images, prefix=prefix)["logits"]
    )
    assert not seen[0].any() and seen[1].all()


def test_an_answer_is_not_seen_by_the_prefix(variables: Any) -> None:
    ids = IDS.copy()
    ids[:, -1] = 11
    seen = changed(
        run(variables, prefix=jnp.array([6, 8]))["logits"],
        run(variables, ids, prefix=jnp.array([6, 8]))["logits"],
    )
    assert seen[0].tolist() == [False] * 7 + [True] and seen[1].all()


def test_a_prefix_sees_all_of_itself_in_local_layers_and_the_rest_its_window() -> None:
    interval = prefix_causal(jnp.array([4, 0]), 6, window=2)
    assert interval.start.tolist() == [[0, 0, 0, 0, 3, 4], [0, 0, 1, 2, 3, 4]]
    assert interval.end.tolist() == [[4, 4, 4, 4, 5, 6], [1, 2, 3, 4, 5, 6]]


def test_several_images_come_in_order_and_rows_without_any_are_texts(variables: Any) -> None:
    images = RANDOM.standard_normal((2, 2, 4, 4, 3)).astype(np.float32)
    (both,) = expand_prompts([[1, IMAGE, 5, IMAGE]], [[COUNT] * 2], IMAGE)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    found = run(variables, np.array([both, text]), images)
    swapped = run(variables, np.array([both, text]), images[:, ::-1])
    np.testing.assert_allclose(
        found["image_tokens"][:, :COUNT], swapped["image_tokens"][:, COUNT:], atol=1e-6
    )
    assert changed(found["logits"], swapped["logits"]).tolist() == [[False] + [True] * 9, [False] * 10]
    plain = MODEL.apply(variables, np.array([text]))
    np.testing.assert_allclose(found["logits"][1], plain["logits"][0], atol=1e-5)


def test_a_placeholder_without_an_image_token_is_not_a_number() -> None:
    rows = insert_images(
        jnp.zeros((2, 4, 3)), jnp.array([[1, 0, 1, 1], [0, 0, 1, 0]], bool), jnp.ones((2, 2, 3))
    )
    assert jnp.isnan(rows).all(axis=-1).tolist() == [[False] * 3 + [True], [False] * 4]
    assert rows[0, :3, 0].tolist() == [1, 0, 1] and rows[1, :, 0].tolist() == [0, 0, 1, 0]
    gradient = jax.grad(
        lambda x: insert_images(jnp.zeros((1, 3, 1)), jnp.array([[True, False, False]]), x).sum()
    )
    assert gradient(jnp.ones((1, 2, 1))).ravel().tolist() == [1, 0]


def test_a_cache_that_was_filled_with_an_image_goes_on_as_the_whole(variables: Any) -> None:
    whole = run(variables)["logits"]

    @jax.jit
    def steps(variables: Any) -> list[Any]:
        cache = MODEL.decoder.init_cache(2, 8)
        out = MODEL.apply(variables, IDS[:, :6], IMAGES, cache=cache)
        found = [out["logits"]]
        for place in (6, 7):
            out = MODEL.apply(variables, IDS[:, place : place + 1], cache=out["cache"], start=place)
            found.append(out["logits"])
        return found

    np.testing.assert_allclose(jnp.concatenate(steps(variables), axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_answers_are_the_likeliest_tokens_whatever_the_padding(variables: Any, prefix_lm: bool) -> None:
    model = MODEL.clone(prefix_lm=prefix_lm)
    lengths = np.array([8, 6])
    ids = np.where(np.arange(8) < lengths[:, None], IDS, 0)
    found = generate_with_images(model, variables, ids, IMAGES, lengths=lengths, max_new_tokens=3).tokens

    @jax.jit
    def logits(row: Any, image: Any, prefix: Any, last: Any) -> Any:
        how = {"prefix": prefix[None]} if prefix_lm else {}
        return model.apply(variables, row[None], image[None], **how)["logits"][0, last]

    for row, length in enumerate(lengths):
        written = np.concatenate([ids[row, :length], np.zeros(11 - length, np.int32)])
        for new in range(3):
            # What stands behind is not seen; one shape serves all lengths.
            last = length + new - 1
            written[last + 1] = np.argmax(logits(written, IMAGES[row], jnp.asarray(length), last))
        np.testing.assert_array_equal(found[row], written[length : length + 3])


def test_tokens_can_be_those_of_chosen_blocks_with_the_class_token() -> None:
    model = MODEL.clone(image_layers=(0, -1), image_prefix=True)
    ids = np.array(expand_prompts([[1, IMAGE, 5]], [[5]], IMAGE))
    variables = jax.jit(model.init)(jax.random.key(0), ids, IMAGES[:1])
    tower = model.image.apply({"params": variables["params"]["image"]}, IMAGES[:1], hidden=(0, 1))["hidden"]
    both = jnp.concatenate([tower[0], tower[1]], axis=-1)
    expected = model.connector.apply({"params": variables["params"]["connector"]}, both)
    np.testing.assert_allclose(run(variables, ids, IMAGES[:1], model)["image_tokens"], expected, atol=1e-6)


TILING = Tiling(4, 2, ((4, 8), (8, 4), (8, 8)))


def test_an_arrangement_puts_tokens_and_newlines_where_it_says() -> None:
    model = MODEL.clone(tiling=TILING)
    arrangement = np.array([[5, NEWLINE, 0, NOTHING]])
    ids = np.array(expand_prompts([[1, IMAGE, 5]], [[3]], IMAGE))
    images = RANDOM.standard_normal((1, 3, 4, 4, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), ids, images)
    plain = run(variables, ids, images, model)["image_tokens"][0]
    found = run(variables, ids, images, model, arrangement=arrangement)
    newline = nn.meta.unbox(variables)["params"]["image_newline"]
    np.testing.assert_allclose(found["image_tokens"][0, :3], [plain[5], newline, plain[0]], atol=1e-6)
    assert jnp.isnan(found["image_tokens"][0, 3]).all() and jnp.isfinite(found["logits"]).all()
    generate_with_images(model, variables, ids, images, arrangement=arrangement, max_new_tokens=1)
    with pytest.raises(UserError, match="4 times, but its images have 3 tokens"):
        more = np.array(expand_prompts([[1, IMAGE]], [[4]], IMAGE))
        generate_with_images(model, variables, more, images, arrangement=arrangement, max_new_tokens=1)


def test_prompts_and_images_that_do_not_fit_are_told(variables: Any) -> None:
    with pytest.raises(UserError, match="Prompt 1 has the image placeholder 20 2 times, but 1 images"):
        expand_prompts([[IMAGE], [IMAGE, 3, IMAGE]], [[4], [4]], IMAGE)
    with pytest.raises(UserError, match="2 prompts, but images of 1"):
        expand_prompts([[IMAGE], [IMAGE]], [[4]], IMAGE)
    with pytest.raises(
        UserError, match="Row 0 has the image placeholder 20 3 times, but its images have 4 tokens"
    ):
        generate_with_images(MODEL, variables, np.where(np.arange(8) == 2, 5, IDS), IMAGES, max_new_tokens=1)


def test_calls_that_say_too_little_or_too_much_are_told(variables: Any) -> None:
    with pytest.raises(UserError, match="needs prefix"):
        run(variables, model=MODEL.clone(prefix_lm=True))
    with pytest.raises(UserError, match="give one"):
        run(variables, prefix=jnp.array([3, 3]), interval=prefix_causal(jnp.array([3, 3]), 8))
    with pytest.raises(UserError, match="tiling is None"):
        run(variables, arrangement=np.zeros((2, 4), np.int32))
    with pytest.raises(UserError, match="multiples of tile=4"):
        dataclasses.replace(TILING, resolutions=((4, 6),))
