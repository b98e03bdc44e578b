"""NegCLIP and ARO: swaps, perturbations, scenes, the 2B x 4B loss, and order that is learned only with negatives."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.objectives.rig import compared, scalars
from tests.systems.training import train, unit_rows
from tests.tiny import ROOT, rows_of, unit
from vlpjax.config import load, spec
from vlpjax.data.bad import BadExample
from vlpjax.data.sources import Scenes
from vlpjax.data.transforms import Perturb, SwappedCaption
from vlpjax.data.words import ADJECTIVE, ADVERB, NOUN, OTHER, VERB, kind_of, kinds_of, noun_phrases, swaps
from vlpjax.errors import UserError
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.contrastive import InfoNCE

CAPTION = "a small red dog quickly chasing the big cat under an old wooden table near two children"


@pytest.mark.parametrize(
    ("word", "kind"),
    [("dog", NOUN), ("red", ADJECTIVE), ("colorful,", ADJECTIVE), ("quickly", ADVERB), ("chasing", VERB),
     ("ring", NOUN), ("under", OTHER), ("Two", OTHER), ("42", OTHER), ("-", OTHER), ("family", NOUN)],
)  # fmt: skip
def test_kinds_of_words(word: str, kind: str) -> None:
    assert kind_of(word) == kind


def test_noun_phrases_end_in_a_noun() -> None:
    words = ["a", "small", "red", "dog", "and", "a", "very", "old", "tree", "house"]
    assert [words[start:end] for start, end in noun_phrases(kinds_of(words))] == [
        ["small", "red", "dog"], ["old", "tree", "house"],
    ]  # fmt: skip


def test_a_swap_keeps_the_words_and_moves_two_of_a_kind() -> None:
    words = CAPTION.split()
    found = swaps(words)
    assert found and all(Counter(swap) == Counter(words) and swap != words for swap in found)
    captions = {" ".join(swap) for swap in found}
    rest = "under an old wooden table near two children"
    assert f"a small red cat quickly chasing the big dog {rest}" in captions
    assert f"a big red dog quickly chasing the small cat {rest}" in captions
    assert f"a big cat quickly chasing the small red dog {rest}" in captions
    assert swaps(["a", "dog", "and", "a", "dog"]) == [] and swaps(["dog"]) == []


def test_a_negative_is_drawn_among_the_swaps() -> None:
    drawn = {
        SwappedCaption().random_map({"caption": CAPTION}, np.random.default_rng(seed))["negative"]
        for seed in range(60)
    }
    assert len(drawn) > 5 and drawn <= {" ".join(swap) for swap in swaps(CAPTION.split())}
    with pytest.raises(BadExample, match="nothing can be swapped in 'a dog'"):
        SwappedCaption().random_map({"caption": "a dog"}, np.random.default_rng(0))


@pytest.mark.parametrize(
    "kind", ["nouns_adjectives", "all_but_nouns_adjectives", "within_trigrams", "trigrams"]
)
def test_a_perturbation_moves_only_what_it_says(kind: str) -> None:
    words = CAPTION.split()
    described = [its in (NOUN, ADJECTIVE) for its in kinds_of(words)]
    for seed in range(10):
        ours = (
            Perturb(kind).random_map({"caption": CAPTION}, np.random.default_rng(seed))["perturbed"].split()
        )
        assert Counter(ours) == Counter(words) and ours != words
        for place, is_described in enumerate(described):
            if kind == "nouns_adjectives" and not is_described:
                assert ours[place] == words[place]
            if kind == "all_but_nouns_adjectives" and is_described:
                assert ours[place] == words[place]
        threes, theirs = ([x[i : i + 3] for i in range(0, len(words), 3)] for x in (ours, words))
        if kind == "within_trigrams":
            assert [sorted(three) for three in threes] == [sorted(three) for three in theirs]


def test_a_perturbation_cuts_the_right_caption_to_the_same_words() -> None:
    found = Perturb("trigrams", most=7).random_map({"caption": CAPTION}, np.random.default_rng(0))
    assert found["caption"].split() == CAPTION.split()[:7]
    assert Counter(found["perturbed"].split()) == Counter(CAPTION.split()[:7])


def test_captions_that_cannot_be_perturbed_are_bad_examples() -> None:
    for kind, caption in (
        ("trigrams", "a red dog"),
        ("within_trigrams", "dog"),
        ("nouns_adjectives", "a dog"),
    ):
        with pytest.raises(BadExample, match=f"{kind} leaves '{caption}' as it is"):
            Perturb(kind).random_map({"caption": caption}, np.random.default_rng(0))
    with pytest.raises(UserError, match="within_trigrams"):
        Perturb("sideways")


def test_the_words_of_a_probe_are_counted_after_they_were_cut() -> None:
    order = load(f"{ROOT}/experiments/contrastive/negclip.py").evaluators.order
    steps, (_, *perturbed) = list(order.data.transforms), order.choices
    assert max(steps.index(kind) for kind in perturbed) < steps.index("tokenize")


# --- scenes -----------------------------------------------------------------------------------------------------


def drawing(color: tuple[int, int, int]) -> bytes:
    picture = Image.new("RGB", (8, 8), (255, 255, 255))
    picture.paste(color, (2, 2, 6, 6))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


DRAWINGS = rows_of(
    name=["dog", "cat", "dog"], image=[drawing((0, 0, 0)), drawing((90, 90, 90)), drawing((0, 0, 0))]
)


def test_a_relation_says_what_stands_where() -> None:
    scenes = Scenes(DRAWINGS, 40, size=8)
    seen = set()
    for index in range(len(scenes)):
        scene = scenes[index]
        pixels = np.asarray(Image.open(io.BytesIO(scene["image"])))
        assert pixels.shape == (8, 16, 3)
        left = "dog" if pixels[4, 4, 0] == 0 else "cat"
        right = "dog" if pixels[4, 12, 0] == 0 else "cat"
        assert {left, right} == {"dog", "cat"}
        first, second = (left, right) if scene["relation"] == "left of" else (right, left)
        assert scene["caption"] == f"a {first} {scene['relation']} a {second}"
        assert scene["wrong"] == f"a {second} {scene['relation']} a {first}"
        seen.add((scene["label"], scene["caption"], left))
        assert scenes[index] == scene
    # Two captions of each of two contents, which share a label: both are right for both.
    assert len(seen) == 4
    assert len({label for label, _, _ in seen}) == len({(label, left) for label, _, left in seen}) == 2


def test_an_attribute_belongs_to_its_thing() -> None:
    scenes = Scenes(DRAWINGS, 40, kind="attribute", size=8)
    channel = {"red": 0, "green": 1, "blue": 2}
    checked = 0
    for index in range(len(scenes)):
        scene = scenes[index]
        words, wrong = scene["caption"].split(), scene["wrong"].split()
        assert [words[1], words[5]] == [wrong[5], wrong[1]] and [words[2], words[6]] == [wrong[2], wrong[6]]
        pixels = np.asarray(Image.open(io.BytesIO(scene["image"]))).astype(int)
        for place, color in ((4, words[1]), (12, words[5])):
            if color in channel:
                assert int(np.argmax(pixels[4, place])) == channel[color]
                checked += 1
    assert checked > 10


def test_scenes_need_two_names() -> None:
    with pytest.raises(UserError, match="pictures of two names"):
        Scenes(rows_of(name=["dog", "dog"], image=[drawing((0, 0, 0))] * 2), 3)[0]
    with pytest.raises(UserError, match="relation, attribute"):
        Scenes(DRAWINGS, 3, kind="count")


# --- the loss ---------------------------------------------------------------------------------------------------


def test_the_loss_of_pairs_with_hard_images_is_the_papers() -> None:
    """[x; x_hard] against [t; t_hard; neg(t); neg(t_hard)]: 2B x 4B logits, negatives are columns only."""
    rng, half = np.random.default_rng(0), 4
    image, text, negative = (unit(rng.normal(size=(2 * half, 5))).astype(np.float32) for _ in range(3))
    loss = compared(
        InfoNCE(negatives=("negative",)),
        {"image": image, "text": text, "negatives": negative[:, None]},
        scalars(logit_scale=np.log(10.0)),
    ).loss
    logits = 10.0 * image @ np.concatenate([text, negative]).T  # [2B, 4B]
    rows = -np.diag(np.asarray(jax.nn.log_softmax(logits, axis=1)))
    columns = -np.diag(np.asarray(jax.nn.log_softmax(logits.T, axis=1)))[: 2 * half]
    np.testing.assert_allclose(loss.value, (rows.mean() + columns.mean()) / 2, rtol=1e-5)


# --- the learning effect ----------------------------------------------------------------------------------------

THINGS, PATCH, STEPS, PAIRS = 30, 6, 300, 32
LOOK = np.random.default_rng(0).normal(size=(THINGS, PATCH, PATCH, 1)).astype(np.float32)


def pairs_of_things(seed: Any, count: int = PAIRS) -> dict[str, jax.Array]:
    """Images of two things side by side, captions of two words, and the words exchanged."""
    key_left, key_shift, key_noise = jax.random.split(jax.random.key(seed), 3)
    left = jax.random.randint(key_left, (count,), 0, THINGS)
    right = (left + jax.random.randint(key_shift, (count,), 1, THINGS)) % THINGS
    image = jnp.concatenate([jnp.asarray(LOOK)[left], jnp.asarray(LOOK)[right]], axis=2)
    image += 0.3 * jax.random.normal(key_noise, image.shape)
    text, negative = (
        jnp.stack([a + 2, b + 2, jnp.ones_like(a)], axis=1) for a, b in ((left, right), (right, left))
    )
    return {"image": image, "text": text, "negative": negative, "label": left * THINGS + right}


def order_and_recall(negatives: tuple[str, ...]) -> tuple[float, float]:
    """Among 256 scenes: how often the right order scores above the wrong one, and R@1."""
    test = pairs_of_things(10_000, 256)
    size, both = (PATCH, 2 * PATCH), dict(width=32, depth=1, heads=2, embedding=32)
    towers = {
        "image": spec(ViT, image_size=size, patch=PATCH, channels=1, **both),
        "text": spec(TextTransformer, vocabulary=THINGS + 2, length=3, **both),
    }

    def read(towers: Towers) -> Any:
        image = unit_rows(towers.call("image", test["image"]))
        text, wrong = (unit_rows(towers.call("text", test[name])) for name in ("text", "negative"))
        order = jnp.mean(jnp.sum(image * text, axis=-1) > jnp.sum(image * wrong, axis=-1))
        best = jnp.argmax(image @ text.T, axis=1)
        return order, jnp.mean(test["label"][best] == test["label"])

    losses = {"clip": spec(InfoNCE, same="label", negatives=negatives)}
    order, recall = train(towers, losses, pairs_of_things, STEPS).read(read)
    return float(order), float(recall)


def test_order_is_learned_sooner_with_negatives_and_retrieval_is_not_lost() -> None:
    plain, with_negatives = order_and_recall(()), order_and_recall(("negative",))
    assert with_negatives[0] > 0.95 and with_negatives[0] > plain[0] + 0.03, (plain, with_negatives)
    assert with_negatives[1] > plain[1] - 0.03, (plain, with_negatives)
