"""Durations become steps, in whatever unit they are written."""

from __future__ import annotations

import pytest

from vlpjax.durations import Durations
from vlpjax.errors import UserError

KNOWN = Durations(batch_size=32, examples_per_epoch=1000, total_steps=250)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("800 steps", 800),
        ("1 step", 1),
        ("0 steps", 0),
        ("1_000 steps", 1000),
        ("1e3 steps", 1000),
        (" 12steps ", 12),
        ("1 epoch", 32),  # 1000 / 32 = 31.25, rounded up
        ("3 epochs", 94),
        ("0.5 epochs", 16),
        ("64 examples", 2),
        ("65 examples", 3),
        ("10%", 25),
        ("2.5 percent", 6),  # 6.25
        ("1.1%", 3),  # 2.75: to the nearest step
        ("100%", 250),
    ],
)
def test_units(duration: str, steps: int) -> None:
    assert KNOWN.steps(duration) == steps


@pytest.mark.parametrize(
    "duration", ["", "800", "steps", "3 hours", "-1 steps", "1 steps 2 epochs", "1,5 epochs", "10 %%"]
)
def test_what_is_no_duration_is_told_with_examples(duration: str) -> None:
    with pytest.raises(UserError) as caught:
        KNOWN.steps(duration, "config.duration")
    for part in ("config.duration", repr(duration), "'800 steps'", "'10%'"):
        assert part in str(caught.value)


def test_units_that_cannot_be_resolved_are_told() -> None:
    with pytest.raises(UserError, match="whole numbers"):
        KNOWN.steps("1.5 steps")
    with pytest.raises(UserError, match="does not know its length"):
        Durations(32).steps("1 epoch")
    with pytest.raises(UserError, match="share of itself"):
        Durations(32, 1000).steps("10%", "config.duration")


def test_what_is_no_point_in_time_is_not_rounded() -> None:
    assert KNOWN.exact_steps("65 examples") == 65 / 32
    assert KNOWN.exact_steps("1.5 steps") == 1.5
    assert KNOWN.exact_steps("1.1%") == pytest.approx(2.75)
