"""Rules by name: the first match wins, and a typo on either side is an error that lists names."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import struct

from vlpjax.errors import UserError
from vlpjax.rules import map_with_names, match_rules, tree_names

NAMES = ["image/norm/scale", "image/block_0/kernel", "text/kernel"]


def test_the_first_rule_that_matches_the_whole_name_wins() -> None:
    rules = [("kernel", 0), ("image/block", 0), (".*/kernel", 1), ("image/.*", 2), (".*", 3)]
    matched = match_rules(rules, NAMES, "rules", strict=False)
    assert matched == {"image/norm/scale": 2, "image/block_0/kernel": 1, "text/kernel": 1}


def test_a_value_of_none_is_a_value() -> None:
    assert match_rules([("image/.*", None), (".*", 1.0)], NAMES, "rules")["image/norm/scale"] is None


def test_a_name_without_a_rule_is_told() -> None:
    with pytest.raises(UserError, match=r"optimizer\.rules: no rule matches 'text/kernel'; .*'\.\*'"):
        match_rules([("image/.*", 1)], NAMES, "optimizer.rules")


def test_a_rule_without_a_name_is_told_with_the_names_there_are() -> None:
    with pytest.raises(UserError, match=r"'imgae/\.\*' match.*'image/norm/scale'"):
        match_rules([("imgae/.*", 1), (".*", 2)], NAMES, "rules")
    assert match_rules([("imgae/.*", 1), (".*", 2)], NAMES, "rules", strict=False)["text/kernel"] == 2


def test_a_rule_that_earlier_rules_leave_nothing_is_not_unused() -> None:
    assert set(match_rules([(".*", 1), ("text/.*", 2)], NAMES, "rules").values()) == {1}


def test_what_is_no_expression_is_told() -> None:
    with pytest.raises(UserError, match=r"rules holds '\(', which is not a regular expression"):
        match_rules([("(", 1)], NAMES, "rules")


@struct.dataclass
class Pair:
    left: object
    right: object


def test_names_are_paths_through_dicts_tuples_and_dataclasses() -> None:
    tree = {"a": Pair(left=jnp.zeros(1), right=(jnp.zeros(2), {"b": jnp.zeros(3)}))}
    assert tree_names(tree) == ["a/left", "a/right/0", "a/right/1/b"]
    assert (
        map_with_names(lambda name, leaf: f"{name}:{leaf.size}", tree)["a"].right[1]["b"] == "a/right/1/b:3"
    )
