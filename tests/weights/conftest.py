"""Fixtures of the weight tests."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from vlpjax.weights import families


@pytest.fixture
def small_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own families, and no others.

    The table is replaced as a whole: put back entry by entry, it would have another order afterwards.
    """
    own = dict.fromkeys(("small", "small_fused", "two"), "tests.weights.small")
    monkeypatch.setattr(families, "FAMILIES", own)


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small models take longer to compile than to run: most of XLA's optimisations are left out.

    Not for published weights (files that import ``real``), whose models take longer to run.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not hasattr(request.module, "real"))
    yield
    jax.config.update("jax_disable_most_optimizations", before)
