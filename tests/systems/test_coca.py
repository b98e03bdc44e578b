"""CoCa: what each half of the decoder sees, the captioning loss against a loop, and its accumulation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import (
    LENGTH,
    ROOT,
    SIZE,
    VOCABULARY,
    assert_trees_close,
    experiment_of,
    model_config,
    random_batch,
)
from vlpjax.config import Config, build, load, spec
from vlpjax.data.transforms import DrawCaption
from vlpjax.errors import UserError
from vlpjax.models.coca import CaptionDecoder, PooledImage, UnimodalText
from vlpjax.models.vit import ViT
from vlpjax.objectives.captioning import Captioning
from vlpjax.step import gradients, initial_state

WIDTH = 16
IMAGE = PooledImage(
    ViT(image_size=SIZE, patch=8, width=WIDTH, depth=1, heads=2, pool="none"), queries=3, width=WIDTH, heads=2,
    embedding=8,
)  # fmt: skip
TEXT = UnimodalText(VOCABULARY, LENGTH, width=WIDTH, depth=2, heads=2, embedding=8)
DECODER = CaptionDecoder(VOCABULARY, depth=2, heads=2)
BATCH = random_batch()
IDS = np.array([[5, 9, 7, 1, 0, 0, 0, 0], [3, 4, 6, 8, 2, 1, 0, 0]], np.int32)


def made(module: nn.Module, *inputs: Any) -> Any:
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs))


@pytest.fixture(scope="module")
def text_variables() -> Any:
    return made(TEXT, IDS)


@pytest.fixture(scope="module")
def decoder_variables(text_variables: Any) -> Any:
    return made(DECODER, TEXT.apply(text_variables, IDS)["tokens"], jnp.zeros((2, 3, WIDTH)))


def test_the_pooler_gives_one_vector_and_a_memory() -> None:
    outputs = IMAGE.apply(made(IMAGE, BATCH["image"]), BATCH["image"])
    assert outputs["memory"].shape == (16, 3, WIDTH)
    assert outputs["pooled"].shape == (16, WIDTH) and outputs["embedding"].shape == (16, 8)


def test_the_texts_vector_does_not_depend_on_padding(text_variables: Any) -> None:
    long = TEXT.apply(text_variables, IDS)
    short = TEXT.apply(text_variables, IDS[:, :6])
    assert_trees_close(short["embedding"], long["embedding"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(short["tokens"], long["tokens"][:, :6], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_the_texts_vector_sees_every_token_and_tokens_only_earlier_ones(
    text_variables: Any, place: int
) -> None:
    changed = IDS.copy()
    changed[1, place] = 11
    before, after = (TEXT.apply(text_variables, ids) for ids in (IDS, changed))
    assert np.max(np.abs(before["embedding"][1] - after["embedding"][1])) > 1e-5
    np.testing.assert_allclose(before["tokens"][:, :place], after["tokens"][:, :place], rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(before["tokens"][1, place:] - after["tokens"][1, place:])) > 1e-5


def test_logits_see_the_image_and_earlier_tokens(text_variables: Any, decoder_variables: Any) -> None:
    tokens = TEXT.apply(text_variables, IDS)["tokens"]
    memory = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))
    before = DECODER.apply(decoder_variables, tokens, memory)["tokens"]
    later = IDS.copy()
    later[:, 4] = 13
    after = DECODER.apply(decoder_variables, TEXT.apply(text_variables, later)["tokens"], memory)["tokens"]
    np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-5)
    other = DECODER.apply(decoder_variables, tokens, memory + 1.0)["tokens"]
    assert np.all(np.max(np.abs(before - other), axis=-1) > 1e-5)


def config_of(accumulate: int = 1) -> Config:
    config = model_config(accumulate=accumulate)
    config.towers = dict(
        image=spec(
            PooledImage, tower=spec(ViT, image_size=SIZE, patch=8, width=WIDTH, depth=1, heads=2, pool="none"),
            queries=3, width=WIDTH, heads=2, embedding=8,
        ),
        text=spec(UnimodalText, vocabulary=VOCABULARY, length=LENGTH, width=WIDTH, depth=1, heads=2, embedding=8),
        decoder=spec(CaptionDecoder, vocabulary=VOCABULARY, depth=1, heads=2),
    )  # fmt: skip
    config.objectives.captions = dict(weight=2.0, loss=spec(Captioning, chunk=3))
    return config


@pytest.fixture(scope="module")
def state() -> Any:
    experiment = experiment_of(config_of())
    return jax.jit(lambda batch: initial_state(experiment, batch))(BATCH)


def grads_of(config: Config, state: Any) -> Any:
    experiment = experiment_of(config)
    return jax.jit(lambda state, batch: gradients(experiment, state, batch)[::2])(state, BATCH)


def test_both_losses_are_their_formulas_and_accumulation_is_exact(state: Any) -> None:
    losses, grads = grads_of(config_of(), state)
    towers = experiment_of(config_of()).towers
    params = {"params": state.params}

    def outputs(towers: Any) -> Any:
        image, text = towers.call("image", BATCH["image"]), towers.call("text", BATCH["text"])
        found = towers.call("decoder", text["tokens"], image["memory"])
        return image["embedding"], text["embedding"], found["tokens"] @ found["kernel"]

    image, text, logits = towers.apply(params, method=outputs)
    nats, count = 0.0, 0
    for row, ids in enumerate(BATCH["text"]):
        for place in range(LENGTH - 1):
            if ids[place + 1] != 0:
                nats -= float(jax.nn.log_softmax(logits[row, place])[ids[place + 1]])
                count += 1
    np.testing.assert_allclose(losses["captions"].value, nats / count, rtol=1e-5)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    scaled = image @ text.T / 0.07
    rows, columns = (-np.diag(jax.nn.log_softmax(scaled, axis)) for axis in (1, 0))
    np.testing.assert_allclose(losses["clip"].value, np.mean(rows + columns) / 2, rtol=1e-5)
    accumulated, parts = grads_of(config_of(accumulate=4), state)
    np.testing.assert_allclose(accumulated["captions"].value, losses["captions"].value, rtol=1e-5)
    assert_trees_close(parts, grads, rtol=1e-4, atol=1e-5)  # sums over all places of a frequent token


@pytest.mark.parametrize("experiment", ["contrastive/coca.py", "composed.py"])
def test_the_first_word_of_a_name_is_asked_for(experiment: str) -> None:
    """The bundled tokenizer has no start token, so all captions begin with the same one, which is never a label."""
    config = load(f"{ROOT}/experiments/{experiment}")
    for steps in (config.data.train.transforms, config.evaluators.style.data.transforms):
        caption, tokenize = build(steps.caption), build(steps.tokenize)
        firsts, seconds = set(), set()
        for name in ("duck", "tree", "red apple"):
            element = {"name": name, "keywords": name}
            if isinstance(caption, DrawCaption):
                element = caption.random_map(element, np.random.default_rng(0))
            else:
                element = caption.map(element)
            first, second = tokenize.map(element)["text"][:2].tolist()
            firsts.add(first), seconds.add(second)
        assert len(firsts) == 1 and len(seconds) == 3


def test_too_long_texts_are_refused(text_variables: Any) -> None:
    with pytest.raises(UserError, match="takes 8 tokens, but the batch has 9"):
        TEXT.apply(text_variables, jnp.zeros((2, 9), jnp.int32))
