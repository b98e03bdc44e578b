"""PaliGemma: what a prefix sees of itself, what nobody sees of an answer, and a loss that is a mean over examples."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import ROOT, abstract_of, assert_trees_close, experiment_of, layout_of, model_config, on_host
from vlpjax.config import Config, build, load, spec
from vlpjax.errors import UserError
from vlpjax.mesh import Layout
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.decoder import Decoder, blockwise_causal
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.objectives.next_token import NextToken
from vlpjax.objectives.visual_next_token import VisualNextToken
from vlpjax.parallel.attention import intersect, segments
from vlpjax.step import gradients, initial_state
from vlpjax.weights.encoders import hold
from vlpjax.weights.families import family_named

VOCABULARY, EACH, LENGTH, ROWS = 20, 4, 16, 8
PLACEHOLDER = VOCABULARY
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["random", "ones", "zeros"])
def test_what_tokens_see_is_what_the_flags_say(kind: str) -> None:
    """allowed(q, k) = (c[k] <= c[q]) and valid[q] and valid[k], for c the running sum of the flags."""
    flags = {"random": RANDOM.integers(0, 2, (6, 12)), "ones": np.ones((1, 12)), "zeros": np.zeros((1, 12))}[
        kind
    ]
    lengths = RANDOM.integers(1, 13, len(flags))
    valid = np.arange(12) < lengths[:, None]
    found = intersect(blockwise_causal(jnp.asarray(flags)), segments(jnp.asarray(valid, jnp.int32))).mask(12)
    want = np.zeros(found.shape, bool)
    for row, sums in enumerate(np.cumsum(flags, axis=1)):
        for query in range(12):
            for key in range(12):
                want[row, query, key] = sums[key] <= sums[query] and valid[row, query] and valid[row, key]
    np.testing.assert_array_equal(found, want)
    if kind != "random":
        plain = np.tril(np.ones((12, 12), bool)) if kind == "ones" else np.ones((12, 12), bool)
        np.testing.assert_array_equal(blockwise_causal(jnp.asarray(flags)).mask(12)[0], plain)


def test_a_window_hides_what_is_far_before_a_token_and_nothing_of_its_own_block() -> None:
    flags = np.array([[0, 0, 0, 0, 0, 1, 1, 0, 0, 1]])
    found = np.asarray(blockwise_causal(jnp.asarray(flags), window=2).mask(10))[0]
    seen = [np.flatnonzero(row).tolist() for row in found]
    assert seen[:5] == [[0, 1, 2, 3, 4]] * 5
    assert seen[5:] == [[4, 5], *[[5, 6, 7, 8]], *[[6, 7, 8]] * 2, [8, 9]]


def config_of(accumulate: int = 1, **fields: Any) -> Config:
    config = model_config(accumulate=accumulate)
    config.towers = dict(
        image=spec(ViT, image_size=8, patch=4, width=16, depth=1, heads=2, mlp_ratio=2.0, pool="none"),
        connector=spec(LinearConnector, width=16),
        decoder=spec(
            Decoder, vocabulary=VOCABULARY, width=16, depth=2, heads=4, kv_heads=1, mlp_dim=24, norm="rms_offset",
            activation="gelu_tanh", embed_scale=4.0, pattern=("local", "global"), window=3,
        ),
    )  # fmt: skip
    given = dict(image_field="image", weight_field="weights", prefix_lm=True, mean="examples", chunk=8)
    loss = spec(VisualNextToken, placeholder=PLACEHOLDER, **{**given, **fields})
    config.objectives = dict(next=dict(weight=1.0, loss=loss))
    return config


PROMPTS = np.array([3, 2, 1, 5, 2, 3, 4, 1])  # tokens of each row's prompt, and of its answer
ANSWERS = np.array([1, 7, 2, 4, 7, 1, 5, 3])


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """[picture][prompt][answer][padding]."""
    tokens, weights = np.zeros((ROWS, LENGTH + 1), np.int32), np.zeros((ROWS, LENGTH + 1), np.float32)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        start = EACH + prompt
        tokens[row, :EACH] = PLACEHOLDER
        tokens[row, EACH : start + answer] = RANDOM.integers(1, VOCABULARY, prompt + answer)
        weights[row, start : start + answer] = 1
    images = RANDOM.normal(size=(ROWS, 1, 8, 8, 3)).astype(np.float32)
    return {"tokens": tokens, "weights": weights, "image": images}


@functools.cache
def state() -> Any:
    experiment = experiment_of(config_of(), ROWS)
    return on_host(jax.jit(lambda batch: initial_state(experiment, batch))(batch()))


def found(config: Config, layout: Layout | None = None, given: Any = None) -> Any:
    """The objective's value, and the gradients."""
    experiment, given = experiment_of(config, ROWS), given or batch()

    def run(state: Any, batch: Any) -> Any:
        losses, _, grads = gradients(experiment, state, batch)
        return losses["next"], grads

    if layout is None:
        return on_host(jax.jit(run)(state(), given))
    placed = jax.device_put(state(), abstract_of(experiment, given, layout)[1])
    with layout.activate():
        return on_host(jax.jit(run)(placed, jax.device_put(given, layout.sharding("batch"))))


@functools.cache
def on_one_device() -> Any:
    return found(config_of())


def model() -> VisionLanguageModel:
    return VisionLanguageModel(**build(config_of().towers), image_token=PLACEHOLDER, prefix_lm=True)


def logits(params: Any, tokens: Any) -> jax.Array:
    prefix = jnp.asarray(EACH + PROMPTS)
    found: jax.Array = model().apply({"params": params}, tokens[:, :-1], batch()["image"], prefix)["logits"]
    return found


