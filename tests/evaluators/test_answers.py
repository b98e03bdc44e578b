"""Generated answers: against decoding without a cache, row by row, and with the loops of scores written out."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from grain import transforms as grain_transforms
from PIL import Image

from tests.evaluators.given import Fingerprinted
from tests.evaluators.test_pictures import pixels
from tests.systems.test_llava import TURNS
from tests.tiny import experiment_of, layout_of, model_config
from vlpjax.config import build, spec
from vlpjax.data.bad import BadExample
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import ChatTemplate, Conversation, Frames, Normalize
from vlpjax.errors import UserError
from vlpjax.evaluators.answers import GeneratedAnswers, another_row, last_turn
from vlpjax.evaluators.base import Result
from vlpjax.experiment import Experiment
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.objectives.next_token import NextToken
from vlpjax.objectives.visual_next_token import VisualNextToken

SIZE, EACH, WIDTH, LENGTH, ROOM, NEW, BATCH = 8, 4, 16, 32, 2, 4, 8
PIECES = SentencePieceTokenizer("bundled:emoji1594.spm.model")
PLACEHOLDER = PIECES.vocab_size
ROWS = 11


def towers() -> dict[str, Any]:
    return dict(
        image=spec(ViT, image_size=SIZE, patch=4, width=WIDTH, depth=1, heads=2, mlp_ratio=2.0, pool="none"),
        connector=spec(LinearConnector, width=WIDTH),
        decoder=spec(Decoder, vocabulary=PLACEHOLDER, width=WIDTH, depth=1, heads=2, mlp_dim=2 * WIDTH),
    )


@functools.cache
def parts(prefix_lm: bool = False) -> tuple[Experiment, Any]:
    """A tiny experiment and parameters that say this of one picture and that of another."""
    config = model_config()
    config.towers = towers()
    fields = dict(image_field="image", weight_field="weights", placeholder=PLACEHOLDER, prefix_lm=prefix_lm)
    loss, text = spec(VisualNextToken, **fields), spec(NextToken)
    packed = spec(VisualNextToken, segment_field="segments", **fields)
    words = spec(NextToken, weight_field="weights")
    config.objectives = {
        name: dict(weight=1.0, loss=one)
        for name, one in dict(next=loss, text=text, packed=packed, words=words).items()
    }
    experiment = experiment_of(config, ROWS)
    batch = {name: np.stack([row[name] for row in rows()]) for name in ("image", "tokens", "weights")}
    batch["segments"] = np.ones_like(batch["tokens"])
    params = nn.meta.unbox(jax.jit(experiment.initial_variables)(batch))["params"]
    return experiment, {"params": jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)}


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """The rows as the data pipeline makes them."""
    steps: tuple[Any, ...] = (
        Conversation(PIECES, LENGTH, ChatTemplate(), PLACEHOLDER, EACH),
        Frames(ROOM, SIZE, EACH, PLACEHOLDER, field="image"),
        Normalize(range="-1..1"),
    )
    rng, made = np.random.default_rng(0), []
    for number in range(ROWS):
        turns = TURNS[number % 3]
        shown = sum(said.count("<image>") for _, said in turns)
        row: dict[str, Any] = {
            "turns": [dict(role=role, content=said) for role, said in turns],
            "image": [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(shown)],
        }
        for step in steps:
            row = step.map(row)
        made.append({name: row[name] for name in ("image", "tokens", "weights")})
    return tuple(made)


@functools.cache
def spoken(prefix_lm: bool, order: tuple[int, ...] = tuple(range(ROWS))) -> tuple[str, ...]:
    """What the model says of the pictures of rows ``order``, by reading all anew for each token, without a cache."""
    model = VisionLanguageModel(
        **build(model_config(towers=towers()).towers), image_token=PLACEHOLDER, prefix_lm=prefix_lm
    )
    variables = parts(prefix_lm)[1]
    ids = np.zeros((ROWS, LENGTH + NEW), np.int32)
    lengths = np.zeros(ROWS, np.int32)
    for number, row in enumerate(rows()):
        asked = np.flatnonzero(row["weights"])
        lengths[number] = next(at for at in asked[::-1] if not row["weights"][at - 1])
        ids[number, : lengths[number]] = row["tokens"][: lengths[number]]
    images = np.stack([rows()[number]["image"] for number in order])

    @jax.jit
    def best(ids: jax.Array, at: jax.Array) -> jax.Array:
        prefix = jnp.asarray(lengths) if prefix_lm else None
        logits = model.apply(variables, ids, images, prefix)["logits"]
        return jnp.argmax(logits[jnp.arange(ROWS), at], axis=-1)

    for step in range(NEW):
        ids[np.arange(ROWS), lengths + step] = best(ids, lengths + step - 1)
    texts = []
    for row, length in zip(ids, lengths, strict=True):
        said = row[length : length + NEW].tolist()
        said = said[: said.index(PIECES.eos_id)] if PIECES.eos_id in said else said
        texts.append(PIECES.decode(said).strip())
    return tuple(texts)


@dataclasses.dataclass(frozen=True)
class Refuse(grain_transforms.Map):
    """Cannot read rows that are marked."""

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        if element.get("broken"):
            raise BadExample("it is broken")
        return element


def data(changed: dict[int, dict[str, Any]] | None = None, **columns: Any) -> Pipeline:
    """The rows with more columns, and with other fields in some of them."""
    made = [
        {
            **row,
            **{name: values[number] for name, values in columns.items()},
            **(changed or {}).get(number, {}),
        }
        for number, row in enumerate(rows())
    ]
    keep = ("image", "tokens", "weights", *(["segments"] if "segments" in columns else []))
    source = Fingerprinted(tuple(made))
    return Pipeline(source, {"refuse": Refuse()}, batch_size=BATCH, shuffle=False, repeat=False, keep=keep)


def judged(mesh: dict[str, int] | None = None, prefix_lm: bool = False, **fields: Any) -> Result:
    experiment, variables = parts(prefix_lm)
    layout = layout_of(math.prod((mesh or {}).values()), **(mesh or {}))
    evaluator = GeneratedAnswers(tokenizer=PIECES, max_new_tokens=NEW, **{"examples": ROWS, **fields})
    return evaluator.make(experiment, layout)(jax.device_put(variables, layout.replicated))


def said_in(result: Result) -> list[str]:
    return [example["pictures"][0]["text"].split("“")[1].split("”")[0] for example in result.examples]


# Rows 1, 4 and 7 of the first batch have one picture each, 2 and 5 have two; in the second batch, no two have as many.
OTHERS = {1: 4, 4: 7, 7: 1, 2: 5, 5: 2}


@pytest.mark.parametrize(
    "mesh", [{}, {"fsdp": 8}, {"fsdp": 2, "ring": 2, "tensor": 2}], ids=["1", "8", "2x2x2"]
)
def test_answers_are_those_of_decoding_without_a_cache(mesh: dict[str, int]) -> None:
    own = spoken(False)
    other = spoken(False, tuple(OTHERS.get(row, row) for row in range(ROWS)))
    assert len(set(own)) > 3 and any(own[row] != other[row] for row in OTHERS)
    wrong = (0, 4)
    references = ["nothing" if row in wrong else f"something|{own[row]}" for row in range(ROWS)]
    found = judged(mesh, data=data(answers=references), references="answers", other_pictures=True)
    assert said_in(found) == list(own)
    assert found.metrics["exact_match_accuracy"] == pytest.approx(1 - len(wrong) / ROWS)
    same = [own[row].lower() == other[row].lower() and row not in wrong for row in OTHERS]
    assert found.metrics["other_pictures/exact_match_accuracy"] == pytest.approx(np.mean(same))
    assert found.metrics["answered"] == ROWS and found.metrics["left_out"] == 0


def test_a_prefix_sees_itself_and_rows_with_earlier_answers_are_left_out() -> None:
    found = judged(prefix_lm=True, data=data())
    kept = [row for row in range(ROWS) if row % 3 != 1]
    assert said_in(found) == [spoken(True)[row] for row in kept]
    assert found.metrics["left_out"] == ROWS - len(kept)


def test_what_the_assistant_says_in_the_row_is_right_where_nothing_else_is() -> None:
    found = judged(data=data(), prompt_length=LENGTH - 8)
    assert said_in(found) == list(spoken(False))
    references = [("red apple", "yes", "dog face")[row % 3] for row in range(ROWS)]
    right = [said.lower() == asked for said, asked in zip(spoken(False), references, strict=True)]
    assert found.metrics["exact_match_accuracy"] == pytest.approx(np.mean(right))
    pairs = [one == other for one in references for other in references]
    assert found.chance["exact_match_accuracy"] == pytest.approx(np.mean(pairs))
    assert [text for text in ("red apple", "yes", "dog face") if f"not “{text}”" in str(found.examples)]


def test_training_may_pack_what_is_asked_one_by_one() -> None:
    assert said_in(judged(data=data(), objective="packed")) == list(spoken(False))
    with pytest.raises(UserError, match="'segments'.*one text"):
        judged(data=data(segments=[np.ones(1, np.int32)] * ROWS), objective="packed")


def test_rows_that_fail_are_told_and_others_are_judged() -> None:
    bad = {
        0: dict(broken=True),
        2: dict(weights=np.zeros(LENGTH + 1, np.float32)),
        5: dict(image=np.full((ROOM, SIZE, SIZE, 3), np.nan, np.float32)),
        7: dict(tokens=np.full(LENGTH + 1, PLACEHOLDER, np.int32)),  # more than its pictures have
    }
    found = judged(data=data(bad))
    assert said_in(found) == [text for row, text in enumerate(spoken(False)) if row not in bad]
    assert found.metrics["answered"] == ROWS - len(bad) and found.metrics["left_out"] == len(bad)
    assert judged(data=data(), prompt_length=8).metrics["left_out"] > 0


def test_the_report_shows_the_pictures_and_the_answer() -> None:
    shown = judged(data=data(), examples=3).examples
    assert [sum("image" in one for one in example["pictures"]) for example in shown] == [0, 1, 2]
    frames = np.stack([row["image"] for row in rows()[:3]])
    low, high = frames.min(), frames.max()
    expected = 255 * (rows()[2]["image"][1] - low) / (high - low)
    np.testing.assert_allclose(pixels(shown[2]["pictures"][1]["image"]), expected, atol=0.51)


def test_a_turn_and_another_row() -> None:
    assert last_turn(np.array([0, 1, 1, 0, 1, 1, 0])) == (4, 6)
    assert last_turn(np.array([0, 0, 1])) == (2, 3)
    assert last_turn(np.zeros(4)) == (0, 0)
    assert another_row(np.array([4, 0, 4, 8, 4, 4, 0])).tolist() == [4, 1, 5, 3, 0, 2, 6]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, ["'data' and 'tokenizer'"]),
        (dict(kinds=("exakt",)), ["'exakt'", "'exact'"]),
        (dict(kinds=()), ["one kind or more"]),
        (dict(objective="nxt"), ["'nxt'", "'next'"]),
        (dict(objective="text"), ["'text'", "weight_field"]),
        (dict(objective="words", other_pictures=True), ["'words'", "no pictures"]),
        (dict(references="anwers"), ["'anwers'", "'answers'"]),
    ],
    ids=range(7),
)
def test_what_does_not_work_is_told(fields: dict[str, Any], told: list[str]) -> None:
    given = {"data": data(answers=["a"] * ROWS)} if fields else {"data": None}
    with pytest.raises(UserError) as caught:
        judged(**{**given, **fields})
    assert all(part in str(caught.value) for part in told), caught.value


def test_data_of_which_nothing_can_be_judged_is_told() -> None:
    silent = {row: dict(weights=np.zeros(LENGTH + 1, np.float32)) for row in range(ROWS)}
    with pytest.raises(UserError, match="none can be judged"):
        judged(data=data(silent))
