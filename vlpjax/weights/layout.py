"""How parameters are named and laid out elsewhere: rules that are data, read in both directions.

A :class:`Rule` says which tensor of another library a parameter of ours is, and how the axes move between the
two, in the notation of einops (``"(h d) i -> i h d"``: their axes, our axes).  Rules rearrange and do nothing
else, so that the inverse of an import is exact, and so that the part of a tensor that a device needs can be
computed from the part of the parameter that it holds.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlpjax.errors import UserError

Shape = tuple[int, ...]
Slices = tuple[slice, ...]
FUSED = "n"  # the axis of a fused tensor that is dealt to several parameters


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs and the parameter, or parameters, of ours that it holds.

    Attributes:
      ours: path of a parameter under ``params``, such as ``"image/block_{n}/mlp/up/kernel"``; ``{n}`` stands for
        any number.  Another collection is spelled out: ``"batch_stats/..."``.  A tuple of paths says that one
        tensor holds them all, and the pattern's right side then starts with the axis ``n`` that is dealt to them.
      theirs: name of the tensor, with the same placeholders.
      pattern: ``"their axes -> our axes"``; ``(a b)`` is one axis of length a b, a outermost; ``1`` is an axis of
        length 1.  None: the same shape.
      beside: path of a parameter that the model must have too for the rule to hold (T5 spells an MLP's projection
        otherwise where there is a gate); None: it always holds.
      without: path of a parameter that the model must not have for the rule to hold (Gemma 2 has norms that Gemma
        lacks, and calls another one by a name of Gemma's).
    """

    ours: str | tuple[str, ...]
    theirs: str
    pattern: str | None = None
    beside: str | None = None
    without: str | None = None

    def __post_init__(self) -> None:
        names = (*self.paths, self.theirs, *filter(None, (self.beside, self.without)))
        placeholders = {frozenset(re.findall(r"\{(\w+)\}", name)) for name in names}
        if len(placeholders) > 1:
            raise UserError(f"The two sides of {self} have different placeholders.")
        if self.pattern is not None:
            right = Pattern.parse(self.pattern).ours
            if isinstance(self.ours, tuple) and right[:1] != ((FUSED,),):
                raise UserError(
                    f"{self} is for several parameters; its right side must start with {FUSED!r}."
                )
        elif isinstance(self.ours, tuple):
            raise UserError(f"{self} is for several parameters; it needs a pattern.")

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters' paths, also when there is only one."""
        return self.ours if isinstance(self.ours, tuple) else (self.ours,)

    def bind(
        self, shape: Shape, theirs: Shape | None = None, sizes: Mapping[str, int] | None = None
    ) -> Binding:
        """The rule for a parameter of this shape.

        Args:
          shape: of (each of) the parameters.
          theirs: of the tensor, if it is there.
          sizes: of axes that the parameter's shape leaves open (p, q and c of ``(p q c)``).

        Raises:
          UserError: the shapes do not fit each other, or a size is not known.
        """
        if self.pattern is None:
            axes = tuple((f"a{index}",) for index in range(len(shape)))
            pattern = Pattern(axes, axes)
        else:
            pattern = Pattern.parse(self.pattern)
        full = (len(self.paths), *shape) if isinstance(self.ours, tuple) else shape
        return pattern.bind(full, theirs, sizes or {})


