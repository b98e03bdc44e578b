"""Fixtures of the weight tests."""

from __future__ import annotations

import pytest

from vlpjax.weights import families


@pytest.fixture
def small_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own families, and no others.

    The table is replaced as a whole: put back entry by entry, it would have another order afterwards.
    """
    own = dict.fromkeys(("small", "small_fused", "two"), "tests.weights.small")
    monkeypatch.setattr(families, "FAMILIES", own)
