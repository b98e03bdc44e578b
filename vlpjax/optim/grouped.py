"""Several optax directions in one optimizer, each for the parameters that rules by name give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from vlpjax.errors import UserError
from vlpjax.rules import map_with_names, match_rules, tree_names


def grouped(
    directions: Mapping[str, optax.GradientTransformation], rules: tuple[tuple[str, str], ...]
) -> optax.GradientTransformation:
    """A direction for :class:`vlpjax.optim.optimizer.Optimizer` that is made of others.

    Learning rates and weight decay of groups are said by the optimizer's own rules; frozen parameters belong to no
    group.

    Args:
      directions: per name of a group, a direction such as ``spec(optax.scale_by_lion)``.
      rules: (expression, name of a group) per parameter name, first match wins.

    Raises:
      UserError: a rule with an unknown group, a group without a rule, a rule without a parameter, or a parameter
        without a rule.
    """
    for pattern, name in rules:
        if name not in directions:
            known = ", ".join(map(repr, directions))
            raise UserError(f"grouped.rules gives {pattern!r} to {name!r}; the groups are {known}.")
    idle = [name for name in directions if name not in {group for _, group in rules}]
    if idle:
        raise UserError(f"grouped.directions has {idle[0]!r}, which no rule names.")

    def labels(tree: Any) -> Any:
        group = match_rules(rules, tree_names(tree), "grouped.rules")
        return map_with_names(lambda name, _: group[name], tree)

    return optax.multi_transform(dict(directions), labels)
