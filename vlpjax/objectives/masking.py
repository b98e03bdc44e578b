"""Which patches, pixels or tokens are hidden: at random, in blocks, on a coarse grid, in groups of pixels, in spans.

Every function draws for one example, from one random key, and is traceable; ``jax.vmap`` over
``context.row_keys(...)`` draws for a batch, so that what an example loses is a function of (seed, step, name, row)
whatever the mesh and the number of micro-batches.  The frozen classes at the end do that, and are what configs name.
Counts are exact unless a function says otherwise: shapes never depend on a draw.

Patches are in reading order.  In masks, True is hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError

Count = int | Int[Array, ""]

# Loops end after so many tries at the latest, so that their random numbers can be drawn at once, before.
MOST_RECTANGLES = 256
MOST_GROUPS = 512


class Split(NamedTuple):
    """Patches in a random order, of which the first ``kept`` are seen.

    Attributes:
      keep: the patches that are seen, in the random order ("ids_keep").
      restore: for every patch its place in the random order ("ids_restore").
      mask: which patches are hidden.
    """

    keep: Int[Array, "*batch kept"]
    restore: Int[Array, "*batch patches"]
    mask: Bool[Array, "*batch patches"]


def random_split(key: jax.Array, patches: int, kept: int) -> Split:
    """Hides all but ``kept`` patches, every subset being equally likely.

    Source: "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3.
    """
    shuffle = jnp.argsort(jax.random.uniform(key, (patches,)))
    restore = jnp.argsort(shuffle)
    return Split(shuffle[:kept], restore, restore >= kept)


def lowest(chance: Float[Array, " size"], count: Count) -> Bool[Array, " size"]:
    """Hides the ``count`` places where ``chance`` is lowest; ``count`` may be traced."""
    return jnp.argsort(jnp.argsort(chance)) < count


def random_subset(key: jax.Array, size: int, count: Count) -> Bool[Array, " {size}"]:
    """Hides exactly ``count`` of ``size``; ``count`` may be traced."""
    return lowest(jax.random.uniform(key, (size,)), count)


def random_grid(
    key: jax.Array, grid: tuple[int, int], cell: int, ratio: float
) -> Bool[Array, " rows*columns"]:
    """Hides ``ceil(ratio * cells)`` whole cells of ``cell`` x ``cell`` patches.

    Args:
      grid: rows and columns of patches; ``cell`` divides both.

    Source: "SimMIM", arXiv 2111.09886, section 3.2, where a cell is 32 pixels whatever the patch.
    """
    rows, columns = grid[0] // cell, grid[1] // cell
    coarse = random_subset(key, rows * columns, math.ceil(ratio * rows * columns)).reshape(rows, columns)
    return jnp.repeat(jnp.repeat(coarse, cell, axis=0), cell, axis=1).reshape(-1)


def rectangle(
    size: tuple[int, int], top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array
) -> Bool[Array, "rows columns"]:
    """True inside a rectangle whose place and sides may be traced."""
    row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None, :]
    return (row >= top) & (row < top + height) & (column >= left) & (column < left + width)


def complete(key: jax.Array, mask: Bool[Array, "*shape"], count: Count) -> Bool[Array, "*shape"]:
    """Hides further places at random until ``count`` are hidden; a mask that hides as many stays as it is."""
    chance = jax.random.uniform(key, (mask.size,)) - mask.reshape(-1)  # what is hidden comes first
    return lowest(chance, jnp.maximum(count, mask.sum())).reshape(mask.shape)


def block_wise(
    key: jax.Array,
    grid: tuple[int, int],
    count: Count,
    smallest: int = 16,
    largest: int | None = None,
    aspect: float = 0.3,
    tries: int = 10,
    exact: bool = False,
) -> Bool[Array, " rows*columns"]:
    """Hides rectangles until ``count`` patches are hidden, or until ``tries`` rectangles in a row did not fit.

    A rectangle has an area uniform between ``smallest`` and the number that may still be hidden, and an aspect ratio
    log-uniform between ``aspect`` and ``1 / aspect``.  It is smaller than the grid, hides at least one new patch and
    never more than may still be hidden.  So ``count`` is never exceeded; a run may end somewhat below it.

    The loop is bounded by 256 tries in all; BEiT's settings take about ten.

    Args:
      grid: rows and columns of patches.
      count: patches to hide; may be traced, and 0.
      largest: the largest area of a rectangle; None sets no bound.
      exact: hide single patches at random in place of those that a run ended below ``count``.

    Source: "BEiT", arXiv 2106.08254, algorithm 1.
    """
    rows, columns = grid
    most = rows * columns if largest is None else largest
    low, high = math.log(aspect), -math.log(aspect)
    loop_key, rest_key = jax.random.split(key)
    draws = jax.random.uniform(loop_key, (MOST_RECTANGLES, 4))

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        mask, failures, number = state
        area, shape, down, along = draws[number]
        room = jnp.minimum(count - mask.sum(), most)
        target = smallest + area * (room - smallest)
        ratio = jnp.exp(low + shape * (high - low))
        height = jnp.round(jnp.sqrt(target * ratio)).astype(jnp.int32)
        width = jnp.round(jnp.sqrt(target / ratio)).astype(jnp.int32)
        top = (down * (rows - height + 1)).astype(jnp.int32)
        left = (along * (columns - width + 1)).astype(jnp.int32)
        new = mask | rectangle(grid, top, left, height, width)
        added = new.sum() - mask.sum()
        fits = (height < rows) & (width < columns) & (added > 0) & (added <= room)
        return jnp.where(fits, new, mask), jnp.where(fits, 0, failures + 1), number + 1

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        mask, failures, number = state
        return (mask.sum() < count) & (failures < tries) & (number < MOST_RECTANGLES)

    start = (jnp.zeros(grid, bool), jnp.int32(0), jnp.int32(0))
    mask = jax.lax.while_loop(unfinished, attempt, start)[0].reshape(-1)
    return complete(rest_key, mask, count) if exact else mask


class MultiBlock(NamedTuple):
    """What is seen and what is to be predicted: True is a member.

    Attributes:
      context: patches that are seen; none of them is in a target.
      targets: per target its patches.
    """

    context: Bool[Array, "*batch patches"]
    targets: Bool[Array, "*batch targets patches"]


def multi_block(
    key: jax.Array,
    grid: tuple[int, int],
    targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
) -> MultiBlock:
    """Several target blocks, which may overlap, and one large square context block without them.

    For predicting a teacher's features of the targets from a tower that sees the context only: :func:`members` makes
    the tower's ``keep`` of the context, and the places to predict of each target.

    Areas (shares of the grid) and aspect ratios (height over width) are uniform in their ranges.  All targets of an
    example have one size.  How many patches the context has is a matter of chance.

    Source: "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", arXiv 2301.08243,
    section 3.
    """
    rows, columns = grid
    size_key, context_key, *target_keys = jax.random.split(key, 2 + targets)

    def uniform(draw: jax.Array, interval: tuple[float, float]) -> jax.Array:
        return interval[0] + draw * (interval[1] - interval[0])

    def block(key: jax.Array, scale: jax.Array, aspect: jax.Array) -> jax.Array:
        area = scale * rows * columns
        height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows).astype(jnp.int32)
        width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns).astype(jnp.int32)
        down, along = jax.random.uniform(key, (2,))
        top = (down * (rows - height + 1)).astype(jnp.int32)
        left = (along * (columns - width + 1)).astype(jnp.int32)
        return rectangle(grid, top, left, height, width).reshape(-1)

    scale, aspect, whole = jax.random.uniform(size_key, (3,))
    scale, aspect = uniform(scale, target_scale), uniform(aspect, target_aspect)
    blocks = jnp.stack([block(key, scale, aspect) for key in target_keys])
    context = block(context_key, uniform(whole, context_scale), jnp.float32(1.0))
    return MultiBlock(context & ~blocks.any(axis=0), blocks)


def members(mask: Bool[Array, " patches"], size: int) -> tuple[Int[Array, " {size}"], Bool[Array, " {size}"]]:
    """The first ``size`` patches where the mask is True, in order, and which of these are no filling.

    Exact masks give exact indices: ``members(~mask, visible)[0]`` are the patches that a tower may keep.
    """
    order = jnp.argsort(~mask, stable=True)[:size]
    return order, mask[order]


def spans(
    key: jax.Array,
    size: int,
    count: Count,
    length: Count | None = None,
    mean: float = 5.0,
    longest: int = 10,
) -> Bool[Array, " {size}"]:
    """Hides exactly ``count`` of the first ``length`` tokens of a sequence, in runs.

    A run's length is geometric with the given mean before it is cut at ``longest`` and at the number that may still
    be hidden; its start is uniform.  Runs may touch and overlap.  After ``size`` runs, which a mask of half the tokens
    never needs, single tokens are hidden until the number is right.

    Args:
      size: of the array.
      count: tokens to hide, at most ``length``; may be traced.
      length: tokens that are no padding; None is all.
      mean: of the geometric distribution, before the cut (SpanBERT's p = 0.2).

    Source: "SpanBERT", arXiv 1907.10529, section 3.1.
    """
    real = jnp.asarray(size if length is None else length, jnp.int32)
    index = jnp.arange(size)
    loop_key, rest_key = jax.random.split(key)
    draws = jax.random.uniform(loop_key, (size, 2))

    def attempt(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mask, number = state
        draw, place = draws[number]
        run = 1 + jnp.floor(jnp.log1p(-draw) / math.log1p(-1 / mean)).astype(jnp.int32)
        run = jnp.minimum(jnp.minimum(run, longest), jnp.minimum(count - mask.sum(), real))
        start = (place * (real - run + 1)).astype(jnp.int32)
        return mask | ((index >= start) & (index < start + run)), number + 1

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0].sum() < count) & (state[1] < size)

    mask, _ = jax.lax.while_loop(unfinished, attempt, (jnp.zeros(size, bool), jnp.int32(0)))
    chance = jax.random.uniform(rest_key, (size,)) - mask + 2.0 * (index >= real)
    return lowest(chance, count)


# --- groups of pixels -------------------------------------------------------------------------------------------

FILLS = ("noise", "zeros")


def pixel_groups(
    key: jax.Array,
    size: tuple[int, int],
    share: float | Float[Array, ""],
    side: float = 0.3,
    align: int = 1,
) -> Bool[Array, "height width"]:
    """Hides rectangles of pixels until at least ``share`` of the image is hidden.

    Corners are uniform on a grid of ``align`` pixels; sides are uniform from ``align`` to ``side`` times the image's,
    rounded to it.  More than ``share`` is hidden by less than one rectangle.  The loop is bounded by 512 rectangles; to
    hide three quarters takes about sixty.

    Source: "GMML is All you Need", arXiv 2205.14986, section 3.
    """
    wanted = jnp.asarray(share * size[0] * size[1])
    draws = jax.random.uniform(key, (MOST_GROUPS, 4))

    def attempt(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mask, number = state
        drawn = draws[number]
        corner, sides = [], []
        for axis in (0, 1):
            start = (drawn[axis] * max(size[axis] // align, 1)).astype(jnp.int32) * align
            longest = max(side * size[axis], align)
            length = jnp.minimum(align + drawn[2 + axis] * (longest - align), size[axis] - start)
            rounded = jnp.maximum(jnp.round(length / align), 1)
            corner.append(start)
            sides.append((rounded * align).astype(jnp.int32))
        return mask | rectangle(size, *corner, *sides), number + 1

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0].sum() < wanted) & (state[1] < MOST_GROUPS)

    return jax.lax.while_loop(unfinished, attempt, (jnp.zeros(size, bool), jnp.int32(0)))[0]


class Corrupted(NamedTuple):
    """Images in which groups of pixels are replaced, and which pixels these are."""

    images: Float[Array, "*batch height width channels"]
    mask: Bool[Array, "*batch height width"]


def corrupt(
    key: jax.Array,
    image: Float[Array, "height width channels"],
    donor: Float[Array, "height width channels"] | None = None,
    share: float = 0.75,
    donor_share: float = 0.3,
    donor_probability: float = 0.5,
    fill: str = "noise",
    side: float = 0.3,
    align: int = 1,
) -> Corrupted:
    """Replaces groups of pixels by noise, or with some probability by the pixels of another image at their places.

    The first form hides a share uniform between ``min(0.5, share)`` and ``share``; the second likewise for
    ``donor_share``, and starts from the clean image.

    Args:
      donor: another image; None always takes the first form.
      fill: ``"noise"`` of the normal distribution, or ``"zeros"``.

    Raises:
      UserError: an unknown ``fill``.

    Source: "GMML is All you Need", arXiv 2205.14986, section 3.
    """
    if fill not in FILLS:
        raise UserError(
            f"Groups of pixels are filled with {fill!r}; there are {', '.join(map(repr, FILLS))}."
        )
    amount_key, group_key, noise_key, choice_key = jax.random.split(key, 4)
    size = (image.shape[0], image.shape[1])
    foreign = jnp.asarray(False)
    if donor is not None:
        foreign = jax.random.bernoulli(choice_key, donor_probability)
    most = jnp.where(foreign, donor_share, share)
    least = jnp.minimum(0.5, most)
    amount = least + jax.random.uniform(amount_key) * (most - least)
    mask = pixel_groups(group_key, size, amount, side, align)
    new = jax.random.normal(noise_key, image.shape, image.dtype) if fill == "noise" else jnp.zeros_like(image)
    if donor is not None:
        new = jnp.where(foreign, donor, new)
    return Corrupted(jnp.where(mask[..., None], new, image), mask)


# --- for configs ----------------------------------------------------------------------------------------------


def _check_ratio(owner: Any, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise UserError(
            f"{type(owner).__name__}.ratio is {value}; it is the share that is hidden, in [0, 1)."
        )


@dataclass(frozen=True)
class RandomPatches:
    """Hides single patches at random.

    Attributes:
      ratio: share of the patches that is hidden.
      rounding: ``"keep"`` keeps floor(N (1 - ratio)) patches (MAE, arXiv 2111.06377); ``"hide"`` hides
        floor(N ratio) (CroCo, arXiv 2210.10716).
    """

    ratio: float = 0.75
    rounding: str = "keep"

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio)
        if self.rounding not in ("keep", "hide"):
            raise UserError(f"RandomPatches.rounding is {self.rounding!r}; there are 'keep' and 'hide'.")

    def kept(self, patches: int) -> int:
        """How many patches are seen."""
        if self.rounding == "keep":
            return int(patches * (1 - self.ratio))
        return patches - int(patches * self.ratio)

    def split(self, keys: jax.Array, patches: int) -> Split:
        """A split per key [B]."""
        kept = self.kept(patches)
        if not kept:
            raise UserError(f"RandomPatches.ratio={self.ratio} of {patches} patches leaves none to be seen.")
        return jax.vmap(lambda key: random_split(key, patches, kept))(keys)

    def __call__(self, keys: jax.Array, grid: tuple[int, int]) -> Bool[Array, "batch patches"]:
        """A mask per key."""
        return self.split(keys, math.prod(grid)).mask


@dataclass(frozen=True)
class RandomCells:
    """Hides whole cells of a coarse grid at random, as SimMIM does (arXiv 2111.09886).

    Attributes:
      ratio: share of the cells that is hidden, rounded up.
      cell: side of a cell in patches (SimMIM's 32 pixels are 2 patches of 16).
    """

    ratio: float = 0.6
    cell: int = 2

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio)

    def __call__(self, keys: jax.Array, grid: tuple[int, int]) -> Bool[Array, "batch patches"]:
        """A mask per key.

        Raises:
          UserError: a grid that the cells do not fill.
        """
        if grid[0] % self.cell or grid[1] % self.cell:
            raise UserError(
                f"RandomCells.cell is {self.cell}, which does not divide {grid[0]}x{grid[1]} patches."
            )
        return jax.vmap(lambda key: random_grid(key, grid, self.cell, self.ratio))(keys)


@dataclass(frozen=True)
class BlockWise:
    """Hides rectangles of patches, as BEiT does (arXiv 2106.08254).

    Attributes:
      ratio: share of the patches that may be hidden, rounded down (BEiT hides up to 75 of 196).
      smallest: the smallest area of a rectangle, in patches.
      aspect: the smallest aspect ratio; its inverse is the largest.
      exact: hide single patches at random in place of those that the rectangles missed.
    """

    ratio: float = 0.385
    smallest: int = 16
    aspect: float = 0.3
    exact: bool = False

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio)

    def count(self, patches: int) -> int:
        """How many patches may be hidden."""
        return int(patches * self.ratio)

    def __call__(self, keys: jax.Array, grid: tuple[int, int]) -> Bool[Array, "batch patches"]:
        """A mask per key."""
        count = self.count(math.prod(grid))
        smallest = min(self.smallest, count)

        def draw(key: jax.Array) -> jax.Array:
            return block_wise(key, grid, count, smallest, aspect=self.aspect, exact=self.exact)

        return jax.vmap(draw)(keys)


@dataclass(frozen=True)
class PixelGroups:
    """Replaces groups of pixels by noise or by another image's, as GMML does (arXiv 2205.14986).

    Attributes:
      share: most of the image that noise replaces; at least min(0.5, share).
      donor_share: likewise for the pixels of another image.
      donor_probability: of the latter.
      fill: ``"noise"`` or ``"zeros"``.
      side: longest side of a rectangle, as a share of the image's.
      align: grid of the corners and sides, in pixels.
    """

    share: float = 0.75
    donor_share: float = 0.3
    donor_probability: float = 0.5
    fill: str = "noise"
    side: float = 0.3
    align: int = 1

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise UserError(f"PixelGroups.fill is {self.fill!r}; there are {', '.join(map(repr, FILLS))}.")

    def __call__(self, keys: jax.Array, images: Float[Array, "batch height width channels"]) -> Corrupted:
        """Corrupts every image; its neighbour in the batch is the donor."""
        chance, more = self.donor_probability, (self.fill, self.side, self.align)

        def draw(key: jax.Array, image: jax.Array, donor: jax.Array) -> Corrupted:
            return corrupt(key, image, donor, self.share, self.donor_share, chance, *more)

        return jax.vmap(draw)(keys, images, jnp.roll(images, 1, axis=0))
