"""In which order examples are drawn: stateless shuffles, so that any position of an endless stream is O(1).

Position ``p`` of a stream over ``n`` examples lies in epoch ``p // n``; within the epoch the examples are
permuted by a keyed bijection that is computed, never stored, so a billion examples cost no memory and a
resumed run needs no replay.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Protocol, TypeGuard, TypeVar, overload

import numpy as np

from vlpjax.data.sources.base import Source

_ROUNDS = 8
_WORD = (1 << 64) - 1
# Multipliers of the SplitMix64 finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators", section 3, with the constants of the authors' reference program).
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB

_Words = TypeVar("_Words", int, np.ndarray)


class Mixed(Source, Protocol):
    """A source that decides its own order, such as ``Mixture``."""

    sources: Mapping[str, Source]

    def locate(self, position: int, seed: int, shuffle: bool) -> tuple[str, int, int]: ...

    def cursors(self, position: int) -> dict[str, int]: ...

    def index_of(self, part: str, index: int) -> int: ...

    def part_of(self, index: int) -> tuple[str, int]: ...


def _is_mixed(source: Source) -> TypeGuard[Mixed]:
    return hasattr(source, "locate")


@functools.lru_cache(maxsize=4096)
def _round_keys(seed: int, epoch: int, name: str) -> tuple[int, ...]:
    """One 64-bit key per round; hashing keeps (seed, epoch + 1) unrelated to (seed + 1, epoch)."""
    material = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(material[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _scramble(word: _Words) -> _Words:
    """SplitMix64's finaliser, for Python integers and for uint64 arrays alike."""
    word = ((word ^ (word >> 30)) * _MULTIPLY_1) & _WORD
    word = ((word ^ (word >> 27)) * _MULTIPLY_2) & _WORD
    return word ^ (word >> 31)


def _feistel(index: _Words, rows: int, columns: int, keys: tuple[int, ...]) -> _Words:
    """A bijection of ``[0, rows * columns)``: each round shifts one coordinate by a hash of the other."""
    row, column = index // columns, index % columns
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _scramble(column ^ even) % rows) % rows
        column = (column + _scramble(row ^ odd) % columns) % columns
    return row * columns + column


@overload
def permute(index: int, size: int, *, seed: int, epoch: int = 0, name: str = "") -> int: ...


@overload
def permute(index: np.ndarray, size: int, *, seed: int, epoch: int = 0, name: str = "") -> np.ndarray: ...


def permute(
    index: int | np.ndarray, size: int, *, seed: int, epoch: int = 0, name: str = ""
) -> int | np.ndarray:
    """Where ``index`` of ``[0, size)`` goes in the shuffle of (seed, epoch, name).

    For fixed key arguments this is a bijection of ``[0, size)``.  An array of indices gives the int64 array
    of what the single indices give.

    The shuffle is a Feistel network over a grid of ``rows x columns >= size`` cells; an index that lands
    beyond ``size`` walks on until it is inside, which happens with a chance below ``1 / columns``.
    """
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    keys = _round_keys(seed, epoch, name)
    if not isinstance(index, np.ndarray):
        place = _feistel(index, rows, columns, keys)
        while place >= size:
            place = _feistel(place, rows, columns, keys)
        return place
    places = _feistel_array(index.astype(np.uint64), rows, columns, keys)
    while (outside := places >= size).any():
        places[outside] = _feistel_array(places[outside], rows, columns, keys)
    return places.astype(np.int64)


def _feistel_array(index: np.ndarray, rows: int, columns: int, keys: tuple[int, ...]) -> np.ndarray:
    flat = np.atleast_1d(index)  # arrays wrap around silently, scalars would warn
    return _feistel(flat, rows, columns, keys).reshape(index.shape)


def draw(source: Source, position: int, seed: int, shuffle: bool, name: str = "") -> tuple[int, int]:
    """Which record of ``source`` the endless stream has at ``position``, as ``(index, epoch)``.

    A source with a ``locate`` method (a ``Mixture``) decides itself; every other source is passed through
    once per epoch.  ``source[index]`` is the example.
    """
    if _is_mixed(source):
        part, index, epoch = source.locate(position, seed, shuffle)
        return source.index_of(part, index), epoch
    epoch, index = divmod(position, len(source))
    return (permute(index, len(source), seed=seed, epoch=epoch, name=name) if shuffle else index), epoch


def locate(source: Source, position: int, seed: int, shuffle: bool) -> tuple[Source, int, int]:
    """Like ``draw``, but looks through mixtures: ``(the part, index in the part, epoch of the part)``."""
    index, epoch = draw(source, position, seed, shuffle)
    while _is_mixed(source):
        part, index = source.part_of(index)
        source = source.sources[part]
    return source, index, epoch


def cursors(source: Source, position: int, name: str = "source") -> dict[str, int]:
    """How many examples of each part were drawn before ``position``; nested mixtures give ``outer/inner``."""
    if not _is_mixed(source):
        return {name: position}
    prefix = "" if name == "source" else f"{name}/"
    drawn: dict[str, int] = {}
    for part, count in source.cursors(position).items():
        drawn |= cursors(source.sources[part], count, f"{prefix}{part}")
    return drawn
