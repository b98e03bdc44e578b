"""Retrieval against a brute-force count, with ties, duplicates, padding and collapsed features."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import experiment_of, layout_of, model_config, rows_of, unit
from vlpjax.config import spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Result
from vlpjax.evaluators.retrieval import Retrieval, chance_of_recall, equal_groups, make_ranking
from vlpjax.models.heads import Scalar

N, E = 21, 3
RNG = np.random.default_rng(0)
# Whole numbers make many exact ties.
IMAGES, TEXTS = (RNG.integers(-1, 2, (N, E)).astype(np.float32) for _ in range(2))
# No two scores of these are equal, so that rounding decides nothing.
FEATURES = {name: RNG.normal(size=(N, E)).astype(np.float32) for name in ("image", "text")}
NAMES = [f"name {index % 17}" for index in range(N)]  # four names are there twice


class Given(nn.Module):
    """A tower whose features are what it is fed, times one parameter."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": x * Scalar(1.0, name="scale")()}


def rank_by_hand(queries: np.ndarray, candidates: np.ndarray, groups: np.ndarray) -> list[int]:
    """Per query, how many wrong candidates score at least as well as the best right one."""
    ranks = []
    for query in range(len(queries)):
        scores = [float(np.dot(queries[query], candidate)) for candidate in candidates]
        best = max(score for score, group in zip(scores, groups, strict=True) if group == groups[query])
        wrong = [score for score, group in zip(scores, groups, strict=True) if group != groups[query]]
        ranks.append(sum(score >= best for score in wrong))
    return ranks


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("chunk", [4, 64])
def test_ranks_are_those_of_counting_by_hand(devices: int, chunk: int) -> None:
    real = np.arange(24) < N
    pad = np.ones((3, E), np.float32) * 99  # would be first everywhere if padding counted
    groups = np.concatenate([np.arange(N) % 17, [0, 1, 2]]).astype(np.int32)
    queries, candidates = np.concatenate([IMAGES, pad]), np.concatenate([TEXTS, pad])
    rank = jax.jit(make_ranking(layout_of(devices), chunk))
    ranks, best, scores = map(np.asarray, rank(queries, candidates, groups, real))
    assert ranks[:N].tolist() == rank_by_hand(IMAGES, TEXTS, groups[:N])
    assert best.shape == scores.shape == (24, 5)
    assert best[:N].max() < N
    by_hand = -np.sort(-(IMAGES @ TEXTS.T), axis=1)[:, :5]
    np.testing.assert_allclose(scores[:N], by_hand)
    np.testing.assert_allclose(np.take_along_axis(IMAGES @ TEXTS.T, best[:N], axis=1), by_hand)


@pytest.mark.parametrize("value", [1.0, 0.0, np.nan])
def test_features_that_say_nothing_find_nothing(value: float) -> None:
    same = np.full((N, E), value, np.float32)
    groups = np.arange(N, dtype=np.int32)
    ranks = jax.jit(make_ranking(layout_of(1), 64))(same, same, groups, np.ones(N, bool))[0]
    assert np.asarray(ranks).tolist() == [N - 1] * N


def evaluate(devices: int, names: list[str] = NAMES, **fields: Any) -> Result:
    """The evaluator on towers that pass the features of the source on."""
    source = rows_of(
        image=list(FEATURES["image"]),
        text=list(FEATURES["text"]),
        name=names,
    )
    data = Pipeline(source, {}, batch_size=8, shuffle=False, repeat=False)
    config = model_config()
    config.towers = dict(image=spec(Given), text=spec(Given))
    experiment, layout = experiment_of(config), layout_of(devices)
    evaluator = Retrieval(
        **{**dict(data=data, same=("name",), caption="name", examples=0, ks=(1, 3, 5)), **fields}
    )
    params = {name: {"scale": {"value": np.float32(2.0)}} for name in ("image", "text")}
    return evaluator.make(experiment, layout)({"params": jax.device_put(params, layout.replicated)})


@pytest.mark.parametrize("devices", [1, 8])
def test_recall_is_the_share_of_ranks_below_k(devices: int) -> None:
    result = evaluate(devices)
    groups = np.array([NAMES.index(name) for name in NAMES])
    z = {name: unit(x) for name, x in FEATURES.items()}
    for source, target in (("image", "text"), ("text", "image")):
        scores = z[source] @ z[target].T
        ranks = []
        for query in range(N):
            right = groups == groups[query]
            ranks.append(np.sum(scores[query][~right] >= scores[query][right].max()))
        for k in (1, 3, 5):
            assert result.metrics[f"{source}_to_{target}/recall@{k}"] == pytest.approx(
                np.mean(np.array(ranks) < k)
            )
            twice = 2 * (N - 17)
            chance = (twice * chance_of_recall(N, 2, k) + (N - twice) * chance_of_recall(N, 1, k)) / N
            assert result.chance[f"{source}_to_{target}/recall@{k}"] == pytest.approx(chance)
        assert result.metrics[f"{source}_to_{target}/median_rank"] == np.median(ranks) + 1


