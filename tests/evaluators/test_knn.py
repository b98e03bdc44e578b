"""k-NN against a sort by hand: ties, padding, chunks, blocks and devices; votes against counting."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.evaluators.given import dataset, evaluate, evaluate_all
from tests.tiny import layout_of, unit
from vlpjax.errors import UserError
from vlpjax.evaluators.base import shared_features
from vlpjax.evaluators.knn import KNN
from vlpjax.evaluators.neighbors import make_nearest

RNG = np.random.default_rng(0)
E, CLASSES = 6, 4
MEMORY, QUERIES = RNG.normal(size=(37, E)).astype(np.float32), RNG.normal(size=(21, E)).astype(np.float32)
KNOWN, ASKED = RNG.integers(0, CLASSES, 37), RNG.integers(0, CLASSES, 21)
# Rows of -1 and 1, all of one length, have few different scores and so many exact ties.
WHOLE = tuple(RNG.choice([-1.0, 1.0], (rows, 4)).astype(np.float32) for rows in (40, 21))


def knn(devices: int = 1, turn: np.ndarray | None = None, **fields: Any) -> dict[str, float]:
    turn = np.eye(E, dtype=np.float32) if turn is None else turn
    train = dataset(image=MEMORY @ turn, label=KNOWN * 10)  # labels need not count from 0
    test = dataset(image=QUERIES @ turn, label=ASKED * 10)
    return evaluate(KNN(**{**dict(train=train, test=test, ks=(1, 3, 7)), **fields}), devices).metrics


def by_hand(k: int, vote: str, distance: str) -> np.ndarray:
    """Classes from the best on, by sorting all scores: [N, classes]."""
    if distance == "cosine":
        scores = unit(QUERIES) @ unit(MEMORY).T
    else:
        scores = -np.linalg.norm(QUERIES[:, None] - MEMORY[None], axis=-1)
    ranked = []
    for row in scores:
        votes = np.zeros(CLASSES)
        for place in np.argsort(-row, kind="stable")[:k]:
            votes[KNOWN[place]] += np.exp(row[place] / 0.07) if vote == "weighted" else 1
        ranked.append(np.argsort(-votes, kind="stable"))
    return np.array(ranked)


def test_the_tower_is_called_with_its_options_and_features_are_not_shared_across_them() -> None:
    data = dict(
        train=dataset(image=MEMORY, label=KNOWN), test=dataset(image=QUERIES, label=ASKED), ks=(1, 3, 7)
    )
    with shared_features():
        whole, part = evaluate_all([KNN(**data), KNN(**data, options=dict(first=2))])
    only = knn(
        train=dataset(image=MEMORY[:, :2], label=KNOWN), test=dataset(image=QUERIES[:, :2], label=ASKED)
    )
    assert part.metrics == only != whole.metrics


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_neighbours_are_those_of_a_sort_also_when_scores_are_equal(
    devices: int, k: int, distance: str
) -> None:
    memory, queries = WHOLE
    real = np.arange(40) < 34
    # A block of 3 rows, and chunks of 8 queries, of which the last is not full.
    nearest = jax.jit(make_nearest(layout_of(devices), k, distance=distance, chunk=8, block=3))
    scores, places = map(np.asarray, nearest(queries, memory, real))
    difference = np.square(queries[:, None] - memory[None]).sum(-1)
    expected = queries @ memory.T / 4 if distance == "cosine" else -0.5 * difference
    expected = np.where(real, expected, -np.inf)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    assert places.tolist() == order.tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("vote", "distance"), [("weighted", "cosine"), ("majority", "cosine"), ("majority", "euclidean")]
)
def test_accuracy_is_that_of_the_vote(devices: int, vote: str, distance: str) -> None:
    found = knn(devices, vote=vote, distance=distance, chunk=8)
    for k in (1, 3, 7):
        ranked = by_hand(k, vote, distance)
        right = ranked[:, 0] == ASKED
        assert found[f"k{k}/top1"] == pytest.approx(right.mean())
        per_class = np.mean([right[label == ASKED].mean() for label in range(CLASSES)])
        assert found[f"k{k}/mean_per_class_accuracy"] == pytest.approx(per_class)
        assert f"k{k}/top5" not in found  # there are four classes


def test_turning_all_features_changes_nothing() -> None:
    turn = np.linalg.qr(RNG.normal(size=(E, E)))[0].astype(np.float32)
    assert knn(turn=turn) == knn()


def test_a_temperature_near_zero_asks_the_nearest_only() -> None:
    nearest = knn(temperature=1e-4, ks=(1, 7))
    assert nearest["k7/top1"] == nearest["k1/top1"]


def test_chance_is_a_guess_among_the_classes() -> None:
    train = dataset(image=MEMORY, label=KNOWN)
    chance = evaluate(KNN(train=train, test=train, ks=(1,))).chance
    assert chance == {"k1/top1": 1 / CLASSES, "k1/mean_per_class_accuracy": 1 / CLASSES}


def test_a_memory_finds_itself() -> None:
    train = dataset(image=MEMORY, label=KNOWN)
    assert evaluate(KNN(train=train, test=train, ks=(1,))).metrics["k1/top1"] == 1.0


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(train=None), ["'train' and 'test'"]),
        (dict(vote="most"), ["vote='most'", "weighted, majority"]),
        (dict(distance="angle"), ["'angle'", "cosine, euclidean"]),
        (dict(distance="euclidean"), ["distance='cosine'", "'euclidean'"]),
        (dict(temperature=0.0), ["above 0", "0.0"]),
        (dict(ks=()), ["at least one"]),
        (dict(ks=(1, 38)), ["38 neighbours", "37 examples"]),
        (dict(label="lable"), ["'lable'", "'label'"]),
        (dict(output="poled"), ["'poled'", "pooled"]),
        (dict(tower="imag"), ["'imag'", "image"]),
    ],
    ids=range(10),
)
def test_what_does_not_work_is_told(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        knn(**fields)
    assert all(part in str(caught.value) for part in parts), caught.value
