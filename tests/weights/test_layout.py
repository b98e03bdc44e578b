"""Patterns and their inverses, on whole arrays and on every part of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlpjax.errors import UserError
from vlpjax.weights.layout import Rule, filled, template, under

# pattern, our shape, their shape, the same in NumPy's words
CASES = {
    "(h d) i -> i h d": ((6, 3, 4), (12, 6), lambda x: x.reshape(3, 4, 6).transpose(2, 0, 1)),
    "(h d) -> h d": ((3, 4), (12,), lambda x: x.reshape(3, 4)),
    "d (h e) -> h e d": ((3, 4, 5), (5, 12), lambda x: x.reshape(5, 3, 4).transpose(1, 2, 0)),
    "o i -> i o": ((3, 5), (5, 3), lambda x: x.T),
    "o c p q -> (p q c) o": ((24, 5), (5, 3, 2, 4), lambda x: x.transpose(2, 3, 1, 0).reshape(24, 5)),
    "d -> 1 1 d": ((1, 1, 5), (5,), lambda x: x[None, None]),
    "1 n d -> n d": ((4, 5), (1, 4, 5), lambda x: x[0]),
    "1 ->": ((), (1,), lambda x: x[0]),
}
SIZES = {"p": 2, "q": 4, "c": 3}


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("pattern", CASES)
def test_a_pattern_says_how_axes_move_and_its_inverse_is_exact(pattern):
    ours, theirs, expected = CASES[pattern]
    binding = Rule("a", "b", pattern).bind(ours, None, SIZES)
    assert binding.their_shape == theirs
    array = numbered(theirs)
    np.testing.assert_array_equal(binding.to_ours(array), expected(array))
    np.testing.assert_array_equal(binding.to_theirs(binding.to_ours(array)), array)


@pytest.mark.parametrize("pattern", CASES)
@given(data=st.data())
def test_any_part_of_a_parameter_is_made_of_a_part_of_the_tensor(pattern, data):
    ours, theirs, expected = CASES[pattern]
    cuts = []
    for size in ours:
        low = data.draw(st.integers(0, size - 1))
        cuts.append(slice(low, data.draw(st.integers(low + 1, size))))
    array = numbered(theirs)
    source, rearrange = Rule("a", "b", pattern).bind(ours, theirs).window(cuts)
    np.testing.assert_array_equal(rearrange(array[source]), expected(array)[tuple(cuts)])


def test_without_a_pattern_the_shape_is_the_same():
    assert Rule("a", "b").bind((3, 4)).their_shape == (3, 4)
    with pytest.raises(UserError, match=r"\(4, 3\) where \(3, 4\) is needed"):
        Rule("a", "b").bind((3, 4), (4, 3))


def test_heads_of_a_fused_tensor_are_read_alone():
    rule = Rule(("query", "key", "value"), "qkv", "(n h d) i -> n i h d")
    binding = rule.bind((6, 4, 5), (60, 6))
    array = numbered((60, 6))
    keys = array.reshape(3, 4, 5, 6)[1].transpose(2, 0, 1)  # [i, h, d]
    source, rearrange = binding.window((slice(1, 2), slice(0, 6), slice(2, 4), slice(0, 5)))
    assert source == (slice(30, 40), slice(0, 6))
    np.testing.assert_array_equal(rearrange(array[source])[0], keys[:, 2:4])


def test_rows_that_others_hold_are_not_read():
    binding = Rule("a", "b", "(h d) i -> i h d").bind((8, 4, 2))
    source, _ = binding.window((slice(0, 2), slice(1, 3), slice(0, 2)))
    assert source == (slice(2, 6), slice(0, 2))


def test_patches_need_sizes_that_no_shape_of_ours_has():
    rule = Rule("a", "b", "o c p q -> (p q c) o")
    with pytest.raises(UserError, match="the size of 'c', 'p', 'q' is not known"):
        rule.bind((12, 5))
    assert rule.bind((12, 5), sizes={"p": 2, "q": 2}).their_shape == (5, 3, 2, 2)
    assert rule.bind((12, 5), (5, 3, 2, 2)).sizes["c"] == 3


def test_under_puts_prefixes_before_all_names():
    rules = under(
        "image/", "vision.", (Rule("a", "b"), Rule("batch_stats/m", "n"), Rule(("x", "y"), "z", "n -> n"))
    )
    assert [rule.paths for rule in rules] == [("image/a",), ("batch_stats/image/m",), ("image/x", "image/y")]
    assert [rule.theirs for rule in rules] == ["vision.b", "vision.n", "vision.z"]


def test_placeholders_stand_for_numbers():
    match = template("a.{n}.b{n}.{m}").fullmatch("a.12.b12.3")
    assert filled("x_{m}/y_{n}", match.groupdict()) == "x_3/y_12"
    assert template("a.{n}.b{n}").fullmatch("a.1.b2") is None
    assert template("a.{n}").fullmatch("aa1") is None  # a point is a point


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b", "i o"), "no '->'"),
        (("a", "b", "i o -> o"), "exactly once on each side"),
        (("a", "b", "i i -> i"), "exactly once on each side"),
        (("a", "b", "(i -> i"), "neither an axis, a group nor 1"),
        (("a_{n}", "b", None), "different placeholders"),
        ((("a", "b"), "c", None), "needs a pattern"),
        ((("a", "b"), "c", "o (n i) -> o n i"), "must start with 'n'"),
    ],
)
def test_a_rule_that_says_nothing_sensible_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Rule(*arguments)


@pytest.mark.parametrize("theirs", [(12,), (12, 7), (13, 6), (6, 12)])
def test_shapes_that_do_not_fit_are_refused(theirs):
    with pytest.raises(UserError):
        Rule("a", "b", "(h d) i -> i h d").bind((6, 3, 4), theirs)
