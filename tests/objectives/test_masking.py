"""Masks have the counts and the shapes that they promise, for every key, traced and on any number of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import layout_of
from vlpjax.errors import UserError
from vlpjax.objectives.masking import (
    BlockWise,
    PixelGroups,
    RandomCells,
    RandomPatches,
    block_wise,
    complete,
    members,
    multi_block,
    pixel_groups,
    spans,
)

KEYS = jax.random.split(jax.random.key(0), 256)
GRID, N = (14, 14), 196


def masks(draw: Callable[..., Any], keys: jax.Array = KEYS) -> np.ndarray:
    """One mask per key, drawn in one compiled program."""
    return np.asarray(jax.jit(jax.vmap(draw))(keys))


def equal_neighbours(mask: np.ndarray) -> float:
    """Share of the pairs of neighbours, beside or below each other, that are both hidden or both seen."""
    pairs = [mask[:, :, 1:] == mask[:, :, :-1], mask[:, 1:] == mask[:, :-1]]
    return float(np.mean(np.concatenate([pair.reshape(len(mask), -1) for pair in pairs], axis=1)))


@pytest.mark.parametrize(
    ("policy", "patches", "kept"),
    [
        (RandomPatches(0.75), 196, 49),
        (RandomPatches(0.9), 196, 19),
        (RandomPatches(0.9, "hide"), 196, 20),
        (RandomPatches(0.0), 10, 10),
    ],
)
def test_random_patches_keep_the_papers_counts(policy: RandomPatches, patches: int, kept: int) -> None:
    split = jax.jit(lambda keys: policy.split(keys, patches))(KEYS)
    assert split.keep.shape == (len(KEYS), kept) and policy.kept(patches) == kept
    assert np.all(split.mask.sum(axis=1) == patches - kept)
    assert not np.any(np.take_along_axis(np.asarray(split.mask), np.asarray(split.keep), axis=1))
    assert np.all(np.sort(np.asarray(split.restore), axis=1) == np.arange(patches))


def test_every_patch_is_hidden_equally_often() -> None:
    shares = np.asarray(jax.jit(lambda keys: RandomPatches(0.75)(keys, (4, 4)))(KEYS)).mean(axis=0)
    np.testing.assert_allclose(shares, 0.75, atol=4 * (0.75 * 0.25 / len(KEYS)) ** 0.5)


def test_cells_are_hidden_whole_and_their_number_is_rounded_up() -> None:
    mask = np.asarray(jax.jit(lambda keys: RandomCells(0.6, 2)(keys, (14, 14)))(KEYS)).reshape(-1, 7, 2, 7, 2)
    cells = mask[:, :, 0, :, 0]
    assert np.all(mask == cells[:, :, None, :, None])
    assert np.all(cells.sum(axis=(1, 2)) == 30)  # ceil(0.6 * 49)


def test_blocks_never_hide_too_much_and_seldom_much_less() -> None:
    mask = masks(lambda key: block_wise(key, GRID, 75))
    counts = mask.sum(axis=1)
    assert counts.max() <= 75 and counts.min() >= 50 and counts.mean() > 72
    scattered = np.asarray(RandomPatches(1 - 121.5 / 196)(KEYS, GRID))
    assert np.all(scattered.sum(axis=1) == 75)
    assert equal_neighbours(mask.reshape(-1, *GRID)) > 0.8
    assert equal_neighbours(scattered.reshape(-1, *GRID)) < 0.62


def test_the_first_block_is_one_rectangle_of_an_allowed_shape() -> None:
    for mask in masks(lambda key: block_wise(key, GRID, 60, smallest=60)).reshape(-1, *GRID):
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if mask.sum() == height * width:  # no second rectangle was needed
            assert 0.25 < height / width < 4
            return
    pytest.fail("not a single mask is one rectangle")


def test_the_count_of_blocks_may_be_traced_and_zero() -> None:
    wanted = jnp.arange(len(KEYS)) % 90
    mask = np.asarray(jax.jit(jax.vmap(lambda key, count: block_wise(key, GRID, count, 4)))(KEYS, wanted))
    assert np.all(mask.sum(axis=1) <= wanted)
    assert not mask[np.asarray(wanted) == 0].any()
    assert mask.sum() > 0.9 * wanted.sum()


def test_blocks_are_completed_to_the_exact_count() -> None:
    plain, exact = (masks(lambda key, e=e: block_wise(key, GRID, 75, exact=e)) for e in (False, True))
    assert np.all(exact.sum(axis=1) == 75)
    assert np.all(plain <= exact)
    assert np.asarray(BlockWise(0.385, exact=True)(KEYS, GRID)).sum(axis=1).tolist() == [75] * len(KEYS)


def test_completing_hides_nothing_where_enough_is_hidden() -> None:
    mask = jnp.arange(10) < 6
    np.testing.assert_array_equal(complete(KEYS[0], mask, 4), mask)
    assert complete(KEYS[0], mask, 8).sum() == 8


def test_targets_are_blocks_that_the_context_does_not_see() -> None:
    context, targets = (np.asarray(x) for x in jax.jit(jax.vmap(lambda key: multi_block(key, GRID)))(KEYS))
    assert targets.shape == (len(KEYS), 4, N)
    assert not np.any(context[:, None] & targets)
    sizes = targets.sum(axis=2)
    assert np.all(sizes == sizes[:, :1]), "the targets of an example have one size"
    assert np.all((sizes >= 0.12 * N) & (sizes <= 0.24 * N))
    for block in targets[:, 0].reshape(-1, *GRID):
        rows, columns = (np.flatnonzero(block.any(axis=axis)) for axis in (1, 0))
        assert block.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    together = context | targets.any(axis=1)
    assert np.all(together.sum(axis=1) >= 0.8 * N)


def test_members_are_indices_of_what_is_true() -> None:
    mask = jnp.array([False, True, False, True, True])
    index, real = members(mask, 4)
    np.testing.assert_array_equal(index, [1, 3, 4, 0])
    np.testing.assert_array_equal(real, [True, True, True, False])


def test_spans_have_the_exact_count_and_leave_padding_alone() -> None:
    lengths = 8 + jnp.arange(len(KEYS)) % 57
    counts = jnp.maximum(1, lengths * 15 // 100)
    mask = np.asarray(jax.jit(jax.vmap(lambda k, c, n: spans(k, 64, c, n)))(KEYS, counts, lengths))
    np.testing.assert_array_equal(mask.sum(axis=1), counts)
    assert not np.any(mask & (np.arange(64) >= np.asarray(lengths)[:, None]))


def test_spans_are_runs_of_the_published_length() -> None:
    mask = masks(lambda key: spans(key, 512, 20, longest=10))
    starts = mask[:, 1:] & ~mask[:, :-1]
    runs = starts.sum() + mask[:, 0].sum()
    assert (
        3.3 < mask.sum() / runs < 4.6
    )  # a geometric length of mean 5, cut at 10, has mean 4.5; the last is cut


def test_pixel_groups_hide_the_share_and_at_most_one_group_more() -> None:
    size = (32, 32)
    mask = masks(lambda key: pixel_groups(key, size, 0.5))
    shares = mask.mean(axis=(1, 2))
    assert np.all(shares >= 0.5) and np.all(shares <= 0.5 + 0.3**2 + 0.02)
    aligned = masks(lambda key: pixel_groups(key, size, 0.5, align=4)).reshape(-1, 8, 4, 8, 4)
    assert np.all(aligned == aligned[:, :, :1, :, :1])


def test_corruption_changes_the_masked_pixels_only() -> None:
    images = jax.random.normal(jax.random.key(1), (len(KEYS), 32, 32, 3)) + 5.0
    out, mask = map(np.asarray, jax.jit(PixelGroups(share=0.75, donor_share=0.3))(KEYS, images))
    changed = np.any(out != images, axis=-1)
    assert np.all(changed <= mask)
    assert changed.sum() > 0.999 * mask.sum()
    foreign = np.array(
        [np.all(o[m] == d[m]) for o, m, d in zip(out, mask, np.roll(images, 1, 0), strict=True)]
    )
    shares = mask.mean(axis=(1, 2))
    group = 0.3**2 + 0.02
    assert 0.35 < foreign.mean() < 0.65
    assert np.all((shares[foreign] >= 0.3) & (shares[foreign] <= 0.3 + group))
    assert np.all((shares[~foreign] >= 0.5) & (shares[~foreign] <= 0.75 + group))
    noise = out[~foreign][mask[~foreign]]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_zeros_fill_and_no_donor_takes_part() -> None:
    images = jnp.ones((8, 16, 16, 3))
    out, mask = jax.jit(PixelGroups(donor_probability=0.0, fill="zeros"))(KEYS[:8], images)
    np.testing.assert_array_equal(out, np.where(mask[..., None], 0.0, images))


POLICIES = (RandomPatches(0.5), RandomCells(0.6, 2), BlockWise(0.4, 4))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_masks_do_not_depend_on_the_mesh_nor_on_how_the_batch_is_split(policy: Any) -> None:
    keys, grid = KEYS[:16], (8, 8)
    whole = np.asarray(jax.jit(lambda keys: policy(keys, grid))(keys))
    layout = layout_of(8)
    placed = jax.device_put(keys, layout.sharding("frames"))
    np.testing.assert_array_equal(jax.jit(lambda keys: policy(keys, grid))(placed), whole)
    np.testing.assert_array_equal(policy(keys[::4], grid), whole[::4])


def test_mistakes_are_told_when_the_config_is_built() -> None:
    with pytest.raises(UserError, match=r"RandomPatches.ratio is 1.5"):
        RandomPatches(1.5)
    with pytest.raises(UserError, match="there are 'keep' and 'hide'"):
        RandomPatches(rounding="up")
    with pytest.raises(UserError, match="filled with 'grey'|PixelGroups.fill is 'grey'"):
        PixelGroups(fill="grey")
    with pytest.raises(UserError, match="does not divide 7x7"):
        RandomCells(cell=2)(KEYS, (7, 7))
    with pytest.raises(UserError, match="leaves none to be seen"):
        RandomPatches(0.9).split(KEYS, 4)