def under(ours: str, theirs: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules with prefixes put before the names of both sides, such as ``("image/", "vision_model.")``."""

    def moved(rule: Rule) -> Rule:
        paths = tuple(_prefixed(ours, path) for path in rule.paths)
        return replace(
            rule,
            ours=paths if isinstance(rule.ours, tuple) else paths[0],
            theirs=theirs + rule.theirs,
            beside=rule.beside and _prefixed(ours, rule.beside),
            without=rule.without and _prefixed(ours, rule.without),
        )

    return tuple(moved(rule) for rule in rules)


def _prefixed(prefix: str, path: str) -> str:
    collection, _, rest = path.partition("/")
    return f"{collection}/{prefix}{rest}" if collection == "batch_stats" else prefix + path


@functools.cache
def template(name: str) -> re.Pattern[str]:
    """The regular expression of a name with ``{n}`` placeholders."""
    parts = re.split(r"\{(\w+)\}", name)
    seen: set[str] = set()
    expression = re.escape(parts[0])
    for placeholder, literal in zip(parts[1::2], parts[2::2], strict=True):
        expression += f"(?P={placeholder})" if placeholder in seen else rf"(?P<{placeholder}>\d+)"
        expression += re.escape(literal)
        seen.add(placeholder)
    return re.compile(expression)


def filled(name: str, numbers: Mapping[str, str]) -> str:
    """A name with its placeholders filled in."""
    return re.sub(r"\{(\w+)\}", lambda match: numbers[match[1]], name)


Axes = tuple[tuple[str, ...], ...]  # per dimension the axes that it is made of, outermost first


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: per dimension of either side, the axes that it is made of."""

    theirs: Axes
    ours: Axes

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> Pattern:
        """Parses ``"(h d) i -> i h d"``.

        Raises:
          UserError: what is not such a text, or an axis that stands on one side only or twice.
        """
        left, arrow, right = text.partition("->")
        if not arrow:
            raise UserError(f"The pattern {text!r} has no '->' between their axes and ours.")
        sides = _dimensions(left, text), _dimensions(right, text)
        flat = [[axis for dimension in side for axis in dimension] for side in sides]
        if sorted(flat[0]) != sorted(flat[1]) or len(set(flat[0])) != len(flat[0]):
            raise UserError(f"The pattern {text!r} must name every axis exactly once on each side.")
        return cls(*sides)

    def bind(self, ours: Shape, theirs: Shape | None, sizes: Mapping[str, int]) -> Binding:
        """The pattern with the sizes of all axes.

        Raises:
          UserError: the shapes do not fit each other, or a size is not known.
        """
        known = _solve(self.ours, ours, {}, "parameter")
        open_axes = {axis for dimension in self.theirs for axis in dimension} - known.keys()
        if open_axes and theirs is not None and len(theirs) == len(self.theirs):
            # The tensor itself knows best; what it says is checked against the parameter below.
            guess = _solve(self.theirs, theirs, dict(known), "tensor", check=False)
            if not open_axes - guess.keys():
                known = guess
        known.update({axis: size for axis, size in sizes.items() if axis in open_axes - known.keys()})
        known = _solve(self.ours, ours, known, "parameter")
        missing = sorted(open_axes - known.keys())
        if missing:
            raise UserError(f"the size of {', '.join(map(repr, missing))} is not known")
        binding = Binding(self, known)
        if theirs is not None and binding.their_shape != theirs:
            raise UserError(f"{theirs} where {binding.their_shape} is needed")
        return binding


@dataclass(frozen=True)
class Binding:
    """A pattern whose axes have sizes: it rearranges whole arrays and parts of them."""

    pattern: Pattern
    sizes: Mapping[str, int]

    @property
    def their_shape(self) -> Shape:
        return self._shape(self.pattern.theirs)

    @property
    def our_shape(self) -> Shape:
        return self._shape(self.pattern.ours)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their whole tensor as our parameter."""
        return self._move(array, self.pattern.theirs, self.pattern.ours)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our whole parameter as their tensor: the exact inverse."""
        return self._move(array, self.pattern.ours, self.pattern.theirs)

    def window(self, wanted: Sequence[slice]) -> tuple[Slices, Callable[[np.ndarray], np.ndarray]]:
        """What to read of their tensor for a part of our parameter.

        Args:
          wanted: per dimension of our parameter, a slice with step 1.

        Returns:
          slices of their tensor, and the function that makes our part of what they read.
        """
        ranges = {axis: (0, size) for axis, size in self.sizes.items()}
        cuts = []
        for dimension, part, size in zip(self.pattern.ours, wanted, self.our_shape, strict=True):
            low, high, _ = part.indices(size)
            cuts.append(self._restrict(dimension, low, max(low, high), ranges))
        read: list[slice] = []
        boxes: list[list[tuple[int, int]]] = []
        for dimension in self.pattern.theirs:
            span, box = self._span(dimension, ranges)
            read.append(span)
            boxes.append(box)
        order = [axis for dimension in self.pattern.theirs for axis in dimension]
        given = dict(zip(order, (one for box in boxes for one in box), strict=True))

        def rearrange(block: np.ndarray) -> np.ndarray:
            block = block.reshape([high - low for low, high in (given[axis] for axis in order)])
            inner = tuple(
                slice(ranges[axis][0] - given[axis][0], ranges[axis][1] - given[axis][0]) for axis in order
            )
            ours = [axis for dimension in self.pattern.ours for axis in dimension]
            block = block[inner].transpose([order.index(axis) for axis in ours])
            lengths = {axis: high - low for axis, (low, high) in ranges.items()}
            block = block.reshape([math.prod(lengths[axis] for axis in d) for d in self.pattern.ours])
            return block[tuple(cuts)]

        return tuple(read), rearrange

    def _restrict(
        self, dimension: tuple[str, ...], low: int, high: int, ranges: dict[str, tuple[int, int]]
    ) -> slice:
        """Narrows the axes of one of our dimensions to [low, high); returns where that lies in what is left.

        Only the outermost axis that more than one index of is needed can be cut; those inside it stay whole.
        """
        if low >= high:
            return slice(0, 0)
        for index, axis in enumerate(dimension):
            stride = math.prod(self.sizes[inner] for inner in dimension[index + 1 :])
            first, last = low // stride, (high - 1) // stride
            ranges[axis] = (first, last + 1)
            low, high = low - first * stride, high - first * stride
            if first != last:
                break
        return slice(low, high)

    def _span(
        self, dimension: tuple[str, ...], ranges: Mapping[str, tuple[int, int]]
    ) -> tuple[slice, list[tuple[int, int]]]:
        """One interval of one of their dimensions that holds the ranges, and the ranges that it then has."""
        start, box = 0, []
        for index, axis in enumerate(dimension):
            stride = math.prod(self.sizes[inner] for inner in dimension[index + 1 :])
            low, high = ranges[axis]
            start += low * stride
            box.append((low, high))
            if high - low != 1:
                box += [(0, self.sizes[inner]) for inner in dimension[index + 1 :]]
                return slice(start, start + (high - low) * stride), box
        return slice(start, start + 1), box

    def _shape(self, dimensions: Axes) -> Shape:
        return tuple(math.prod(self.sizes[axis] for axis in dimension) for dimension in dimensions)

    def _move(self, array: np.ndarray, source: Axes, target: Axes) -> np.ndarray:
        order = [axis for dimension in source for axis in dimension]
        moved = array.reshape([self.sizes[axis] for axis in order])
        moved = moved.transpose([order.index(axis) for dimension in target for axis in dimension])
        return moved.reshape(self._shape(target))


def _dimensions(side: str, text: str) -> Axes:
    found: list[tuple[str, ...]] = []
    for piece in re.findall(r"\([^()]*\)|\S+", side):
        axes = tuple(piece[1:-1].split()) if piece[0] == "(" and piece[-1] == ")" else (piece,)
        if not all(axis.isidentifier() or axis == "1" for axis in axes):
            raise UserError(f"The pattern {text!r} has {piece!r}, which is neither an axis, a group nor 1.")
        found.append(tuple(axis for axis in axes if axis != "1"))
    return tuple(found)


def _solve(
    dimensions: Axes, shape: Shape, known: dict[str, int], what: str, *, check: bool = True
) -> dict[str, int]:
    """Sizes of the axes that a shape determines: every dimension with at most one unknown axis."""
    if len(shape) != len(dimensions):
        if check:
            raise UserError(f"the {what} has {len(shape)} dimensions where {len(dimensions)} are needed")
        return known
    for dimension, size in zip(dimensions, shape, strict=True):
        unknown = [axis for axis in dimension if axis not in known]
        rest = math.prod(known[axis] for axis in dimension if axis in known)
        if len(unknown) == 1 and rest and size % rest == 0:
            known[unknown[0]] = size // rest
        elif check and ((not unknown and rest != size) or len(unknown) == 1):
            raise UserError(f"the {what} has {size} along ({' '.join(dimension)}), which cannot be")
    return known
