"""The order of a stream: shuffles are bijections, mixtures keep their proportions, cursors are exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpjax.data.sources import Concat, Mixture, cursors, draw, locate, permute
from vlpjax.errors import UserError


@dataclass(frozen=True)
class Numbers:
    """A source of ``count`` examples that know their own number."""

    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"number": index}

    def describe(self, index):
        return f"number {index}"

    def fingerprint(self):
        return f"numbers-{self.count}"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 16, 97, 1000, 1001, 4099])
def test_the_shuffle_is_a_bijection_of_every_size(size):
    for epoch in range(3):
        places = permute(np.arange(size), size, seed=1, epoch=epoch)
        assert sorted(places) == list(range(size))


def test_single_indices_and_arrays_shuffle_alike():
    size = 3_000_000_019
    indices = np.array([[0, 1], [2_000_000_000, size - 1]])
    places = permute(indices, size, seed=7, epoch=2, name="part")
    assert places.shape == (2, 2)
    assert places.dtype == np.int64
    assert places.ravel().tolist() == [
        permute(int(i), size, seed=7, epoch=2, name="part") for i in indices.ravel()
    ]


def test_every_epoch_seed_and_name_has_its_own_order():
    orders = {
        tuple(permute(np.arange(50), 50, seed=seed, epoch=epoch, name=name))
        for seed in range(3)
        for epoch in range(3)
        for name in ("a", "b")
    }
    assert len(orders) == 18


def test_the_order_is_fixed_forever():
    """A changed shuffle would change the batches of every run that is resumed."""
    assert permute(np.arange(10), 10, seed=0).tolist() == [9, 7, 3, 0, 2, 1, 6, 5, 4, 8]


def test_small_shuffles_put_every_index_everywhere_equally_often():
    size, epochs = 6, 6000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, seed=3, epoch=epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 53  # 25 degrees of freedom: exceeded by chance once in a thousand


def test_neighbours_do_not_stay_neighbours():
    places = permute(np.arange(10_000), 10_000, seed=0)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(places)) == 1).mean() < 0.002


def test_a_plain_source_is_passed_through_once_per_epoch():
    source = Numbers(7)
    drawn = [draw(source, position, seed=0, shuffle=True) for position in range(21)]
    assert [epoch for _, epoch in drawn] == [0] * 7 + [1] * 7 + [2] * 7
    first, second = [i for i, _ in drawn[:7]], [i for i, _ in drawn[7:14]]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_without_shuffling_the_order_is_the_source_order():
    assert [draw(Numbers(3), p, seed=9, shuffle=False) for p in range(5)] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (1, 1),
    ]
    assert cursors(Numbers(3), 5) == {"source": 5}


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 1000).map(lambda n: n / 100), min_size=1, max_size=9).filter(any),
    prefix=st.integers(0, 10**13),
)
def test_every_prefix_holds_each_share_to_within_two_examples(weights, prefix):
    names = [f"part{i}" for i in range(len(weights))]
    mixture = Mixture(dict.fromkeys(names, Numbers(10)), dict(zip(names, weights, strict=True)))
    counts = mixture.cursors(prefix)
    assert sum(counts.values()) == prefix
    for name, weight in zip(names, weights, strict=True):
        # Integers of hundredths, because a float cannot hold a tenth of 10**13 exactly.
        share, whole = round(weight * 100), sum(round(w * 100) for w in weights)
        assert abs(counts[name] * whole - prefix * share) < 2 * whole


def test_cursors_count_what_locate_draws():
    mixture = Mixture({"a": Numbers(5), "b": Numbers(9), "c": Numbers(3)}, {"a": 0.2, "b": 0.7, "c": 0.1})
    seen: Counter[str] = Counter()
    for position in range(200):
        assert mixture.cursors(position) == {name: seen[name] for name in "abc"}
        part, index, epoch = mixture.locate(position, seed=0, shuffle=False)
        assert (epoch, index) == divmod(seen[part], len(mixture.sources[part]))
        seen[part] += 1
    assert seen == {"a": 40, "b": 140, "c": 20}


def test_each_part_is_reshuffled_in_each_of_its_own_epochs():
    mixture = Mixture({"small": Numbers(8), "large": Numbers(100)}, {"small": 1, "large": 1})
    passes: dict[int, list[int]] = {}
    for position in range(48):
        part, index, epoch = mixture.locate(position, seed=4, shuffle=True)
        if part == "small":
            passes.setdefault(epoch, []).append(index)
    assert sorted(passes) == [0, 1, 2]
    assert all(sorted(indices) == list(range(8)) for indices in passes.values())
    assert len({tuple(indices) for indices in passes.values()}) == 3


def test_without_weights_one_length_of_draws_holds_every_record_once():
    mixture = Mixture({"a": Numbers(5), "b": Numbers(9), "c": Numbers(1)})
    indices = [draw(mixture, position, seed=2, shuffle=True)[0] for position in range(len(mixture))]
    assert sorted(indices) == list(range(15))


def test_a_source_of_weight_zero_is_never_drawn():
    mixture = Mixture({"a": Numbers(5), "b": Numbers(9)}, {"a": 1, "b": 0})
    assert mixture.cursors(1000) == {"a": 1000, "b": 0}
    assert {mixture.locate(p, 0, True)[0] for p in range(50)} == {"a"}


def test_nested_mixtures_are_looked_through():
    inner = Mixture({"x": Numbers(4), "y": Numbers(6)}, {"x": 3, "y": 1})
    outer = Mixture({"in": inner, "z": Numbers(5)}, {"in": 1, "z": 1})
    assert cursors(outer, 80) == {"in/x": 30, "in/y": 10, "z": 40}
    for position in range(40):
        index, _ = draw(outer, position, seed=0, shuffle=True)
        part, place, _ = locate(outer, position, seed=0, shuffle=True)
        assert outer[index] == part[place]


def test_a_mixture_is_indexed_like_the_concatenation():
    parts = {"a": Numbers(2), "b": Numbers(3)}
    mixture, concat = Mixture(parts, {"a": 9, "b": 1}), Concat(parts)
    assert (
        [mixture[i] for i in range(5)]
        == [concat[i] for i in range(5)]
        == [{"number": n} for n in (0, 1, 0, 1, 2)]
    )
    assert concat.describe(3) == "b: number 1"
    assert [concat.index_of(*concat.part_of(i)) for i in range(5)] == list(range(5))
    assert mixture.fingerprint() != Mixture(parts).fingerprint() != concat.fingerprint()


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": 1}, r"name \['a'\], but its sources are \['a', 'b'\]"),
        ({"a": 1, "b": -0.5}, "'b' is -0.5"),
        ({"a": 1, "b": float("nan")}, "'b' is nan"),
        ({"a": 0, "b": 0}, "All weights of a Mixture are zero"),
    ],
)
def test_wrong_weights_are_refused(weights, sentence):
    with pytest.raises(UserError, match=sentence):
        Mixture({"a": Numbers(1), "b": Numbers(1)}, weights)


def test_a_combination_of_nothing_is_refused():
    with pytest.raises(UserError, match="Concat was given no sources"):
        Concat({})
