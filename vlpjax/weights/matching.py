"""Which tensor holds which parameter: the rules of a family applied to names and shapes, in total.

Nothing is left over: a tensor that no rule takes and a parameter that no rule gives are errors, and so is one
that two rules dispute.  All of this is known from names and shapes, before a weight is read or written.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax.core import meta

from vlpjax.errors import UserError
from vlpjax.rules import tree_names
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Binding, Rule, Shape, filled, template

SCANNED = "blocks"  # the module whose parameters are stacked by layer (vlpjax.models.stack)
MOST_NAMES = 10  # in a message


@dataclass(frozen=True)
class Member:
    """A parameter as the rules see it: of a scanned stack, one layer of it.

    Attributes:
      name: for the rules: ``"image/block_3/mlp/up/kernel"``, ``"batch_stats/..."``.
      path: of the array in the variables: ``"params/image/blocks/mlp/up/kernel"``.
      layer: index on the array's first axis, or None for the whole array.
      shape: of the layer or the whole.
    """

    name: str
    path: str
    layer: int | None
    shape: Shape


@dataclass(frozen=True)
class Piece:
    """A parameter, the tensor that holds it, and where in it.

    Attributes:
      member: the parameter.
      tensor: name of the tensor.
      rule: that joins them.
      position: of the parameter among those that a fused tensor holds; None if it holds just this one.
      binding: the rule's pattern with sizes.
    """

    member: Member
    tensor: str
    rule: Rule
    position: int | None
    binding: Binding


def members(shapes: Any) -> list[Member]:
    """All parameters of a tree of variables (arrays or shapes, boxed or not)."""
    plain = meta.unbox(shapes)
    found = []
    for path, leaf in zip(tree_names(plain), jax.tree.leaves(plain), strict=True):
        name, shape = path.removeprefix("params/"), tuple(leaf.shape)
        parts = name.split("/")
        if SCANNED in parts:
            for layer in range(shape[0]):
                layered = "/".join(f"block_{layer}" if part == SCANNED else part for part in parts)
                found.append(Member(layered, path, layer, shape[1:]))
        else:
            found.append(Member(name, path, None, shape))
    return found


def match_tensors(
    family: Family,
    parameters: Sequence[Member],
    tensors: Mapping[str, Shape],
    sizes: Mapping[str, int],
    what: str,
    fixed: Container[str] = (),
) -> list[Piece]:
    """For every parameter the tensor that holds it.

    Args:
      tensors: shapes by name.
      sizes: of axes that no parameter's shape determines.
      what: the folder or file, for messages.
      fixed: names of tensors that the module computes.

    Raises:
      UserError: tensors or parameters without a counterpart, two for one, or shapes that do not fit.
    """
    given = without_prefixes(family, tensors, what)
    pieces: list[Piece] = []
    missing: list[str] = []
    taken: dict[tuple[str, int | None], Member] = {}
    names = {member.name for member in parameters}
    for member in parameters:
        found: dict[str, tuple[Rule, int | None]] = {}
        candidates = list(_candidates(family, member, names))
        expected = [name for _, _, name in candidates]
        copied = not any(name in given for name in expected)  # only then a copy stands in
        for rule, position, name in candidates:
            source = _copy_of(family, name, given) if copied else name
            if source is not None and source in given:
                known = found.setdefault(source, (rule, position))
                if known[0].pattern != rule.pattern or known[1] != position:
                    raise UserError(
                        f"Two rules of {family.name!r} read {member.name!r} from {name!r} differently: {known[0]} and "
                        f"{rule}."
                    )
        if len(found) > 1:
            raise UserError(
                f"{what}: the tensors {_some(found)} both claim to be the parameter {member.name!r}; there must be one."
            )
        if not found:
            missing.append(
                f"{member.name} (from {_some(expected)})" if expected else f"{member.name} (no rule)"
            )
            continue
        (source, (rule, position)) = next(iter(found.items()))
        other = taken.setdefault((source, position), member)
        if other is not member:
            raise UserError(
                f"{what}: the tensor {source!r} is claimed by both {other.name!r} and {member.name!r}."
            )
        binding = _bound(rule, member, tensors[given[source]], sizes, given[source], what)
        pieces.append(Piece(member, given[source], rule, position, binding))
    used = {piece.tensor for piece in pieces}
    surplus = [
        full
        for name, full in given.items()
        if full not in used and name not in fixed and not _needless(family, name, {key for key, _ in taken})
    ]
    _check_total(family, missing, surplus, what)
    _check_whole(pieces, what)
    return pieces


def match_parameters(
    family: Family, parameters: Sequence[Member], sizes: Mapping[str, int]
) -> dict[str, list[Piece]]:
    """For every tensor that is to be written, the parameters that it holds, in their order.

    Raises:
      UserError: a parameter without a rule, or with one that does not fit its shape.
    """
    tensors: dict[str, list[Piece]] = {}
    missing = []
    names = {member.name for member in parameters}
    for member in parameters:
        first = next(_candidates(family, member, names), None)
        if first is None:
            missing.append(f"{member.name} (no rule)")
            continue
        rule, position, name = first
        binding = _bound(rule, member, None, sizes, name, f"family {family.name!r}")
        tensors.setdefault(name, []).append(Piece(member, name, rule, position, binding))
    _check_total(family, missing, [], f"family {family.name!r}")
    for pieces in tensors.values():
        if len({piece.position for piece in pieces}) != len(pieces):
            raise UserError(
                f"The rules of {family.name!r} write both {pieces[0].member.name!r} and {pieces[1].member.name!r} as "
                f"{pieces[0].tensor!r}."
            )
        pieces.sort(key=lambda piece: piece.position or 0)
    _check_whole([piece for pieces in tensors.values() for piece in pieces], f"family {family.name!r}")
    return tensors


def tied_copies(family: Family, tensors: Mapping[str, Shape], used: set[str]) -> list[tuple[str, str]]:
    """Pairs (copy, original) of tensors that should be equal, of which only the original was used."""
    given = without_prefixes(family, tensors, "the file")
    pairs = []
    for name, full in given.items():
        for copy, original in family.tied:
            match = template(copy).fullmatch(name)
            if match and full not in used:
                source = given.get(filled(original, match.groupdict()))
                if source in used and source is not None:
                    pairs.append((full, source))
    return pairs


def _candidates(
    family: Family, member: Member, names: Container[str]
) -> Iterator[tuple[Rule, int | None, str]]:
    """Rules that take a parameter of a model with these: each with the position in a fused tensor and its name."""
    for rule in family.rules:
        for position, path in enumerate(rule.paths):
            if match := template(path).fullmatch(member.name):
                numbers = match.groupdict()
                if rule.beside is not None and filled(rule.beside, numbers) not in names:
                    continue
                if rule.without is not None and filled(rule.without, numbers) in names:
                    continue
                name = filled(rule.theirs, numbers)
                yield rule, position if isinstance(rule.ours, tuple) else None, name


def _bound(
    rule: Rule, member: Member, theirs: Shape | None, sizes: Mapping[str, int], tensor: str, what: str
) -> Binding:
    try:
        return rule.bind(member.shape, theirs, sizes)
    except UserError as error:
        needed = ""
        if theirs is not None:
            try:
                needed = f" needs {rule.bind(member.shape, None, sizes).their_shape}"
            except UserError:
                needed = f" does not fit ({error})"
            raise UserError(
                f"{what}: the tensor {tensor!r} has shape {theirs}, but the parameter {member.name!r} of shape "
                f"{member.shape}{needed}; the weights and the config disagree."
            ) from error
        raise UserError(
            f"{what}: the parameter {member.name!r} of shape {member.shape} cannot be written as {tensor!r} by the "
            f"pattern {rule.pattern!r}: {error}."
        ) from error


def without_prefixes(family: Family, tensors: Mapping[str, Shape], what: str) -> dict[str, str]:
    """Names without a wrapper's prefix -> names in the file; the longest prefix that fits goes."""
    found: dict[str, str] = {}
    for full in tensors:
        prefix = max((item for item in family.prefixes if full.startswith(item)), key=len, default="")
        name = full.removeprefix(prefix)
        if name in found:
            raise UserError(f"{what} holds both {found[name]!r} and {full!r}, which are the same tensor.")
        found[name] = full
    return found


