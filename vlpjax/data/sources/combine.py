"""Sources made of sources: one after the other, mixed by weight, or filtered by a field."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from vlpjax.data.sources import order
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.errors import UserError


class _Parts(NamedTuple):
    names: tuple[str, ...]
    ends: tuple[int, ...]  # running total of the lengths


@dataclass(frozen=True)
class Concat(LazySource):
    """The records of all sources, one source after the other.

    Raises (at construction):
      UserError: if there is no source.
    """

    sources: Mapping[str, Source]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(f"{type(self).__name__} was given no sources; name at least one.")

    def _open(self) -> _Parts:
        return _Parts(tuple(self.sources), tuple(itertools.accumulate(map(len, self.sources.values()))))

    def __len__(self) -> int:
        return self._opened.ends[-1]

    def part_of(self, index: int) -> tuple[str, int]:
        """The name of the source that holds record ``index``, and the record's index in that source."""
        names, ends = self._opened
        number = bisect.bisect_right(ends, index)
        return names[number], index - (ends[number - 1] if number else 0)

    def index_of(self, part: str, index: int) -> int:
        """The inverse of ``part_of``."""
        names, ends = self._opened
        number = names.index(part)
        return index + (ends[number - 1] if number else 0)

    def __getitem__(self, index: SupportsIndex) -> Example:
        part, position = self.part_of(checked_index(index, len(self), self))
        return self.sources[part][position]

    def describe(self, index: int) -> str:
        part, position = self.part_of(checked_index(index, len(self), self))
        return f"{part}: {self.sources[part].describe(position)}"

    def fingerprint(self) -> str:
        return digest(
            type(self).__name__, [(name, part.fingerprint()) for name, part in self.sources.items()]
        )


class _Split(NamedTuple):
    """A fork of the mixing tree: ``share / whole`` of what arrives goes left."""

    left: _Split | str
    right: _Split | str
    share: int
    whole: int

    def sent_left(self, arrived: int) -> int:
        """How many of the first ``arrived`` draws go left: the share, rounded to the nearest count."""
        return (2 * arrived * self.share + self.whole) // (2 * self.whole)


@dataclass(frozen=True)
class Mixture(Concat):
    """Sources drawn in fixed proportions, for endless streams.

    Every prefix of the stream holds each source's share to within two examples, however long the stream
    and however many the sources, and each source is passed through epoch by epoch in an order of its own.
    Weights are taken as the decimal numbers that were written (0.1 is one tenth) and need not sum to one;
    without weights a source's share is its size, and ``len`` draws hold every record exactly once.  As a
    plain sequence (``len``, ``[i]``) a mixture is the concatenation of its sources.

    The draws are dealt out by a binary tree, built like Huffman's so that rare sources sit deep.  Each fork
    sends a rounded share left, which is a closed form in integers: no state, no table, no drift.

    Raises (at construction):
      UserError: if the weights name other sources than ``sources``, are negative, or are all zero.
    """

    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None:
            return
        if set(self.weights) != set(self.sources):
            raise UserError(
                f"The weights of a Mixture name {sorted(self.weights)},"
                f" but its sources are {sorted(self.sources)}; give each source one weight."
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"The weight of {name!r} is {weight}; weights are finite and not negative.")
        if not any(self.weights.values()):
            raise UserError("All weights of a Mixture are zero; give at least one source a positive weight.")

    def _shares(self) -> dict[str, int]:
        """Integer weights with exactly the written proportions."""
        if self.weights is None:
            return {name: len(part) for name, part in self.sources.items()}
        exact = {name: Fraction(repr(float(weight))) for name, weight in self.weights.items()}
        scale = math.lcm(*(fraction.denominator for fraction in exact.values()))
        return {name: int(exact[name] * scale) for name in self.sources}

    @property
    def _tree(self) -> _Split | str:
        held = self.__dict__.get("_mixing_tree")  # not pickled: it is rebuilt in microseconds
        if held is None:
            held = self.__dict__["_mixing_tree"] = _mixing_tree(self._shares())
        return held

    def locate(self, position: int, seed: int, shuffle: bool) -> tuple[str, int, int]:
        """What the endless stream has at ``position``: ``(source name, index in the source, its epoch)``."""
        node = self._tree
        while isinstance(node, _Split):
            left = node.sent_left(position)
            if node.sent_left(position + 1) > left:
                node, position = node.left, left
            else:
                node, position = node.right, position - left
        return (node, *order.draw(self.sources[node], position, seed, shuffle, name=node))

    def cursors(self, position: int) -> dict[str, int]:
        """How many examples of each source the stream has before ``position``."""
        counts = dict.fromkeys(self.sources, 0)
        pending = [(self._tree, position)]
        while pending:
            node, arrived = pending.pop()
            if isinstance(node, _Split):
                left = node.sent_left(arrived)
                pending += [(node.left, left), (node.right, arrived - left)]
            else:
                counts[node] = arrived
        return counts

    def fingerprint(self) -> str:
        return digest(super().fingerprint(), self._shares())


