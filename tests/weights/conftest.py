"""Fixtures of the weight tests."""

from __future__ import annotations

import pytest

from vlpjax.weights.families import FAMILIES


@pytest.fixture
def small_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own families, and no others."""
    for name in list(FAMILIES):
        monkeypatch.delitem(FAMILIES, name)
    for name in ("small", "small_fused", "two"):
        monkeypatch.setitem(FAMILIES, name, "tests.weights.small")