def test_the_loss_is_the_mean_of_the_means_of_one_to_seven_tokens_and_not_that_of_all_tokens() -> None:
    tokens, weights = batch()["tokens"], batch()["weights"]

    def both(params: Any) -> tuple[jax.Array, jax.Array]:
        logs = jax.nn.log_softmax(logits(params, tokens))
        labels = np.minimum(tokens[:, 1:], VOCABULARY - 1)
        nats = -jnp.take_along_axis(logs, labels[..., None], axis=2)[..., 0]
        means = [
            jnp.mean(nats[row, EACH + prompt - 1 : EACH + prompt + answer - 1])
            for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
        ]
        return sum(means) / ROWS, jnp.sum(nats * weights[:, 1:]) / weights.sum()

    (mean, over_tokens), grads = jax.jit(jax.value_and_grad(both, has_aux=True))(state().params)
    ours, our_grads = on_one_device()
    np.testing.assert_allclose(ours.value, mean, rtol=1e-5)
    assert_trees_close(our_grads, grads, rtol=1e-4, atol=1e-6)
    assert ours.metrics["tokens"] == ANSWERS.sum()
    np.testing.assert_allclose(found(config_of(mean="tokens"))[0].value, over_tokens, rtol=1e-5)
    assert abs(float(mean - over_tokens)) > 1e-3


def test_a_prompt_sees_all_of_itself_and_nothing_of_the_answer() -> None:
    row, tokens = 3, batch()["tokens"]  # a prompt of five, an answer of four
    start = EACH + PROMPTS[row]
    params = state().params
    run = jax.jit(lambda tokens: logits(params, tokens)[row])

    def changed(place: int) -> np.ndarray:
        other = tokens.copy()
        other[row, place] = other[row, place] % (VOCABULARY - 1) + 1
        return np.any(np.asarray(run(tokens)) != np.asarray(run(other)), axis=-1)[: start + ANSWERS[row]]

    assert changed(start - 1).all()  # the prompt's last token: the picture before it sees it
    first = changed(start)
    assert not first[:start].any() and first[start:].all()


def test_accumulation_is_exact() -> None:
    assert_trees_close(found(config_of(accumulate=4)), on_one_device(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "ring": 2, "ulysses": 2}, {"ring": 8}], ids=str)
def test_every_mesh_has_the_same_loss_and_gradients(sizes: dict[str, int]) -> None:
    assert_trees_close(found(config_of(), layout_of(8, **sizes)), on_one_device(), rtol=1e-4, atol=1e-6)


def test_examples_that_share_rows_have_the_loss_that_they_have_alone() -> None:
    """Texts of all lengths packed into rows: each document weighs as much as in a row of its own."""
    config = config_of()
    config.towers = dict(decoder=config.towers.decoder)
    fields = dict(
        weight_field="weights", prefix_lm=True, mean="examples", segment_field="segment_ids", chunk=8
    )
    config.objectives = dict(next=dict(weight=1.0, loss=spec(NextToken, **fields)))
    texts = [
        (tokens[EACH:][:count], weights[EACH:][:count])
        for tokens, weights, count in zip(
            batch()["tokens"], batch()["weights"], PROMPTS + ANSWERS, strict=True
        )
    ]

    def rows(packs: list[list[int]]) -> dict[str, np.ndarray]:
        names = dict(tokens=np.int32, weights=np.float32, segment_ids=np.int32)
        made = {name: np.zeros((ROWS, 2 * LENGTH + 1), dtype) for name, dtype in names.items()}
        for row, pack in enumerate(packs):
            place = 0
            for number, text in enumerate(pack, start=1):
                where = slice(place, place + len(texts[text][0]))
                made["tokens"][row, where], made["weights"][row, where] = texts[text]
                made["segment_ids"][row, where] = number
                place = where.stop
        return made

    experiment = experiment_of(config, ROWS)
    params = {"decoder": state().params["decoder"]}
    start = state().replace(params=params, optimizer=experiment.make_optimizer(params).init(params))
    run = jax.jit(
        lambda state, batch: (lambda losses, _, grads: (losses["next"], grads))(
            *gradients(experiment, state, batch)
        )
    )
    alone = on_host(run(start, rows([[text] for text in range(ROWS)])))
    assert_trees_close(on_host(run(start, rows([[0, 1, 2], [3], [4, 5, 6, 7]]))), alone, rtol=1e-4, atol=1e-6)


def test_the_published_weights_fit_the_towers_of_the_paper() -> None:
    text = dict(hidden_size=2048, intermediate_size=16_384, num_attention_heads=8, num_key_value_heads=1)
    vision = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27)
    published = dict(
        image_token_index=257_152,
        projection_dim=2048,
        text_config=dict(model_type="gemma", num_hidden_layers=18, vocab_size=257_216, **text),
        vision_config=dict(model_type="siglip_vision_model", patch_size=14, vision_use_head=False, **vision),
    )
    whole = family_named("paligemma").build(published)
    config = load(f"{ROOT}/experiments/decoders/paligemma.py:paper")
    assert whole.image_token == config.objectives.next.loss.placeholder
    for name, tower in build(config.towers).items():
        hold("PaliGemma", tower, getattr(whole, name))


def test_settings_that_cannot_be_are_told() -> None:
    with pytest.raises(UserError, match="mean is 'rows'; there are 'tokens', 'examples'"):
        NextToken(mean="rows")
    with pytest.raises(UserError, match="prefix_lm needs a weight_field"):
        NextToken(prefix_lm=True)
