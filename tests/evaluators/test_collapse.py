"""Spread and effective rank on features whose collapse is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluators.given import dataset, evaluate
from vlpjax.errors import UserError
from vlpjax.evaluators.collapse import Collapse, effective_rank, spread

RNG = np.random.default_rng(0)


def test_features_that_point_everywhere_have_a_spread_of_one_and_full_rank() -> None:
    features = RNG.normal(size=(4000, 8))
    assert spread(features) == pytest.approx(1.0, abs=0.02)
    assert effective_rank(features) == pytest.approx(8.0, abs=0.02)


def test_features_that_are_all_alike_have_none() -> None:
    features = np.tile(RNG.normal(size=(1, 8)), (50, 1))
    assert spread(features) == pytest.approx(0.0, abs=1e-7)
    assert effective_rank(features) == pytest.approx(1.0, abs=1e-6)


def test_the_effective_rank_counts_directions_of_equal_strength() -> None:
    """Collapse to a few dimensions, which the spread alone would not show."""
    features = RNG.normal(size=(4000, 3)) @ np.linalg.qr(RNG.normal(size=(8, 3)))[0].T
    assert effective_rank(features) == pytest.approx(3.0, abs=0.02)
    assert effective_rank(np.diag([1.0, 1.0, 0.0])) == pytest.approx(2.0)


def test_scale_changes_neither() -> None:
    features = RNG.normal(size=(30, 5))
    assert spread(7 * features) == pytest.approx(spread(features))
    assert effective_rank(7 * features) == pytest.approx(effective_rank(features))


def test_the_evaluator_leaves_padding_out() -> None:
    features = RNG.normal(size=(21, 5)).astype(np.float32)
    found = evaluate(Collapse(data=dataset(image=features)), 8).metrics
    assert found == {
        "spread": pytest.approx(spread(features), rel=1e-5),
        "effective_rank": pytest.approx(effective_rank(features), rel=1e-5),
    }
    with pytest.raises(UserError, match="Collapse.data is not set"):
        evaluate(Collapse())
