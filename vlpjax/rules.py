"""Rules by parameter name: ordered lists of (regular expression, value), of which the first match wins.

Everything that is said per parameter is said this way: what is frozen, learning-rate factors, weight decay,
what is loaded and exported.  A rule that matches nothing and a parameter that no rule takes are both errors,
because both are how a typo looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from vlpjax.errors import UserError

Rules = Sequence[tuple[str, Any]]


def tree_names(tree: Any) -> list[str]:
    """The leaves' names, such as ``"image/block_0/attention/query/kernel"``, in the order of the leaves."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_names(function: Any, tree: Any, *rest: Any, is_leaf: Any = None) -> Any:
    """``jax.tree.map`` of ``function(name, leaf, *leaves of the other trees)``."""

    def call(path: Any, *leaves: Any) -> Any:
        return function(_name(path), *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *rest, is_leaf=is_leaf)


def match_rules(rules: Rules, names: Iterable[str], what: str, *, strict: bool = True) -> dict[str, Any]:
    """For every name the value of the first rule whose expression matches all of it.

    Args:
      rules: (regular expression, value) in order of precedence.
      names: parameter names.
      what: what the rules are, for messages, such as ``"optimizer.decay_rules"``.
      strict: whether a rule that matches no name is an error.  It is for rules that a person wrote about
        this model; it is not for a rule that an earlier one leaves nothing to take, which is counted as used
        when its expression matches a name at all.

    Raises:
      UserError: a name without a rule, a rule without a name, or an invalid expression.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(
                f"{what} holds {pattern!r}, which is not a regular expression: {error}."
            ) from error
    names = list(names)
    matched: dict[str, Any] = {}
    for name in names:
        value = next((rule for rule in compiled if rule[0].fullmatch(name)), None)
        if value is not None:
            matched[name] = value[1]
    missing = [name for name in names if name not in matched]
    if missing:
        raise UserError(f"{what}: no rule matches {_some(missing)}; end the list with a rule for '.*'.")
    unused = [rule.pattern for rule, _ in compiled if not any(map(rule.fullmatch, names))]
    if strict and unused:
        raise UserError(f"{what}: {_some(unused)} match no parameter; the parameters are {_some(names, 12)}.")
    return matched


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _name(path: Sequence[Any]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