def _mixing_tree(shares: Mapping[str, int]) -> _Split | str:
    """Huffman's tree: the two smallest shares are joined until one is left.

    A grandchild's share is then at most half of its grandparent's, so the rounding of all forks above a
    source adds up to less than 1/2 + 1/2 + 1/4 + 1/4 + 1/8 + ... = 2 examples.
    """
    heap: list[tuple[int, int, Any]] = [
        (share, number, name) for number, (name, share) in enumerate(shares.items()) if share > 0
    ]
    heapq.heapify(heap)
    for number in itertools.count(len(shares)):
        share, _, node = heapq.heappop(heap)
        if not heap:
            return node
        other_share, _, other = heapq.heappop(heap)
        whole = share + other_share
        heapq.heappush(heap, (whole, number, _Split(node, other, share, whole)))
    raise AssertionError("unreachable: each round shortens the heap")


@dataclass(frozen=True)
class Filter(LazySource):
    """The records of ``source`` whose ``field`` is one of ``values`` (or is none of them, with ``exclude``).

    The source is scanned once, on first use; the result is kept for the process, shared by equal filters,
    and travels in pickles, so worker processes do not scan again.
    """

    source: Source
    field: str
    values: tuple[Any, ...]
    exclude: bool = False

    def _open(self) -> np.ndarray:
        key = self.fingerprint()
        if key not in _FILTERED:
            _FILTERED[key] = self._scan()
        return _FILTERED[key]

    def _scan(self) -> np.ndarray:
        values = set(self.values)
        kept = [(value in values) != self.exclude for value in self._field_values()]
        if not any(kept):
            wanted = "is none of" if self.exclude else "is one of"
            raise UserError(
                f"No record of {len(kept)} has a {self.field!r} that {wanted} {tuple(self.values)};"
                " check the values."
            )
        return np.flatnonzero(kept)

    def _field_values(self) -> list[Any]:
        if hasattr(self.source, "column"):  # sources that can read one field without the images
            return self.source.column(self.field)
        values = []
        for index in range(len(self.source)):
            example = self.source[index]
            if self.field not in example:
                raise UserError(
                    f"{self.source.describe(index)} has no field {self.field!r} to filter by;"
                    f" it has {sorted(example)}."
                )
            values.append(example[self.field])
        return values

    def __getstate__(self) -> dict[str, Any]:
        held = self.__dict__.get(self._OPENED)
        return super().__getstate__() | ({"_scanned": (self.fingerprint(), held[1])} if held else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        key, indices = state.pop("_scanned", (None, None))
        if key is not None:
            _FILTERED.setdefault(key, indices)
        super().__setstate__(state)

    def __len__(self) -> int:
        return len(self._opened)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.source[int(self._opened[checked_index(index, len(self), self)])]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self._opened[checked_index(index, len(self), self)]))

    def fingerprint(self) -> str:
        return digest(
            "Filter", self.source.fingerprint(), self.field, sorted(map(repr, self.values)), self.exclude
        )


_FILTERED: dict[str, np.ndarray] = {}
