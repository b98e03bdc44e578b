"""Fixtures of the weight tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.tiny import optimised
from vlpjax.weights import families


@pytest.fixture
def small_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own families, and no others.

    The table is replaced as a whole: put back entry by entry, it would have another order afterwards.
    """
    own = dict.fromkeys(("small", "small_fused", "two"), "tests.weights.small")
    monkeypatch.setattr(families, "FAMILIES", own)


@pytest.fixture(autouse=True, scope="module")
def well_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """For published weights (files that import ``real``), whose models take longer to run than to compile."""
    with optimised() if hasattr(request.module, "real") else contextlib.nullcontext():
        yield
