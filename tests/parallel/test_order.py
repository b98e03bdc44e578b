"""Orders of tokens over ranks: permutations that keep intervals intervals, and how evenly they share out attention."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.order import KINDS, TokenOrder, balance, fitting_order

LENGTH = 96
ORDERS = [TokenOrder(kind, ranks, tile=4) for kind in KINDS for ranks in (1, 4, 8)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_token_lies_in_one_place_and_is_found_again(order: TokenOrder) -> None:
    permutation = order.permutation(LENGTH)
    np.testing.assert_array_equal(np.sort(permutation), np.arange(LENGTH))
    row = np.random.default_rng(0).integers(0, 99, (2, LENGTH)).astype(np.int32)
    np.testing.assert_array_equal(order.unpermute(order.permute(row, 1), 1), row)
    np.testing.assert_array_equal(order.permute(row, 1), row[:, permutation])
    np.testing.assert_array_equal(order.permute(row.T, 0), row[:, permutation].T)
    np.testing.assert_array_equal(permutation[order.inverse(LENGTH)], np.arange(LENGTH))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_rank_holds_its_tokens_in_ascending_order(order: TokenOrder) -> None:
    for rank in range(order.ranks):
        assert np.all(np.diff(order.positions_of(rank, LENGTH)) > 0)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_tile_is_found_with_its_holder(order: TokenOrder) -> None:
    count, tile = order.tiles(LENGTH)
    rank, nth = order.holder(jnp.arange(count * order.ranks), LENGTH)
    places = np.asarray((rank * count + nth) * tile)
    np.testing.assert_array_equal(order.permutation(LENGTH)[places], np.arange(0, LENGTH, tile))


def test_the_orders_are_those_of_their_descriptions() -> None:
    assert list(TokenOrder("contiguous", 2).permutation(8)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert list(TokenOrder("zigzag", 2).permutation(8)) == [0, 1, 6, 7, 2, 3, 4, 5]
    assert list(TokenOrder("block_striped", 2, tile=2).permutation(8)) == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_an_interval_is_an_interval_of_the_tokens_of_every_rank(order: TokenOrder) -> None:
    ends = jnp.arange(LENGTH + 1)
    for rank in range(order.ranks):
        expected = np.searchsorted(order.positions_of(rank, LENGTH), np.arange(LENGTH + 1))
        np.testing.assert_array_equal(order.before(ends, rank, LENGTH), expected)
        local = order.local(Interval(ends, ends), jnp.int32(rank), LENGTH)
        np.testing.assert_array_equal(local.end, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_ranks_together_hold_what_the_grouped_order_says(kind: str) -> None:
    order = TokenOrder(kind, 8, tile=4)
    for size in (2, 4, 8):
        together = order.permutation(LENGTH).reshape(8 // size, -1)
        for group in range(8 // size):
            expected = order.grouped(size).positions_of(group, LENGTH)
            np.testing.assert_array_equal(np.sort(together[group]), expected)


@pytest.mark.parametrize(
    ("order", "near"),
    [
        (TokenOrder("contiguous", 8), "96 or 104"),
        (TokenOrder("zigzag", 8), "96 or 112"),
        (TokenOrder("block_striped", 8, 16), "128"),
    ],
    ids=str,
)
def test_a_length_that_cannot_be_split_is_told_with_the_nearest_that_can(
    order: TokenOrder, near: str
) -> None:
    with pytest.raises(UserError, match=f"100 tokens cannot be split over 8 .* that work are {near}\\."):
        order.permutation(100)


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(UserError, match="'striped'; there are 'contiguous', 'zigzag', 'block_striped'"):
        TokenOrder("striped")
    with pytest.raises(UserError, match="not 0 and 512"):
        TokenOrder("zigzag", 0)


def test_the_fitting_order_has_the_largest_tiles_that_fit() -> None:
    assert fitting_order(8 * 1536, 8) == TokenOrder("block_striped", 8, 512)
    assert fitting_order(96, 8) == TokenOrder("block_striped", 8, 12)
    assert fitting_order(8 * 700, 8) == TokenOrder("block_striped", 8, 350)
    with pytest.raises(UserError, match="98 tokens"):
        fitting_order(98, 8)


TILE, RANKS, ROW = 16, 8, 16 * 512  # 512 tiles, as rows of 256k tokens in tiles of 512


def documents(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Causal intervals in rows of one text, of one long and many short ones, or of texts of very uneven lengths."""
    rng = np.random.default_rng(1)
    lengths = {"single": [ROW], "half long": [ROW // 2]}.get(kind, [])
    while sum(lengths) < ROW:
        size = rng.lognormal(5.0, 1.4) if kind == "long tail" else rng.integers(30, 130)
        lengths.append(min(max(int(size), 4), ROW - sum(lengths)))
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return first, np.arange(ROW) + 1


@pytest.mark.parametrize("kind", ["single", "half long", "long tail"])
def test_block_striped_rows_are_even_whatever_is_packed(kind: str) -> None:
    found = balance(TokenOrder("block_striped", RANKS, TILE), *documents(kind), TILE)
    assert found.total < 1.06
    assert found.lockstep < 1.1


def test_zigzag_is_even_for_one_text_and_uneven_for_packed_ones() -> None:
    zigzag = TokenOrder("zigzag", RANKS)
    assert balance(zigzag, *documents("single"), TILE).total < 1.01
    assert balance(zigzag, *documents("half long"), TILE).total > 1.7
    assert balance(zigzag, *documents("half long"), TILE).lockstep > 1.7
    assert balance(zigzag, *documents("long tail"), TILE).total > 1.2


def test_contiguous_pieces_are_uneven_for_causal_texts() -> None:
    contiguous = TokenOrder("contiguous", RANKS)
    assert balance(contiguous, *documents("single"), TILE).total == pytest.approx(
        1.875, abs=0.02
    )  # (2R - 1) / R
    assert balance(contiguous, *documents("half long"), TILE).total > 3