def _copy_of(family: Family, name: str, given: Mapping[str, str]) -> str | None:
    """A tensor of the file that repeats ``name``, which is not there itself."""
    for copy, original in family.tied:
        if match := template(original).fullmatch(name):
            source = filled(copy, match.groupdict())
            if source in given:
                return source
    return None


def _needless(family: Family, name: str, taken: set[str]) -> bool:
    """Whether a tensor may stay unread: it holds nothing learned, or repeats one that is read."""
    if any(re.fullmatch(expression, name) for expression in family.ignored):
        return True
    for copy, original in family.tied:
        match = template(copy).fullmatch(name)
        if match and filled(original, match.groupdict()) in taken:
            return True
    return False


def _check_total(family: Family, missing: Sequence[str], surplus: Sequence[str], what: str) -> None:
    if missing or surplus:
        told = []
        if missing:
            told.append(f"{len(missing)} parameters get no tensor: {_some(missing)}")
        if surplus:
            told.append(f"{len(surplus)} tensors belong to no parameter: {_some(surplus)}")
        raise UserError(f"{what} does not fit the architecture {family.name!r}; {'; '.join(told)}.")


def _check_whole(pieces: Sequence[Piece], what: str) -> None:
    """A fused tensor must find all of its parameters."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.position is not None:
            parts.setdefault(piece.tensor, []).append(piece)
    for tensor, held in parts.items():
        if len(held) != len(held[0].rule.paths):
            raise UserError(
                f"{what}: the tensor {tensor!r} holds {len(held[0].rule.paths)} parameters, of which the model has "
                f"only {_some([piece.member.name for piece in held])}."
            )
        if len({piece.member.shape for piece in held}) > 1:
            shapes = ", ".join(f"{piece.member.name} {piece.member.shape}" for piece in held)
            raise UserError(
                f"{what}: the tensor {tensor!r} can hold only parameters of one shape, not {shapes}."
            )


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