@pytest.mark.parametrize(
    ("candidates", "right", "k"), [(7, 1, 1), (7, 1, 3), (7, 2, 3), (7, 3, 5), (5, 2, 9), (4, 4, 1)]
)
def test_chance_is_the_share_of_all_draws_that_hold_a_right_one(candidates: int, right: int, k: int) -> None:
    draws = list(itertools.combinations(range(candidates), min(k, candidates)))
    share = np.mean([min(draw) < right for draw in draws])
    assert chance_of_recall(candidates, right, k) == pytest.approx(share)


def test_examples_that_are_equal_in_any_field_are_one_group() -> None:
    source = rows_of(image=[b"a", b"b", b"c", b"a", b"d"], name=["x", "y", "y", "z", "w"])
    groups = equal_groups(source, ("image", "name"))
    assert groups[0] == groups[3]  # the same image
    assert groups[1] == groups[2]  # the same name
    assert len(set(groups.tolist())) == 3
    assert equal_groups(
        rows_of(image=[b"a", b"a", b"b"], name=["x", "y", "y"]), ("image", "name")
    ).tolist() in ([0] * 3, [1] * 3, [2] * 3)
    with pytest.raises(UserError, match=r"'nmae'; the examples have image, name"):
        equal_groups(source, ("nmae",))


def test_data_that_does_not_end_in_order_is_told() -> None:
    source = rows_of(image=[1.0], text=[1.0], name=["a"])
    for fields in (dict(shuffle=True, repeat=False), dict(shuffle=False, repeat=True)):
        with pytest.raises(UserError, match="repeat=False and shuffle=False"):
            evaluate(1, data=Pipeline(source, {}, batch_size=8, **fields))
    with pytest.raises(UserError, match="Retrieval.data is not set"):
        evaluate(1, data=None)


# --- several captions per image -----------------------------------------------------------------------------------

TABLE = RNG.normal(size=(64, E)).astype(np.float32)


class Words(nn.Module):
    """A tower whose features are rows of a table, by the first id."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": jnp.asarray(TABLE)[ids[:, 0]] * Scalar(1.0, name="scale")()}


def captioned(order: np.ndarray, captions: np.ndarray, devices: int = 1) -> Result:
    """The evaluator on ten images with three captions each, ids [10, 3, 2], in this order."""
    source = rows_of(
        image=[FEATURES["image"][row] for row in order],
        text=[captions[row] for row in order],
        name=[str(row) for row in order],
    )
    data = Pipeline(source, {}, batch_size=8, shuffle=False, repeat=False)
    config = model_config()
    config.towers = dict(image=spec(Given), text=spec(Words))
    layout = layout_of(devices)
    evaluator = Retrieval(data=data, same=("name",), examples=0, ks=(1, 3))
    params = {name: {"scale": {"value": np.float32(2.0)}} for name in ("image", "text")}
    return evaluator.make(experiment_of(config), layout)(
        {"params": jax.device_put(params, layout.replicated)}
    )


CAPTIONS = np.arange(60).reshape(10, 3, 2).astype(np.int32)


@pytest.mark.parametrize("devices", [1, 8])
def test_an_image_is_found_by_any_of_its_captions_and_every_caption_must_find_its_image(devices: int) -> None:
    found = captioned(np.arange(10), CAPTIONS, devices).metrics
    scores = unit(FEATURES["image"][:10]) @ unit(TABLE[CAPTIONS[:, :, 0].ravel()]).T  # [10, 30]
    own = np.repeat(np.arange(10), 3)
    for k in (1, 3):
        best = np.argsort(-scores, axis=1)[:, :k]
        any_caption = np.mean([(own[best[row]] == row).any() for row in range(10)])
        assert found[f"image_to_text/recall@{k}"] == pytest.approx(any_caption)
        best = np.argsort(-scores, axis=0)[:k]  # images per caption
        assert found[f"text_to_image/recall@{k}"] == pytest.approx(np.mean((best == own).any(axis=0)))


def test_the_order_of_images_and_of_their_captions_changes_nothing() -> None:
    order = RNG.permutation(10)
    turned = captioned(order, CAPTIONS[:, ::-1])
    plain = captioned(np.arange(10), CAPTIONS)
    assert turned.metrics == plain.metrics
    assert turned.chance == pytest.approx(plain.chance)


def test_recall_counts_images_with_any_caption_and_not_the_share_of_captions() -> None:
    """Two captions per image, of which only the first one is near its image: any is 1.0, the share would be 0.5."""
    scores = np.array([[3, 0, 1, 1], [1, 1, 3, 0]], np.float32)  # [images, captions]
    rank = jax.jit(make_ranking(layout_of(1), 4))
    one, two = np.arange(2, dtype=np.int32), np.array([0, 0, 1, 1], np.int32)
    ranks = rank(scores, np.eye(4, dtype=np.float32), two, np.ones(4, bool), one)[0]
    assert np.asarray(ranks).tolist() == [0, 0]
    ranks = rank(np.eye(4, dtype=np.float32), scores, one, np.ones(2, bool), two)[0]
    assert np.asarray(ranks).tolist() == [0, 1, 0, 1]  # image retrieval asks with every caption
