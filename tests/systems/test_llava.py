"""LLaVA: pictures stand in the text as if spliced in, stages train what they name, answers are about the picture."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.systems.training import Trained, train
from tests.tiny import ROOT, Rows, assert_trees_close, experiment_of, model_config, on_host, rows_of
from vlpjax.config import Config, build, load, spec
from vlpjax.data.packed_documents import PackedDocuments
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import Filter
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import ChatTemplate, Conversation, Frames, Normalize
from vlpjax.models.connectors import MlpConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.objectives.visual_next_token import VisualNextToken
from vlpjax.rules import tree_names
from vlpjax.step import gradients, initial_state, train_step
from vlpjax.weights.encoders import hold
from vlpjax.weights.families import family_named

SIZE, EACH, WIDTH, LENGTH, ROOM = 8, 4, 16, 40, 2
PIECES = SentencePieceTokenizer("bundled:emoji1594.spm.model")
VOCABULARY = PLACEHOLDER = PIECES.vocab_size
LAYER = -2
TURNS = (  # rows of none, one and two pictures
    (("user", "a fruit?"), ("assistant", "red apple")),
    (("user", "<image> what?"), ("assistant", "cat"), ("user", "sure?"), ("assistant", "yes")),
    (("user", "from <image> to <image>"), ("assistant", "dog face")),
)


def towers(vocabulary: int = VOCABULARY, depth: int = 2, width: int = WIDTH) -> dict[str, Config]:
    """The image tower has a class token, and its last block is not used."""
    return dict(
        image=spec(ViT, image_size=SIZE, patch=4, width=width, depth=2, heads=2, mlp_ratio=2.0),
        connector=spec(MlpConnector, width=width),
        decoder=spec(Decoder, vocabulary=vocabulary, width=width, depth=depth, heads=2, mlp_dim=2 * width, tied=False),
    )  # fmt: skip


def loss(placeholder: int = PLACEHOLDER, **fields: Any) -> Config:
    given = dict(image_field="image", weight_field="weights", image_layers=(LAYER,), chunk=16)
    return spec(VisualNextToken, placeholder=placeholder, **{**given, **fields})


def rules_of(size: str) -> Any:
    """What this stage of the experiment trains."""
    return load(f"{ROOT}/experiments/decoders/llava.py:{size}").optimizer.rate_rules


def config_of(**fields: Any) -> Config:
    config = model_config()
    config.towers, config.objectives = towers(), dict(next=dict(weight=1.0, loss=loss(**fields)))
    return config


def records() -> Rows:
    """The turns with pictures that are drawn."""
    rng, pictures = np.random.default_rng(0), []
    for turns in TURNS:
        shown = sum(words.count("<image>") for _, words in turns)
        pictures.append(
            [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(shown)]
        )
    return rows_of(
        turns=[[dict(role=role, content=words) for role, words in turns] for turns in TURNS], image=pictures
    )


def conversation(**fields: Any) -> Conversation:
    template = ChatTemplate(opening="a chat.", system="{} ", user="user: {} ", assistant="assistant: {}")
    return Conversation(PIECES, LENGTH, template, PLACEHOLDER, EACH, **fields)


def batch_of(source: Any, transforms: Mapping[str, Any], room: int) -> dict[str, np.ndarray]:
    """All rows of a source, in order, as the data pipeline makes them."""
    frames = Frames(room, SIZE, EACH, PLACEHOLDER, field="image")
    steps = {**transforms, "frames": frames, "normalize": Normalize(range="-1..1")}
    batch = Pipeline(source, steps, batch_size=len(source), shuffle=False, repeat=False).batch(0)
    return {name: batch[name] for name in batch if name not in ("index", "valid")}


@functools.cache
def conversations() -> dict[str, np.ndarray]:
    """One to a row."""
    return batch_of(records(), {"conversation": conversation()}, ROOM)


@functools.cache
def packed() -> tuple[list[int], dict[str, np.ndarray]]:
    """All of them in one row: their order, and the row."""
    steps = {"conversation": conversation(pad=False)}
    packing = PackedDocuments(records(), steps, length=2 * LENGTH, images=ROOM + 1)
    assert len(packing) == 1
    return packing.documents(0), batch_of(packing, {}, ROOM + 1)


@functools.cache
def state() -> Any:
    experiment = experiment_of(config_of(), len(TURNS))
    return on_host(jax.jit(lambda batch: initial_state(experiment, batch))(conversations()))


def model() -> VisionLanguageModel:
    return VisionLanguageModel(**build(config_of().towers), image_token=PLACEHOLDER, image_layers=(LAYER,))


def spliced(params: Any) -> list[jax.Array]:
    """Logits of every row by itself: [text before][tokens of the picture][text after], lists put end to end."""
    parts, found = build(config_of().towers), []
    decoder = {"params": params["decoder"]}
    table = params["decoder"]["token_embedding"]["embedding"]
    for ids, weights, images in zip(*map(conversations().get, ("tokens", "weights", "image")), strict=True):  # type: ignore[arg-type]
        length = int(np.flatnonzero(weights)[-1])  # nothing is asked for behind this one
        seen = parts["image"].apply({"params": params["image"]}, images, hidden=(LAYER,))["hidden"][LAYER]
        shown = parts["connector"].apply(
            {"params": params["connector"]}, seen[:, 1:]
        )  # without the class token
        pieces, number, place = [], 0, 0
        while place < length:
            if ids[place] == PLACEHOLDER:
                pieces.append(shown[number])
                number, place = number + 1, place + EACH
            else:
                pieces.append(table[ids[place]][None])
                place += 1
        row = jnp.concatenate(pieces)[None]
        assert row.shape[1] == length
        found.append(parts["decoder"].apply(decoder, embeddings=row)["logits"][0])
    return found


def spliced_loss(params: Any) -> tuple[jax.Array, list[jax.Array]]:
    """The mean over all tokens that are asked for, and the logits."""
    logits, total, count = spliced(params), jnp.zeros(()), 0.0
    for row, ids, weights in zip(logits, conversations()["tokens"], conversations()["weights"], strict=True):
        labels, asked = ids[1 : len(row) + 1], weights[1 : len(row) + 1]
        logs = jax.nn.log_softmax(row)[np.arange(len(row)), np.minimum(labels, VOCABULARY - 1)]
        total, count = total - jnp.sum(asked * logs), count + float(asked.sum())
    return total / count, logits


def test_placeholders_equal_lists_that_are_spliced_in_value_and_gradient() -> None:
    batch, params = conversations(), state().params
    (value, lists), grads = jax.jit(jax.value_and_grad(spliced_loss, has_aux=True))(params)
    experiment = experiment_of(config_of(), len(TURNS))

    def run(state: Any, batch: Any) -> Any:
        losses, _, grads = gradients(experiment, state, batch)
        return (
            losses["next"],
            grads,
            model().apply({"params": state.params}, batch["tokens"][:, :-1], batch["image"]),
        )

    ours, our_grads, outputs = on_host(jax.jit(run)(state(), batch))
    for row, logits in enumerate(lists):
        np.testing.assert_allclose(outputs["logits"][row, : len(logits)], logits, atol=1e-5)
    np.testing.assert_allclose(ours.value, value, rtol=1e-5)
    assert ours.metrics["tokens"] == batch["weights"].sum()
    assert_trees_close(our_grads, on_host(grads), rtol=1e-4, atol=1e-6)


def test_the_order_of_a_pictures_tokens_changes_what_follows_it_only() -> None:
    ids, images = conversations()["tokens"][2:, :-1], conversations()["image"][2:]
    variables, whole = {"params": state().params}, model()

    @jax.jit
    def logits(order: jax.Array) -> jax.Array:
        shown = whole.apply(variables, images, method="encode_images")[:, order]
        rows = whole.apply(variables, ids, shown, method="embed")
        return whole.decoder.apply({"params": variables["params"]["decoder"]}, embeddings=rows)["logits"]

    order = np.arange(2 * EACH)
    before, after = (
        logits(order),
        logits(np.r_[order[:EACH], order[: EACH - 1 : -1]]),
    )  # of the second picture
    second = np.flatnonzero(ids[0] == PLACEHOLDER)[EACH]
    changed = np.any(np.asarray(before) != np.asarray(after), axis=-1)[0]
    assert not changed[:second].any() and changed[second:].all()


def test_samples_that_share_a_row_do_not_see_one_another() -> None:
    """Each sample of a packed row has the logits that it has alone, also when its neighbour becomes another."""
    order, batch = packed()
    ids, segments, images = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1], batch["image"]
    changed = segments[0] == order.index(1) + 1  # words and picture of the second conversation
    other = np.where(changed & (ids != PLACEHOLDER), (ids + 1) % VOCABULARY, ids)
    first = sum(words.count("<image>") for number in order[: order.index(1)] for _, words in TURNS[number])
    pictures = images + (np.arange(ROOM + 1) == first)[:, None, None, None].astype(np.float32)
    variables, whole = {"params": state().params}, model()

    @jax.jit
    def logits(ids: jax.Array, images: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        return whole.apply(variables, ids, images, segment_ids=segments)["logits"]

    both = logits(
        np.concatenate([ids, other]), np.concatenate([images, pictures]), np.concatenate([segments] * 2)
    )
    differ = np.any(np.asarray(both[0] != both[1]), axis=-1)
    assert not differ[~changed].any() and differ[changed].all()
    alone = logits(conversations()["tokens"][:, :-1], conversations()["image"])
    for place, number in enumerate(order, 1):
        found = both[0][segments[0] == place]
        np.testing.assert_allclose(found, alone[number, : len(found)], atol=1e-5)


def test_conversations_that_share_a_row_have_the_loss_and_gradients_of_rows_of_their_own() -> None:
    def run(batch: Mapping[str, np.ndarray], **fields: Any) -> Any:
        experiment = experiment_of(config_of(**fields), len(batch["tokens"]))

        def losses(state: Any, batch: Any) -> Any:
            losses, _, grads = gradients(experiment, state, batch)
            return losses["next"], grads

        return on_host(jax.jit(losses)(state(), batch))

    order, batch = packed()
    assert sorted(order) == [0, 1, 2] and batch["weights"].sum() == conversations()["weights"].sum()
    (loss, grads), (want, want_grads) = (
        run(batch, segment_field="segment_ids"),
        run(conversations()),
    )
    np.testing.assert_allclose(loss.value, want.value, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["filled"], np.mean(batch["segment_ids"] > 0), rtol=1e-6)
    assert loss.metrics["tokens"] == want.metrics["tokens"]
    assert_trees_close(grads, want_grads, rtol=1e-4, atol=1e-6)


def test_the_experiment_packs_where_it_is_asked_to() -> None:
    config = load(f"{ROOT}/experiments/decoders/llava.py:small,packed=4")
    drawings = config.data.train.source.source
    drawings.source = spec(Filter, source=drawings.source, field="label", values=(0, 66))
    pipeline = build(config.data.train)
    batch = pipeline.batch(0)
    assert batch["image"].shape == (4, 5, 32, 32, 3) and batch["segment_ids"].max() > 1
    assert (batch["weights"].sum(axis=1) > 0).all()
    paper = load(f"{ROOT}/experiments/decoders/llava.py:paper,packed=64")
    assert paper.data.train.batch_size == 64 and paper.data.example.image == "float32[3,336,336,3]"
    assert paper.objectives.next.loss.segment_field == "segment_ids"


@pytest.mark.parametrize(
    ("stage", "trained"),
    [("small_stage1", {"connector"}), ("paper_stage1", {"connector"}), ("paper", {"connector", "decoder"})],
)
def test_a_stage_moves_every_parameter_of_what_it_trains_and_no_bit_of_the_rest(
    stage: str, trained: set[str]
) -> None:
    config = config_of()
    config.optimizer.rate_rules = rules_of(stage)
    experiment = experiment_of(config, len(TURNS))
    before = state().replace(optimizer=experiment.make_optimizer(state().params).init(state().params))
    after, _ = jax.jit(lambda state, batch: train_step(experiment, state, batch))(before, conversations())
    same = jax.tree.map(
        lambda old, new: np.array_equal(old, new), before.params, jax.device_get(after.params)
    )
    moved = {name for name, kept in zip(tree_names(same), jax.tree.leaves(same), strict=True) if not kept}
    assert moved == {name for name in tree_names(same) if name.partition("/")[0] in trained}


def test_the_published_weights_fit_the_towers_of_the_paper() -> None:
    sizes = dict(num_hidden_layers=32, num_attention_heads=32, hidden_size=4096, intermediate_size=11_008)
    vicuna = dict(vocab_size=32_000, max_position_embeddings=4096, rms_norm_eps=1e-5, **sizes)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    clip = dict(
        vision_config=dict(image_size=336, patch_size=14, **vision), text_config={}, projection_dim=768
    )
    paper = build(load(f"{ROOT}/experiments/decoders/llava.py:paper_stage1").towers)
    hold("Vicuna", paper["decoder"], family_named("llama").build(vicuna))
    hold("CLIP", paper["image"], family_named("clip").build(clip).makers["image"]().clone(embedding=None))


# --- a toy: pictures of four classes, and a question that is the same for all ------------------------------------

CLASSES, ROWS = 4, 32
QUESTION, SHOWN = 4, 5  # ids: 0 to 3 are the answers


def draw(number: Any) -> Mapping[str, jax.Array]:
    """A batch: the question, a noisy picture, and the name of its class, which alone is asked for."""
    key = jax.random.fold_in(jax.random.key(1), number)
    labels = jax.random.randint(key, (ROWS,), 0, CLASSES)
    patterns = jax.random.uniform(jax.random.key(7), (CLASSES, SIZE, SIZE, 3), minval=-1)
    images = patterns[labels] + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (ROWS, SIZE, SIZE, 3))
    text = jnp.full((ROWS, 1 + EACH), SHOWN).at[:, 0].set(QUESTION)
    tokens = jnp.concatenate([text, labels[:, None]], axis=1)
    return {"image": images[:, None], "tokens": tokens, "weights": (tokens < CLASSES).astype(jnp.float32)}


def answer_loss(trained: Trained, shuffled: bool) -> float:
    """Of the answers to new pictures, or to those of other rows."""
    batch = dict(draw(10_000))
    if shuffled:
        batch["image"] = jnp.roll(batch["image"], 1, axis=0)
    experiment = trained.experiment
    found = jax.jit(lambda state, batch: gradients(experiment, state, batch)[0]["next"].value)(
        trained.state, batch
    )
    return float(found)


def test_answers_are_about_the_picture_that_was_shown() -> None:
    trained = train(
        towers(CLASSES + 1, width=32),
        dict(next=loss(SHOWN)),
        draw,
        steps=150,
        rate_rules=rules_of("small"),
    )
    chance = math.log(CLASSES)
    assert answer_loss(trained, shuffled=False) < 0.5 * chance
    assert answer_loss(trained, shuffled=True) > 0.9 * chance
